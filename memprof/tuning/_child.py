"""``memprof`` in a process of its own that ends with the worker that started it, however the worker ends."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    runpy.run_module("memprof", run_name="__main__", alter_sys=True)
