"""Commands as a user types them, in this process."""

from __future__ import annotations

import pytest

from memprof.cli import main


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code of ``memprof WORDS``, and what it wrote to stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err
