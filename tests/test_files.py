"""Files are written whole, by one process at a time, and what is damaged is said."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from memprof import files
from memprof.errors import DataError, MemprofError


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.replace(path, "old")

    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="gone"):
        files.replace(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_replaced_has_the_rights_of_a_new_file(tmp_path: Path) -> None:
    files.replace(tmp_path / "deep" / "ours", "x")
    (tmp_path / "plain").write_text("x")
    rights = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "deep" / "ours", tmp_path / "plain")}
    assert len(rights) == 1


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    files.replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    heard = list[str]()
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.replace(tmp_path / "pipe", "said")
    reader.join()
    assert heard == ["said"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000])
def test_damaged_json_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json"):
        files.read_json(tmp_path / "x.json")
    aside = files.set_aside(tmp_path / "x.json")
    assert aside is not None
    assert aside.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "x.json")


def test_one_holds_a_lock_at_a_time(tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "lock"),
        pytest.raises(MemprofError, match="another process is writing"),
        files.locked(tmp_path / "lock", wait=False),
    ):
        pass
    with files.locked(tmp_path / "lock", wait=False), files.locked(tmp_path, wait=False):
        pass
