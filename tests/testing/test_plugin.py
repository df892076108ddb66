"""The pytest plug-in: limits, predictions, baselines, the fixture, and what a failure tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

from memprof.records import Run
from memprof.testing.baselines import Taken

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic import make_runs

pytest_plugins = ["pytester"]

#: What every test file of these tests begins with: a tiny model, and a prompt about one picture.
HEAD = """
import pytest, torch

@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained({path!r}, dtype=torch.float32)

@pytest.fixture
def inputs():
    ids = torch.full((1, 40), 5)
    ids[0, 2:18] = 290
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 112, 112))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("internvl")[2].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return make_runs(("ai2d",), samples=3, tokens=4)


@pytest.fixture
def tests(pytester: pytest.Pytester, saved: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project of its own, as strict as can be."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name in ("CI", "BUILD_NUMBER"):  # where one is set, pytest prints each failure whole twice
        monkeypatch.delenv(name, raising=False)
    pytester.makeini("[pytest]\naddopts = --strict-markers --strict-config\nfilterwarnings = error\n")
    pytester.makeconftest(HEAD.format(path=str(saved)))
    return pytester


def run(tests: pytest.Pytester, body: str, *words: str) -> pytest.RunResult:
    """Run ``body`` as a test file, with the plug-in."""
    tests.makepyfile(test_it=body)
    return tests.runpytest_inprocess("-p", "memprof.testing", "-p", "no:cacheprovider", *words)


GENERATES = """
import pytest, torch

{mark}
def test_answer(model, inputs):
    inputs = {{k: torch.cat([v] + [v[:, -1:]] * {more}, 1) if v.ndim == 2 else v for k, v in inputs.items()}}
    model.generate(**inputs, max_new_tokens={new})
"""


def generates(mark: str, new: int = 3, more: int = 0) -> str:
    """A test that makes ``new`` tokens from a prompt that is ``more`` tokens longer."""
    return GENERATES.format(mark=mark, new=new, more=more)


def test_a_limit_that_holds_passes(tests: pytest.Pytester) -> None:
    run(tests, generates('@pytest.mark.gpu_memory(limit="1GiB")')).assert_outcomes(passed=1)


def test_a_limit_that_is_exceeded_says_who_holds_it(tests: pytest.Pytester) -> None:
    done = run(tests, generates('@pytest.mark.gpu_memory(limit="1KiB", part="kv_cache")'))
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    assert "KV cache is" in text
    assert "(limit 1KiB)" in text
    assert "measured on cpu, called from test_it.py:6" in text
    assert "16 visual and 24 text tokens, 3 made" in text
    assert "transformers/cache_utils.py:" in text
    assert "memprof/testing" not in text  # no traceback of ours
    assert "Traceback" not in text


def test_baselines_are_written_and_then_held(tests: pytest.Pytester) -> None:
    done = run(tests, generates("@pytest.mark.gpu_memory()"))
    done.assert_outcomes(failed=1)
    assert "no baseline for cpu_torch-" in done.stdout.str()
    assert "--memprof-update writes one" in done.stdout.str()
    done = run(tests, generates("@pytest.mark.gpu_memory()"), "--memprof-update")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["memprof: 1 baseline written to memory-baselines/cpu_torch-*_transformers-*.json"])
    run(tests, generates("@pytest.mark.gpu_memory()")).assert_outcomes(passed=1)
    # A longer prompt is well within 32 MiB of so small a model, and not within 1 %.
    run(tests, generates("@pytest.mark.gpu_memory()", more=300)).assert_outcomes(passed=1)
    marks = '@pytest.mark.gpu_memory(tolerance="1%")\n@pytest.mark.gpu_memory(tolerance="1%", part="kv_cache")'
    done = run(tests, generates(marks, more=300))
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    assert "peak memory is" in text
    assert "KV cache is" in text
    assert "baseline 28.8 KiB and 1%" in text
    done.stdout.re_match_lines([r"  MLP +0\.029 +0\.\d+ +\+0\.\d+$", r"  most KV cache at any .* \+0\.\d+$"])
    done.stdout.re_match_lines([r"  who grew, of the largest tensors then:", r" +\+\d.* transformers/.*\.py:\d+  "])
    (file,) = (tests.path / "memory-baselines").iterdir()
    there = json.loads(file.read_text())["tests"]["test_it.py::test_answer"]
    assert there["peak"] == there["static"] + sum(there["parts"].values())


