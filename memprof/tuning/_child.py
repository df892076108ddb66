"""``memprof`` in a process of its own that ends with the worker that started it, however the worker ends."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    from memprof.cli import main

    main()
