"""Whatever a user calls a model, one path leads to it: a name, a hub id, a folder, a configuration alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import families, tiny_card

from memprof import api
from memprof.bench import Bench
from memprof.errors import UnknownName, UsageError, WeightsError, did_you_mean
from memprof.families import FAMILIES, Model
from memprof.models.find import find, named
from memprof.records import RunSpec
from memprof.runner import complete_spec, run

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"


def written(model: Model) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint of ``model``."""
    found: dict[str, Any] = model.family.config(model).to_dict()
    return {**found, "model_type": model.config["model_type"], "torch_dtype": model.dtype}


def sizes(model: Model) -> tuple[Any, ...]:
    vision = {key: model.vision.get(key) for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size")}
    return model.layers, model.hidden, model.ffn, model.kv_numbers, model.positions, vision


@pytest.mark.parametrize("name", named())
def test_every_named_model_is_its_configuration(name: str, tmp_path: Path) -> None:
    """A folder with its ``config.json`` is the same model, and so is the file alone, whatever it is called."""
    model = find(name)
    assert find(name.upper()) is model
    (tmp_path / "config.json").write_text(json.dumps(written(model)))
    (tmp_path / "alone.json").write_text(json.dumps(written(model)))
    for where in (tmp_path, tmp_path / "config.json", tmp_path / "alone.json"):
        found = find(str(where))
        assert (found.family, sizes(found), found.dtype) == (model.family, sizes(model), model.dtype)
        assert found.family.config(found).to_dict() == model.family.config(model).to_dict()
        assert find(found.name) == found
    assert find(name, str(tmp_path)).title == model.title


def test_titles_say_where_a_model_is_from(tmp_path: Path) -> None:
    model = tiny_card(FAMILIES.load("internvl")())
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written(model)))
    (tmp_path / "alone.json").write_text(json.dumps(written(model)))
    assert find(str(folder)).title == find(str(folder / "config.json")).title == "mine"
    assert find(str(tmp_path / "alone.json")).title == "alone"
    assert find("internvl2-2b", str(folder)).title == "InternVL2-2B as in mine"


ASK = "import sys; from memprof.models.find import find; m = find(sys.argv[1]); print(m.name, m.title, m.layers, m.hub)"


def asked(home: Path, *words: str, path: Path | None = None, code: str = ASK) -> subprocess.CompletedProcess[str]:
    """What a fresh process says with ``home`` as its Hugging Face cache, and ``path`` on its import path."""
    more = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "MEMPROF_CACHE": ""}
    env = {**os.environ, **more} | ({"PYTHONPATH": os.pathsep.join([str(path), *sys.path])} if path else {})
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_hub_id_is_read_from_the_local_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--somebody--their-model"
    (snapshot / "snapshots" / "0123abcd").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0123abcd")
    model = tiny_card(FAMILIES.load("llava")())
    (snapshot / "snapshots" / "0123abcd" / "config.json").write_text(json.dumps(written(model)))
    done = asked(tmp_path, "somebody/their-model")
    assert done.stdout.split() == ["somebody/their-model", "their-model", str(model.layers), "somebody/their-model"]
    done = asked(tmp_path, "somebody/another")
    assert "WeightsError: somebody/another is neither a model that `memprof list` names" in done.stderr
    assert asked(tmp_path, "OpenGVLab/InternVL2-2B").stdout.startswith("internvl2-2b InternVL2-2B 24 ")


