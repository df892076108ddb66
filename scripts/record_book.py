"""Make the book that ships with memprof: ``python scripts/record_book.py``.

What is in it answers ``run``, ``fit``, ``explain`` and ``tune`` on ``sim`` without loading torch: every named model
under Baseline, FastV and TopV on both stacks, and what ``explain`` tries in their place. It is found by the versions of
torch and transformers that are installed here, which must be those of ``constraints.txt``, by ``RECORDER``
(:mod:`memprof.forecasts.book`), and by what the files of the method and of the family do. Where one of these changes,
entries are found no more: ``python scripts/record_book.py core`` takes those away and makes the :data:`CORE` again, in
minutes, which is all that ``tests/test_shipped_book.py`` asks for; a release has them all, which takes hours of two
cores.

A model is a process of its own, two of them at a time, and each entry is put into the package as soon as it is made: a
run that was cut goes on where it stopped, and what is in place is left alone (``--again`` adds to it what it lacks).
What methods ask for themselves comes first, of every model; then what ``explain`` tries.
"""

from __future__ import annotations

import argparse
import dataclasses
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memprof import files
from memprof.analysis.fit import searched_tiles
from memprof.analysis.whatif import COUNTERFACTUALS, Benches, Change, all_exact, floor, may_rise
from memprof.bench import Bench
from memprof.families import Model
from memprof.forecasts import Ask, Setup
from memprof.forecasts.book import SHIPPED, SUFFIX, name_of
from memprof.models.find import find, named
from memprof.prompts import Prompt, Shape
from memprof.pruning import kept_share, method_spec
from memprof.records import STACKS, RunSpec
from memprof.runner import complete_spec
from memprof.tasks import TASKS

#: Those of the TopV paper's supplement and the proving model: what the README and the tutorials ask about.
CORE = ("internvl2-2b", "llava-1.5-7b", "proving")
METHODS = ("baseline", "fastv", "topv")
#: Tokens of the shortest and of the longest question; and of a prompt that is text alone: one of a single token takes
#: the steps of decoding, and tells of no other.
QUESTIONS, TEXTS = (1, 512), (8, 4096)
#: Tokens of a run's answer, which stand for all from seven tokens on; and those that ``explain`` makes first, which are
#: all that it makes unless decoding may reach the peak.
TOKENS, FEW = 16, Benches.FEW
#: Shares of visual tokens beside a method's own: one token, nearly all (of few and of many), between which lie the
#: others; and no cut.
SHARES, UNCUT = (1e-6, 0.98, 0.999), 1.0
#: How often all is asked: where one prompt shows that a program is wrong, those asked before need others in its place.
AGAIN = 3
#: Most kinds of images that are told apart, before it is no use.
KINDS = 4


