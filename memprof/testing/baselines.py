"""What tests took before: a file for each device and its versions, which belongs beside the tests and in their history.

::

    memory-baselines/cuda-nvidia-h200_torch-2.13.0_transformers-5.23.0.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from memprof import files
from memprof.errors import DataError
from memprof.plain import Plain
from memprof.records import PARTS, Holder, Run, SampleRecord
from memprof.telling.facts import device_text, slug, version_of

SCHEMA = 1
#: What a test may be held to beside a part of the dynamic bytes: sums of several.
WHOLES = ("peak", "static", "dynamic")
#: How many of the largest tensors are kept.
MOST_HOLDERS = 12


@dataclass
class Taken(Plain):
    """What a call took; of a test with several calls, what the highest took, and :attr:`others`.

    Attributes:
        peak: Highest allocated bytes, weights included.
        static: Bytes before.
        parts: Bytes above static of each part at the highest instant.
        most: The most that each part held at the highest instant of any token; of the cache, also between them.
        holders: The largest tensors alive at the highest instant.
        caller: The file and line that called ``generate()``, or None.
        what: Model and prompt in words.
        others: Calls of the same test that peak lower and hold more of something: of a part, or before they began.
    """

    peak: int
    static: int
    parts: dict[str, int]
    most: dict[str, int]
    holders: list[Holder] = field(default_factory=list)
    caller: str | None = None
    what: str = ""
    others: list[Taken] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run, sample: SampleRecord) -> Taken:
        """What ``sample`` of ``run`` took."""
        spec, static = run.record.spec, sample.peak_allocated_bytes - sample.dynamic_peak_bytes
        if not sample.tokens:  # refused in prefill: what was there before is known, and nothing of a token
            static = run.record.static_bytes
        prompt = f"{sample.visual_tokens:,} visual and {sample.text_tokens:,} text tokens, {len(sample.tokens)} made"
        if not sample.ok:
            prompt += f", then stopped: {sample.error or sample.status}"
        most = {part: max(held, default=0) for part, held in sample.token_parts.items()}
        most["kv_cache"] = max(most.get("kv_cache", 0), sample.kv_cache_bytes)
        return cls(
            peak=static + sample.dynamic_peak_bytes,
            static=static,
            parts={part: n for part, n in sample.peak_parts.items() if n},
            most={**most, **{part: n for part, n in sample.peak_parts.items() if n > most.get(part, 0)}},
            holders=sample.peak_holders[:MOST_HOLDERS],
            caller=sample.caller,
            what=f"{spec.model} {spec.dtype} under {spec.method}: {prompt}",
        )

    @classmethod
    def together(cls, calls: Sequence[Taken]) -> Taken:
        """What all ``calls`` of a test took: the highest of them, and those that hold more of something."""
        first, *rest = sorted(calls, key=lambda call: -call.peak)
        most = [max((first, *rest), key=lambda call: call.bytes_of(part)) for part in (*WHOLES, *PARTS)]
        return replace(first, others=[call for call in rest if any(call is one for one in most)])

    def highest(self, part: str | None) -> Taken:
        """The call that holds most of ``part``."""
        return max((self, *self.others), key=lambda call: call.bytes_of(part))

    def bytes_of(self, part: str | None) -> int:
        """The bytes of ``part``: None and ``peak`` are all of it, ``static`` and ``dynamic`` what makes it up."""
        own = {None: self.peak, "peak": self.peak, "static": self.static, "dynamic": self.peak - self.static}
        return own[part] if part in own else self.most.get(str(part), 0)


def key_of(run: Run) -> str:
    """What a baseline belongs to: status, device and card, and the versions that move bytes."""
    record = run.record
    device = f"predicted-{record.environment.get('gpu')}" if record.status == "predicted" else device_text(record)
    versions = (f"{name}-{version_of(record, name)}" for name in ("torch", "transformers"))
    return "_".join(map(slug, (device, *versions)))


class Baselines:
    """The files of a folder.

    Args:
        folder: Where they are, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, key: str) -> Path:
        """The file of a device and its versions (:func:`key_of`)."""
        return self.folder / f"{key}.json"

    def read(self, key: str, test: str) -> Taken | None:
        """What ``test`` took, or None.

        Raises:
            DataError: The file is damaged.
        """
        entry = self._entries(key).get(test)
        try:
            return None if entry is None else Taken.from_json(entry)
        except ValueError as error:
            raise DataError(f"{self.file(key)}: {test}: {error}; --memprof-update writes it anew") from None

    def write(self, key: str, test: str, taken: Taken) -> None:
        """Keep what ``test`` took; the other tests' stay, and other processes may write at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.locked(self.folder):
            entries = {**self._entries(key), test: taken.to_json()}
            files.write_json(self.file(key), {"schema": SCHEMA, "tests": dict(sorted(entries.items()))})

    def elsewhere(self, test: str) -> list[str]:
        """Devices and versions that have a baseline of ``test``."""
        return [file.stem for file in sorted(self.folder.glob("*.json")) if test in self._entries(file.stem)]

    def _entries(self, key: str) -> dict[str, dict[str, object]]:
        try:
            data = files.read_json(self.file(key))
        except FileNotFoundError:
            return {}
        found = data.get("tests")
        if data.get("schema") != SCHEMA or not isinstance(found, dict):
            raise DataError(f"{self.file(key)} holds no baselines of schema {SCHEMA}; --memprof-update writes it anew")
        return found