def test_what_nobody_knows_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown model 'internvl2-2x' .did you mean 'internvl2-2b'"):
        find("internvl2-2x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty holds no config\.json"):
        find(str(tmp_path / "empty"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError, match=r"no family of models of type 'bert'; it knows .*internvl"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no family of models of type None"):
        find(str(tmp_path))


@pytest.mark.parametrize("family", families())
def test_a_folder_runs_as_the_model_does(family: str, tmp_path: Path) -> None:
    """The same bytes, whichever way the configuration is named."""
    model = tiny_card(FAMILIES.load(family)())
    (tmp_path / "config.json").write_text(json.dumps(written(model)))
    (tmp_path / "one.csv").write_text("width,height,text_tokens\n400,200,9\n")
    spec = RunSpec(
        str(tmp_path), "topv:layer=1", "ai2d", "sim", dtype="float32", data=str(tmp_path / "one.csv"), max_new_tokens=2
    )
    done = complete_spec(spec)
    assert done.setup.model.layers == model.layers
    there = run(spec, tmp_path / "run", bench=Bench(done.setup)).samples[0]
    assert there.status == "ok", there.error
    assert there.shape is not None
    assert there.kv_tokens_found == there.kv_tokens_planned
    own = Bench(complete_spec(spec).setup).set_up(done.setup)
    assert own.outcome(done.ask(there.shape)).memory.fullest.dynamic_peak_bytes == there.dynamic_peak_bytes


# -- a family of somebody else's ---------------------------------------------------------------------------------------

RUN = """
import json, sys
from memprof.families import FAMILIES
from memprof.pruning import METHODS, build_pruner, method_spec
from memprof.records import RunSpec
from memprof.runner import run
assert "strips" in FAMILIES.names() and "every-other" in METHODS.names()
assert method_spec(build_pruner("every-other:keep=0.25")) == "every-other:keep=0.25,layer=2"
model, folder = sys.argv[1:]
for method in ("baseline", "topv:layer=1", "every-other:layer=1"):
    spec = RunSpec(model, method, "ai2d", "sim", dtype="float32", data=folder + "/shapes.csv", max_new_tokens=3)
    for sample in run(spec, __import__("pathlib").Path(folder, method.partition(":")[0])).samples:
        assert sample.ok, sample.error
        print(json.dumps([method, sample.tiles, sample.visual_tokens, sample.text_tokens, sample.kept_visual_tokens,
                          sample.kv_tokens_found == sample.kv_tokens_planned]))
"""


@pytest.mark.slow
def test_another_package_adds_a_family_and_a_method_in_a_file_each(tmp_path: Path) -> None:
    """What it takes: the file, and a line of entry points. No file of memprof knows of either."""
    files = {name: (PLUGIN / name).read_text() for name in ("strips.py", "every_other.py")}
    assert all(len(text.splitlines()) <= 60 for text in files.values())
    site = tmp_path / "site"
    about = site / "strips-1.0.dist-info"
    about.mkdir(parents=True)
    for name, text in files.items():
        (site / name).write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: strips\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[memprof.families]\nstrips = strips\n\n[memprof.methods]\nevery-other = every_other\n"
    )
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = {
        "model_type": "qwen2_vl", "image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 288,
        "vision_end_token_id": 289, "text_config": {**text, "model_type": "qwen2_vl_text"},
        "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 14,
                          "spatial_merge_size": 2},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "shapes.csv").write_text("width,height,text_tokens\n280,140,7\n84,84,9\n")
    done = asked(tmp_path, str(tmp_path / "config.json"), str(tmp_path), path=site, code=RUN)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[:4] for row in rows] == [[m, 1, *n] for m in ("baseline", "topv:layer=1", "every-other:layer=1")
                                         for n in ((50, 16), (9, 18))]  # fmt: skip
    assert all(row[5] for row in rows)
    assert rows[0][4] == [50] * 4
    assert rows[2][4] == rows[4][4] == [50, 25, 25, 25]


def test_the_worked_examples_of_contributing_are_what_is_tested(tmp_path: Path) -> None:
    blocks = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1:]
    code = [block.partition("```")[0] for block in blocks]
    assert (PLUGIN / "strips.py").read_text() in code
    (tmp_path / "brightest.py").write_text(code[0])
    code[1] = "from brightest import Brightest; print(Brightest().stages(100, 5)[0].kept)"
    said = asked(tmp_path, path=tmp_path, code=code[1])
    assert said.stdout.strip() == "50", said.stderr


def test_an_option_that_a_family_cannot_heed_is_refused_by_name() -> None:
    """Whatever the family: what would change nothing is refused, and what changes something is taken."""
    for model in {type(model.family): model for model in named().values()}.values():
        image = model.family.image if model.family.sees else None
        heeded = image is not None and image(model, 4096, 1024, 1) != image(model, 4096, 1024, 16)
        for asked, taken in (({"max_tiles": 16}, heeded), ({"images": 2}, model.family.sees)):
            if taken:
                assert api.spec(model.name, **asked).model == model.name
            else:
                with pytest.raises(UsageError, match=f"leave out {next(iter(asked))}="):
                    api.spec(model.name, **asked)
        assert api.spec(model.name).max_tiles is None
    text = next(name for name, model in named().items() if not model.family.sees)
    for more in ({"tiles": 3}, {"images": 2}):
        with pytest.raises(UsageError, match="takes no images"):
            api.fits("h100", text, **more)
    with pytest.raises(UsageError, match="leave out max_tiles=3"):
        api.predict("llava-1.5-7b", images=[(100, 100)], max_tiles=3)


def test_the_nearest_names_begin_with_what_was_typed() -> None:
    for typed in ("internvl2", "llava", "qwen2.5-vl"):
        with pytest.raises(UnknownName) as told:
            find(typed)
        near = re.findall("'([^']*)'", str(told.value).partition("did you mean")[2].partition("?")[0])
        assert 1 < len(near) <= 3
        assert all(name.startswith(typed) for name in near[:2])
    hubs = [model.hub for model in named().values() if model.hub]
    assert did_you_mean("Qwen/Qwen2.5-VL-7b", hubs).startswith(" (did you mean 'Qwen/Qwen2.5-VL-7B-Instruct', ")
    assert did_you_mean("zzz", hubs) == ""
