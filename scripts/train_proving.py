"""Train the proving model from scratch: ``python scripts/train_proving.py --out memprof/families/_proving``.

Two single-thread processes share each batch and average their gradients (gloo). The same seed gives the same weights on
the same machine and versions. What carries the training, all of it dropped afterwards:

* dense heads that name, for each visual token, its ink and place in the string (after the projector) and its character
  (after decoder layer 2, so that layers before it have little to read);
* a head that locates, after decoder layer 1, the character to be written next: layer 1 learns to look at the image;
* text-to-image attention hidden in random subsets of all layers, background tokens dropped at random from layer 2 on;
* Muon for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon; here in float32), AdamW for the rest;
* two questions packed on one image, each blind to the other. That the last character alone can be asked for, with the
  others given, needs no training of its own: it is the end of reading a string.

Writes ``model.safetensors`` (float16), ``tokenizer.json`` and ``report.json`` with the gates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from memprof.families import Model
from memprof.families._proving.drawing import (
    CHARACTERS,
    HELD_OUT,
    INKS,
    LENGTHS,
    SIZE,
    Question,
    Scene,
    draw_scene,
    read_question,
)
from memprof.families.proving import SPECIALS, VOCABULARY, Proving
from memprof.models.find import find

#: Measures a model on so many held-out pictures: numbers by name.
Gates = Callable[[Any, int], dict[str, float]]
FAMILY = Proving()
CARD = find("proving")
SIDE = FAMILY.side(CARD)
CELLS, PIXELS = SIDE * SIDE, SIZE // SIDE
LAYERS = CARD.layers
#: Decoder layers whose output the locating and the character head read.
LOCATE, NAME = 1, 2
#: Layers that read characters: one of them always sees the image.
READERS = range(NAME + 1, LAYERS)
IDS = {token: number for number, token in enumerate(VOCABULARY)}
#: <bos> <img>, the visual tokens, </img>.
PREFIX = CELLS + 3


@dataclass(frozen=True)
class Plan:
    """One training run: what its weights follow from."""

    seed: int = 0
    steps: int = 2000
    images: int = 16
    world: int = 2
    muon: float = 0.02
    adam: float = 3e-3
    warmup: int = 60
    decay: float = 0.5  # share of the steps over which the rates fall to zero
    disturb: float = 0.4  # probability that a picture's text is blind in some layers
    hide: float = 0.3  # and then in each of them with this probability
    drop: float = 0.5  # probability that a picture loses background tokens


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Packed prompts of ``b`` pictures.

    Attributes:
        pixels: ``(b, 3, SIZE, SIZE)`` float32, normalised.
        ids, labels: ``(b, length)`` int64; a label is the next token, or -100.
        ink, place, character: ``(b, CELLS)`` int64: what lies under each visual token; 0 for none.
        locate: ``(b, length)`` int64: the visual token under the character to be written next, or -100.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    ink: torch.Tensor
    place: torch.Tensor
    character: torch.Tensor
    locate: torch.Tensor


def segments() -> list[tuple[int, int]]:
    """Start and length of each packed question with its answer: one for each line of the picture."""
    length = 2 + LENGTHS[1]
    return [(PREFIX, length), (PREFIX + length, length)]


def layout() -> tuple[torch.Tensor, torch.Tensor]:
    """What may look at what, ``(length, length)`` bool, and positions ``(1, length)``: as if each stood alone."""
    length = sum(segments()[-1])
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    positions = torch.arange(length)
    for start, count in segments():
        sees[start : start + count, PREFIX:start] = False
        positions[start : start + count] = PREFIX + torch.arange(count)
    return sees, positions[None]


def questions(scene: Scene) -> list[Question]:
    """The packed questions of one picture."""
    return [read_question(scene, line) for line in (0, 1)]


def under(scene: Scene) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ink, place and character under each visual token ``(3, CELLS)``, and the token of each character, by line."""
    share, labels, homes = np.full(CELLS, PIXELS * PIXELS / 5), np.zeros((3, CELLS), dtype=np.int64), []
    edges = np.arange(SIDE) * PIXELS
    for line in scene.lines:
        home = np.zeros(len(line.text), dtype=np.int64)
        for k, (left, top, right, bottom) in enumerate(line.boxes):
            across = (np.minimum(edges + PIXELS, right) - np.maximum(edges, left)).clip(0)
            down = (np.minimum(edges + PIXELS, bottom) - np.maximum(edges, top)).clip(0)
            area = np.outer(down, across).ravel()
            home[k] = area.argmax()
            more = area > share
            share[more] = area[more]
            what = (list(INKS).index(line.ink), k, CHARACTERS.index(line.text[k]))
            labels[:, more] = np.array(what)[:, None] + 1
        homes.append(home)
    return labels, homes


