"""``positions``: where each token lies."""

from __future__ import annotations

from memprof.pruning.signals import Signal


class Positions(Signal):
    """Centre of each token on its image, ``(n, 2)`` float32, x and y in units of the image's edges.

    Always there: the surgery reads it off the layout. A merged token lies where the token lies that it stands behind.
    """

    of_prompt = True
