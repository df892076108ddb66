"""From what a user calls a model to the model: a name, a hub id, a folder, a ``config.json``. One path, taken once.

Whatever is asked for, a configuration is read, and its ``model_type`` says which family knows the rest. What is found
is carried; nobody reads the files a second time. A named model is known without torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from memprof.errors import UnknownName, UsageError, WeightsError, did_you_mean
from memprof.families import FAMILIES, Family, Model
from memprof.families._towers import check_tower
from memprof.files import read_json
from memprof.models.files import folder_of, locate, locate_cached, read_object, stored_tensors
from memprof.models.tokenizer import special_tokens
from memprof.records import GIVEN, RunRecord, RunSpec

#: What ``weights`` says in a spec where they come with memprof.
SHIPPED = "shipped"
#: What decides bytes: a checkpoint that differs from its named model here is another model and is called so.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "image_size", "patch_size",
)  # fmt: skip


# -- by name -----------------------------------------------------------------------------------------------------------


@cache
def named() -> Mapping[str, Model]:
    """Every model that is known by a name: one JSON file each, in the folder ``models`` beside its family's file.

    The file holds ``config`` (a ``config.json``), ``title``, ``hub``, ``dtype`` and ``source``.
    """
    found = dict[str, Model]()
    for _, cls in FAMILIES:
        for file in sorted((Path(inspect.getfile(cls)).parent / "models").glob("*.json"), key=_by_size):
            data = read_json(file)
            if data["config"]["model_type"] in cls.model_types:
                found[file.stem] = _named(file.stem, cls(), data)
    return found


def _by_size(file: Path) -> list[tuple[str, float]]:
    """Names in the order a reader expects: numbers count as such."""
    words = re.split(r"([0-9]+(?:[.][0-9]+)?)", file.stem)
    return [(text, float(number)) for text, number in zip(words[::2], [*words[1::2], "0"], strict=True)]


def _named(name: str, family: Family, data: Mapping[str, Any]) -> Model:
    facts = {key: data[key] for key in ("title", "hub", "dtype", "source", "config")}
    before, _, behind = family.template
    return Model(name, family=family, template=(before, behind), max_tiles=family.max_tiles(data["config"]), **facts)


def find(name: str | os.PathLike[str], weights: str = "random") -> Model:
    """The model that ``name`` means, with the configuration of its ``weights``.

    Args:
        name: A name that ``memprof list`` gives, a hub id whose files are in the local cache, a folder, or a
            configuration file.
        weights: ``random``, ``hub``, or the path of a folder or a ``.safetensors`` file. The ``config.json`` beside
            weights decides, and the name only fills in what it leaves out, so that what is recorded about a model is
            true of the weights that run. The folder need not hold weights: a configuration is enough for a prediction.

    Raises:
        UnknownName: Nothing is called so.
        WeightsError: No checkpoint there, one of another family, or of a variant memprof does not run.
    """
    name = os.fspath(name)
    model = named().get(name.lower()) or _of_hub(name) or _at(name)
    if weights in ("random", SHIPPED):
        return model
    return _read(locate(weights, model.hub), model, model.hub if weights == "hub" else None) or model


def model_of(spec: RunSpec) -> Model:
    """The model that a spec names."""
    return find(spec.model, "random" if spec.weights == GIVEN else spec.weights)


def of_run(record: RunRecord) -> Model:
    """The model of a run: of the configuration that its record keeps, or the one that its spec names.

    Raises:
        UnknownName: Nothing is called so any more.
        WeightsError: No family knows its models.
    """
    return model_of(record.spec) if record.configuration is None else of_config(record.configuration)


def of_config(raw: Mapping[str, Any]) -> Model:
    """The model of a configuration that is at hand: what ``config.json`` holds, or transformers' object as plain data.

    One loaded from the hub repository of a named model, with its sizes, has that model's name.

    Raises:
        WeightsError: No family knows models of its type, or it lacks an entry.
    """
    called = str(raw.get("_name_or_path") or "")
    like = next((model for model in named().values() if called and model.hub == called), None)
    found = _checked(f"a configuration of type {raw.get('model_type')!r}", lambda: _of_raw(raw, None, None, None))
    if like is not None and _same(found, like):
        return dataclasses.replace(like, config=found.config)
    title = called.rstrip("/").rpartition("/")[2]
    return dataclasses.replace(found, name=called or found.name, title=title or found.title)


def check_model(given: Any) -> None:
    """Raise UsageError for what has no transformers configuration, and is none."""
    if not plain_config(given):
        raise UsageError(
            f"a {type(given).__name__} says nothing of a model; give a name, a folder, a config.json, a transformers "
            "configuration, or a model of transformers"
        )


def plain_config(given: Any) -> dict[str, Any]:
    """What a transformers configuration, or a model's, says as ``config.json`` would have it; {} of what has none."""
    config = getattr(given, "config", given)
    if not hasattr(config, "to_json_string"):
        return {}
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if config is not given and not found.get("architectures"):
        found["architectures"] = [type(given).__name__]
    return found