def make_batch(seeds: Sequence[int]) -> Batch:
    """The pictures of ``seeds`` with their questions."""
    length = sum(segments()[-1])
    ids, labels, locate = (np.full((len(seeds), length), fill) for fill in (0, -100, -100))
    pixels, dense = [], []
    ids[:, :PREFIX] = [IDS["<bos>"], IDS["<img>"], *[FAMILY.image_token(CARD)] * CELLS, IDS["</img>"]]
    for b, seed in enumerate(seeds):
        scene = draw_scene(seed)
        cells, homes = under(scene)
        pixels.append(FAMILY.pixels(CARD, FAMILY.image(CARD, SIZE, SIZE), scene.image()))
        dense.append(cells)
        for (start, _), question in zip(segments(), questions(scene), strict=True):
            asked = question.text.split()
            answer = [IDS[c] for c in question.answer] + [IDS["<eos>"]]
            first = start + len(asked) - 1  # the position that writes the answer's first token
            ids[b, start : first + 1] = [IDS[token] for token in asked]
            ids[b, first + 1 : first + len(answer)] = answer[:-1]
            labels[b, first : first + len(answer)] = answer
            home = homes[question.line][: len(answer) - 1]
            locate[b, first : first + len(home)] = home
    ink, place, character = (torch.from_numpy(np.stack([d[i] for d in dense])) for i in range(3))
    return Batch(
        torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(ids), torch.from_numpy(labels),
        ink, place, character, torch.from_numpy(locate),
    )  # fmt: skip


# -- model -------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """The auxiliary heads, which are thrown away."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ink = nn.Linear(hidden, len(INKS) + 1)
        self.place = nn.Linear(hidden, LENGTHS[1] + 1)
        self.character = nn.Linear(hidden, len(CHARACTERS) + 1)
        self.locate = nn.Linear(hidden, CELLS)


def new_model(seed: int, attention: str = "sdpa") -> Any:
    """The true architecture with fresh weights."""
    from transformers import InternVLForConditionalGeneration

    torch.manual_seed(seed)
    config = FAMILY.config(CARD)
    config._attn_implementation = attention
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        vision = model.model.vision_tower
        vision.embeddings.position_embeddings.normal_(0, 0.1)
    return model


@dataclass
class States:
    """What a forward left: logits ``(b, length, vocabulary)``, the projector's output, and each layer's."""

    logits: torch.Tensor
    visual: torch.Tensor
    hidden: list[torch.Tensor]


