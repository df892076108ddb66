"""``clip_image``: CLIP's own embedding of each token's patch."""

from __future__ import annotations

from typing import NoReturn

from memprof.pruning.signals import Scene, Signal


class ClipImage(Signal):
    """CLIP's image embedding of each patch, ``(n, p)`` float32: post-layernorm, then the visual projection."""

    of_prompt = True

    def __init__(self, scene: Scene) -> NoReturn:
        from memprof.pruning.vision import refuse_clip

        super().__init__(scene)
        refuse_clip()
