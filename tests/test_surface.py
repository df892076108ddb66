"""The public surface: what ``memprof`` offers is frozen here, and does what it says on models of three kinds."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import Shell
from tiny import families, state_of, tiny_model, tiny_prompt
from transformers import LlamaConfig, LlamaForCausalLM

import memprof
from memprof import records, scopes
from memprof.bench.generate import place
from memprof.calls import NOTHING
from memprof.cli import main
from memprof.errors import BadValue, DoesNotFit, MemprofError, RunExists, UnknownName, UsageError, WeightsError
from memprof.gpus import CONTEXT_BYTES
from memprof.profiler import Profiler
from memprof.pruning import build_pruner
from memprof.pruning.surgery import Surgery, entered_on
from memprof.records import PARTS
from memprof.units import MIB

#: Every name, and how it is called. Whoever changes a line here changes what programs of others rely on.
SURFACE = {
    "fits": "(card: 'str', model: 'str', *, context: 'str | None' = None, **asked: 'Any') -> 'Fit'",
    "predict": "(model: 'str | PreTrainedConfig | nn.Module', inputs: 'Mapping[str, Any] | None' = None, *, "
    "images: 'Sequence[tuple[int, int]]' = (), text_tokens: 'int' = 53, method: 'str' = 'baseline', "
    "stack: 'str' = 'current', new_tokens: 'int' = 16, card: 'str | None' = None, dtype: 'str | None' = None, "
    "attention: 'str | None' = None, max_tiles: 'int | None' = None, batch: 'int' = 1) -> 'Profile'",
    "profile": "(model: 'nn.Module') -> 'Iterator[Profile]'",
    "prune": "(model: 'nn.Module', method: 'str', inputs: 'Mapping[str, Any]', *, "
    "images: 'Sequence[tuple[int, int]]' = (), stack: 'str' = 'current', seed: 'int' = 0) -> 'Surgery'",
    "read": "(*paths: 'Path | str') -> 'list[Profile]'",
    "run": "(asked: 'RunSpec', folder: 'Path | str', **how: 'Any') -> 'Profile'",
    "spec": "(model: 'str', method: 'str' = 'baseline', task: 'str' = 'ai2d', device: 'str' = 'auto', *, "
    "dtype: 'str | None' = None, max_new_tokens: 'int | None' = None, **fields: 'Any') -> 'RunSpec'",
    "weightless": "(model: 'str | PreTrainedConfig', *, dtype: 'str | None' = None, card: 'str' = 'h100', "
    "attention: 'str | None' = None) -> 'Iterator[Any]'",
}
#: The same of what they give.
PROFILE = {
    "explain": "(self, sample: 'str | None' = None, *, what_if: 'bool' = True) -> 'Explanation'",
    "plot": "(self, kind: 'str' = 'memory-curve', *, style: 'str' = 'print', width: 'str' = 'single', "
    "unit: 'str | None' = None) -> 'Figure'",
    "save": "(self, folder: 'Path | str', *, force: 'bool' = False) -> 'Path'",
    "table": "(self, unit: 'str | None' = None, *, width: 'int | None' = None) -> 'str'",
}
VALUES = {
    "finished", "healed", "highest", "memory", "parts", "path", "peak", "record", "samples", "tokens", "unfinished",
}  # fmt: skip
#: A language model, one image of one view, images of any size.
KINDS = ("text", "llava", "qwen2-5-vl")


@pytest.fixture(autouse=True)
def own_book(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path / "cache"))


class Homemade(LlamaConfig):
    """Llama under a type that nobody knows."""

    model_type = "homemade"


def text_model(kind: type[LlamaConfig] = LlamaConfig) -> Any:
    config = kind(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def given(kind: str, text: int = 6) -> tuple[Any, dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
    """A tiny model, what a processor would make for it, and its generation of four tokens."""
    if kind == "text":
        model = text_model()
        ids = torch.arange(10, 16 + text)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        family, card, model = tiny_model(kind)
        inputs = place(tiny_prompt(family, card, text=text), model)

    def generate(tokens: int = 4, **how: Any) -> torch.Tensor:
        return model.generate(**inputs, max_new_tokens=tokens, **{"do_sample": False, **how})  # type: ignore[no-any-return]

    return model, inputs, generate


# -- what there is -----------------------------------------------------------------------------------------------------


def test_the_surface_is_frozen() -> None:
    assert set(memprof.__all__) == {"Profile", "Profiler", "__version__", *SURFACE}
    for name, called in SURFACE.items():
        assert str(inspect.signature(getattr(memprof, name))) == called, name
    for name, called in PROFILE.items():
        assert str(inspect.signature(getattr(memprof.Profile, name))) == called, name
    offered = {name for name in dir(memprof.Profile) if not name.startswith("_")} - {"of"}
    fields = {field.name for field in dataclasses.fields(memprof.Profile)}
    assert offered | fields == {*PROFILE, *VALUES}


def test_a_tab_completes_what_is_offered_and_nothing_else() -> None:
    code = "import memprof; print(sorted(dir(memprof)) == sorted(memprof.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_every_record_says_what_its_fields_are() -> None:
    for name, cls in vars(records).items():
        if dataclasses.is_dataclass(cls) and inspect.getmodule(cls) is records and not name.startswith("_"):
            said = inspect.getdoc(cls) or ""
            inherited = "fields are those of" in said
            for field in dataclasses.fields(cls):
                assert inherited or re.search(rf"\b{field.name}\b", said) or cls is records.RunSpec, (name, field.name)


def test_import_is_light() -> None:
    code = (
        "import sys, memprof, memprof.api, memprof.profiles\nassert callable(memprof.predict)\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pandas', 'IPython', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- a window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_changes_nothing_and_sees_every_call(kind: str) -> None:
    model, inputs, generate = given(kind)
    plain, longer = generate(), generate(6)
    torch.manual_seed(5)
    drawn = generate(do_sample=True)
    before = state_of(model)
    with memprof.profile(model) as run:
        assert torch.equal(generate(), plain)
        assert len(run.samples) == 1
        assert torch.equal(generate(6), longer)
        torch.manual_seed(5)
        assert torch.equal(generate(do_sample=True), drawn)
    assert state_of(model) == before
    assert "generate" not in vars(model)
    assert scopes.depth() == 1
    assert [len(sample.tokens) for sample in run.samples] == [4, 6, 4]
    assert len(run.tokens) == 14
    assert run.record.complete
    assert run.record.status == "measured"
    assert run.record.spec.max_new_tokens == 6

    with Profiler(model) as profiler:
        generate()
    first = run.samples[0]
    given_bytes = sum(tensor.untyped_storage().nbytes() for tensor in inputs.values())
    assert first.tokens.kv_bytes == profiler.tokens.kv_bytes
    assert first.peak_parts["inputs"] >= given_bytes
    assert first.peak_allocated_bytes == max(profiler.reading.peak_allocated_bytes) + given_bytes
    assert run.peak == max(sample.peak_allocated_bytes for sample in run.samples)
    assert sum(run.parts.values()) == run.highest.dynamic_peak_bytes == run.peak - run.record.static_bytes
    assert set(run.parts) <= set(PARTS)


@pytest.mark.parametrize("family", families())
def test_a_calls_prompt_is_read_off_its_inputs(family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    inputs = place(prompt, model)
    with memprof.profile(model) as run:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    (sample,) = run.samples
    assert sample.shape is not None
    assert sample.shape.like() == prompt.shape.like()
    assert sample.kv_tokens_found == [prompt.shape.length] * len(sample.kv_tokens_found)


def test_rows_of_tokens() -> None:
    model, _, generate = given("text")
    with memprof.profile(model) as run:
        generate()
        generate(2)
    rows = list(run.tokens)
    assert [(row.sample, row.token) for row in rows] == [
        *(("call-1", token) for token in range(4)), *(("call-2", token) for token in range(2))
    ]  # fmt: skip
    assert rows == run.tokens[:]
    assert repr(run.tokens) == "<6 tokens of 2 samples>"
    for row in rows:
        assert sum(row.parts.values()) == row.peak_allocated_bytes - run.record.static_bytes
        assert row.seconds is not None
        assert row.seconds > 0


def test_rows_of_tokens_as_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    model, _, generate = given("text")
    with memprof.profile(model) as run:
        generate()
    frame = run.tokens.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.kv_bytes) == run.samples[0].tokens.kv_bytes
    assert list(frame.part_kv_cache + frame.part_mlp) == [
        row.parts.get("kv_cache", 0) + row.parts.get("mlp", 0) for row in run.tokens
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_leaves_the_model_as_it_was_and_keeps_what_was_measured(kind: str) -> None:
    model, _, generate = given(kind)
    plain, before, forwards = generate(), state_of(model), 0

    def fail(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 7:
            raise RuntimeError("stop\nhere")

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), memprof.profile(model) as run:
        twice(generate)
    hook.remove()
    assert state_of(model) == before
    assert "generate" not in vars(model)
    assert scopes.depth() == 1
    done, failed = run.samples
    assert (done.status, failed.status, failed.error) == ("ok", "failed", "RuntimeError: stop")
    assert failed.tokens.kv_bytes[:2] == done.tokens.kv_bytes[:2]
    assert len(failed.tokens) == 3
    assert run.peak >= done.peak_allocated_bytes
    assert "1 not finished, the first for: RuntimeError: stop" in repr(run)
    assert "RuntimeError: stop" in run.table()
    assert torch.equal(generate(), plain)


def twice(act: Callable[[], Any]) -> None:
    act()
    act()


def test_an_exception_beside_generate_keeps_all_calls() -> None:
    model, _, generate = given("text")
    with pytest.raises(ZeroDivisionError), memprof.profile(model) as run:
        twice(lambda: generate() if not run.samples else 1 // 0)
    assert [sample.status for sample in run.samples] == ["ok"]
    assert run.record.complete


def test_a_window_without_a_call_says_so() -> None:
    model, _, _ = given("text")
    with memprof.profile(model) as run:
        pass
    assert run.record.notes == [NOTHING]
    assert (run.peak, run.parts, len(run.tokens)) == (0, {}, 0)
    assert NOTHING in run.table()
    assert "0 calls" in repr(run)
    assert "<table" in run._repr_html_()
    with pytest.raises(MemprofError, match="no finished sample"):
        run.explain()
    with pytest.raises(MemprofError, match="no sample finished"):
        run.plot()


def test_what_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(UsageError, match="no generate"), memprof.profile(torch.nn.Linear(2, 2)):
        pass
    model, _, generate = given("text")
    with pytest.raises(MemprofError, match="a forward is not a token"), memprof.profile(model) as run:
        generate(prompt_lookup_num_tokens=2)
    assert [sample.status for sample in run.samples] == ["failed"]


def test_inference_mode_and_prompts_side_by_side() -> None:
    model, inputs, generate = given("text")
    plain = generate()
    with torch.inference_mode(), memprof.profile(model) as run:
        assert torch.equal(generate(), plain)
    two = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    with memprof.profile(model) as both:
        model.generate(**two, max_new_tokens=4, do_sample=False)
    assert both.samples[0].shape is not None
    assert both.samples[0].shape.batch == 2
    assert both.samples[0].tokens.kv_bytes == [2 * n for n in run.samples[0].tokens.kv_bytes]


def test_windows_inside_each_other_both_see() -> None:
    model, _, generate = given("text")
    plain = generate()
    with memprof.profile(model) as outer:
        generate()
        with memprof.profile(model) as inner:
            assert torch.equal(generate(), plain)
        generate()
    assert (len(outer.samples), len(inner.samples)) == (3, 1)
    assert "generate" not in vars(model)


# -- what is shown and kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_shows_itself_and_is_read_back(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, generate = given(kind)
    with memprof.profile(model) as run:
        generate()
        generate(3)
    assert re.fullmatch(
        rf"<memprof.Profile: {type(model).__name__} under Baseline, measured on cpu: peak [\d.]+ MiB "
        r"\([\d.]+ MiB of it static\), 2 calls, 7 tokens>",
        repr(run),
    )
    assert f"{type(model).__name__} on calls of generate(), 2 samples" in run.table()
    said = str(run.explain(what_if=False))
    assert said.startswith(f"{type(model).__name__} under Baseline peaks at")
    assert "Held by (measured):" in said
    run.plot().savefig(tmp_path / "curve.png")
    run.plot("over-tokens", style="slides").savefig(tmp_path / "tokens.svg")
    assert {path.name for path in tmp_path.glob("*.[ps][nv]g")} == {"curve.png", "tokens.svg"}
    with pytest.raises(UnknownName, match="memory-curve"):
        run.plot("nothing")

    folder = run.save(tmp_path / "a")
    with pytest.raises(RunExists):
        run.save(folder)
    run.save(folder, force=True)
    run.save(tmp_path / "b")
    (back,) = memprof.read(folder)
    assert isinstance(back, memprof.Profile)
    assert (back.samples, back.peak, back.parts) == (run.samples, run.peak, run.parts)
    assert back.table() == run.table()
    for words in (
        ["report", str(folder)], ["report", str(folder), "-o", str(tmp_path / "page.html")], ["audit", str(folder)],
        ["plot", str(folder), "-o", str(tmp_path / "figures"), "-f", "png"], ["runs"],
        ["diff", str(folder), str(tmp_path / "b")], ["explain", str(folder), "--no-what-if"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code, (words, capsys.readouterr().err)


def test_what_a_notebook_shows_asks_for_nothing_and_is_read_in_the_dark() -> None:
    model, _, generate = given("llava")
    model.config.name_or_path = "<script>alert(1)</script>"
    try:
        with memprof.profile(model) as run:
            generate()
    finally:
        model.config.name_or_path = ""
    page = run._repr_html_()
    assert page.count("<table") == page.count("<svg") == 1
    assert page.count("<polygon") == len({part for sample in run.samples for part in sample.token_parts})
    assert "<script" not in page.lower()
    assert not re.search(r"(?:src|href)=|url\(|@import", page)
    assert "currentColor" in page
    assert not re.search(r"(?<!-)color:(?!inherit)", page), "text has the page's own colour"
    assert page.count("<div") == page.count("</div")


@pytest.mark.slow
def test_what_would_lower_a_measured_peak_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, generate = given("llava")
    with memprof.profile(model) as run:
        generate()
    found = run.explain()
    assert found.predicted_peak_bytes is not None
    assert {answer.name for answer in found.answers} >= {"8-bit KV cache", "keep 0.5 (pruned 0.5)"}
    with pytest.raises(SystemExit) as ended:
        main(["explain", str(run.save(tmp_path / "run")), "--json"])
    assert not ended.value.code
    (same,) = json.loads(capsys.readouterr().out)["explanations"]
    assert same["predicted_peak_bytes"] == found.predicted_peak_bytes


def test_of_a_model_that_cannot_be_predicted_a_note_says_why() -> None:
    model = text_model(Homemade)
    with memprof.profile(model) as run:
        model.generate(torch.arange(10, 20)[None], max_new_tokens=2, do_sample=False)
    found = run.explain()
    assert found.answers == []
    assert len(found.notes) == 1
    assert "not predicted: a configuration of type 'homemade': memprof knows no family" in found.notes[0]


# -- pruned ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("method", ["fastv:keep=0.5", "topv:keep=0.5"])
def test_ones_own_generate_is_pruned_on_every_family(family: str, method: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    inputs, before = place(prompt, model), state_of(model)
    tiled = any(image.tiles > 1 and not image.views for image in prompt.shape.images)
    sizes = [(400, 200)] if tiled else []
    with Surgery(model, build_pruner(method), prompt.places) as by_hand:
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        kept = by_hand.kept()
    with memprof.prune(model, method, inputs, images=sizes) as surgery, memprof.profile(model) as run:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
    assert surgery.kept() == kept
    assert run.samples[0].kept_visual_tokens == by_hand.visual_tokens
    assert run.samples[0].kv_tokens_found == by_hand.kv_tokens
    assert run.record.spec.method.startswith(method)
    assert entered_on(model) is None
    assert state_of(model) == before
    if tiled and method.startswith("topv"):
        with pytest.raises(UsageError, match="give the pictures' sizes"), memprof.prune(model, method, inputs):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert state_of(model) == before


def test_a_window_is_of_one_method() -> None:
    model, inputs, generate = given("llava")
    with memprof.profile(model) as run:
        generate()
        with pytest.raises(UsageError, match="open a window for each"), memprof.prune(model, "fastv:keep=0.5", inputs):
            generate()
    assert len(run.samples) == 1
    assert "generate" not in vars(model)


def test_prompts_that_cannot_be_pruned_are_refused() -> None:
    model, inputs, _ = given("llava")
    two = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    with pytest.raises(UsageError, match="one prompt at a time"):
        memprof.prune(model, "topv", two)
    for wrong in ({"input_ids": inputs["input_ids"].tolist()}, {"input_ids": inputs["input_ids"][0]}, {}):
        with pytest.raises(UsageError, match="needs its input_ids: a tensor"):
            memprof.prune(model, "topv", wrong)
    with pytest.raises(UsageError, match="and its images 32"):
        memprof.prune(model, "topv", inputs, images=[(10, 10), (10, 10)])
    with pytest.raises(UsageError, match="a view of"):
        memprof.prune(model, "topv", {"input_ids": inputs["input_ids"][:, :-9]})


# -- predicted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_sizes_and_a_window_predict_the_same(kind: str) -> None:
    model, inputs, _ = given(kind, text=40)
    images, text = list[tuple[int, int]](), inputs["input_ids"].shape[1]
    if kind != "text":
        family, card, _ = tiny_model(kind)
        images = [(400, 200)]  # and text beside the chat template that the family has
        text = tiny_prompt(family, card, text=40).shape.text_tokens - sum(family.template[::2])
    sizes = memprof.predict(model, images=images, text_tokens=text, new_tokens=4)
    own = memprof.predict(model, inputs, new_tokens=4)
    with memprof.weightless(model.config, dtype="float32", card="h100") as empty, memprof.profile(empty) as window:
        out = empty.generate(**inputs, max_new_tokens=4)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert "generate" not in vars(empty)
    for run in (sizes, own, window):
        assert run.record.status == "predicted"
        assert run.record.environment["gpu"] == "h100"
        assert len(run.tokens) == 4
        assert "predicted for h100" in repr(run)
        assert run.memory.kv_bytes_per_layer == window.memory.kv_bytes_per_layer
        assert run.record.static_bytes == window.record.static_bytes
    assert sizes.peak == own.peak == window.peak
    assert sizes.parts == own.parts == window.parts
    assert sizes.tokens[3].kv_bytes == own.tokens[3].kv_bytes


def test_a_recorded_prediction_of_a_name_loads_no_torch(tmp_path: Path) -> None:
    asked = "memprof.predict('proving', images=[(80, 80)], text_tokens=6, new_tokens=2, method='topv')"
    memprof.predict("proving", images=[(80, 80)], text_tokens=6, new_tokens=2, method="topv")
    code = (
        f"import sys, memprof\nrun = {asked}\nrun.save({str(tmp_path / 'run')!r})\nprint(run.peak, run.parts, run)\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = memprof.predict("proving", images=[(80, 80)], text_tokens=6, new_tokens=2, method="topv")
    assert done.stdout == f"{here.peak} {here.parts} {here}\n"
    (back,) = memprof.read(tmp_path / "run")
    assert back.samples == here.samples


def test_a_card_that_refuses() -> None:
    large = LlamaConfig(hidden_size=512, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=4)
    asked: dict[str, Any] = {"text_tokens": 2000, "new_tokens": 2, "dtype": "float32"}
    free = memprof.predict(large, **asked)
    assert free.samples[0].ok
    with pytest.raises(DoesNotFit):
        memprof.predict(large, **asked, card="520MiB")
    room = CONTEXT_BYTES + free.record.static_bytes + (free.peak - free.record.static_bytes) // 2
    run = memprof.predict(large, **asked, card=f"{room // MIB}MiB")
    (sample,) = run.samples
    assert sample.status == "oom"
    assert sample.error is not None
    assert "out of memory" in sample.error
    assert run.memory.refused == sample.error
    assert run.peak >= run.record.static_bytes > 0
    assert "1 not finished" in repr(run)
    assert "out of memory" in run.table()


def test_what_no_prompt_can_be_is_refused() -> None:
    for wrong, said in (
        ({"new_tokens": 0}, "new_tokens=0"), ({"batch": 0}, "batch=0"), ({"stack": "paper2"}, "stack"),
        ({"card": "nonesuch"}, "nonesuch"), ({"method": "nonesuch"}, "nonesuch"), ({"attention": "flash"}, "flash"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            memprof.predict("proving", images=[(80, 80)], **wrong)
    beyond: list[dict[str, Any]] = [
        {"text_tokens": 10**12}, {"new_tokens": 10**9}, {"max_tiles": 10**8}, {"text_tokens": 10**6, "batch": 5},
    ]  # fmt: skip
    for more in beyond:
        with pytest.raises(UsageError, match="above the limit"):
            memprof.predict("proving", **more)
    with pytest.raises(UnknownName):
        memprof.predict("nonesuch")
    from transformers import CLIPVisionConfig

    with pytest.raises(WeightsError, match="no family"):
        memprof.predict(CLIPVisionConfig())


def test_a_model_without_sdpa_is_predicted_as_its_window_is() -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4)
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    run = memprof.predict(config, inputs, new_tokens=2)
    with memprof.weightless(config) as empty, memprof.profile(empty) as there:
        empty.generate(**inputs, max_new_tokens=2)
    assert run.samples[0].ok
    assert run.peak == there.peak
    with pytest.raises(UsageError, match="sdpa"):
        memprof.predict(config, inputs, attention="sdpa")


@pytest.mark.parametrize(
    "images",
    [
        [(0, 5)], [(-5, 10)], [(100.5, 10)], [(10**12, 10)], ["a.png"], (1600, 1200), "a.png", 3, [(1, 2, 3)],
        [(80, 80)] * 1001,
    ],
)  # fmt: skip
def test_images_that_no_picture_can_be_are_refused_in_a_line(images: Any) -> None:
    for asked in (
        lambda: memprof.predict("proving", images=images),
        lambda: memprof.predict("proving", {"input_ids": torch.ones(1, 2, dtype=torch.long)}, images=images),
    ):
        with pytest.raises(BadValue, match=r"image|width|height") as told:
            asked()
        assert "\n" not in str(told.value)


# -- notebooks ---------------------------------------------------------------------------------------------------------


def test_a_cell_with_a_window_around_it() -> None:
    model, inputs, _ = given("llava")
    shell = Shell()
    shell.user_ns.update(model=model, inputs=inputs, same=model, _hidden=text_model())
    shell.run("%load_ext memprof")
    generate = "model.generate(**inputs, max_new_tokens=2, do_sample=False)\n"
    found = shell.run(f"%%memprof\n{generate}")
    assert isinstance(found, memprof.Profile)
    assert len(found.tokens) == 2
    with pytest.raises(ZeroDivisionError):
        shell.run(f"%%memprof model -o run\n{generate}1 / 0\n")
    assert len(shell.user_ns["run"].samples) == 1
    assert "generate" not in vars(model)
    with pytest.raises(UsageError, match="no variable 'other'"):
        shell.run(f"%%memprof other\n{generate}")
    with pytest.raises(UsageError, match=re.escape("usage: %%memprof [MODEL] [-o NAME]")):
        shell.run(f"%%memprof model --no\n{generate}")
    shell.user_ns["another"] = text_model()
    with pytest.raises(UsageError, match=r"several models \(.*another.*\).*name one"):
        shell.run(f"%%memprof\n{generate}")
    empty = Shell()
    empty.run("%load_ext memprof")
    with pytest.raises(UsageError, match="no model"):
        empty.run("%%memprof\n1\n")


def test_the_same_in_ipython() -> None:
    pytest.importorskip("IPython")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_surface import given\n"
        "shell = InteractiveShell.instance()\nshell.user_ns['model'], shell.user_ns['inputs'], _ = given('text')\n"
        "shell.run_line_magic('load_ext', 'memprof')\n"
        "done = shell.run_cell('%%memprof model -o run\\nmodel.generate(**inputs, max_new_tokens=3)\\n')\n"
        "done.raise_error()\nassert done.result is shell.user_ns['run']\nassert len(done.result.tokens) == 3\n"
        "text, html = (shell.display_formatter.format(done.result)[0][kind] for kind in ('text/plain', 'text/html'))\n"
        "assert text == repr(done.result) and '<svg' in html"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
