"""``clip_text``: CLIP's own embedding of the question."""

from __future__ import annotations

from typing import NoReturn

from memprof.pruning.signals import Scene, Signal


class ClipText(Signal):
    """CLIP's text embeddings of the question, ``(s, p)`` float32, one for each 77 tokens of it."""

    leads = (None,)
    of_prompt = True

    def __init__(self, scene: Scene) -> NoReturn:
        from memprof.pruning.vision import refuse_clip

        super().__init__(scene)
        refuse_clip()
