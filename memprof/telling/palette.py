"""Names and colours, one of each for every part and method, in all outputs: figures, tables, pages.

Parts are areas and wear Paul Tol's *light* scheme, made for black text on top. Methods are lines and wear hues of Okabe
and Ito. Both are safe for the colour-blind, neither repeats a colour of the other, and every method's colour stands out
on white and on near-black alike.
"""

from __future__ import annotations

from zlib import crc32

STATIC = "#DDDDDD"
INK, MUTED, RULE = "#1A1A1A", "#555555", "#B5B5B5"
ALARM = "#B2182B"

PART_COLOURS: dict[str, str] = {
    "kv_cache": "#77AADD",
    "vision": "#44BB99",
    "attention": "#EE8866",
    "mlp": "#EEDD88",
    "logits": "#FFAABB",
    "pruner": "#99DDFF",
    "inputs": "#BBCC33",
    "other": "#BBBBBB",
    "unexplained": "#FFFFFF",  # and hatched, wherever it is drawn
}
PART_LABELS: dict[str, str] = {
    "kv_cache": "KV cache",
    "vision": "vision",
    "attention": "attention",
    "mlp": "MLP",
    "logits": "logits",
    "pruner": "pruner",
    "inputs": "inputs",
    "other": "other",
    "unexplained": "unexplained",
}

_METHODS: dict[str, tuple[str, str]] = {
    "baseline": ("Baseline", "#767676"),
    "topv": ("TopV", "#0072B2"),
    "fastv": ("FastV", "#D55E00"),
    "random": ("Random", "#B565A7"),
    "uniform": ("Uniform", "#009E73"),
    "divprune": ("DivPrune", "#C58A00"),
    "visionzip": ("VisionZip", "#3D9BD9"),
    "pyramiddrop": ("PyramidDrop", "#AA4466"),
    "sparsevlm": ("SparseVLM", "#8A8A1F"),
    "sparsevlm-plus": ("SparseVLM+", "#5F7F3A"),
    "vispruner": ("VisPruner", "#6A5ACD"),
    "cdpruner": ("CDPruner", "#2E8B8B"),
    "holov": ("HoloV", "#A0522D"),
    "dart": ("DART", "#C2477F"),
}
_SPARE = ("#5B7F2B", "#7D5BA6", "#1F7A9C", "#96603B")
_MODELS = {
    "internvl": "InternVL", "llava": "LLaVA", "qwen": "Qwen", "proving-llava": "Proving model (LLaVA)",
    "proving": "Proving model", "smolvlm": "SmolVLM", "gemma": "Gemma", "llama": "Llama", "gpt2": "GPT-2",
}  # fmt: skip
#: Words behind the first one, as their makers write them.
_WORDS = {"vl": "VL", "onevision": "OneVision", "mistral": "Mistral", "vicuna": "Vicuna"}
_TASKS = {"ai2d": "AI2D", "ocrbench": "OCRBench"}


def method_colour(name: str) -> str:
    """The colour of the method called ``name``; one that is new here gets a colour of its own by its name."""
    if name in _METHODS:
        return _METHODS[name][1]
    return _SPARE[crc32(name.encode(errors="backslashreplace")) % len(_SPARE)]


def method_label(name: str) -> str:
    """``'topv'`` -> ``'TopV'``."""
    return _METHODS[name][0] if name in _METHODS else name


def model_label(name: str) -> str:
    """``'internvl2-2b'`` -> ``'InternVL2-2B'``."""
    for start, spelled in _MODELS.items():
        if name.lower().startswith(start) and not name[len(start) : len(start) + 1].isalpha():
            rest = name[len(start) :]
            return spelled + "-".join(map(_word, rest.split("-")))
    return name


def _word(word: str) -> str:
    """One of a model's name: sizes in capitals, as ``7B`` and ``500M``."""
    return word.upper() if word[:1].isdigit() and word[-1:] in "bBmM" else _WORDS.get(word, word)


def task_label(name: str) -> str:
    """``'ai2d'`` -> ``'AI2D'``."""
    return _TASKS.get(name, name)


def tint(colour: str, white: float) -> str:
    """``colour`` mixed with ``white`` parts of white: a pale fill without transparency."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(v + (255 - v) * white):02X}" for v in parts)
