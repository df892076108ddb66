"""Qwen3-VL: 16-pixel patches, four to a token; DeepStack adds what the tower's middle layers saw to early layers."""

from __future__ import annotations

from memprof.families._chat import Chat
from memprof.families._grids import Grids


class Qwen3VL(Grids):
    """Qwen3-VL (Qwen), with one feed-forward network a layer or a mixture of experts."""

    title = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    # "<|im_start|>user\n" and "<|vision_start|>"; no system turn.
    template = (4, 2, 6)
    normalised_by = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    chat = Chat(None, between="\n")
    pixels_taken = (256 * 256, 4096 * 4096)
