"""``docs/github-action.yml``: its steps do what they say, on two sides of a pull request that doubles the prompt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys, torch
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cuda")
ids = torch.full((1, LENGTH), 5).to("cuda")
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
"""


def steps() -> dict[str, dict[str, Any]]:
    """The workflow's steps by name."""
    flow = yaml.safe_load((ROOT / "docs" / "github-action.yml").read_text())
    return {step.get("name", step.get("uses")): step for step in flow["jobs"]["memory"]["steps"]}


def test_it_is_a_workflow() -> None:
    flow = yaml.safe_load((ROOT / "docs" / "github-action.yml").read_text())
    assert flow[True] == "pull_request"  # what YAML makes of "on"
    assert flow["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert list(steps())[-1] == "Hold it to the limit"


@pytest.mark.slow
def test_its_steps_predict_both_sides_and_hold_the_head_to_the_base(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("internvl")[2].save_pretrained(model)
    (model / "model.safetensors").unlink()  # nobody needs it
    for side, length in (("base", 400), ("head", 800)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "demo.py").write_text(SCRIPT.replace("LENGTH", str(length)))
    tool = tmp_path / "bin" / "memprof"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m memprof "$@"\n')
    tool.chmod(0o755)
    env = {
        **os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CARD": "l4",
        "SCRIPT": f"demo.py {model}", "FAIL_ABOVE": "2%", "MEMPROF_CACHE": str(tmp_path / "cache"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "GITHUB_OUTPUT": str(tmp_path / "output"),
    }  # fmt: skip
    for name in ("Predict both sides", "Compare"):
        words = ["bash", "-e", "-c", steps()[name]["run"]]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == "code=3\n"
    comment = (tmp_path / "comment.md").read_text()
    assert comment.startswith("### Memory: grew by more than 2%\n\n- dynamic peak of call-1: ")
    assert "predicted" in comment
    assert (tmp_path / "summary").read_text() == comment
