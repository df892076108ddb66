"""Write memprof/tasks/{ai2d,ocrbench,folder}.json, the bundled samples, byte for byte.

    python scripts/make_bundled.py --shared ../shared

Taken from ``shared`` are plain facts, and nothing else:

* AI2D: the 43 image sizes of MathVista's testmini (source AI2D; CC BY-SA 4.0). That AI2D prompts have 53 tokens on
  average and 88 at most is from METHODS.md.
* OCRBench: the sizes of the 133 images that could be had (66 FUNSD; 67 SROIE, CC BY 4.0), 48 of them, evenly in order
  of source and size, and how many tokens the question asked about each has (OCRBench.json; MIT).
* The InternLM2 tokenizer (Apache-2.0), to count tokens.

Questions, answers and pictures are memprof's own: a *scene* (a food chain, a receipt, ...) is made from the words
below, the question about it is answered by construction, and ``memprof/tasks/_draw.py`` draws it. Of the phrasings that
a question can have, the one with the length nearest to the real length is taken. Needs ``sentencepiece``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from memprof.tasks.ai2d import AI2D
from memprof.tasks.ocrbench import OCRBench

T = TypeVar("T")
Count = Callable[[str], int]
Size = tuple[int, int]
Made = dict[str, Any]

AI2D_MOST, AI2D_MEAN = 88, 53  # tokens of a prompt, METHODS.md
OCR_SAMPLES = 48
CAMERA_SIZES = [(4032, 3024), (640, 480), (1920, 1080), (512, 512), (3024, 4032), (1080, 2400), (1280, 720)]

CHAINS = {
    "a pond": ["pond algae", "water flea", "tadpole", "dragonfly larva", "perch", "grey heron"],
    "a meadow": ["clover", "grasshopper", "field vole", "weasel", "barn owl"],
    "the open sea": ["plankton", "krill", "herring", "mackerel", "tuna", "orca"],
    "an oak wood": ["oak leaf", "caterpillar", "blue tit", "sparrowhawk", "goshawk"],
    "the tundra": ["lichen", "lemming", "stoat", "snowy owl", "arctic fox"],
}
CYCLES = {
    "Life of a frog": ["spawn", "tadpole", "froglet", "young frog", "adult frog"],
    "Life of a butterfly": ["egg", "caterpillar", "chrysalis", "butterfly"],
    "The way of water": ["evaporation", "condensation", "cloud", "rain", "river", "sea"],
    "The way of rock": ["magma", "lava", "igneous rock", "sediment", "sandstone", "slate"],
    "Phases of the moon": ["new moon", "first quarter", "full moon", "last quarter"],
    "Year of an apple tree": ["bud", "blossom", "small fruit", "ripe apple", "bare tree"],
}
LAYERS = {
    "Layers of the soil": ["leaf litter", "topsoil", "subsoil", "loose rock", "bedrock"],
    "Layers of the Earth": ["crust", "upper mantle", "lower mantle", "outer core", "inner core"],
    "Layers of the air": ["exosphere", "thermosphere", "mesosphere", "stratosphere", "troposphere"],
    "Layers of a rainforest": ["emergent trees", "canopy", "understory", "shrubs", "forest floor"],
    "Zones of the ocean": ["sunlight zone", "twilight zone", "midnight zone", "abyss", "trenches"],
}
TREES = {
    "Animals": {
        "mammals": ["otter", "bat", "whale"],
        "birds": ["heron", "penguin"],
        "fish": ["trout", "eel", "shark"],
        "insects": ["bee", "moth"],
    },
    "Rocks": {"igneous": ["basalt", "granite"], "sedimentary": ["chalk", "shale"], "metamorphic": ["marble", "slate"]},
    "Plants": {"mosses": ["peat moss"], "ferns": ["bracken", "maidenhair"], "conifers": ["larch"], "grasses": ["rye"]},
    "Energy": {"stored": ["battery", "spring"], "moving": ["wind", "river"], "radiant": ["sunlight", "lamp"]},
}
PARTS = {
    "Parts of a flower": ["petal", "sepal", "stamen", "pistil", "ovary", "stem"],
    "Parts of a plant cell": ["cell wall", "nucleus", "vacuole", "chloroplast", "membrane"],
    "Parts of the eye": ["cornea", "iris", "lens", "retina", "optic nerve"],
    "Parts of a volcano": ["crater", "main vent", "side vent", "magma chamber", "ash layer", "lava flow"],
    "Parts of an insect": ["head", "thorax", "abdomen", "antenna", "wing", "leg"],
}
COLOURS = ("red", "blue", "green", "orange", "purple", "brown", "pink", "grey")

PLACES = ("Harbour", "Mill", "Orchard", "Station", "Castle", "Willow", "Quarry", "Lantern", "Juniper", "Cobble")
TRADES = ("Stationers", "Bakery", "Hardware", "Grocers", "Pharmacy", "Book Room", "Garden Supply", "Tea House")
STREETS = ("Larch Lane", "Copper Street", "Old Ferry Road", "Beacon Hill", "Saddler Row", "Weaver Court", "Salt Quay")
TOWNS = ("Northmere", "Eastwick Vale", "Tarn Bridge", "Port Alder", "Fenwater", "Kestrel Bay")
GOODS = (
    "Notebook A5", "Rye bread", "Wood screws 40", "Oat biscuits", "Lamp oil", "Garden twine", "Ink, blue",
    "Apple juice", "Honey 250 g", "Paint brush 2", "Envelopes 50", "Green tea", "Tomato seeds", "Hand soap",
    "Candles x6", "Ruler 30 cm", "Sandpaper", "Plum jam", "Cork board", "Batteries AA", "Milk 1 l", "Potting soil",
    "Hinge, brass", "Cotton thread",
)  # fmt: skip
THANKS = ("Thank you and come again", "Keep this slip for returns", "Open every day but Monday")
PEOPLE = ("R. Alderman", "J. Okonkwo", "M. Lindqvist", "T. Barros", "S. Whitlock", "K. Ishida", "P. Novak", "L. Moreau")
OFFICES = ("Records Office", "Plant 4", "Field Survey", "Test Laboratory", "Print Shop", "Harbour Authority")
FORMS = ("Travel request", "Sample receipt record", "Equipment loan form", "Change notice", "Shipping memorandum")
NOTES = (
    "Return the white copy to the office named above within ten days.",
    "Entries in pencil are not accepted. Corrections must be signed.",
    "The holder of this form is answerable for the goods listed on it.",
    "Questions are answered at the front desk between nine and four.",
)


# ------------------------------------------------------------------------------------------------------ chance


def number(*key: object) -> int:
    """A whole number that follows from ``key``, the same in every Python."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:6])


