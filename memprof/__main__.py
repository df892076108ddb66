"""``python -m memprof`` and the ``memprof`` command: signals are answered before anything slow is imported."""

from __future__ import annotations

import os
import sys

from memprof import stopping


def main() -> None:
    """Listen for signals, then run the command line."""
    _hold_places()
    stopping.listen()
    try:
        try:
            from memprof.cli import main as run

            run()
        except SystemExit:
            if stopping.asked():
                stopping.leave()
            stopping.rest()
            raise
    except SystemExit:
        raise
    except BaseException as error:
        if not stopping.asked():
            raise
        stopping.finish(error)
        stopping.leave()


def _hold_places() -> None:
    """No file that is opened later takes the place of a standard stream that is closed; writing there then fails."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)  # the lowest that is free: this one
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


if __name__ == "__main__":
    main()
