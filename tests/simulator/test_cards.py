from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from memprof.errors import BadValue, DataError
from memprof.gpus import (
    ANY,
    CARDS,
    CONTEXT_BYTES,
    cublas_workspace_bytes,
    cublaslt_workspace_bytes,
    find_card,
    load_calibration,
)
from memprof.simulator.rules import RULES, flash_splits
from memprof.units import GIB, MIB


def test_names_and_sizes() -> None:
    assert find_card(None) == find_card("h100@any")
    assert find_card("8GiB").architecture == CARDS["h100"].architecture
    assert find_card("H100") is CARDS["h100"]
    assert find_card("RTX 4090").name == "rtx4090"
    assert find_card("8GiB").memory_bytes == 8 * GIB
    anyhow = find_card("H100@any")
    assert anyhow.memory_bytes is None
    assert dataclasses.replace(anyhow, memory_bytes=CARDS["h100"].memory_bytes) == CARDS["h100"]
    assert CARDS["h100"].any_memory == "h100@any"
    assert find_card("8GiB").any_memory is None
    for wrong, says in (
        ("h10", "did you mean 'h100'"),
        ("", "unknown card"),
        ("0GiB", "no memory"),
        ("8G", "cannot read"),
    ):
        with pytest.raises(BadValue, match=says):
            find_card(wrong)


def test_workspaces_by_architecture() -> None:
    assert cublas_workspace_bytes(CARDS["h100"], {}) == 32 * MIB
    assert cublas_workspace_bytes(CARDS["a100"], {}) == 8_519_680  # :4096:2:16:8
    assert cublas_workspace_bytes(ANY, {}) == 0
    assert cublas_workspace_bytes(find_card("8GiB"), {}) == 32 * MIB
    assert cublas_workspace_bytes(CARDS["t4"], {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}) == 16 * 8 * 1024
    assert cublas_workspace_bytes(CARDS["t4"], {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}) == 8_519_680
    assert cublaslt_workspace_bytes(CARDS["h100"], {}) == MIB
    assert cublaslt_workspace_bytes(CARDS["h100"], {"CUBLASLT_WORKSPACE_SIZE": "32768"}) == 32 * MIB
    assert cublaslt_workspace_bytes(CARDS["l4"], {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}) == 16 * 8 * 1024


def test_splits_of_the_keys() -> None:
    assert flash_splits(300, 264, 40) == 1  # the card is full
    assert flash_splits(8, 264, 1) == 1  # one block cannot be cut
    assert flash_splits(8, 264, 27) == 27
    assert flash_splits(32, 216, 6) == 6
    sums, output = RULES["cuda:flash split logsumexp"], RULES["cuda:flash split output"]
    decode = (132, 1, 8, 2, 3388, 128)  # InternVL2-2B: two query heads of each of eight groups become queries
    assert sums(decode) == 4 * 27 * 8 * 2
    assert output(decode) == 4 * 27 * 8 * 2 * 128
    assert output((132, 1, 16, 3388, 3388, 128)) == output((0, *decode[1:])) == 0


def test_a_calibration_says_how(tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    good = {"schema": 1, "card": "h100", "measured": {"context_bytes": {"bytes": 5, "how": "NVML less reserved"}}}
    file.write_text(json.dumps(good))
    calibrated = load_calibration(file, CARDS["h100"])
    assert (calibrated.context_bytes, CARDS["h100"].context_bytes) == (5, CONTEXT_BYTES)
    assert calibrated.source.endswith("; h100.json")
    for wrong in (
        {**good, "schema": 2},
        {**good, "card": "t4"},
        {**good, "measured": {"context_bytes": {"bytes": 5, "how": " "}}},
        {**good, "measured": {"context_bytes": 5}},
        [],
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError):
            load_calibration(file, CARDS["h100"])
    with pytest.raises(DataError):
        load_calibration(tmp_path / "none.json", CARDS["h100"])
