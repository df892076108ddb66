"""What choosing tokens asks of a card, told without one: operators dispatched and bytes, for every method at 13 tiles.

    python benchmarks/selection.py -o benchmarks/results/selection.json     # half a minute, no card
    python benchmarks/selection.py --tiles 40 --method topv                 # 10,240 tokens and more

The prompt runs through InternVL2-2B in its true width, with a few of its layers, over weights without storage. Counted
is every operator that reaches the dispatcher while the surgery works; views launch nothing on a card and are counted,
too.

choice      in the method itself and in what is worked out for it: one query's attention, the vision tower's
cut         in dropping the tokens, which is the same for every method: hidden states, positions, masks
bytes       the most that the surgery and the method held at once
room        the two widest activations of the layer before the cut, which a choice may take without the peak rising
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memprof import scopes
from memprof.bench.generate import profile_prompt
from memprof.environment import environment
from memprof.meters import meter_for
from memprof.models.build import build_model
from memprof.models.find import find
from memprof.prompts import Prompt
from memprof.pruning import METHODS, Pruner, build_pruner
from memprof.simulator.trace import Trace

MODEL, TILES, TEXT, LAYERS = "internvl2-2b", 13, 53, 4
#: The most operators a choice may dispatch at 13 tiles, unless each token chosen asks for the one before
#: (:attr:`memprof.pruning.Pruner.sequential`).
MOST = {"topv": 60, "any other": 300}


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators dispatched for pruning while it is entered: in ``select``, and apart from it."""

    def __init__(self, pruner: Pruner) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choice = self.cut = 0
        self._choosing = False
        select = pruner.select

        def watched(view: Any, kept: int) -> Any:
            self._choosing = True
            try:
                return select(view, kept)
            finally:
                self._choosing = False

        object.__setattr__(pruner, "select", watched)  # in the way of the class's own, for this one object

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it, run it."""
        scope = scopes.current()
        if scope.part == "pruner" and func.namespace != "prim":  # tensors without storage are asked for their device
            if self._choosing or scope.module in ("tower", "signals"):
                self.choice += 1
            else:
                self.cut += 1
        return func(*args, **(kwargs or {}))


class Stand:
    """InternVL2-2B in its true width without weights' storage, and a prompt of so many tiles."""

    def __init__(self, tiles: int = TILES) -> None:
        self.card = find(MODEL).but({"num_hidden_layers": LAYERS}, {"num_hidden_layers": 2})
        family = self.card.family
        self.model: Any = build_model(self.card, device="sim", dtype=self.card.dtype)
        self.meter: Any = meter_for(self.model)
        wide = {13: (1792, 1344), 3: (896, 448), 1: (448, 448)}.get(tiles, (448 * (tiles - 1), 448))
        self.prompt: Prompt = family.drawn(self.card, family.shape(self.card, *wide, TEXT, max(12, tiles - 1)))
        assert self.prompt.shape.tiles == tiles

    def tally(self, spec: str) -> dict[str, Any]:
        """What ``spec`` takes for its choices in one prefill."""
        pruner = build_pruner(spec)
        with Operators(pruner) as seen:
            profile_prompt(self.model, self.meter, pruner, "current", self.prompt, new_tokens=1)
        cuts = len(pruner.stages(self.prompt.shape.visual_tokens, LAYERS))
        row = {"cuts": cuts, "choice": seen.choice, "cut": seen.cut, "bytes": held(self.meter.trace, "pruner")}
        if pruner.sequential:
            return row | {"sequential": True}
        most = MOST.get(spec, MOST["any other"]) * cuts
        return row | ({"goal": most, "met": seen.choice <= most} if self.prompt.shape.tiles <= TILES else {})

    @property
    def room(self) -> int:
        """Bytes of two activations of the MLP, of the visual tokens."""
        return 2 * 2 * int(self.prompt.shape.visual_tokens * self.card.text["intermediate_size"])


def held(trace: Trace, part: str) -> int:
    """The most bytes that ``part`` held at once."""
    live = most = 0
    for event in trace.events:
        slot = max(event, ~event)
        if trace.parts[slot] == part:
            live += trace.nbytes[slot] if event >= 0 else -trace.nbytes[slot]
            most = max(most, live)
    return most


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it; 1 if a method is above the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="only this method; repeatable")
    parser.add_argument("--tiles", type=int, default=TILES, help="tiles of the prompt's image, 256 visual tokens each")
    parser.add_argument("-o", "--output", type=Path, help="write the table as JSON, too")
    asked = parser.parse_args(argv)
    stand = Stand(asked.tiles)
    visual = stand.prompt.shape.visual_tokens
    print(f"{visual:,} visual tokens, room {stand.room / 2**20:.1f} MiB, torch {torch.__version__}")
    print(f"{'method':24}{'cuts':>6}{'choice':>9}{'cut':>7}{'MiB':>9}")
    table = {}
    for method in asked.method or [name for name in METHODS.names() if name != "baseline"]:
        table[method] = row = stand.tally(method)
        verdict = "sequential" if "sequential" in row else {True: "met", False: "MISSED"}.get(row.get("met"), "")
        print(f"{method:24}{row['cuts']:6}{row['choice']:9}{row['cut']:7}{row['bytes'] / 2**20:9.2f}  {verdict}")
    if asked.output is not None:
        about = {"schema": 1, "status": "counted", "model": MODEL, "visual_tokens": visual, "room_bytes": stand.room}
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        found = about | {"environment": environment(), "methods": table}
        asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(row.get("met") is False for row in table.values()))


if __name__ == "__main__":
    sys.exit(main())