def weights_of(model: Model, weights: str) -> str:
    """Where weights are: ``random``, ``hub`` or a path, which may lie inside memprof."""
    shipped = model.family.shipped(model)
    return str(shipped) if shipped is not None and weights in ("random", SHIPPED) else weights


def family_of(model_type: str) -> Family | None:
    """The family that knows models of this ``model_type``, or None."""
    # One that another package brings comes first: whoever installs it means it.
    families = sorted((cls() for _, cls in FAMILIES), key=lambda family: type(family).__module__.startswith("memprof."))
    named = (family for family in families if model_type in family.model_types)
    return next(named, None) or next((family for family in families if family.knows(model_type)), None)


def _of_hub(name: str) -> Model | None:
    """The model of a hub id: one with a name, or one whose files are in the local cache."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        return None
    hubs = {model.hub.lower(): model for model in named().values() if model.hub}
    if name.lower() in hubs:
        return hubs[name.lower()]
    try:
        where = locate_cached(name)
    except WeightsError as error:
        raise WeightsError(f"{error}{did_you_mean(name, (model.hub for model in hubs.values()))}") from None
    return _read(where, None, name)


def _at(name: str) -> Model:
    """The model of a folder or a file."""
    where = Path(name).expanduser()
    if not where.exists():
        raise UnknownName("model", name, named())
    found = _read(where, None, None)
    if found is None:
        raise WeightsError(f"{where} holds no config.json, which says what model it is")
    return found


# -- by its files ------------------------------------------------------------------------------------------------------


def _file(where: Path) -> Path:
    """The configuration of what lies at ``where``."""
    return where if where.suffix == ".json" else folder_of(where) / "config.json"


def _read(where: Path, like: Model | None, hub: str | None) -> Model | None:
    """The model whose files are at ``where``; None where there is no ``config.json``.

    Args:
        where: A folder, or a file in it; a ``.json`` is a configuration itself.
        like: The named model that it is to be, if one was asked for.
        hub: The hub id that the folder is a copy of.
    """
    file = _file(where)
    raw = read_object(file)
    if raw is None:
        return None
    return _checked(str(file), lambda: _of_raw(raw, where, like, hub))


def _checked(what: str, read: Callable[[], Model]) -> Model:
    """What ``read`` gives; whatever is wrong with a configuration is said in one line."""
    try:
        model = read()
        if min(model.layers, model.hidden) < 1:  # said by every configuration of a decoder
            raise ValueError("it has no decoder layers")
        return model
    except KeyError as error:
        raise WeightsError(f"{what}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, _strict()) as error:
        raise WeightsError(f"{what}: {' '.join(str(error).split())}") from None


def _of_raw(raw: Mapping[str, Any], where: Path | None, like: Model | None, hub: str | None) -> Model:
    """The model of a configuration; ``where`` are the files beside it, if there are any."""
    _check_sizes(raw)
    raw = _decoded(raw)
    family = _family(raw, like)
    raw = {**raw, **family.of_processor({} if where is None else _processor(_file(where)))}
    config = _config(family, raw, where)
    check_tower(family, config)
    if like is not None:
        _check_tower(config, like)
    return _model(where, raw, family, config, like, hub)


#: No model is larger in any of these; what a damaged configuration asks for would fill the memory.
_MOST = {
    "num_hidden_layers": 2**10, "depth": 2**10, "hidden_size": 2**17, "embed_dim": 2**17, "intermediate_size": 2**20,
    "vocab_size": 2**24, "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "num_heads": 2**12,
    "head_dim": 2**12, "image_size": 2**14, "patch_size": 2**10,
}  # fmt: skip


def _check_sizes(raw: Mapping[str, Any]) -> None:
    """Raise ValueError where a size is none, in whichever part of a configuration."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
        elif key in _MOST and value is not None:
            for size in value if isinstance(value, list) else [value]:
                if type(size) is not int or not 0 < size <= _MOST[key]:
                    raise ValueError(f"{key} is {str(size)[:40]}, and not a whole number from 1 to {_MOST[key]}")


def _decoded(value: Any) -> Any:
    """A configuration with its infinities, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def _strict() -> type[Exception]:
    """What transformers' configurations raise, which are checked field by field."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError


def _family(raw: Mapping[str, Any], like: Model | None) -> Family:
    kind = raw.get("model_type")
    if like is not None:
        if kind not in like.family.model_types:
            raise ValueError(f"this is a model of type {kind!r}, and {like.name} is {like.config['model_type']!r}")
        return like.family
    family = family_of(str(kind))
    if family is None:
        known = sorted(kind for _, cls in FAMILIES for kind in cls.model_types)
        raise ValueError(
            f"memprof knows no family of models of type {kind!r}; it knows {', '.join(known)}, and every causal "
            "language model that transformers has"
        )
    return family


