"""TopV's share of prefill time on the CPU, at the true width of InternVL2-2B.

The model is built with few layers: a decoder layer before the cut, one behind it and a vision layer are each timed in
the same prefill as the selection, and their times are multiplied by the true depth. What stands outside the layers
(embeddings, projector, head, generate()'s own work) is left out of prefill, which makes the share look larger, not
smaller. Times are CPU seconds, the least of the repeats, so that a share depends little on who else uses the machine.

    python benchmarks/topv_share.py                     # 1, 3 and 13 tiles, float32
    python benchmarks/topv_share.py --tiles 1 --dtype bfloat16 --method topv:features=l2
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import defaultdict
from typing import Any

import torch

from memprof.anatomy import anatomy
from memprof.bench.generate import place
from memprof.models.build import build_model
from memprof.models.find import find
from memprof.pruning import build_pruner
from memprof.pruning.surgery import Surgery

#: Width and height of an image that InternVL cuts into so many tiles, thumbnail included.
SIZES = {1: (448, 448), 3: (896, 448), 7: (1344, 896), 13: (1792, 1344)}


def main() -> int:
    """Print one row a number of tiles; 1 if a share is above ``--most``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 3, 13], choices=sorted(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--method", default="topv")
    parser.add_argument("--repeats", type=int, default=3, help="prefills timed, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="more than one counts their waiting for each other, too")
    parser.add_argument("--most", type=float, default=0.02, help="largest share that passes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    card = find("internvl2-2b")

    family = card.family
    depth, tower_depth = (int(part["num_hidden_layers"]) for part in (card.text, card.vision))
    pruner: Any = build_pruner(args.method)
    few = pruner.layer + 1
    small = card.but(text={"num_hidden_layers": few}, vision={"num_hidden_layers": 1})
    model: Any = build_model(small, device="cpu", dtype=args.dtype)
    watch = Watch(pruner)
    layers = [layer for _, layer in anatomy(model).layers]
    watch.time("before", layers[0])
    watch.time("behind", layers[-1])
    watch.time("vision", model.model.vision_tower.encoder.layer[0])

    print(f"{args.method}, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}; CPU ms")
    print("tiles visual vision layer before cut behind cut   prefill   select  share")
    worst = 0.0
    for tiles in args.tiles:
        prompt = small.family.drawn(small, family.shape(small, *SIZES[tiles], 50, 12))
        assert prompt.shape.tiles == tiles
        for repeat in range(args.repeats + 1):
            if repeat == 1:
                watch.seconds.clear()  # the first one warmed up
            with Surgery(model, watch.pruner, prompt.places), torch.no_grad():
                model(**place(prompt, model), logits_to_keep=1)
        ms = {name: 1e3 * min(times) for name, times in watch.seconds.items()}
        prefill = (
            tower_depth * ms["vision"]
            + pruner.layer * ms["before"]
            + (depth - pruner.layer) * ms["behind"]
            + ms["select"]
        )
        share = ms["select"] / prefill
        worst = max(worst, share)
        print(
            f"{tiles:5} {prompt.shape.visual_tokens:6} {ms['vision']:12.1f} {ms['before']:10.1f} {ms['behind']:10.1f} "
            f"{prefill:9.0f} {ms['select']:8.1f} {share:6.2%}"
        )
    return int(worst > args.most)


class Watch:
    """CPU seconds of modules, and of ``pruner``'s choice."""

    def __init__(self, pruner: Any) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        seconds = self.seconds

        class Timed(type(pruner)):  # type: ignore[misc]
            def select(self, view: Any, kept: int) -> torch.Tensor:
                start = time.process_time()
                chosen: torch.Tensor = super().select(view, kept)
                seconds["select"].append(time.process_time() - start)
                return chosen

        self.pruner = Timed(**{f.name: getattr(pruner, f.name) for f in dataclasses.fields(pruner)})

    def time(self, name: str, module: torch.nn.Module) -> None:
        """Time every run of ``module``, other hooks on it included or not as they come."""
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
        module.register_forward_hook(lambda *_: self.seconds[name].append(time.process_time() - started.pop()))


if __name__ == "__main__":
    sys.exit(main())