def test_a_baseline_of_another_device_is_none_and_is_named(tests: pytest.Pytester) -> None:
    run(tests, generates("@pytest.mark.gpu_memory()"), "--memprof-update").assert_outcomes(passed=1)
    (file,) = (tests.path / "memory-baselines").iterdir()
    file.rename(file.with_name("cuda-nvidia-h200_torch-2.9.0_transformers-5.1.0.json"))
    done = run(tests, generates("@pytest.mark.gpu_memory()"))
    done.assert_outcomes(failed=1)
    assert "there is one for cuda-nvidia-h200_torch-2.9.0_transformers-5.1.0" in done.stdout.str()


#: Calls of which each holds most of something else: the highest keeps no cache, and the larger model has few tokens.
SEVERAL = """
import pytest, torch

@pytest.fixture
def larger():
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=300)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **sizes)).eval()

def calls(model, larger, new):
    ids = torch.full((1, 8), 5)
    model.generate(ids, max_new_tokens=new, eos_token_id=None)
    many = ids.repeat(600, 1)
    model.generate(many, attention_mask=torch.ones_like(many), max_new_tokens=1, use_cache=False)
    larger.generate(ids[:, :1], max_new_tokens=1)

{marks}
def test_answers(model, larger):
    calls(model, larger, {new})
"""


def several(*marks: str, new: int = 20) -> str:
    return SEVERAL.format(marks="\n".join(f"@pytest.mark.gpu_memory({mark})" for mark in marks), new=new)


def test_a_part_is_held_in_whichever_call_holds_most_of_it(tests: pytest.Pytester) -> None:
    done = run(tests, several('limit="12KiB", part="kv_cache"', 'limit="1MiB", part="static"', 'limit="90MiB"'))
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    assert "KV cache is" in text
    assert "8 text tokens, 20 made" in text
    assert "static is 1.4 MiB" in text
    assert text.count("  at the highest instant") == 2


def test_a_baseline_knows_the_call_that_holds_most_of_each_part(tests: pytest.Pytester) -> None:
    marks = 'tolerance="1%"', 'tolerance="1%", part="kv_cache"', 'tolerance="1%", part="static"'
    run(tests, several(*marks), "--memprof-update").assert_outcomes(passed=1)
    run(tests, several(*marks)).assert_outcomes(passed=1)
    done = run(tests, several(*marks, new=30))
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    assert "KV cache is" in text
    assert text.count("  at the highest instant") == 1  # the highest call is what it was, and so is the larger model
    done.stdout.re_match_lines([r"  most KV cache at any +0\.\d+ +0\.\d+ +\+0\.\d+$"])


def test_the_cache_is_held_to_its_most_and_not_to_what_it_had_at_the_highest_instant(runs: list[Run]) -> None:
    (made,) = (run for run in runs if run.record.spec.method.startswith("topv"))
    sample = max(made.finished, key=lambda s: s.kv_cache_bytes)
    assert max(sample.token_parts.get("kv_cache", [0])) <= sample.kv_cache_bytes
    assert Taken.of(made, sample).bytes_of("kv_cache") == sample.kv_cache_bytes


