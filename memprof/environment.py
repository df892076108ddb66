"""Where a run happened: versions, device, settings. Everything is read, nothing is changed."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memprof.version import VERSION

#: Packages whose version can move a byte.
PACKAGES = ("torch", "transformers", "numpy", "pillow", "nvidia-ml-py")
#: Settings of the caching allocator, in the order PyTorch reads them.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")

#: What torchrun and SLURM tell a process of its place among all others.
RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"
)  # fmt: skip
#: What they tell it of its place among those on the same machine.
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID")


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """Commit of the checkout memprof runs from, with ``+`` if files are changed; None outside a checkout."""
    folder = Path(__file__).parent
    if not (folder.parent / "pyproject.toml").is_file():  # installed: a repository around it would be somebody else's
        return None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() or None


def environment() -> dict[str, Any]:
    """Versions, host and allocator settings, as they go into ``run.json``."""
    return {
        "memprof": VERSION,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "allocator_settings": {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ},
    }


def may_have_cuda() -> bool:
    """Whether torch could have a card here; False is certain, and found without loading it.

    CUDA is reached through the driver's library, which torch loads by the same name, or on AMD cards through a device
    of the kernel's. ``CUDA_VISIBLE_DEVICES`` that names none, or begins with what is no card, hides all of them.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None and shown.strip().partition(",")[0].strip() in ("", "-1"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True


def rank_shard() -> tuple[str, str] | None:
    """``i/n`` of this process, 1-based, and the variable that says so: torchrun's, or SLURM's in a step of a job.

    None where neither runs more than one process. A batch script has a rank and a number of tasks too, and is one
    process.
    """
    slurm = os.environ.get("SLURM_STEP_NUM_TASKS") or ("SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS"))
    for rank, world in (("RANK", os.environ.get("WORLD_SIZE")), ("SLURM_PROCID", slurm)):
        if rank in os.environ and int(world or 1) > 1:
            return f"{int(os.environ[rank]) + 1}/{world}", rank
    return None


def own_card(cards: int) -> int | None:
    """Number of the card that is this process's, of ``cards`` it can see: each local rank takes the next.

    None where no launcher speaks, or none is seen. A launcher that shows each process one card has chosen already.
    """
    rank = next((os.environ[name] for name in LOCAL_RANK_VARIABLES if name in os.environ), None)
    return int(rank) % cards if rank is not None and cards else None
