"""What a measurement or a prediction is to a user: a :class:`Profile` shows itself.

It is a :class:`~memprof.records.Run` and holds nothing beside it, so whatever takes runs takes profiles, and a folder
that one was saved in is read back as one. It stands on top of all that shows runs; the rooms below know runs alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from memprof.errors import RunExists
from memprof.records import GIVEN, PARTS, Memory, Run, SampleRecord, Token, summarize
from memprof.store import RunFolder
from memprof.units import format_bytes, unit_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from memprof.analysis.explain import Explanation


class Tokens(Sequence[Token]):
    """Every token of a run, sample after sample: rows to iterate over, :meth:`to_pandas` for a data frame."""

    def __init__(self, samples: Sequence[SampleRecord]) -> None:
        self._rows = [row for sample in samples for row in sample.rows()]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Token: ...

    @overload
    def __getitem__(self, at: slice) -> list[Token]: ...

    def __getitem__(self, at: int | slice) -> Token | list[Token]:
        return self._rows[at]

    def __iter__(self) -> Iterator[Token]:
        return iter(self._rows)

    def __repr__(self) -> str:
        samples = len({row.sample for row in self._rows})
        return f"<{len(self)} tokens of {samples} sample{'s' * (samples != 1)}>"

    def to_pandas(self) -> DataFrame:
        """A row a token: the fields of :class:`~memprof.records.Token`, and ``part_NAME`` in bytes for each part.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame([_flat(row) for row in self._rows])


def _flat(row: Token) -> dict[str, Any]:
    found = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "parts"}
    return found | {f"part_{part}": row.parts.get(part, 0) for part in PARTS}


@dataclasses.dataclass(repr=False)
class Profile(Run):
    """What :func:`memprof.profile`, :func:`memprof.predict`, :func:`memprof.run` and :func:`memprof.read` give.

    All bytes are integers, times are seconds. While a window is open it has the calls that are done.

    Attributes:
        record: The experiment: what ran, where, under which versions; ``record.status`` is ``measured`` or
            ``predicted``.
        samples: A :class:`~memprof.records.SampleRecord` for each ``generate()``, failed ones included.
        path: The folder it was read from or saved in, or None.
        healed: What of that folder was damaged, a line each.
    """

    @classmethod
    def of(cls, run: Run) -> Profile:
        """``run`` as a profile, of the same records."""
        return cls(run.record, run.samples, run.path, run.healed)

    # -- numbers -------------------------------------------------------------------------------------------------------

    @property
    def peak(self) -> int:
        """Highest allocated bytes, weights included, of all samples; of one that failed, up to there. 0 without any."""
        return max(map(self._peak_of, self.samples), default=0)

    def _peak_of(self, sample: SampleRecord) -> int:
        # Of the token in which one ended there is no row, only what was there.
        there = sample.peak_allocated_bytes
        return there if there and sample.ok else max(there, self.record.static_bytes + sample.dynamic_peak_bytes)

    @property
    def tokens(self) -> Tokens:
        """Every token of every sample, in order; token 0 of each is its prefill."""
        return Tokens(self.samples)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes above static that each part holds at the highest instant, the largest part first.

        They sum to the dynamic peak; parts are those of :data:`memprof.records.PARTS`, and one that holds nothing is
        left out.
        """
        top = self._top
        held = top.peak_parts if top is not None else {}
        return {part: n for part, n in sorted(held.items(), key=lambda item: -item[1]) if n}

    @property
    def memory(self) -> Memory:
        """What the highest sample took, card by card, and layer by layer in the cache.

        Raises:
            DataError: There is no sample.
        """
        from memprof.errors import DataError

        if self._top is None:
            raise DataError(f"{self.path or 'the run'} has no sample")
        return self._top.memory

    @property
    def _top(self) -> SampleRecord | None:
        """The sample that peaks highest, among those that finished if any did."""
        return max(self.finished or self.samples, key=lambda sample: sample.dynamic_peak_bytes, default=None)

    # -- shown ---------------------------------------------------------------------------------------------------------

    def table(self, unit: str | None = None, *, width: int | None = None) -> str:
        """The table that ``memprof report`` prints.

        Args:
            unit: ``GiB``, ``GB``, ``MiB``, ``MB`` or ``KiB``; None: what shows the numbers well.
            width: In columns; None: the terminal's.
        """
        from memprof import reports

        return reports.render("table", [self], unit, width=width)

    def plot(
        self, kind: str = "memory-curve", *, style: str = "print", width: str = "single", unit: str | None = None
    ) -> Figure:
        """A figure as ``memprof plot`` draws it, to be shown or saved: ``run.plot().savefig("curve.pdf")``.

        Args:
            kind: Of figure: ``memory-curve``, ``over-tokens``, ``breakdown``, ...
            style: ``print`` or ``slides``.
            width: ``single`` or ``double`` column.
            unit: As in :meth:`table`.

        Raises:
            DataError: No sample finished.
            UnknownName: No figure of a single run is called so.
        """
        from memprof import figures

        return figures.figure([self], kind, style, width, unit)

    def explain(self, sample: str | None = None, *, what_if: bool = True) -> Explanation:
        """Who holds the highest instant and, predicted, what would lower it; ``print`` it for the words.

        Args:
            sample: A sample's id; None: the one with the highest peak.
            what_if: Also predict what would lower the peak: seconds to a minute, where nothing alike was predicted
                before. Of a model that memprof cannot predict, a note says why it is left out.

        Raises:
            DataError: No sample finished.
        """
        from memprof.analysis.explain import explain

        return explain(self, sample, what_if=what_if)

    def __repr__(self) -> str:
        from memprof.telling import facts
        from memprof.telling.palette import model_label

        what = f"{model_label(self.record.spec.model)} under {facts.method_text(self)}, {facts.where_text(self.record)}"
        return f"<memprof.Profile: {what}: {', '.join(self._counted())}>"

    def _counted(self) -> Iterator[str]:
        """Peak, weights, how many samples and tokens, and what failed, in words."""
        if self.samples:
            unit = unit_for(self.peak)
            static = format_bytes(self.record.static_bytes, unit)
            yield f"peak {format_bytes(self.peak, unit)} ({static} of it static)"
        what = "call" if self.record.spec.data == GIVEN and self.record.status == "measured" else "sample"
        for count, word in ((len(self.samples), what), (len(self.tokens), "token")):
            yield f"{count} {word}{'s' * (count != 1)}"
        failed = [sample for sample in self.samples if not sample.ok]
        if failed:
            yield f"{len(failed)} not finished, the first for: {failed[0].error}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, and the curve as SVG; no script, and nothing is loaded from anywhere."""
        from memprof.reports import cell

        return cell.render(self)

    # -- kept ----------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, *, force: bool = False) -> Path:
        """Write a run folder, which every command reads and :func:`memprof.read` too.

        Args:
            folder: Made if missing.
            force: Replace the run that is there.

        Returns:
            The folder.

        Raises:
            RunExists: It holds a run, and ``force`` was not given.
            UsageError: It holds something else.
        """
        path = Path(folder)
        record = dataclasses.replace(self.record, totals=summarize(dataclasses.replace(self, path=str(path))))
        try:
            opened = RunFolder.open(path, record, force=force)
        except RunExists:
            raise RunExists(f"{path} already holds a run; force=True replaces it") from None
        with opened as kept:
            for sample in self.samples:
                kept.append(sample)
        self.path = str(path)
        return path