#: Calls that end by an exception, or cannot be counted, each beside a small one that holds every limit.
UNSEEN = """
import copy, pytest, threading, torch

class Stops:
    def __init__(self, after):
        self.left = after
    def put(self, tokens):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no more")
    def end(self):
        pass

def small(model, new=1, **more):
    return model.generate(torch.full((1, 8), 5), max_new_tokens=new, eos_token_id=None, **more)

@pytest.mark.gpu_memory(limit="8KiB", part="kv_cache")
def test_stopped(model):
    small(model)
    with pytest.raises(RuntimeError, match="no more"):
        small(model, 40, streamer=Stops(21))

@pytest.mark.gpu_memory(limit="1GiB")
def test_stopped_early_enough(model):
    with pytest.raises(RuntimeError, match="no more"):
        small(model, 40, streamer=Stops(3))

@pytest.mark.gpu_memory(limit="1GiB")
def test_not_begun(model):
    with pytest.raises(ValueError):
        small(model, nonsense=1)

@pytest.mark.gpu_memory(limit="1GiB")
def test_beside_one_that_was(model):
    small(model)
    with pytest.raises(ValueError):
        small(model, nonsense=1)

@pytest.mark.gpu_memory(limit="1GiB")
def test_uncounted(model):
    small(model)
    small(model, 4, prompt_lookup_num_tokens=2)

@pytest.mark.gpu_memory()
def test_only_uncounted(model):
    small(model, 4, prompt_lookup_num_tokens=2)

@pytest.mark.gpu_memory(limit="1GiB")
def test_threads(model):
    copied = copy.deepcopy(model)
    class Waits(Stops):
        def put(self, tokens):
            if not self.left:
                other = threading.Thread(target=small, args=(copied,))
                other.start()
                other.join()
            self.left = 1
    small(model, 2, streamer=Waits(0))

def test_fixture(model, memory_profile):
    small(model, 4, prompt_lookup_num_tokens=2)
    assert len(memory_profile.runs) == 1
    memory_profile.peak
"""

#: Which of them are refused, and why.
UNCOUNTED = [
    ("test_it.py::test_uncounted", ": in chunked prefill"),
    ("test_it.py::test_only_uncounted", ": in chunked prefill"),
    ("test_it.py::test_threads", ", as another thread was generating"),
    ("memprof.errors.UsageError", ": in chunked prefill"),  # of the fixture, in the test's own line
]


def test_a_stopped_call_counts_and_one_without_numbers_fails_the_gate(tests: pytest.Pytester) -> None:
    done = run(tests, UNSEEN)
    done.assert_outcomes(passed=2, failed=6)
    text = done.stdout.str()
    assert "KV cache is" in text
    assert "made, then stopped: RuntimeError: no more" in text
    assert "test_it.py::test_not_begun: no generate() of this test came to a forward" in text
    assert "so there is nothing to hold to anything: test_it.py:14: ValueError: " in text
    for test, why in UNCOUNTED:
        said = "not every generate() of this test could be measured, so there is no saying what it takes"
        assert f"{test}: {said}: test_it.py:14: not profiled{why}" in text
    assert "no model of transformers" not in text


def test_no_baseline_is_written_for_want_of_numbers(tests: pytest.Pytester) -> None:
    run(tests, UNSEEN, "-k", "uncounted", "--memprof-update").assert_outcomes(failed=2, deselected=6)
    assert not (tests.path / "memory-baselines").exists()


PREDICTS = """
import pytest

@pytest.mark.memory_prediction(model="internvl2-2b", card="l4", fits=True)
def test_fits():
    pass

@pytest.mark.memory_prediction(model="internvl2-2b", card="2GiB", fits=False)
def test_does_not_fit():
    pass

@pytest.mark.memory_prediction(model="internvl2-2b", card="2GiB", fits=True)
def test_should_fit():
    pass

@pytest.mark.memory_prediction(model="internvl2-2b", card="l4", limit="4.2GiB", images=[(1600, 1200)])
def test_has_a_limit():
    pass

@pytest.mark.memory_prediction(model="internvl2-2b", card="l4", part="kv_cache", images=[(448, 448)])
def test_has_a_baseline(memory_profile):
    assert memory_profile.predictions[0].samples[0].visual_tokens == 256

class TestOwn:
    @pytest.fixture
    def model(self):
        from transformers import AutoConfig
        return AutoConfig.from_pretrained({path!r})

    @pytest.mark.memory_prediction(limit="1GiB", text_tokens=20)
    def test_the_fixtures_model(self, model, memory_profile):
        assert memory_profile.predictions[0].record.spec.model

def test_no_mark_and_no_card():
    pass
"""