def forward(model: Any, batch: Batch, masks: Sequence[torch.Tensor]) -> States:
    """Run the packed prompts, each decoder layer under a mask ``(b, 1, length, length)`` of its own."""
    inner = model.model
    visual = inner.get_image_features(pixel_values=batch.pixels).pooler_output
    text = inner.get_input_embeddings()(batch.ids)
    stream = torch.cat((text[:, :2], visual, text[:, 2 + CELLS :]), dim=1)
    _, positions = layout()
    turn, hidden = inner.language_model.rotary_emb(stream, positions), []
    for layer, mask in zip(inner.language_model.layers, masks, strict=True):
        stream = layer(stream, attention_mask=mask, position_embeddings=turn)
        hidden.append(stream)
    return States(model.lm_head(inner.language_model.norm(stream)), visual, hidden)


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
            mask[:, 2 + CELLS :, 2 : 2 + CELLS] &= ~hidden[:, layer, None, None]
        if dropped is not None and layer >= cut:
            mask[:, :, 2 : 2 + CELLS] &= ~dropped[:, None, :]
        masks.append(torch.zeros(mask.shape).masked_fill_(~mask, -1e9)[:, None])
    return masks


def disturb(batch: Batch, plan: Plan, draw: torch.Generator) -> list[torch.Tensor]:
    """Masks that hide the image from text in random layers, and drop background tokens from layer 2 on."""
    pictures = len(batch.ids)
    hidden = torch.rand(pictures, LAYERS, generator=draw) < plan.hide
    spared = READERS.start + torch.randint(len(READERS) - 1, (pictures,), generator=draw)
    hidden[torch.arange(pictures), spared] = False
    hidden &= torch.rand(pictures, 1, generator=draw) < plan.disturb
    share = torch.rand(pictures, 1, generator=draw) * (torch.rand(pictures, 1, generator=draw) < plan.drop)
    dropped = (torch.rand(pictures, CELLS, generator=draw) < share) & (batch.character == 0)
    return masks_for(pictures, hidden, dropped)


