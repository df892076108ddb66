"""Qwen2-VL: images of any size, 14-pixel patches, four to a token, rotary positions of time, height and width."""

from __future__ import annotations

from memprof.families._chat import Chat
from memprof.families._grids import Grids
from memprof.families._tiling import CLIP_MEAN, CLIP_STD


class Qwen2VL(Grids):
    """Qwen2-VL (Qwen)."""

    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    # The system turn (11), "<|im_start|>user\n" and "<|vision_start|>"; "<|vision_end|>" and the next one's start;
    # "<|vision_end|>", the end of the turn (2) and "<|im_start|>assistant\n".
    template = (15, 2, 6)
    normalised_by = (CLIP_MEAN, CLIP_STD)
    chat = Chat("You are a helpful assistant.", between="\n")
    pixels_taken = (56 * 56, 28 * 28 * 16384)
