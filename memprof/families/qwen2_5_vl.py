"""Qwen2.5-VL: Qwen2-VL's images through a tower that looks through windows of 112 pixels in most of its layers."""

from __future__ import annotations

from memprof.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (Qwen)."""

    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    searched_images = searched_prompts = 8

    def kind(self, across: int, down: int) -> int:
        """Its own: the tower goes through as many windows as a grid has, each of its own size at the edges."""
        return across << 16 | down
