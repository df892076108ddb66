"""``images``: which image each token belongs to."""

from __future__ import annotations

from memprof.pruning.signals import Signal


class Images(Signal):
    """Number of the image each token belongs to, ``(n,)`` int64. Always there: the surgery reads it off the layout."""

    of_prompt = True
