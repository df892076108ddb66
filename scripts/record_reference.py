"""Record on a card what predictions are held to: ``python scripts/record_reference.py -o reference/NAME``.

InternVL2-2B and LLaVA-1.5-7B in their true configuration, with random weights (they move no byte), over every number
of tiles, both stacks, and Baseline, FastV (row and map), TopV and Random, 16 new tokens each. One run folder a model,
stack and method, as ``memprof run`` writes it, so every command reads it; and for a few samples the allocator's whole
history (``*.history.json.gz``). What is worth most comes first, each sample is on the disk when it is done, and the
same command goes on where it was cut, on a card of the same name. A step that fails is named, and tried again then.

Expected on an H100 or H200, in seconds: 20 to import and build the first model; 12 a run of InternVL2-2B (10 runs of 16
samples and a warm-up, 0.7 each, most of it decoding on the host), 7 a run of LLaVA-1.5-7B (10 runs of 8 samples), 4 a
further build (3), 3 a history (7). All in all about 4 minutes; ``--budget`` ends it in good order.

Needs torch, transformers, numpy, pillow and, for what the driver says of the process, nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn.attention import SDPBackend

from memprof import runner
from memprof.analysis.histories import as_recording
from memprof.bench import Bench
from memprof.bench.outcome import release
from memprof.environment import environment
from memprof.errors import DataError, MemprofError, UsageError
from memprof.families import Model
from memprof.files import write_json
from memprof.models import find
from memprof.records import Run, RunSpec
from memprof.runner import Complete, complete_spec
from memprof.snapshots.history import HISTORY, write_history
from memprof.snapshots.recording import Recording, read_recordings
from memprof.store import RUN_FILE

INTERNVL, LLAVA = "internvl2-2b", "llava-1.5-7b"
#: Tokens of AI2D's prompts on average; others stand beside it where memory depends on them.
TEXT = 53
#: Columns and rows of tiles, the outermost first; with a thumbnail they give 13, 1, 7, 3, 10, ... tiles, and never 2.
GRIDS = ((4, 3), (1, 1), (3, 2), (2, 1), (3, 3), (3, 1), (2, 2), (5, 1), (7, 1), (4, 2), (5, 2), (11, 1))
TOKENS, HISTORY_TOKENS = 16, 3
#: What is said of a history that an earlier call recorded.
THERE = "there already"


@dataclass(frozen=True)
class Step:
    """A run over all shapes of its model, or the history of one sample of it."""

    spec: RunSpec
    shape: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """File name, without an ending for histories."""
        method = self.spec.method.replace(":scores=", "-")
        sample = "" if self.shape is None else "_{}x{}_{}".format(*self.shape)
        return f"{self.spec.model}_{self.spec.stack}_{method}{sample}"


def shapes(model: str) -> list[tuple[int, int, int]]:
    """Width, height and question tokens of each sample, what is worth most first."""
    if model == LLAVA:
        return [(336, 336, text) for text in (TEXT, 500, 20, 200, 88, 35, 120, 300)]
    plain = [(448 * columns, 448 * rows, TEXT) for columns, rows in GRIDS]
    return [*plain, (1344, 896, 20), (1344, 896, 300), (448, 448, 200), (1792, 1344, 88)]


def steps(device: str, tokens: int) -> Iterator[Step]:
    """Everything to record, in order. Methods that need eager attention come last: it is another model."""

    def spec(model: str, method: str, stack: str) -> RunSpec:
        dtype = find.find(model).dtype
        gpu = "h100" if device == "sim" else None
        return RunSpec(model, method, "ai2d", device, stack=stack, dtype=dtype, max_new_tokens=tokens, gpu=gpu)

    def history(model: str, method: str, stack: str, number: int) -> Step:
        few = dataclasses.replace(spec(model, method, stack), max_new_tokens=min(tokens, HISTORY_TOKENS))
        return Step(few, shapes(model)[number])

    row, drawn = ("baseline", "topv", "fastv:scores=row"), "fastv:scores=map"
    yield from (Step(spec(INTERNVL, method, "current")) for method in row)
    yield Step(spec(INTERNVL, "baseline", "paper"))
    yield from (history(INTERNVL, "baseline", "current", number) for number in (0, 1))
    yield from (history(INTERNVL, method, "current", 0) for method in row[1:])
    yield from (Step(spec(INTERNVL, method, "paper")) for method in row[1:])
    yield from (Step(spec(INTERNVL, "random", stack)) for stack in ("current", "paper"))
    yield from (Step(spec(LLAVA, method, stack)) for stack in ("current", "paper") for method in (*row, "random"))
    yield history(LLAVA, "baseline", "current", 0)
    for model in (LLAVA, INTERNVL):
        yield from (Step(spec(model, drawn, stack)) for stack in ("paper", "current"))
        yield history(model, drawn, "paper", 0 if model == LLAVA else 2)


class TimeUp(Exception):
    """The budget is spent; everything finished is on the disk."""


class Recorder:
    """Records into ``folder`` until ``budget`` seconds are over.

    Attributes:
        log: By name, what became of each step that was done or failed, of earlier calls too.

    Raises:
        UsageError: What is in ``folder`` was recorded on another card.
        DataError: The folder's ``reference.json`` cannot be read.
    """

    def __init__(self, folder: Path, budget: float) -> None:
        self.folder, self.begin, self.budget = folder, time.monotonic(), budget
        self.bench: Bench | None = None
        self.log: dict[str, dict[str, Any]] = {}
        self.about = folder / "reference.json"
        if not self.about.exists():
            return
        try:
            there = json.loads(self.about.read_text(encoding="utf-8"))
            card, self.log = there.get("card"), {entry["step"]: entry for entry in there["recorded"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"cannot read {self.about}: {error!r}") from None
        if card != card_name():
            here = card_name() or "none"
            raise UsageError(f"{folder} was recorded on {card or 'no card'}, and here is {here}; use another folder")

    def record(self, every: list[Step]) -> bool:
        """Record each step; whether all are done."""
        for step in every:
            start = time.monotonic()
            try:
                self.check()
                done = self.run(step) if step.shape is None else self.history(step, step.shape)
                failed = False
            except TimeUp:
                say(f"{step.name}: the budget of {self.budget:.0f} s is spent; the same command goes on here")
                return False
            except (MemprofError, RuntimeError) as error:  # memory that ran out is a RuntimeError; the others can go on
                done, failed = str(error).partition("\n")[0], True
            seconds = round(time.monotonic() - start, 1)
            say(f"{step.name}: {'failed: ' * failed}{done} in {seconds} s")
            self.note(step, done, seconds, failed=failed)
        return all(self.has(step) for step in every)

    def has(self, step: Step) -> bool:
        """Whether a step is done."""
        return "samples" in self.log.get(step.name, ())

    def note(self, step: Step, done: str, seconds: float, *, failed: bool) -> None:
        """Write down what became of a step; one that an earlier call finished keeps the time it took."""
        if failed or not self.has(step) or done not in (THERE, self.log[step.name]["samples"]):
            said = {"failed" if failed else "samples": done}
            self.log[step.name] = {"step": step.name, **said, "seconds": seconds}
        about = {
            "schema": 1, "card": card_name(), "environment": environment(), "attention": attention_kernels(),
            "recorded": list(self.log.values()),
        }  # fmt: skip
        write_json(self.about, about)

    def check(self, *_: Any) -> None:
        """Raise TimeUp once the budget is spent."""
        if time.monotonic() - self.begin > self.budget:
            raise TimeUp

    def ready(self, spec: RunSpec) -> tuple[Complete, Any]:
        """The completed spec, and the meter of its model, which asks the driver at every token."""
        done = complete_spec(spec)
        self.bench = Bench(done.setup) if self.bench is None else self.bench.set_up(done.setup)
        meter: Any = self.bench.ready()[1]
        meter.ask_driver = "always"  # where there is a driver to ask
        return done, meter

    def run(self, step: Step) -> str:
        """Record a run folder, or finish the one that is there."""
        data = self.folder / f"{step.spec.model}.csv"
        if not data.exists():
            lines = [",".join(map(str, shape)) for shape in shapes(step.spec.model)]
            data.write_text("\n".join(["width,height,text_tokens", *lines, ""]), encoding="utf-8")
        path = self.folder / step.name
        spec = dataclasses.replace(step.spec, data=data.as_posix())
        self.ready(spec)
        done = runner.run(spec, path, bench=self.bench, resume=(path / RUN_FILE).exists(), progress=self.check)
        for sample in done.samples:
            if not sample.ok:
                say(f"{step.name} {sample.id}: {sample.error}")
        return _count(done)

    def history(self, step: Step, shape: tuple[int, int, int]) -> str:
        """Record all that the allocator does in one sample."""
        path = self.folder / f"{step.name}{HISTORY}"
        if path.exists():
            return THERE
        done, meter = self.ready(step.spec)
        bench, spec, model = self.bench, done.spec, done.setup.model
        assert bench is not None
        ask = done.ask(model.family.shape(model, *shape, spec.max_tiles))
        ask = ask.about(bench.written(ask))

        def generate() -> None:
            release(spec.device)
            refused = bench.profile(ask).refused
            if refused is not None:
                raise MemprofError(refused)

        meter.attribution = "none"  # the ledger would stand in every stack
        try:
            generate()  # what lasts is there before the recording begins
            if spec.device == "cuda":
                release(spec.device)
                torch.cuda.memory._record_memory_history(context="alloc", stacks="python", clear_history=True)
                try:
                    generate()
                    recording = _snapshot()
                finally:
                    torch.cuda.memory._record_memory_history(enabled=None)
            else:
                recording = as_recording(meter.trace, meter.loaded)
        finally:
            meter.attribution = "prefill"
        width, height, text = shape
        about = {
            "spec": spec.to_json(), "width": width, "height": height, "text_tokens": text,
            "static_bytes": meter.static_bytes, "environment": environment() | meter.environment(),
        }  # fmt: skip
        write_history(path, about, recording)
        return f"{len(recording):,} events"


def card_name() -> str | None:
    """What torch calls the card that is recorded; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def attention_kernels() -> dict[str, str]:
    """Which kernel torch picks on this card for each kind of attention InternVL2-2B runs; empty without a card."""
    if not torch.cuda.is_available():
        return {}

    def pick(heads: int, kv_heads: int, queries: int, keys: int, dim: int, causal: bool, batch: int = 1) -> str:
        query = torch.empty(batch, heads, queries, dim, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(batch, kv_heads, keys, dim, dtype=torch.bfloat16, device="cuda")
        grouped = kv_heads != heads
        try:
            chosen = torch._fused_sdp_choice(query, key, key, None, 0.0, causal, enable_gqa=grouped)
            return str(SDPBackend(chosen).name).lower()
        except (RuntimeError, TypeError, ValueError) as error:  # a private function: what it cannot tell is no reason
            return f"unknown: {error}".partition("\n")[0]

    return {
        "vision, 13 tiles": pick(16, 16, 1025, 1025, 64, False, 13),
        "prefill, heads repeated": pick(16, 16, 3388, 3388, 128, True),
        "prefill, heads grouped": pick(16, 8, 3388, 3388, 128, True),
        "decode, heads repeated": pick(16, 16, 1, 3389, 128, False),
        "decode, heads grouped": pick(16, 8, 1, 3389, 128, False),
    }


def _snapshot() -> Recording:
    """The recording so far, through the reader that runs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "snapshot.pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        return max(read_recordings(path), key=len)


def _count(done: Run) -> str:
    failed = len(done.samples) - len(done.finished)
    return f"{len(done.finished)} sample{'s' * (len(done.finished) != 1)}" + (f", {failed} failed" if failed else "")


def say(line: str) -> None:
    """One line on stderr, now."""
    print(line, file=sys.stderr, flush=True)


def tiny(model: str, *_: str) -> Model:
    """A model of the same make that a laptop runs in a moment."""
    card = find.named()[model]
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    extra = {key: 290 for key in card.config if key.startswith("image_token")}
    return dataclasses.replace(card.but(text, vision, **extra), template=(3, 2))


def main(argv: list[str] | None = None) -> int:
    """Record; 0 when all is done, 1 when the budget cut it or a step failed, 2 on another card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to record into, or to go on in")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no further sample is begun")
    parser.add_argument("--model", action="append", choices=(INTERNVL, LLAVA), help="only this model; repeatable")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="new tokens a sample")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, predicted: the whole way without a card")
    asked = parser.parse_args(argv)
    if asked.dry_run:
        find.find = tiny
    device = "sim" if asked.dry_run else "cuda"
    wanted = [step for step in steps(device, asked.tokens) if not asked.model or step.spec.model in asked.model]
    asked.output.mkdir(parents=True, exist_ok=True)
    try:
        recorder = Recorder(asked.output, asked.budget)
    except MemprofError as error:
        say(str(error))
        return error.exit_code
    done = recorder.record(wanted)
    size = sum(path.stat().st_size for path in asked.output.rglob("*") if path.is_file())
    count = sum(map(recorder.has, wanted))
    say(f"{count} of {len(wanted)} steps, {size / 1e6:.2f} MB, {time.monotonic() - recorder.begin:.0f} s")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
