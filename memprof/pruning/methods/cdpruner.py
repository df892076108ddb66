"""CDPruner: keep tokens that differ from each other and suit the question, before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View

#: A gain below this share of what a token had to give at first is a rounding error of float32.
_NOTHING = 1e-6


@dataclass(frozen=True)
class CDPruner(OneCut):
    """Greedy choice of the most likely subset of a determinantal point process, conditioned on the question.

    The kernel is ``q_i cos(x_i, x_j) q_j`` of projected features x and relevance q. Each step takes the token with the
    largest gain and takes out of all others what it explains (code, ``LlavaMetaForCausalLM.encode_images``; fast greedy
    MAP of Chen et al., arXiv:1709.05135). Steps follow one another, one a token.

    ``relevance=clip`` is the published one: MINUS the mean cosine of CLIP's embedding of the patch and CLIP's text
    embeddings of the question (the paper has no minus; the code does, and its author saw that only with CLIP), from 0
    to 1 over the picture, plus 1e-6 over its span. No model that memprof knows brings CLIP's text tower (0.23 GiB in
    half precision) and projections, and it is refused there. ``relevance=question``, the default, is memprof's choice
    for them: the mean cosine of the projected token and the embeddings of the text behind the image, with its own sign,
    scaled alike. ``relevance=none`` conditions on nothing.

    Beyond the features' rank the code divides rounding errors by each other, ends in NaN and takes tokens twice. Here a
    gain that is nothing but rounding (below 1e-6 of the token's first) explains nothing more, and no token is taken
    twice: the remaining places go to what still has the largest gain.
    """

    title = "CDPruner"
    paper = "CDPruner, NeurIPS 2025, arXiv:2506.10967"
    reference = "Theia-4869/CDPruner, LlavaMetaForCausalLM.encode_images"
    departs = "relevance from the model's own text embeddings, not CLIP's; the kernel a row at a time, never whole"
    sequential = True
    layer: int = setting(0, "decoder layers that still see every token", origin="paper", ge=0)
    relevance: str = setting(
        "question",
        "what conditions the choice: the question's embeddings, CLIP's text tower, or nothing",
        origin="memprof",
        choices=("question", "clip", "none"),
    )
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """The tokens, and what the question says of them."""
        asked = {"question": {"question"}, "clip": {"clip_image", "clip_text"}, "none": set[str]()}
        return frozenset({"source"} | asked[self.relevance])

    def select(self, view: View, kept: int) -> torch.Tensor:
        """``kept`` tokens, in the order they were chosen."""
        import torch

        from memprof.pruning.pairs import lengths

        unit = view.source / lengths(view.source)[:, None]
        relevance = self.relevance_of(view)
        gains = relevance.square() * unit.square().sum(1)
        nothing = gains * _NOTHING
        explained = unit.new_zeros((kept, view.count))
        chosen: list[torch.Tensor] = []
        for step in range(kept):
            best = gains.argmax(0, keepdim=True)
            chosen.append(best)
            gain = gains.index_select(0, best)
            row = torch.mv(unit, unit.index_select(0, best)[0]).mul_(relevance).mul_(relevance.index_select(0, best))
            if step:
                row -= explained[:step].index_select(1, best)[:, 0] @ explained[:step]
            row = torch.where(gain > nothing.index_select(0, best), row / gain.sqrt(), 0.0)
            explained[step] = row
            gains = gains.sub_(row.square()).index_fill_(0, best, -torch.inf)
        return torch.cat(chosen)

    def relevance_of(self, view: View) -> torch.Tensor:
        """How much each token has to do with the question, ``(n,)`` float32, positive."""
        import torch

        if self.relevance == "none":
            return torch.ones(view.count, device=view.device)
        if self.relevance == "question":
            return _scaled(_unit(view.source) @ view.question)
        return _scaled((_unit(view.clip_image) @ _unit(view.clip_text).T).neg().mean(1))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    from memprof.pruning.pairs import lengths

    return rows / lengths(rows)[:, None]


def _scaled(values: torch.Tensor) -> torch.Tensor:
    """From 0 to 1, and 1e-6 over the span more, so that none is zero (code)."""
    low, high = values.aminmax()
    return (values - low + 1e-6) / (high - low).clamp(min=1e-12)
