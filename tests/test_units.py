from __future__ import annotations

import pytest

from memprof.errors import BadValue
from memprof.units import GIB, MIB, check_unit, format_bytes, parse_bytes, say_bytes, unit_for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GiB", 5 * 2**30),
        ("8 GB", 8 * 10**9),
        ("512MiB", 2**29),
        ("4096", 4096),
        ("5.2gib", int(5.2 * 2**30)),
        (".5 KB", 500),
    ],
)
def test_parse(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "5G", "GiB", "-1GiB", "five", "1 2"])
def test_what_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="GiB"):
        parse_bytes(text)


def test_the_unit_stands_beside_the_number() -> None:
    assert format_bytes(4_411_509_760) == "4.109 GiB"
    assert format_bytes(4_411_509_760, "GB", 2) == "4.41 GB"
    said = {0: "0 B", 512: "512 B", 27_136: "26.5 KiB", 2 * MIB: "2.0 MiB", 4_411_509_760: "4.109 GiB"}
    assert {n_bytes: say_bytes(n_bytes) for n_bytes in said} == said
    with pytest.raises(BadValue, match="GiB, GB"):
        check_unit("G")


def test_the_unit_follows_from_the_size_unless_asked_for() -> None:
    assert [unit_for(n) for n in (4 * GIB, GIB // 5, 7 * MIB, 0)] == ["GiB", "GiB", "MiB", "MiB"]
    assert [unit_for(n, least=50_000) for n in (GIB, 7 * MIB)] == ["GiB", "KiB"]  # what is shown beside it counts
    assert [unit_for(n, least=0) for n in (7 * MIB, 50_000)] == ["MiB", "MiB"]
    assert unit_for(50_000) == "KiB"
    assert unit_for(7 * MIB, "GB") == "GB"
    with pytest.raises(BadValue):
        unit_for(7 * MIB, "G")