def test_predictions_take_no_card(tests: pytest.Pytester, saved: Path) -> None:
    body = PREDICTS.replace("{path!r}", repr(str(saved)))
    done = run(tests, body, "--memprof-update")
    done.assert_outcomes(passed=5, failed=2)
    text = done.stdout.str()
    assert "test_it.py::test_should_fit: predicted not to fit on 2GiB" in text
    assert "peak memory is" in text
    assert "predicted for l4" in text
    assert "3,328 visual" in text
    assert "model.language_model.layers.*.mlp" in text
    done = run(tests, body, "-k", "test_has_a_baseline")
    done.assert_outcomes(passed=1)


WRONG = """
import pytest

@pytest.mark.gpu_memory({words})
def test_it(model, inputs):
    {body}
"""


@pytest.mark.parametrize(
    ("words", "body", "said"),
    [
        ('limit="1GiB"', "pass", "no model of transformers generated in this test"),
        ('"1GiB"', "pass", "takes arguments by name, as limit='1GiB'"),
        ('most="1GiB"', "pass", "knows no 'most'; valid: limit, part, tolerance"),
        ('limit="1GiB", part="cache"', "model.generate(**inputs, max_new_tokens=1)", "unknown part 'cache'"),
        ('limit="1"', "model.generate(**inputs, max_new_tokens=1)", "has no unit"),
        ("limit=2**30", "pass", "'1073741824' has no unit; write for example 1073741824B, or 5GiB or 512MiB"),
        ('limit="1GiB", tolerance="1%"', "pass", "a tolerance is of a baseline, and a limit has none"),
        ("tolerance=0.02", "pass", 'tolerance=0.02 is none; write for example tolerance="2%"'),
    ],
)
def test_mistakes_fail_in_one_line(tests: pytest.Pytester, words: str, body: str, said: str) -> None:
    done = run(tests, WRONG.format(words=words, body=body))
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    assert said in text
    assert "Error" not in text
    assert "another exception" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('fits="no"', "fits='no' is neither True nor False"),
        ("fits=1", "fits=1 is neither True nor False"),
        ('fits=False, limit="1GiB"', "what is not to fit has no limit; write a mark of its own for that"),
        ('fits=False, part="kv_cache"', "what is not to fit has no part"),
        ('limit="9GiB", tolerance="2%"', "a tolerance is of a baseline, and a limit has none"),
        ("limit=10**9", "write for example 1000000000B"),
        ('fits=True, part="kv_cache"', "no baseline for predicted-l4"),
    ],
)
def test_a_prediction_that_would_be_held_to_less_than_it_says_is_refused(
    tests: pytest.Pytester, words: str, said: str
) -> None:
    mark = f'@pytest.mark.memory_prediction(model="internvl2-2b", card="l4", text_tokens=20, {words})'
    done = run(tests, f"import pytest\n\n{mark}\ndef test_it():\n    pass\n")
    done.assert_outcomes(failed=1)
    assert said in done.stdout.str()
    assert "Error" not in done.stdout.str()


USES = """
import pytest

def test_it(model, inputs, memory_profile):
    with pytest.raises(Exception, match="no model of transformers generated"):
        memory_profile.peak
    model.generate(**inputs, max_new_tokens=2)
    first = memory_profile.parts["kv_cache"]
    model.generate(**inputs, max_new_tokens=8)
    assert memory_profile.parts["kv_cache"] >= first > 0
    assert len(memory_profile.run.samples) == 2
    assert len(memory_profile.tokens) == 10
    assert "test_it.py" in memory_profile.table()

def test_its_own_failure_is_its_own(model, inputs, memory_profile):
    assert model.generate(**inputs, max_new_tokens=1).shape == (1, 1)
"""


def test_the_fixture_has_what_a_profile_has(tests: pytest.Pytester) -> None:
    done = run(tests, USES)
    done.assert_outcomes(passed=1, failed=1)
    assert "AssertionError" in done.stdout.str()


def test_it_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_it():\n"
        "    assert not {'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)\n"
        "    assert not [n for n in sys.modules if n.startswith('memprof.') and not n in\n"
        "                ('memprof.testing', 'memprof.version')]\n"
    )
    words = ["-m", "pytest", "-p", "memprof.testing", "-p", "no:cacheprovider", "-q", "--strict-markers"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_entry_point_is_the_module() -> None:
    """So that ``-p memprof.testing`` beside it is the same plug-in, and no second one."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"memprof.testing": "memprof.testing"}