def _processor(file: Path) -> Mapping[str, Any]:
    """What the image processor beside a configuration says: newer checkpoints have it inside their processor's file."""
    whole = read_object(file.with_name("processor_config.json")) or {}
    found: Mapping[str, Any] | None = whole.get("image_processor")
    return found or read_object(file.with_name("preprocessor_config.json")) or {}


def _config(family: Family, raw: Mapping[str, Any], where: Path | None) -> Any:
    """The transformers configuration; what a chat ends with is said by the file beside it, in transformers' layout."""
    if where is None:
        return family.read(raw, {})
    file = _file(where)
    config = family.read(raw, special_tokens(file.parent))
    generation = read_object(file.with_name("generation_config.json")) or {}
    if raw["model_type"] == config.model_type and generation.get("eos_token_id") is not None:
        config.get_text_config().eos_token_id = generation["eos_token_id"]
    return config


def _check_tower(config: Any, like: Model) -> None:
    """Raise ValueError where the vision tower is of another kind than the named model's."""
    found, own = (getattr(one, "vision_config", None) for one in (config, like.family.config(like)))
    if found is not None and type(found) is not type(own):
        raise ValueError(f"its vision tower is of type {found.model_type!r}, which {like.name} has not")


def _model(
    where: Path | None, raw: Mapping[str, Any], family: Family, config: Any, like: Model | None, hub: str | None
) -> Model:
    """The model of a configuration that was read."""
    called = hub or (_class_of(raw) if where is None else str(where))
    named_type = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    known = named_type if named_type in ("bfloat16", "float16", "float32") else None
    before, _, behind = family.template
    found = Model(
        name=called if hub or where is None else str(where.resolve()),
        title=called if where is None else _title(where, hub), family=family,
        config=_plain(family, config, raw, tied=_tied(family, raw, config, where)), hub=hub or "",
        dtype=known or "bfloat16", source=f"configuration file of {called}", template=(before, behind),
        max_tiles=family.max_tiles(raw),
    )  # fmt: skip
    if like is None:
        return found
    return dataclasses.replace(
        found, name=like.name, hub=like.hub, dtype=known or like.dtype, template=like.template,
        title=like.title if _same(found, like) else f"{like.title} as in {Path(called).name}",
    )  # fmt: skip


def _class_of(raw: Mapping[str, Any]) -> str:
    """What a configuration without a name is called: its class, else its type."""
    return str((raw.get("architectures") or [raw.get("model_type")])[0])


def _title(where: Path, hub: str | None) -> str:
    if hub is not None:
        return hub.rpartition("/")[2]
    return where.stem if where.is_file() and where.name != "config.json" else folder_of(where.resolve()).name


def _same(found: Model, like: Model) -> bool:
    """Whether two configurations have the same sizes; defaults that only one of them spells out count."""
    own = _plain(like.family, like.family.config(like), like.config, tied=False)
    pairs = ((found.text, own.get("text_config", own)), (found.vision, own.get("vision_config", {})))
    return all(mine.get(key) == theirs.get(key) for mine, theirs in pairs for key in _SIZES)


def _tied(family: Family, raw: Mapping[str, Any], config: Any, where: Path | None) -> bool:
    """Whether the output embedding is the input embedding.

    Transformers goes by the model's own entry, else by its class's default. Files of before transformers 5, and other
    layouts, say it of the language model only. Weights beside the file know best: some files say so and store both.
    """
    own, text = config.model_type == raw.get("model_type"), raw.get("text_config") or raw.get("llm_config") or {}
    entries = [part.get("tie_word_embeddings") for part in ((raw, text) if own else (text, raw))]
    default = own and getattr(config, "tie_word_embeddings", None) is True
    said = [entry for entry in (*entries, default) if entry is not None]
    if where is None or not any(said) or not any(folder_of(where).glob("*.safetensors")):
        return bool(said[0])
    targets = (piece.target for name in stored_tensors(where) for piece in family.pieces(name, config))
    return all(target != "lm_head.weight" for target in targets)


def _plain(family: Family, config: Any, raw: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """A configuration as plain data in transformers' layout, every size in it.

    ``model_type`` is transformers' own, so that a converted layout is read as that from here on; a family that
    transformers runs under another's name keeps its own.
    """
    kind = config.model_type if config.model_type in family.model_types else raw["model_type"]
    parts = {key: getattr(config, key) for key in ("text_config", "vision_config") if hasattr(config, key)}
    found = {"model_type": kind, **_numbers(config), "tie_word_embeddings": tied}
    for key, part in parts.items():
        found[key] = {"model_type": part.model_type, **_numbers(part)}
    if parts:
        found["text_config"]["tie_word_embeddings"] = tied
    return found


def _numbers(config: Any) -> dict[str, Any]:
    """What a configuration says beyond what every configuration says."""
    from transformers import PreTrainedConfig

    every = {*PreTrainedConfig().to_dict(), "model_type", "text_config", "vision_config"}
    return {key: value for key, value in config.to_dict().items() if key not in every}