# -- what is asked -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the book.

    Attributes:
        setup, ask: What it is found by; of the ask only the method and how it is generated.
        run: Whether it is what ``run`` and ``fit`` ask for, and not only what ``explain`` tries in its place.
    """

    setup: Setup
    ask: Ask
    run: bool

    @property
    def name(self) -> str:
        """What its file is called."""
        return name_of(self.setup, self.ask.pruner, self.ask.manner)

    def asks(self, model: Model) -> Iterator[list[Ask]]:
        """What is asked so that it comes to know all it should; the prompts of each list become one program."""
        pruner, most, tokens = self.ask.pruner, largest(model), TOKENS if self.run else FEW
        shares: list[float] = [] if kept_share(pruner) is None else [*SHARES, *[UNCUT] * self.run]
        shapes = shapes_of(model, fit=self.run)
        if any(each.name.startswith("vision") for each in self.ask.around):
            # A tower that takes some tiles at a time takes other steps for each number of them: of the largest only.
            shapes, shares = [most.longer(n) for n in questions_of(model)], []
        kept = [dataclasses.replace(pruner, keep=share) for share in shares]  # type: ignore[call-arg]
        for one in (pruner, *kept):
            yield [dataclasses.replace(self.ask, pruner=one, new_tokens=tokens).about(shape) for shape in shapes]
        if self.run and not pruner.stages(1_000, model.layers) and not each_its_own(model):
            yield [dataclasses.replace(self.ask, new_tokens=tokens).about(shape) for shape in batches_of(model)]


def entries_of(model: Model) -> dict[str, Entry]:
    """The entries of ``model`` by name: each method on each stack, and every change that ``explain`` makes of it."""
    found: dict[str, Entry] = {}
    shape = largest(model)
    for stack in STACKS:
        for method in METHODS if model.family.sees else METHODS[:1]:
            asked = complete_spec(RunSpec(model.name, method, "ai2d", "sim", stack, dtype=model.dtype))
            now = Change(asked.spec, asked.pruner, shape, model)
            # Where a prompt does not fit on the paper stack, fit asks for the same method on the current one.
            runs = now, Change(dataclasses.replace(asked.spec, stack="current"), asked.pruner, shape, model)
            changes = [change for counterfactual in COUNTERFACTUALS for change in counterfactual(now)]
            for change in filter(None, (*runs, *changes, all_exact(now), floor(now))):
                ask = Ask(change.pruner, change.spec.stack, Prompt(shape), 1, around=change.around)
                entry = Entry(Setup.of(change.spec, model), ask, change in runs)
                if entry.run or entry.name not in found:
                    found[entry.name] = entry
    return found


def questions_of(model: Model) -> tuple[int, int, int]:
    """Tokens of the shortest and of the longest question that a model is asked here, and of one between: a test of what
    the two say, where all pictures are as many tokens.
    """
    shortest, longest = QUESTIONS if model.family.sees else TEXTS
    longest = min(longest, model.positions - TOKENS)
    return shortest, longest, (shortest + longest) // 2


def bundled(model: Model) -> list[Shape]:
    """The distinct prompts of the bundled samples, but for the length of the question."""
    sizes = {(one.width, one.height) for _, kind in TASKS for one in kind().samples() if one.width}
    shapes = [model.family.shape(model, *size, 0) for size in sorted(sizes)]
    return list({shape.like(): shape for shape in shapes}.values())


def largest(model: Model) -> Shape:
    """The bundled prompt with the most visual tokens: what ``explain`` explains of a run on them."""
    return max(bundled(model), key=lambda shape: (shape.visual_tokens, shape.tiles))


def each_its_own(model: Model) -> bool:
    """Whether each grid of patches is a program of its own, as Qwen2.5-VL's windows make it.

    Then the steps of many images are as many: what is asked of these is recorded when it is asked for.
    """
    return len({tuple(image.kind for image in shape.images) for shape in bundled(model)}) > KINDS


def shapes_of(model: Model, *, fit: bool) -> list[Shape]:
    """Prompts between which lies what is asked: those of the bundled samples, and of any number of tiles; of as many as
    ``fit`` tries, if it is to be answered.
    """
    family, found = model.family, bundled(model)
    one = family.shape_of(model, family.of_tiles(model, 1), 0)
    if each_its_own(model):  # the usual picture, and the largest
        found = [one, largest(model)]
    elif family.one_batch(model):
        tried = searched_tiles(model) if fit else family.most_tiles(model)
        most = max(1, min(tried, (model.positions - one.text_tokens - 1) // max(1, one.visual_tokens)))
        found += [family.shape_of(model, family.of_tiles(model, n), 0) for n in range(1, most + 1)]
    else:  # as many images as one looks at first
        found += [family.shape_of(model, family.of_tiles(model, family.most_tiles(model), n), 0) for n in (1, 2)]
    middle = sum(shape.visual_tokens for shape in found) / len(found)
    found.sort(key=lambda shape: -abs(shape.visual_tokens - middle))  # outermost first: what lies between may follow
    return [shape.longer(tokens) for shape in found for tokens in questions_of(model)]


def batches_of(model: Model) -> list[Shape]:
    """Prompts side by side, as ``fit`` tries them."""
    family, most = model.family, model.family.searched_prompts
    tiles = sorted({1, family.most_tiles(model)})
    shown = [family.of_tiles(model, n) for n in tiles]
    return [
        family.shape_of(model, images, tokens, 2**n)
        for images in shown for tokens in questions_of(model) for n in range(1, most.bit_length())
    ]  # fmt: skip


# -- recording ---------------------------------------------------------------------------------------------------------


def record(name: str, *, runs: bool, again: bool) -> None:
    """Record what is missing of a model, in this process, and put it into the package, entry by entry.

    ``runs``: only what methods ask for themselves; ``again``: also what entries lack that are there.
    """
    model, benches = find(name), dict[Setup, Bench]()
    missing = [one for one in entries_of(model).values() if one.run >= runs and (again or not there(one))]
    with tempfile.TemporaryDirectory() as folder:
        for done, entry in enumerate(missing, start=1):
            start = sum(os.times()[:4])
            bench = benches.setdefault(entry.setup, Bench(entry.setup))
            bench.book.folder = Path(folder)
            asks = foresee(entry, model, bench)
            lost = sum(not bench.knows(ask) for ask in asks)
            made = Path(folder) / f"{entry.name}.json"
            if not made.exists() and there(entry):  # of another model with the same numbers, meanwhile; or whole
                continue
            files.replace(file_of(entry.name), lzma.compress(made.read_bytes(), preset=9))
            took, method = sum(os.times()[:4]) - start, method_spec(entry.ask.pruner)
            without = f", {lost} prompts without a program" if lost else ""
            words = f"{method} {entry.ask.manner}, {took:.0f} s of CPU{without}"
            print(f"{name} {done}/{len(missing)}: {words}", flush=True)


def foresee(entry: Entry, model: Model, bench: Bench) -> list[Ask]:
    """Have all recorded that is asked of an entry; returns it."""
    asked = [*entry.asks(model)]
    for asks in asked * AGAIN:
        bench.foresee(asks)
    if not entry.run:
        longer = [[dataclasses.replace(ask, new_tokens=TOKENS) for ask in asks] for asks in asked if rises(bench, asks)]
        for asks in longer * AGAIN:
            bench.foresee(asks)
        asked += longer
    return [ask for asks in asked for ask in asks]


def rises(bench: Bench, asks: list[Ask]) -> bool:
    """Whether decoding may reach the peak of one of some prompts: if it does not come near, however roundings fall, in
    the shortest of them, the longest, and the one between, it does not.
    """
    by_length = sorted(asks, key=lambda ask: ask.shape.length)
    some = by_length[0], by_length[len(asks) // 2], by_length[-1]
    return any(may_rise(bench.outcome(ask).memory, 4 * TOKENS) for ask in some)


def file_of(name: str) -> Path:
    """Where an entry is in the package."""
    return SHIPPED / f"{name}{SUFFIX}"


def there(entry: Entry) -> bool:
    """Whether the package has an entry."""
    return file_of(entry.name).exists()


def apart(name: str, how: list[str]) -> str:
    """:func:`record` in a process of its own; says how long that took."""
    start = time.monotonic()
    alone = {**os.environ, "MEMPROF_CACHE": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, *how, name], check=True, env=alone)
    return f"{name}: {time.monotonic() - start:.0f} s"


def main() -> None:
    """Record what is missing, and put it into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="some models only, or core; the others' stay")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default: 2)")
    parser.add_argument("--again", action="store_true", help="add to entries that are there what they lack")
    parser.add_argument("--here", choices=("runs", "all"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        record(args.models[0], runs=args.here == "runs", again=args.again)
        return
    models = {name: entries_of(model) for name, model in named().items()}
    known = {name for entries in models.values() for name in entries}
    stale = [file for file in SHIPPED.glob(f"*{SUFFIX}") if file.name.removesuffix(SUFFIX) not in known]
    for file in stale:
        file.unlink()
    print(f"{len(stale)} entries that nothing finds any more are taken away", flush=True)
    words = args.models or ("core", *models)
    asked = dict.fromkeys(one for word in words for one in (CORE if word == "core" else (word,)))
    if unknown := sorted(set(asked) - set(models)):
        raise SystemExit(f"{', '.join(unknown)}: not of the book; its models are {', '.join(models)}")
    for runs in (True, False):
        todo = [
            name for name in asked
            if args.again or not all(there(entry) for entry in models[name].values() if entry.run >= runs)
        ]  # fmt: skip
        how = ["--here", "runs" if runs else "all", *["--again"] * args.again]
        with ThreadPoolExecutor(args.jobs) as pool:
            for number, said in enumerate(pool.map(apart, todo, [how] * len(todo)), start=1):
                print(f"{said} ({number} of {len(todo)} models)", flush=True)
    shipped = sorted(SHIPPED.glob(f"*{SUFFIX}"))
    size = sum(file.stat().st_size for file in shipped)
    print(f"{len(shipped)} entries, {size / 1e6:.1f} MB in {SHIPPED}")


if __name__ == "__main__":
    main()