def pick(items: Sequence[T], *key: object) -> T:
    """One of ``items``."""
    return items[number(*key) % len(items)]


def shuffled(items: Sequence[T], *key: object) -> list[T]:
    """``items`` in another order."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: number(*key, i))]


# ------------------------------------------------------------------------------------------------------- facts


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tiles(size: Size, most: int = 12) -> int:
    """InternVL's tiles of an image, thumbnail included; used here to order the samples and nowhere else."""
    width, height = size
    grids = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most}
    best, best_gap = (1, 1), math.inf
    for i, j in sorted(grids, key=lambda g: (g[0] * g[1], g)):
        gap = abs(width / height - i / j)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * 448 * 448 * i * j):
            best, best_gap = (i, j), gap
    count = best[0] * best[1]
    return count + (count > 1)


def spread(items: list[T], key: Callable[[T], Any]) -> list[T]:
    """``items``, the greatest first, then the least, then ever finer halves: every prefix spans the range."""
    ranked = sorted(items, key=key, reverse=True)
    order = list(dict.fromkeys([0, len(ranked) - 1, *halves(0, len(ranked) - 1)]))
    return [ranked[i] for i in order]


def halves(low: int, high: int) -> Iterator[int]:
    """The middles of ``low``..``high``, breadth first."""
    spans = [(low, high)]
    while spans:
        spans = [s for s in spans if s[1] - s[0] > 1]
        yield from ((a + b) // 2 for a, b in spans)
        spans = [half for a, b in spans for half in ((a, (a + b) // 2), ((a + b) // 2, b))]


def nearest(phrasings: Sequence[T], target: int, length: Callable[[T], int], key: str) -> T:
    """The phrasing whose length is nearest to ``target``; of equals, one by chance."""
    return min(shuffled(phrasings, key, "phrase"), key=lambda p: abs(length(p) - target))


# -------------------------------------------------------------------------------------------------------- AI2D


def ai2d(shared: Path, count: Count) -> Made:
    """43 diagrams at the real sizes."""
    found = rows(shared / "data/mathvista/image_sizes.csv")
    sizes = [(int(r["width"]), int(r["height"])) for r in found if r["source"] == "AI2D"]
    sizes = spread(sizes, lambda s: (tiles(s), s[0] * s[1], s))
    lengths = shuffled(ai2d_lengths(len(sizes)), "ai2d lengths")
    places = shuffled([n % 4 for n in range(len(sizes))], "ai2d places")
    samples, task = [], AI2D()
    for n, (size, target, place) in enumerate(zip(sizes, lengths, places, strict=True)):
        key = f"ai2d-{n:02d}"
        scene, questions, right, wrong, kind = DIAGRAMS[n % len(DIAGRAMS)](key)
        options = shuffled(wrong, key, "wrong")[:3]
        options.insert(place, right)
        phrasings = [
            {"question": question, "options": [style.format(o, kind=kind) for o in options], "answer": str(place)}
            for question in questions
            for style in ("{}", "the {}", "the {kind} {}", "the {kind} called {}")
        ]
        phrasings = [p for p in phrasings if count(task.prompt(p)) <= AI2D_MOST]
        row = nearest(phrasings, target, lambda p: count(task.prompt(p)), key)
        samples.append(sample(key, size, count(task.prompt(row)), row, scene))
    facts = "image sizes: MathVista testmini, source AI2D (CC BY-SA 4.0); about 53 tokens a prompt, as AI2D has"
    return {"title": "AI2D", "shapes": "real shapes", "facts": facts, "samples": samples}


def ai2d_lengths(n: int) -> list[int]:
    """Prompt lengths in tokens to aim at, with AI2D's mean and greatest value: the quantiles of a skewed curve."""
    low, high, mean = 37, AI2D_MOST, AI2D_MEAN - 1
    # x^power for x in (0, 1] has mean 1 / (power + 1)
    power = (high - low) / (mean - low) - 1
    return [round(low + (high - low) * ((i + 0.5) / (n - 0.5)) ** power) for i in range(n)]


Diagram = tuple[Made, list[str], str, list[str], str]


def chain(key: str) -> Diagram:
    """A food chain: who eats whom."""
    place = pick(list(CHAINS), key, "chain")
    every = CHAINS[place]
    at = 1 + number(key, "who") % (len(every) - 1)
    ask = [f"What does the {every[at]} eat?", f"Which of these is eaten by the {every[at]} in the food chain shown?"]
    lead = f"The diagram shows a food chain in {place}; each arrow points from what is eaten to what eats it."
    far = " Only the living things drawn in the diagram count, and only the one that stands directly before it."
    questions = [*ask, *(f"{lead} {a}" for a in ask), f"{lead}{far} {ask[1]}"]
    scene = {"kind": "chain", "title": f"Food chain in {place}", "labels": every}
    return scene, questions, every[at - 1], [e for i, e in enumerate(every) if i not in (at, at - 1)], "living thing"


def cycle(key: str) -> Diagram:
    """A ring of stages: what comes next."""
    title = pick(list(CYCLES), key, "cycle")
    every = CYCLES[title]
    at = number(key, "stage") % len(every)
    ask = [f"What follows {every[at]}?", f"Which stage in the diagram comes directly after the one named {every[at]}?"]
    lead = "The diagram shows stages that repeat in a ring, and the arrows tell their order."
    far = " Follow the arrow that leaves the stage in question, and name the stage in which it ends."
    questions = [*ask, *(f"{lead} {a}" for a in ask), f"{lead}{far} {ask[1]}"]
    right = every[(at + 1) % len(every)]
    wrong = [e for e in every if e not in (right, every[at])] + ["none of them"] * (len(every) == 4)
    return {"kind": "cycle", "title": title, "labels": every}, questions, right, wrong, "stage"


def layers(key: str) -> Diagram:
    """A stack of layers: what lies below or above."""
    title = pick(list(LAYERS), key, "layers")
    every = LAYERS[title]
    up = number(key, "up") % 2
    at = up + number(key, "layer") % (len(every) - 1)
    side = "above" if up else "below"
    ask = [
        f"What lies directly {side} the {every[at]}?",
        f"In the diagram, which layer is drawn directly {side} the {every[at]}?",
    ]
    lead = "The diagram shows layers one upon another, and each of them has its name at the side."
    far = f" Find the one in question first, then go one layer {'up' if up else 'down'} and read the name there."
    questions = [*ask, *(f"{lead} {a}" for a in ask), f"{lead}{far} {ask[1]}"]
    right = every[at - 1 if up else at + 1]
    scene = {"kind": "layers", "title": title, "labels": every}
    return scene, questions, right, [e for e in every if e not in (right, every[at])], "layer"


def tree(key: str) -> Diagram:
    """Groups and their members: what belongs where."""
    root = pick(list(TREES), key, "tree")
    groups = TREES[root]
    right = pick(list(groups), key, "group")
    member = pick(groups[right], key, "member")
    ask = [
        f"To which group does {member} belong?",
        f"Under which group is {member} written in the chart of {root.lower()}?",
    ]
    lead = f"The chart sorts {root.lower()} into groups, and under each group some of its members are written."
    far = " Go up from the member in question along the line until you reach the coloured box of a group."
    questions = [*ask, *(f"{lead} {a}" for a in ask), f"{lead}{far} {ask[1]}"]
    scene = {"kind": "tree", "title": f"Kinds of {root.lower()}", "root": root.lower(), "groups": groups}
    others = [m for g, members in groups.items() if g != right for m in members][:1]
    return scene, questions, right, [g for g in groups if g != right] + others * (len(groups) == 3), "group"


def parts(key: str) -> Diagram:
    """Coloured parts with names: which is which."""
    title = pick(list(PARTS), key, "parts")
    every = PARTS[title]
    colours = shuffled(COLOURS, key, "colours")[: len(every)]
    at = number(key, "part") % len(every)
    ask = [
        f"Which part is {colours[at]}?",
        f"Which part does the line lead to that is coloured {colours[at]} in the diagram?",
    ]
    lead = "The diagram shows parts in different colours, and a line joins each of them to its name."
    far = " Find the part with the colour in question, follow its line to the side, and read the name at its end."
    questions = [*ask, *(f"{lead} {a}" for a in ask), f"{lead}{far} {ask[1]}"]
    scene = {"kind": "parts", "title": title, "parts": dict(zip(every, colours, strict=True))}
    return scene, questions, every[at], [e for e in every if e != every[at]], "part"


DIAGRAMS = (chain, cycle, layers, tree, parts)


# ---------------------------------------------------------------------------------------------------- OCRBench


def ocrbench(shared: Path, count: Count) -> Made:
    """48 receipts and forms at real sizes."""
    folder = shared / "data/ocrbench"
    real = json.loads((folder / "OCRBench.json").read_text(encoding="utf-8"))
    found = [
        (r["dataset_name"], (int(r["width"]), int(r["height"])), count(real[int(r["ocrbench_index"])]["question"]))
        for r in rows(folder / "ocrbench_image_sizes.csv")
    ]
    found.sort(key=lambda f: (f[0], f[1][0] * f[1][1], f))
    found = [found[int((i + 0.5) * len(found) / OCR_SAMPLES)] for i in range(OCR_SAMPLES)]
    samples, task = [], OCRBench()
    for n, (source, size, target) in enumerate(spread(found, lambda f: (tiles(f[1]), f[1][0] * f[1][1], f))):
        key = f"ocrbench-{n:02d}"
        scene, questions, answer = receipt(key, size) if source == "SROIE" else form(key)
        question = nearest(questions, target, count, key)
        row = {"question": question, "answer": [answer], "question_type": "Key Information Extraction"}
        tokens = count(task.prompt(row))
        samples.append(sample(key, size, tokens, {"question_tokens": count(question)} | row, scene))
    facts = (
        "image sizes: FUNSD and SROIE (CC BY 4.0) images of OCRBench; question lengths: OCRBench.json (MIT);"
        " 48 of 133, evenly by source and size"
    )
    return {"title": "OCRBench", "shapes": "real shapes", "facts": facts, "samples": samples}


def money(cents: int) -> str:
    """``1234`` -> ``12.34``."""
    return f"{cents // 100}.{cents % 100:02d}"


def receipt(key: str, size: Size) -> tuple[Made, list[str], str]:
    """A receipt whose length suits the paper, and a question about one of its four facts."""
    lines = max(3, min(14, round(9 * size[1] / size[0]) - 6))
    goods = shuffled(GOODS, key, "goods")[:lines]
    prices = [120 + number(key, "price", i) % 2400 for i in range(lines)]
    subtotal = sum(prices)
    tax = subtotal * 6 // 100
    scene = {
        "kind": "receipt",
        "company": f"{pick(PLACES, key, 'company')} {pick(TRADES, key, 'trade')}",
        "address": [f"{1 + number(key, 'house') % 180} {pick(STREETS, key, 'street')}", pick(TOWNS, key, "town")],
        "date": day(key),
        "number": f"{10000 + number(key, 'bill') % 90000}",
        "items": [[name, money(price)] for name, price in zip(goods, prices, strict=True)],
        "subtotal": money(subtotal),
        "tax": money(tax),
        "total": money(subtotal + tax),
        "thanks": pick(THANKS, key, "thanks"),
    }
    asked = {
        "company": ("What is the name of the shop", "Which shop gave out the receipt", "What shop is named at the top"),
        "date": (
            "On which day was the receipt printed",
            "What date does it bear",
            "Which date is printed on the receipt",
        ),
        "address": (
            "In which street is the shop",
            "What house number and street are given",
            "Where in the town is the shop",
        ),
        "total": (
            "How much was paid in all",
            "What is the total at the bottom",
            "What is the sum of the whole receipt",
        ),
    }
    fact = pick(list(asked), key, "fact")
    value = scene[fact][0] if fact == "address" else scene[fact]
    tails = (
        "?",
        "? Copy it as printed.",
        "? Reply with the words of the receipt.",
        "? Write it down just as it is printed there.",
        "? Write it down just as it is printed there, and add nothing of your own.",
    )
    return scene, [a + tail for a in asked[fact] for tail in tails], str(value)


def day(*key: object) -> str:
    """A date as on a receipt."""
    return f"{1 + number(*key, 'd') % 28:02d}/{1 + number(*key, 'm') % 12:02d}/{2016 + number(*key, 'y') % 9}"


def form(key: str) -> tuple[Made, list[str], str]:
    """A form of two columns, and a question about one of its fields."""
    people, offices = shuffled(PEOPLE, key, "people"), shuffled(OFFICES, key, "offices")
    fields = {
        "Date": day(key),
        "Reference no.": f"{pick('ABCDEFGH', key, 'r')}-{1000 + number(key, 'ref') % 9000}",
        "Prepared by": people[0],
        "Approved by": people[1],
        "Department": offices[0],
        "Deliver to": offices[1],
        "Number of boxes": str(2 + number(key, "boxes") % 60),
        "Telephone": f"555-{1000 + number(key, 'tel') % 9000}",
        "Estimated cost": f"$ {money(5000 + number(key, 'cost') % 900000)}",
        "Purchase order": str(200000 + number(key, "po") % 700000),
    }
    scene = {
        "kind": "form",
        "title": f"{pick(FORMS, key, 'form')} {10 + number(key, 'no') % 90}",
        "fields": {name: fields[name] for name in shuffled(list(fields), key, "fields")},
        "notes": shuffled(NOTES, key, "notes")[:3],
    }
    name = pick(list(fields), key, "field")
    heads = (
        f"What stands in the field '{name}'",
        f"Which entry has been made on this form in the field named '{name}'",
    )
    tails = (
        "?", "? Copy it as it stands.", "? Reply with the words of the form alone.",
        "? Write it down just as it has been filled in there.",
        "? Look for the name of the field in small letters and write down what is below it.",
    )  # fmt: skip
    return scene, [a + tail for a in heads for tail in tails], fields[name]


# ------------------------------------------------------------------------------------------------------ folder


def folder(count: Count) -> Made:
    """Test cards at sizes that cameras and screens have."""
    samples = []
    for n, size in enumerate(CAMERA_SIZES):
        key = f"folder-{n:02d}"
        words = str(1000 + number(key, "words") % 9000)
        question = pick(("Which number is written in the picture?", "Read the number in the middle."), key, "ask")
        row = {"question": question, "answer": words}
        samples.append(sample(key, size, count(question), row, {"kind": "card", "words": words}))
    facts = "sizes that cameras and screens commonly have; from no data set"
    return {"title": "image folder", "shapes": "common picture sizes", "facts": facts, "samples": samples}


# -------------------------------------------------------------------------------------------------------- file


def sample(key: str, size: Size, tokens: int, row: Made, scene: Made) -> Made:
    """One line of a bundled file."""
    return {"id": key, "width": size[0], "height": size[1], "text_tokens": tokens, **row, "scene": scene}


def render(made: Made) -> str:
    """A bundled file as text: the header, then one sample a line."""
    by = "written by scripts/make_bundled.py; pictures, questions and answers are memprof's own"
    head = {"about": by, **{k: v for k, v in made.items() if k != "samples"}}
    head["text_tokens"] = "InternLM2's count of the prompt body, without a chat template"
    lines = ",\n".join(json.dumps(s, ensure_ascii=False) for s in made["samples"])
    return json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "samples": [\n{lines}\n]\n}}\n'


def build(shared: Path) -> dict[str, str]:
    """File name -> text of every bundled file."""
    import sentencepiece

    file = shared / "data/tokenizers/internvl2-2b/tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def count(text: str) -> int:
        return len(model.encode(text))

    made = {"ai2d": ai2d(shared, count), "ocrbench": ocrbench(shared, count), "folder": folder(count)}
    return {f"{name}.json": render(data) for name, data in made.items()}


def main() -> None:
    """Write the files into the package."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=root.parent / "shared", help="the folder with data/")
    for name, text in build(parser.parse_args().shared).items():
        (root / "memprof/tasks" / name).write_text(text, encoding="utf-8")
        print(f"memprof/tasks/{name}: {len(json.loads(text)['samples'])} samples, {len(text):,} bytes")


if __name__ == "__main__":
    main()
