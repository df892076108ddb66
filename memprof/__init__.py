"""memprof: where the memory of a vision-language model goes while it generates, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memprof.profiler import Profiler

__version__ = "0.1.0"
__all__ = ["Profiler", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the profiler when first asked for, so that ``memprof --help`` loads no torch."""
    if name == "Profiler":
        from memprof.profiler import Profiler

        return Profiler
    raise AttributeError(f"module 'memprof' has no attribute {name!r}")
