"""The text of out-of-memory errors, in the words of several versions of PyTorch; the numbers are our own."""

from __future__ import annotations

import io
import json
import sys

import pytest

from memprof.cli import main
from memprof.errors import DataError
from memprof.snapshots.message import hints, read
from memprof.units import GIB, MIB

END = (
    " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
    "avoid fragmentation.  See documentation for Memory Management"
)


def new(asked, free, allocated, unallocated, *, capacity="24.00 GiB", middle="", private="") -> str:
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked}. GPU 1 has a total capacity of "
        f"{capacity} of which {free} is free. {middle}Of the allocated memory {allocated} is allocated by PyTorch, "
        f"{private}and {unallocated} is reserved by PyTorch but unallocated.{END}"
    )


def old(asked, capacity, allocated, free, reserved) -> str:
    return (
        f"RuntimeError: CUDA out of memory. Tried to allocate {asked} (GPU 0; {capacity} total capacity; {allocated} "
        f"already allocated; {free} free; {reserved} reserved in total by PyTorch)"
    )


def first(text: str) -> str:
    return hints(read([text]))[0].remedy


def pointed(text: str) -> set[str]:
    return {hint.remedy.split(" (")[0] for hint in hints(read([text])) if hint.points_to_it}


EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"


def test_all_numbers_of_a_new_message():
    middle = (
        "Process 42 has 3.00 GiB memory in use. Including non-PyTorch memory, this process has 18.50 GiB memory in "
        "use. 20.00 GiB allowed; "
    )
    private = "with 512.00 MiB allocated in private pools (e.g., CUDA Graphs), "
    message = read([new("2.00 GiB", "2.50 GiB", "17.00 GiB", "1.00 GiB", middle=middle, private=private)])
    assert (message.device, message.count) == (1, 1)
    assert (message.asked, message.capacity, message.free) == (2 * GIB, 24 * GIB, 5 * GIB // 2)
    assert (message.allocated, message.unallocated, message.reserved) == (17 * GIB, GIB, 18 * GIB)
    assert (message.private, message.allowed, message.process) == (512 * MIB, 20 * GIB, int(18.5 * GIB))
    assert [(each.pid, each.bytes) for each in message.others] == [(42, 3 * GIB)]
    assert message.unnamed == GIB // 2


@pytest.mark.parametrize("capacity", ["total capacity", "total capacty"])
def test_every_spelling(capacity):
    text = new("1.00 GiB", "0 bytes", "22.00 GiB", "900.00 MiB").replace("total capacity", capacity)
    assert read([text]).free == 0
    assert read([text.replace("CUDA out", "HIP out")]).capacity == 24 * GIB
    message = read([old("2.00 GiB", "8.00 GiB", "4.50 GiB", "512.00 MiB", "6.00 GiB")])
    assert (message.capacity, message.free, message.unallocated) == (8 * GIB, 512 * MIB, int(1.5 * GIB))
    older = old("12.50 MiB", "8.00 GiB", "6.00 GiB", "4.00 MiB", "1").replace(
        "1 reserved in total by PyTorch", "1.00 GiB cached"
    )
    assert read([older]).unallocated == GIB


def test_fragmentation_is_what_the_numbers_point_to():
    assert first(new("5.00 GiB", "2.00 GiB", "12.00 GiB", "9.00 GiB")) == EXPANDABLE
    assert EXPANDABLE in pointed(old("2.00 GiB", "8.00 GiB", "3.00 GiB", "1.00 GiB", "6.00 GiB"))
    assert EXPANDABLE not in pointed(new("5.00 GiB", "2.00 GiB", "21.00 GiB", "0.50 GiB"))
    assert EXPANDABLE not in pointed(new("1.00 GiB", "2.00 GiB", "12.00 GiB", "9.00 GiB"))


def test_more_than_the_card_has():
    assert "ask for less at once" in pointed(new("30.00 GiB", "20.00 GiB", "2.00 GiB", "1.00 GiB"))
    assert EXPANDABLE not in pointed(new("30.00 GiB", "20.00 GiB", "2.00 GiB", "1.00 GiB"))


def test_other_processes_and_oneself_inside_a_container():
    others = "Process 42 has 20.00 GiB memory in use. "
    assert "end the other processes on the card" in pointed(
        new("2.00 GiB", "0.50 GiB", "2.00 GiB", "0.10 GiB", middle=others)
    )
    # Inside a container PyTorch does not know its own number: 20 GiB are those that it holds.
    alone = new("2.00 GiB", "0.50 GiB", "19.00 GiB", "0.60 GiB", middle=others)
    assert read([alone]).others == ()
    assert read([alone]).process == 20 * GIB
    assert "end the other processes on the card" not in pointed(alone)
    impossible = "Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. "
    assert read([new("2.00 GiB", "0.50 GiB", "19.00 GiB", "0.60 GiB", middle=impossible)]).process is None


def test_a_limit_of_ones_own_and_a_driver_that_refuses_what_is_free():
    limited = new("2.00 GiB", "20.00 GiB", "1.00 GiB", "0.50 GiB", middle="2.00 GiB allowed; ")
    assert first(limited) == "raise per_process_memory_fraction"
    assert first(new("1.00 GiB", "8.00 GiB", "12.00 GiB", "1.00 GiB")).startswith("look at who else")
    spilled = new("1.00 GiB", "0 bytes", "30.00 GiB", "1.00 GiB")
    assert any("system memory" in remedy for remedy in pointed(spilled))


def test_a_card_without_memory_is_read():
    found = hints(read([new("1.50 GiB", "0 bytes", "0 bytes", "0 bytes", capacity="0 bytes")]))
    assert any("hold less" in hint.remedy for hint in found)


def test_how_much_less_and_which_card():
    (hint,) = [
        h for h in hints(read([new("5.00 GiB", "1.00 GiB", "22.00 GiB", "0.50 GiB")])) if "hold less" in h.remedy
    ]
    assert "4.00 GiB less" in hint.why
    assert "a card of 32 GiB" in hint.why


def test_the_last_message_of_a_log_counts():
    log = [
        "starting\n", new("1.00 GiB", "0 bytes", "22.00 GiB", "1.00 GiB") + "\n", "Traceback\n",
        "\x1b[31m[rank1]: " + new("3.00 GiB", "0 bytes", "22.00 GiB", "1.00 GiB")[:150] + "\x1b[0m\n",
        new("3.00 GiB", "0 bytes", "22.00 GiB", "1.00 GiB")[150:] + "\n", "done\n",
    ]  # fmt: skip
    message = read(log)
    assert (message.count, message.asked, message.unallocated) == (2, 3 * GIB, GIB)


@pytest.mark.parametrize(
    "text", ["", "hello\n" * 100, "CUDA error: out of memory", "Tried to allocate 3 GiB", "\x00" * 99]
)
def test_unknown_text_is_one_line(text):
    with pytest.raises(DataError) as caught:
        read(text.splitlines(keepends=True))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_absurd_are_read_or_left_out():
    huge = "9" * 400 + ".00 GiB"
    message = read([new(huge, huge, "1.00 GiB", "1.00 GiB") + f" Process {'1' * 30} has {huge} memory in use."])
    assert hints(message)
    assert read(
        [
            f"CUDA out of memory. Tried to allocate {'9' * 10_000_000}.00 GiB",
            new("1.00 GiB", "0 bytes", "1.00 GiB", "0 bytes"),
        ]
    )


def command(capsys, monkeypatch, text: str, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        main(["oom", *words])
    return (int(ended.value.code or 0), *capsys.readouterr())


@pytest.mark.parametrize("columns", [60, 80])
def test_the_command(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = new("5.00 GiB", "2.00 GiB", "12.00 GiB", "9.00 GiB")
    code, out, _ = command(capsys, monkeypatch, text)
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    said = " ".join(out.split())
    assert "Out of memory on GPU 1" in said
    assert f"yes {EXPANDABLE}" in said
    path = tmp_path / "log"
    path.write_text(text)
    code, out, _ = command(capsys, monkeypatch, "", str(path), "--json")
    assert (code, json.loads(out)["unallocated"]) == (0, 9 * GIB)
    code, out, err = command(capsys, monkeypatch, "nothing of the kind")
    assert (code, out, err.count("\n")) == (1, "", 1)
    code, _, err = command(capsys, monkeypatch, "", str(tmp_path / "nowhere"))
    assert (code, err.count("\n")) == (1, 1)
    assert command(capsys, monkeypatch, text, "--unit", "bits")[0] == 2
