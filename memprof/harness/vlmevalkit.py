"""VLMEvalKit: every image sample is profiled, and a table of memory lies beside the table of answers.

From a shell, ``memprof harness vlmevalkit -o FOLDER -- run.py WORDS`` is ``python run.py WORDS`` with this switched on;
from Python::

    from memprof.harness import vlmevalkit as watching

    with watching.watched("runs/mine"):
        infer_data_job(model, work_dir=work_dir, model_name=name, dataset=dataset)

VLMEvalKit asks sample by sample: ``infer_data`` has a prompt built from a line of the data, and gives it to the
model's ``generate``. Which line it was is seen where it is used: in ``build_prompt`` or ``dump_image`` of the dataset.
Video and conversations have loops of their own, and are not watched.
"""

from __future__ import annotations

import csv
import io
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memprof.errors import UsageError

NAME = "VLMEvalKit"
#: The columns of the table, before those of the parts.
COLUMNS = (
    "index", "status", "device", "peak_allocated_bytes", "peak_reserved_bytes", "dynamic_peak_bytes", "kv_cache_bytes",
    "peak_phase", "error",
)  # fmt: skip


@contextmanager
def watched(folder: Path | str) -> Iterator[None]:
    """Profile what VLMEvalKit's ``infer_data`` asks inside; a run for each dataset is written below ``folder``.

    Beside the answers ``MODEL_DATASET.xlsx`` there is then ``MODEL_DATASET_memory.csv``, a line for each sample that
    was asked now (those of an earlier, interrupted evaluation have none), to be joined by ``index``.

    Raises:
        UsageError: ``folder`` holds something already, or a model is no transformers model of this process.
        MemprofError: The profiler refused what was generated; the evaluation is stopped, for its scores would be wrong.
    """
    from vlmeval import inference
    from vlmeval.vlm.base import BaseModel

    from memprof.harness.watching import Watch, check_new, many_samples

    check_new(Path(folder))
    infer, ask = inference.infer_data, BaseModel.generate
    now: dict[str, str] = {}  # the dataset that is asked, and the line its next prompt is made from

    with Watch(Path(folder), NAME) as watch:

        def infer_data(model: Any, model_name: str, work_dir: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            now["task"] = dataset.dataset_name
            noted = {name: _noting(getattr(dataset, name), now) for name in ("build_prompt", "dump_image")}
            vars(dataset).update(noted)
            try:
                with many_samples():
                    return infer(model, model_name, work_dir, dataset, *args, **kwargs)
            finally:
                for name in noted:
                    delattr(dataset, name)
                now.clear()
                watch.check()
                _put_beside(Path(work_dir), f"{model_name}_{dataset.dataset_name}", Path(folder), dataset.dataset_name)

        def generate(self: Any, message: Any, dataset: Any = None) -> Any:
            if "task" not in now:  # a loop that is not watched
                return ask(self, message, dataset)
            if "line" not in now:
                raise UsageError(f"a prompt of {now['task']} was made by neither build_prompt nor dump_image")
            with watch.sample(self, now["task"], now.pop("line")) as asked:
                answer = ask(self, message, dataset)
                asked.answer = answer if isinstance(answer, str) else None
            return answer

        inference.infer_data, BaseModel.generate = infer_data, generate
        try:
            yield
        finally:
            inference.infer_data, BaseModel.generate = infer, ask


def _noting(plain: Callable[..., Any], now: dict[str, str]) -> Callable[..., Any]:
    """A dataset's method whose first argument is a line of the data, noted by its ``index``."""

    def noting(line: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(line, int):
            now["line"] = str(line["index"])
        return plain(line, *args, **kwargs)

    return noting


def _put_beside(work: Path, name: str, folder: Path, task: str) -> None:
    """Write the table of what this process asked."""
    from memprof import files
    from memprof.environment import rank_shard
    from memprof.harness.watching import memories
    from memprof.records import PARTS

    shard = rank_shard()
    known = memories(folder, task, own=True)
    if not known:
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*COLUMNS, *(f"{part}_at_peak" for part in PARTS)])
    for index, memory in known.items():
        parts = memory.pop("parts")
        table.writerow([index, *(memory[name] for name in COLUMNS[1:]), *(parts.get(part, 0) for part in PARTS)])
    place = "" if shard is None else f"_{shard[0].replace('/', '-of-')}"
    files.replace(work / f"{name}_memory{place}.csv", text.getvalue())


def main(words: Sequence[str]) -> None:
    """Run VLMEvalKit's ``run.py``, which is the first of ``words``, with the rest of them."""
    if not words or not Path(words[0]).is_file():
        raise UsageError("give the path of VLMEvalKit's run.py, and its options after it")
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")
