"""What a launcher's variables say of this process."""

from __future__ import annotations

import pytest

from memprof.environment import LOCAL_RANK_VARIABLES, own_card, rank_shard

VARIABLES = (
    "RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, ("2/4", "RANK")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
        # srun: a step of four tasks.
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
            ("4/4", "SLURM_PROCID"),
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, ("4/4", "SLURM_PROCID")),
        # The script of sbatch --ntasks 4, and one task that srun starts in it.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_a_shard_follows_from_a_launcher_alone(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, str], found: tuple[str, str] | None
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert rank_shard() == found


@pytest.mark.parametrize(
    ("there", "cards", "found"),
    [
        ({}, 8, None),
        ({"LOCAL_RANK": "3"}, 8, 3),
        ({"LOCAL_RANK": "3"}, 1, 0),  # CUDA_VISIBLE_DEVICES shows each rank its own
        ({"LOCAL_RANK": "5"}, 4, 1),
        ({"SLURM_LOCALID": "2"}, 4, 2),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 4, 1),  # torchrun in a SLURM step of one task
        ({"LOCAL_RANK": "1"}, 0, None),
    ],
)
def test_each_local_rank_takes_a_card(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, str], cards: int, found: int | None
) -> None:
    for name in LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert own_card(cards) == found
