"""lmms-eval: every ``generate_until`` request is profiled, and its sample in ``--log_samples`` gets a ``memory``.

From a shell, ``memprof harness lmms-eval -o FOLDER -- WORDS`` is ``python -m lmms_eval WORDS`` with this switched on;
from Python::

    from memprof.harness import lmms_eval as watching

    with watching.watched("runs/mine"):
        results = lmms_eval.simple_evaluate(model="llava_hf", tasks=["ai2d"], log_samples=True)

lmms-eval gives a model's wrapper all requests at once, and the wrapper forms batches. A batch's peak is no sample's, so
requests are passed on one by one, and a batch size beyond 1 is refused. What is scored by likelihood generates nothing,
and has no memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memprof.errors import MemprofError, UsageError

if TYPE_CHECKING:
    from memprof.harness.watching import Watch

NAME = "lmms-eval"


@contextmanager
def watched(folder: Path | str) -> Iterator[None]:
    """Profile what lmms-eval's ``evaluate`` asks inside; a run for each task is written below ``folder``.

    Raises:
        UsageError: ``folder`` holds something already, or the model's wrapper batches, or holds no transformers model.
        MemprofError: The profiler refused what was generated; the evaluation is stopped, for its scores would be wrong.
    """
    from lmms_eval import evaluator

    from memprof.harness.watching import Watch, check_new

    check_new(Path(folder))
    plain = evaluator.evaluate
    refused: list[MemprofError] = []

    def evaluate(lm: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with Watch(Path(folder), NAME) as watch:
                lm.generate_until = _one_by_one(lm, watch)
                try:
                    results = plain(lm, *args, **kwargs)
                finally:
                    del lm.generate_until
                    watch.check()
        except MemprofError as error:
            refused.append(error)
            raise
        _put_beside(results, Path(folder))
        return results

    evaluator.evaluate = evaluate
    try:
        yield
    finally:
        evaluator.evaluate = plain
    if refused:  # lmms-eval's command line logs an error, and ends as if nothing had been
        raise refused[0]


def _one_by_one(lm: Any, watch: Watch) -> Callable[[Sequence[Any]], list[Any]]:
    """The wrapper's ``generate_until``, given one request at a time."""
    from memprof.harness.watching import many_samples

    plain = lm.generate_until

    def one(request: Any) -> Any:
        if request.metadata.get("__padding_only__"):  # asked again so that all processes ask equally often
            return plain([request])[0]
        with watch.sample(lm, request.task_name, str(request.doc_id)) as asked:
            (given,) = plain([request])
            asked.answer = given if isinstance(given, str) else getattr(given, "text", None)
        return given

    def generate_until(requests: Sequence[Any]) -> list[Any]:
        if (size := str(getattr(lm, "batch_size", 1))) != "1":
            raise UsageError(f"--batch_size is {size}: a batch's peak is no sample's; profile with --batch_size 1")
        with many_samples():
            return [one(request) for request in requests]

    return generate_until


def _put_beside(results: Any, folder: Path) -> None:
    """Give each logged sample the memory of its first request, of whichever process asked it."""
    from memprof.harness.watching import memories

    for task, samples in ((results or {}).get("samples") or {}).items():  # None in all processes but the first
        known = memories(folder, task)
        for sample in samples:
            sample["memory"] = known.get(str(sample["doc_id"]))


def main(words: Sequence[str]) -> None:
    """Run ``python -m lmms_eval`` with ``words``."""
    from lmms_eval.__main__ import cli_evaluate

    sys.argv = ["lmms_eval", *words]
    cli_evaluate()
