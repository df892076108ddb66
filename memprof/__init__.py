"""memprof: where the memory of a vision-language model goes while it generates, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memprof.version import VERSION as __version__

if TYPE_CHECKING:
    from memprof.api import Profile, Profiler, fits, predict, profile, prune, read, run, spec, weightless

__all__ = [
    "Profile", "Profiler", "__version__", "fits", "predict", "profile", "prune", "read", "run", "spec", "weightless",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is offered when it is first asked for, so that ``memprof --help`` loads no torch."""
    if name in __all__:
        from memprof import api

        return getattr(api, name)
    raise AttributeError(f"module 'memprof' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is offered: a tab completes it before it is imported."""
    return sorted(__all__)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext memprof``: gives a notebook ``%%memprof``."""
    from memprof.notebook import load

    load(ipython)
