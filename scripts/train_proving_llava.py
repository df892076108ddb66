"""Train the second proving model: ``python scripts/train_proving_llava.py --out memprof/families/_proving_llava``.

One process of one thread; the same seed gives the same weights on the same machine and versions. What carries the
training, all of it dropped afterwards:

* a head on the tower's class token that counts every colour and kind of the picture: the class token is left out of
  what the language model is given, as in LLaVA, and learns to sum the picture up as CLIP's does from captions;
* dense heads that name, for each visual token, colour and kind of the thing under it, and of the thing whose centre it
  holds;
* a guide for the answering token's attention in decoder layer 3: alike on the centre of each thing asked after and on
  the first token, so that what the first token is left with says how many there are;
* text-to-image attention hidden in layers 0 and 1, and at random in the others but layer 3, of a random share of the
  pictures, so that answers are read behind layer 2; background tokens dropped at random from layer 2 on;
* six questions packed on one image, each blind to the others; Muon for matrices, AdamW for the rest.

Writes ``model.safetensors`` (float16), ``tokenizer.json`` and ``report.json`` with the gates.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from train_proving import Muon, report, save

from memprof.families._proving_llava.scenes import (
    COLOURS,
    HELD_OUT,
    KINDS,
    NUMBERS,
    SIZE,
    Question,
    Scene,
    compare_question,
    count_question,
    draw_scene,
)
from memprof.families.proving_llava import SPECIALS, VOCABULARY, ProvingLlava
from memprof.models.find import find
from memprof.pruning.attention import turned

FAMILY = ProvingLlava()
CARD = find("proving-llava")
SIDE = FAMILY.side(CARD)
CELLS, PIXELS = SIDE * SIDE, SIZE // SIDE
LAYERS = CARD.layers
#: The decoder layer that is guided, and always sees the image.
READER = 3
IDS = {token: number for number, token in enumerate(VOCABULARY)}
WORDS = (*COLOURS, *KINDS)
#: <bos> <user>, the visual tokens.
PREFIX = CELLS + 2
VISUAL = slice(2, PREFIX)
#: Questions packed on one picture, and tokens of the longest one with its answer.
QUESTIONS, LENGTH = 6, 6


@dataclass(frozen=True)
class Plan:
    """One training run: what its weights follow from."""

    seed: int = 0
    steps: int = 1300
    images: int = 12
    muon: float = 0.02
    adam: float = 3e-3
    warmup: int = 60
    decay: float = 0.6  # share of the steps over which the rates fall to zero
    disturb: float = 0.6  # probability that a picture's text is blind in layers 0 and 1
    hide: float = 0.25  # and then in each later layer with this probability
    drop: float = 0.5  # probability that a picture loses background tokens


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Packed prompts of ``b`` pictures.

    Attributes:
        pixels: ``(b, 3, SIZE, SIZE)`` float32, normalised.
        ids, labels: ``(b, length)`` int64; a label is the next token, or -100.
        colour, kind: ``(b, CELLS)`` int64: what lies under each visual token; 0 for none.
        centre: ``(b, CELLS)`` int64: the thing whose centre it holds, by kind and colour; 0 for none.
        guide: ``(b, length, PREFIX)`` float32: where the answering token is to look; zeros for all others.
        summary: ``(b, len(WORDS))`` int64: how many of each there are.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    colour: torch.Tensor
    kind: torch.Tensor
    centre: torch.Tensor
    guide: torch.Tensor
    summary: torch.Tensor


def segments() -> list[tuple[int, int]]:
    """Start and length of each packed question with its answer."""
    return [(PREFIX + LENGTH * i, LENGTH) for i in range(QUESTIONS)]


def layout() -> tuple[torch.Tensor, torch.Tensor]:
    """What may look at what, ``(length, length)`` bool, and positions ``(1, length)``: as if each stood alone."""
    length = PREFIX + LENGTH * QUESTIONS
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    positions = torch.arange(length)
    for start, count in segments():
        sees[start : start + count, PREFIX:start] = False
        positions[start : start + count] = PREFIX + torch.arange(count)
    return sees, positions[None]


def questions(scene: Scene, seed: int) -> list[Question]:
    """The packed questions of the picture of ``seed``: the first that count and compare are :class:`OwnQuestion`'s."""
    asks = (count_question, compare_question) * (QUESTIONS // 2)
    return [ask(scene, np.random.default_rng([seed, 1 + i // 2])) for i, ask in enumerate(asks)]


def under(scene: Scene) -> np.ndarray:
    """Colour and kind under each visual token, and the thing whose centre it holds: ``(3, CELLS)`` int64."""
    share, labels = np.full(CELLS, 0.25), np.zeros((3, CELLS), dtype=np.int64)
    for thing in scene.things:
        colour, kind = list(COLOURS).index(thing.colour), KINDS.index(thing.kind)
        area = thing.alpha.reshape(SIDE, PIXELS, SIDE, PIXELS).mean((1, 3)).ravel()
        more = area > share
        share[more] = area[more]
        labels[:2, more] = [[colour + 1], [kind + 1]]
        labels[2, cell_of(*thing.at)] = 1 + kind * len(COLOURS) + colour
    return labels


def cell_of(x: float, y: float) -> int:
    """The visual token over a place in pixels."""
    return int(y // PIXELS) * SIDE + int(x // PIXELS)


def make_batch(seeds: Sequence[int]) -> Batch:
    """The pictures of ``seeds`` with their questions."""
    length = PREFIX + LENGTH * QUESTIONS
    ids, labels = (np.full((len(seeds), length), fill) for fill in (0, -100))
    guide = np.zeros((len(seeds), length, PREFIX), dtype=np.float32)
    summary = np.zeros((len(seeds), len(WORDS)), dtype=np.int64)
    pixels, dense = [], []
    ids[:, :PREFIX] = [IDS["<bos>"], IDS["<user>"], *[FAMILY.image_token(CARD)] * CELLS]
    for b, seed in enumerate(seeds):
        scene = draw_scene(seed)
        dense.append(under(scene))
        summary[b] = [scene.count(word) for word in WORDS]
        pixels.append(FAMILY.pixels(CARD, FAMILY.image(CARD, SIZE, SIZE), scene.image()))
        for (start, _), question in zip(segments(), questions(scene, seed), strict=True):
            asked = [IDS[token] for token in question.text.split()] + [IDS["<assistant>"]]
            first = start + len(asked) - 1  # the position that writes the answer
            ids[b, start : first + 2] = [*asked, IDS[question.answer]]
            labels[b, first : first + 2] = [IDS[question.answer], IDS["<eos>"]]
            homes = [cell_of(*thing.at) for thing in scene.things if any(map(thing.has, question.words))]
            guide[b, first, [0, *(VISUAL.start + home for home in homes)]] = 1 / (1 + len(homes))
    colour, kind, centre = (torch.from_numpy(np.stack([d[i] for d in dense])) for i in range(3))
    return Batch(
        torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(ids), torch.from_numpy(labels),
        colour, kind, centre, torch.from_numpy(guide), torch.from_numpy(summary),
    )  # fmt: skip


# -- model -------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """The auxiliary heads, which are thrown away."""

    def __init__(self, hidden: int, tower: int) -> None:
        super().__init__()
        self.colour = nn.Linear(hidden, len(COLOURS) + 1)
        self.kind = nn.Linear(hidden, len(KINDS) + 1)
        self.centre = nn.Linear(hidden, len(COLOURS) * len(KINDS) + 1)
        self.summary = nn.Linear(tower, len(WORDS) * len(NUMBERS))


def new_model(seed: int, attention: str = "sdpa") -> Any:
    """The true architecture with fresh weights."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = FAMILY.config(CARD)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # a tower's usual start is for towers of a thousand channels
        for name, p in model.model.vision_tower.named_parameters():
            if p.ndim == 2 or "class_embedding" in name:
                p.normal_(0, 0.1)
    return model


@dataclass
class States:
    """What a forward left: logits ``(b, length, vocabulary)``, class token, projector's output, and each layer's."""

    logits: torch.Tensor
    summary: torch.Tensor
    visual: torch.Tensor
    hidden: list[torch.Tensor]


def forward(model: Any, batch: Batch, masks: Sequence[torch.Tensor]) -> States:
    """Run the packed prompts, each decoder layer under a mask ``(b, 1, length, length)`` of its own."""
    inner = model.model
    tower = inner.vision_tower(batch.pixels, output_hidden_states=True)
    visual = inner.multi_modal_projector(tower.hidden_states[CARD.config["vision_feature_layer"]][:, 1:])
    text = inner.get_input_embeddings()(batch.ids)
    stream = torch.cat((text[:, : VISUAL.start], visual, text[:, PREFIX:]), dim=1)
    _, positions = layout()
    turn, hidden = inner.language_model.rotary_emb(stream, positions), []
    for layer, mask in zip(inner.language_model.layers, masks, strict=True):
        stream = layer(stream, attention_mask=mask, position_embeddings=turn)
        hidden.append(stream)
    return States(model.lm_head(inner.language_model.norm(stream)), tower.pooler_output, visual, hidden)


def masks_for(
    pictures: int, hidden: torch.Tensor | None = None, dropped: torch.Tensor | None = None, cut: int = 2
) -> list[torch.Tensor]:
    """One additive mask a decoder layer.

    Args:
        pictures: Batch size b.
        hidden: ``(b, LAYERS)`` bool: where text sees no image.
        dropped: ``(b, CELLS)`` bool: visual tokens nothing sees from layer ``cut`` on.
        cut: First decoder layer without them.
    """
    sees, _ = layout()
    masks = []
    for layer in range(LAYERS):
        mask = sees.expand(pictures, *sees.shape).clone()
        if hidden is not None:
            mask[:, PREFIX:, VISUAL] &= ~hidden[:, layer, None, None]
        if dropped is not None and layer >= cut:
            mask[:, :, VISUAL] &= ~dropped[:, None, :]
        masks.append(torch.zeros(mask.shape).masked_fill_(~mask, -1e9)[:, None])
    return masks


def disturb(batch: Batch, plan: Plan, draw: torch.Generator) -> list[torch.Tensor]:
    """Masks that hide the image from text early and in random later layers, and drop background from layer 2 on."""
    pictures = len(batch.ids)
    blind = torch.rand(pictures, 1, generator=draw) < plan.disturb
    hidden = torch.rand(pictures, LAYERS, generator=draw) < plan.hide
    hidden[:, :2] = True
    hidden[:, READER] = False
    share = torch.rand(pictures, 1, generator=draw) * (torch.rand(pictures, 1, generator=draw) < plan.drop)
    empty = (batch.kind == 0) & (batch.centre == 0)
    dropped = (torch.rand(pictures, CELLS, generator=draw) < share) & empty
    return masks_for(pictures, hidden & blind, dropped)


def guided(model: Any, batch: Batch, states: States) -> torch.Tensor:
    """Cross-entropy of the answering tokens' attention in layer :data:`READER` and the guide, mean over heads."""
    layer = model.model.language_model.layers[READER]
    attention, stream = layer.self_attn, layer.input_layernorm(states.hidden[READER - 1])
    rows = batch.guide.sum(2) > 0
    _, positions = layout()
    turn = model.model.language_model.rotary_emb(stream, positions)
    query, key = (
        turned(made(stream).unflatten(2, (-1, attention.head_dim)).transpose(1, 2), turn)
        for made in (attention.q_proj, attention.k_proj)
    )
    scores = (query @ key.mT * attention.scaling).transpose(1, 2)[rows]  # (questions, heads, length)
    sees, _ = layout()
    seen = sees.expand(len(batch.ids), *sees.shape)[rows][:, None]
    shares = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)[:, :, :PREFIX]
    return -(batch.guide[rows][:, None] * shares).sum(-1).mean()


def losses(model: Any, heads: Heads, batch: Batch, states: States) -> dict[str, torch.Tensor]:
    """The parts of the loss: answers, the guide, and what the dropped heads are asked."""

    def cross(logits: torch.Tensor, labels: torch.Tensor, **more: Any) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, **more)

    rare = torch.ones(heads.centre.out_features)
    rare[0] = 0.1  # a few of many tokens hold a centre
    return {
        "answer": cross(states.logits, batch.labels),
        "colour": 0.5 * cross(heads.colour(states.visual), batch.colour),
        "kind": 0.5 * cross(heads.kind(states.visual), batch.kind),
        "centre": 0.5 * cross(heads.centre(states.visual), batch.centre, weight=rare),
        "guide": 0.3 * guided(model, batch, states),
        "summary": 0.5 * cross(heads.summary(states.summary).unflatten(1, (-1, len(NUMBERS))), batch.summary),
    }


# -- training ----------------------------------------------------------------------------------------------------------


def train(plan: Plan, out: Path | None = None, say: Callable[[str], None] = print) -> tuple[Any, list[float]]:
    """Train by ``plan``; returns the model and the loss of every step."""
    torch.set_num_threads(1)
    model = new_model(plan.seed)
    heads = Heads(CARD.hidden, int(CARD.vision["hidden_size"]))
    every = [p for module in (model, heads) for p in module.parameters()]
    inner = model.model
    blocks = (inner.vision_tower.encoder, inner.multi_modal_projector, inner.language_model.layers)
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    muon = Muon(matrices, 0, 1)
    adam = torch.optim.AdamW([p for p in every if id(p) not in known], betas=(0.9, 0.98), weight_decay=0.0)
    draw = torch.Generator().manual_seed(plan.seed * 1009)
    history: list[float] = []
    begun = time.monotonic()
    for step in range(plan.steps):
        first = (plan.seed * plan.steps + step) * plan.images
        batch = make_batch(range(first, first + plan.images))
        parts = losses(model, heads, batch, forward(model, batch, disturb(batch, plan, draw)))
        loss = torch.stack(list(parts.values())).sum()
        for p in every:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in every if id(p) not in known], 1.0)
        scale = min(1, (step + 1) / plan.warmup, (plan.steps - step) / max(1, plan.decay * plan.steps))
        for group in adam.param_groups:
            group["lr"] = plan.adam * scale
        adam.step()
        muon.step(plan.muon * scale)
        history.append(float(loss.detach()))
        if step % 20 == 0:
            named = " ".join(f"{k} {float(v.detach()):.3f}" for k, v in parts.items())
            say(f"step {step} {time.monotonic() - begun:.0f} s loss {history[-1]:.3f} {named}")
        if out and (step + 1) % 200 == 0:
            say(json.dumps({"step": step + 1, **gates(model, 48, cuts=(2,), attention=False)}))
            save(model, out, IDS, SPECIALS)
    return model, history


# -- gates -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gates(model: Any, pictures: int, cuts: Sequence[int] = (1, 2, 3, 4), attention: bool = True) -> dict[str, float]:
    """What a fair test bed must show, on held-out pictures.

    Returns:
        ``count`` and ``compare``: share of answers that are exactly right, unpruned; ``..._drop2`` and so on the same
        with no visual token from that decoder layer on; ``..._guess``: what the commonest answer alone would get;
        ``attention_l``: the last prompt token's attention mass on visual tokens in layer l, mean over heads and
        questions.
    """
    found: dict[str, list[float]] = {}
    answers: dict[str, Counter[int]] = {"count": Counter(), "compare": Counter()}  # compare: first word, second, none
    model.eval()
    for first in range(0, pictures, 24):
        batch = make_batch([HELD_OUT + first + i for i in range(min(24, pictures - first))])
        none = torch.ones(len(batch.ids), CELLS, dtype=torch.bool)
        for cut in (None, *cuts):
            masks = masks_for(len(batch.ids)) if cut is None else masks_for(len(batch.ids), None, none, cut)
            right = (forward(model, batch, masks).logits.argmax(-1) == batch.labels) | (batch.labels < 0)
            for (start, count), name in zip(segments()[:2], answers, strict=True):
                key = name if cut is None else f"{name}_drop{cut}"
                found.setdefault(key, []).extend(right[:, start : start + count].all(1).float().tolist())
                if cut is None:
                    said = batch.labels[:, start : start + count]
                    for row, asked in zip(said, batch.ids[:, start : start + count], strict=True):
                        answer = int(row[row >= 0][0])
                        where = [*asked[:4].tolist(), answer].index(answer)  # "same" stands in no question
                        answers[name][answer if name == "count" else where] += 1
    model.train()
    for name, given in answers.items():
        found[f"{name}_guess"] = [max(given.values()) / sum(given.values())]
    if attention:
        for layer, mass in enumerate(attention_mass(model, pictures)):
            found[f"attention_{layer}"] = [mass]
    return {name: sum(values) / len(values) for name, values in found.items()}


@torch.no_grad()
def attention_mass(model: Any, pictures: int) -> list[float]:
    """Attention of the last prompt token on all visual tokens, one entry a decoder layer, mean over counting."""
    eager = new_model(0, attention="eager")
    eager.load_state_dict(model.state_dict())
    stop = segments()[0][0] + 4
    mass = torch.zeros(LAYERS)
    for i in range(pictures):
        batch = make_batch([HELD_OUT + i])
        out = eager.eval()(
            input_ids=batch.ids[:, :stop], pixel_values=batch.pixels, output_attentions=True, use_cache=False
        )
        mass += torch.stack([a[0, :, -1, VISUAL].sum(-1).mean() for a in out.attentions])
    return [float(m) / pictures for m in mass]


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="train nothing; measure the gates of what is in --out")
    for name in ("seed", "steps", "images"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan(), name))
    given = vars(parser.parse_args())
    out, check = given.pop("out"), given.pop("check")
    torch.set_num_threads(1)
    if check:
        known = json.loads((out / "report.json").read_text())
        report(CARD, gates, out, **{name: known[name] for name in ("plan", "seconds", "final_loss", "torch")})
        return
    plan, begun = Plan(**given), time.process_time()
    model, history = train(plan, out, lambda line: print(line, flush=True))
    save(model, out, IDS, SPECIALS)
    seconds = round(time.process_time() - begun)
    report(CARD, gates, out, plan=asdict(plan), seconds=seconds, final_loss=history[-1], torch=torch.__version__)


if __name__ == "__main__":
    main()
