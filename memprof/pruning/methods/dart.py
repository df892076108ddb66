"""DART: keep the tokens least alike to a few pivots, before a decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut, Stage, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class DART(OneCut):
    """A few pivots, and for each of them the tokens that duplicate it least.

    Pivots are the ``image_pivots`` visual tokens and the ``text_pivots`` tokens of the text behind the image whose keys
    in the layer before the cut have the largest L1 norm, rotary applied and all heads together. Each in turn takes the
    tokens still free with the LOWEST cosine to it, of that layer's output behind the model's final norm (code,
    ``DART.get_retained_image_token``). Each takes ``int(n * keep / pivots)``, and the visual pivots stay as well, so
    that a budget of 192 keeps 196. Nothing is random; the paper's random pivots are not in the code.

    The turns matter, and in the code they are the order of a Python set of places in the prompt, a matter of its
    hashing. memprof's turns are by falling norm, visual pivots first. Where there are fewer text tokens than pivots
    asked for, those there are share the budget.
    """

    title = "DART"
    paper = "DART, EMNLP 2025, arXiv:2502.11494"
    reference = "ZichenWen1/DART, DART.get_retained_image_token (as in VTC-Bench)"
    departs = "pivots in turn by falling norm, not in a Python set's order; cosines in float32"
    image_pivots: int = setting(4, "visual tokens that are pivots", origin="code", ge=1)
    text_pivots: int = setting(4, "text tokens that are pivots", origin="code", ge=0)
    positions: str = positions_setting("original", "code")

    @property
    def needs(self) -> frozenset[str]:
        """Normed outputs and sizes of keys, of the visual tokens and of the text behind them."""
        return frozenset({"normed", "normed_text", "key_norms", "text_key_norms"})

    def cut(self, n_visual: int, budget: int) -> Stage:
        """The visual pivots, and a whole number of tokens for each pivot."""
        del budget
        pivots = self.image_pivots + self.text_pivots
        each = int(n_visual * self.keep / pivots + 1e-9)  # a budget over n, times n, is to be that budget
        return Stage(self.layer, min(n_visual, self.image_pivots + each * pivots))

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The visual pivots, then each pivot's picks."""
        import torch

        image, text = self.pivots(view, kept)
        turns = [*(view.normed.index_select(0, image)), *(view.normed_text.index_select(0, text))]
        each, more = divmod(kept - len(image), len(turns))
        picks = picked(view.normed, image, turns, [each + (i < more) for i in range(len(turns))])
        return torch.cat((image, *picks))

    def pivots(self, view: View, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual pivots, and text pivots counted from the first token behind the image, by falling norm."""
        image = min(self.image_pivots, kept)
        text = min(self.text_pivots, len(view.text_key_norms))
        return view.key_norms.topk(image).indices, view.text_key_norms.topk(text).indices


def picked(
    tokens: torch.Tensor, taken: torch.Tensor, turns: Sequence[torch.Tensor], counts: Sequence[int]
) -> list[torch.Tensor]:
    """What each of ``turns`` picks of ``tokens`` ``(n, hidden)``, the least alike first.

    Args:
        tokens: The visual tokens.
        taken: Those that are not free from the start.
        turns: The pivots in turn, ``(hidden,)`` each.
        counts: How many each picks.
    """
    import torch

    from memprof.pruning.pairs import dots, lengths

    pivots = torch.stack(list(turns))
    alike = dots(pivots, tokens) / lengths(pivots)[:, None] / lengths(tokens)
    alike.index_fill_(1, taken, torch.inf)
    picks = []
    for row, count in enumerate(counts):
        picks.append(alike[row].topk(count, largest=False).indices)
        alike.index_fill_(1, picks[-1], torch.inf)
    return picks
