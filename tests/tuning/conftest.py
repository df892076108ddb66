from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("optuna")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database of Debian's PostgreSQL that lives as long as the test; skipped where there is none."""
    pytest.importorskip("psycopg2")
    pytest.importorskip("sqlalchemy")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="memprof-pg-", dir="/tmp"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            pytest.skip("there is no user postgres to run it as")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data, bin_ = folder / "data", binaries[-1].parent

    def call(*words: str | Path) -> None:
        subprocess.run([*as_user, *map(str, words)], check=True, capture_output=True, cwd=folder, timeout=120)

    try:
        call(bin_ / "initdb", "-D", data, "-A", "trust", "-U", "memprof", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call(bin_ / "pg_ctl", "-D", data, "-o", options, "-w", "-l", folder / "log", "start")
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL does not start here: {getattr(error, 'stderr', None) or error}")
    try:
        yield f"postgresql://memprof@/postgres?host={folder}"
    finally:
        call(bin_ / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