def losses(heads: Heads, batch: Batch, states: States) -> dict[str, torch.Tensor]:
    """The parts of the loss: answers, and what the dropped heads are asked."""

    def cross(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    seen = states.hidden[NAME][:, 2 : 2 + CELLS]
    at = batch.locate >= 0
    return {
        "answer": cross(states.logits, batch.labels),
        "ink": 0.5 * cross(heads.ink(states.visual), batch.ink),
        "place": 0.5 * cross(heads.place(states.visual), batch.place),
        "character": cross(heads.character(seen), batch.character),
        "locate": 0.3 * F.cross_entropy(heads.locate(states.hidden[LOCATE][at]), batch.locate[at]),
    }


# -- optimisers --------------------------------------------------------------------------------------------------------


class Muon:
    """Momentum whose steps are made orthogonal, matrix by matrix; each rank does its share of the matrices.

    Args:
        matrices: Parameters of two dimensions.
        rank, world: This process, and how many there are.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        shapes = sorted({tuple(sorted(p.shape)) for p in matrices})
        self._groups = [[p for p in matrices if tuple(sorted(p.shape)) == shape] for shape in shapes]
        self._momentum = {p: torch.zeros_like(p) for p in matrices}

    @torch.no_grad()
    def step(self, rate: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        """One update, ``rate`` long in each direction; wide matrices are scaled as Jordan's code scales them."""
        steps = []
        for group in self._groups:
            stack = torch.stack([self._nesterov(p, momentum) for p in group])
            done = torch.zeros_like(stack)
            done[self._rank :: self._world] = orthogonal(stack[self._rank :: self._world])
            steps.append(done)
        flat = torch.cat([s.flatten() for s in steps])
        if self._world > 1:
            dist.all_reduce(flat)
        parts = flat.split([s.numel() for s in steps])
        for group, stack, part in zip(self._groups, steps, parts, strict=True):
            for p, step in zip(group, part.view_as(stack), strict=True):
                tall = p.shape[0] > p.shape[1]
                p.mul_(1 - rate * decay).sub_(
                    step.T if tall else step, alpha=rate * max(1, p.shape[0] / p.shape[1]) ** 0.5
                )

    def _nesterov(self, p: nn.Parameter, momentum: float) -> torch.Tensor:
        assert p.grad is not None
        kept = self._momentum[p].lerp_(p.grad, 1 - momentum)
        step = p.grad.lerp(kept, momentum)
        return step.T if p.shape[0] > p.shape[1] else step


def orthogonal(stack: torch.Tensor, passes: int = 5) -> torch.Tensor:
    """Each ``(m, n)`` matrix of ``stack``, m <= n, with its singular values brought near 1 (Newton-Schulz, quintic)."""
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(passes):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


# -- training ----------------------------------------------------------------------------------------------------------


def train(
    plan: Plan, rank: int = 0, out: Path | None = None, say: Callable[[str], None] = print
) -> tuple[Any, list[float]]:
    """Train by ``plan``; returns the model and the loss of every step. Call it in each of ``plan.world`` processes."""
    torch.set_num_threads(1)
    model = new_model(plan.seed)
    heads = Heads(CARD.hidden)
    every = [p for module in (model, heads) for p in module.parameters()]
    inner = model.model
    blocks = (inner.vision_tower.encoder, inner.multi_modal_projector, inner.language_model.layers)
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    muon = Muon(matrices, rank, plan.world)
    adam = torch.optim.AdamW([p for p in every if id(p) not in known], betas=(0.9, 0.98), weight_decay=0.0)
    draw = torch.Generator().manual_seed(plan.seed * 1009 + rank)
    share = plan.images // plan.world
    history: list[float] = []
    begun = time.monotonic()
    for step in range(plan.steps):
        first = (plan.seed * plan.steps + step) * plan.images + rank * share
        batch = make_batch(range(first, first + share))
        parts = losses(heads, batch, forward(model, batch, disturb(batch, plan, draw)))
        loss = torch.stack(list(parts.values())).sum()
        for p in every:
            p.grad = None
        loss.backward()
        shown = torch.stack([loss, *parts.values()]).detach()
        average([*(p.grad for p in every if p.grad is not None), shown], plan.world)
        nn.utils.clip_grad_norm_([p for p in every if id(p) not in known], 1.0)
        scale = min(1, (step + 1) / plan.warmup, (plan.steps - step) / max(1, plan.decay * plan.steps))
        for group in adam.param_groups:
            group["lr"] = plan.adam * scale
        adam.step()
        muon.step(plan.muon * scale)
        history.append(float(shown[0]))
        if rank == 0 and step % 20 == 0:
            named = " ".join(f"{k} {v:.3f}" for k, v in zip(parts, shown[1:].tolist(), strict=True))
            say(f"step {step} {time.monotonic() - begun:.0f} s loss {history[-1]:.3f} {named}")
        if out and rank == 0 and (step + 1) % 200 == 0:
            say(json.dumps({"step": step + 1, **gates(model, 48, cuts=(), attention=False)}))
            save(model, out, IDS, SPECIALS)
    return model, history


def average(tensors: Sequence[torch.Tensor], world: int) -> None:
    """The mean over processes, in place, in one message."""
    if world == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, (flat / world).split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


# -- gates -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gates(model: Any, pictures: int, cuts: Sequence[int] = (1, 2, 3, 4), attention: bool = True) -> dict[str, float]:
    """What a fair test bed must show, on held-out pictures.

    Returns:
        ``read`` and ``last``: share of strings, and of last characters with the others given, that are exactly right,
        unpruned; ``..._drop2`` and so on the same with no visual token from that decoder layer on;
        ``attention_l``: the last prompt token's attention mass on visual tokens in layer l, mean over heads and
        questions.
    """
    found: dict[str, list[float]] = {}
    model.eval()
    for first in range(0, pictures, 24):
        batch = make_batch([HELD_OUT + first + i for i in range(min(24, pictures - first))])
        none = torch.ones(len(batch.ids), CELLS, dtype=torch.bool)
        for cut in (None, *cuts):
            masks = masks_for(len(batch.ids)) if cut is None else masks_for(len(batch.ids), None, none, cut)
            right = (forward(model, batch, masks).logits.argmax(-1) == batch.labels) | (batch.labels < 0)
            for start, count in segments():
                mine, end = right[:, start : start + count], batch.labels[:, start : start + count] == IDS["<eos>"]
                last = mine | ~(end | end.roll(-1, 1))  # the last character, and that nothing follows it
                for name, score in (("read", mine.all(1)), ("last", last.all(1))):
                    key = name if cut is None else f"{name}_drop{cut}"
                    found.setdefault(key, []).extend(score.float().tolist())
    model.train()
    if attention:
        for layer, mass in enumerate(attention_mass(model, pictures)):
            found[f"attention_{layer}"] = [mass]
    return {name: sum(values) / len(values) for name, values in found.items()}


@torch.no_grad()
def attention_mass(model: Any, pictures: int) -> list[float]:
    """Attention of the last prompt token on all visual tokens, one entry a decoder layer, mean over read questions."""
    eager = new_model(0, attention="eager")
    eager.load_state_dict(model.state_dict())
    stop = segments()[0][0] + 2
    mass = torch.zeros(LAYERS)
    for i in range(pictures):
        batch = make_batch([HELD_OUT + i])
        out = eager.eval()(
            input_ids=batch.ids[:, :stop], pixel_values=batch.pixels, output_attentions=True, use_cache=False
        )
        mass += torch.stack([a[0, :, -1, 2 : 2 + CELLS].sum(-1).mean() for a in out.attentions])
    return [float(m) / pictures for m in mass]


# -- files -------------------------------------------------------------------------------------------------------------


def save(model: Any, out: Path, ids: Mapping[str, int], specials: Sequence[str]) -> None:
    """Write what memprof ships: weights in float16, and the tokenizer of ``ids``."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file({k: v.detach().half().contiguous() for k, v in model.state_dict().items()}, weights)
    weights.chmod(0o644)  # safetensors lets nobody else read it
    (out / "tokenizer.json").write_text(tokenizer(ids, specials))


def report(card: Model, gates: Gates, out: Path, pictures: int = 400, **made: Any) -> None:
    """Write ``report.json``: the ``gates`` of the weights as saved, in half precision, and how they were ``made``."""
    from memprof.models.checkpoint import load_checkpoint

    model: Any = load_checkpoint(card, str(out), device="cpu", dtype="float32", attention="sdpa")
    made |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_pictures": pictures,
        "gates": {name: round(value, 4) for name, value in gates(model, pictures).items()},
    }
    (out / "report.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made), flush=True)


def tokenizer(ids: Mapping[str, int], specials: Sequence[str]) -> str:
    """A ``tokenizer.json``: lower-case words and single characters, by ``ids``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split(Regex(r"[a-z]+|."), "isolated")]
    )
    words.decoder = decoders.Fuse()
    words.add_special_tokens(list(specials))
    return str(words.to_str(pretty=True))


def work(rank: int, plan: Plan, out: Path, meeting: str) -> None:
    """One process of a training run."""
    if plan.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.world)
    begun = time.monotonic()
    model, history = train(plan, rank, out, lambda line: print(line, flush=True))
    if rank == 0:
        save(model, out, IDS, SPECIALS)
        seconds = round(time.monotonic() - begun)
        report(CARD, gates, out, plan=asdict(plan), seconds=seconds, final_loss=history[-1], torch=torch.__version__)
    if plan.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="train nothing; measure the gates of what is in --out")
    for name in ("seed", "steps", "images", "world"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan(), name))
    given = vars(parser.parse_args())
    out, check = given.pop("out"), given.pop("check")
    if check:
        torch.set_num_threads(1)
        known = json.loads((out / "report.json").read_text())
        report(CARD, gates, out, **{name: known[name] for name in ("plan", "seconds", "final_loss", "torch")})
        return
    plan = Plan(**given)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (plan, out, f"{folder}/meeting")
        if plan.world == 1:
            work(0, *arguments)
        else:
            torch.multiprocessing.spawn(work, arguments, plan.world)


if __name__ == "__main__":
    main()
