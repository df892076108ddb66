"""Prompts and answers through tokenizers made here: what text becomes, and that it stays text."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memprof.errors import WeightsError
from memprof.families._chat import Special, Tokenizer, encode_parts
from memprof.families.internvl import CHATS, InternVL
from memprof.models.find import find
from memprof.models.tokenizer import load_tokenizer, read_tokenizer, special_tokens
from memprof.prompts import Image

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<image>"]
WORDS = ["user", "assistant", "system", "USER", "ASSISTANT", ":", "\n", " ", "what", "is", "this", "?", "cat", "[", "]",
         "<", ">", "|", "im_end", "[SPELT]"]  # fmt: skip
ONE = [Image(((2, 2),))]
NONE: list[Image] = []


def write_words(folder: Path, *, bos: bool = True) -> Path:
    """A ``tokenizer.json`` of whole words: every word, white space and sign is a token."""
    from tokenizers import AddedToken, Regex
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing

    folder.mkdir(parents=True, exist_ok=True)
    model = Library(WordLevel({token: id for id, token in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(r"\[\w+\]|\s|\w+|[^\w\s]"), "isolated")
    model.decoder = Fuse()
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    model.add_tokens([AddedToken("<tool>", special=False)])
    if bos:
        model.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    model.save(str(folder / "tokenizer.json"))
    return folder


def write_pieces(folder: Path) -> Path:
    """A sentencepiece model like InternLM2's: its special tokens are spelt ``[UNUSED_0]`` and named in another file."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    said = "user assistant system what is this cat dog USER ASSISTANT a b c ? : . , [ ] < > |"
    trainer.train(
        sentence_iterator=iter([said] * 20),
        model_writer=stream, vocab_size=330, model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
        user_defined_symbols=["[UNUSED_0]", "[UNUSED_1]"],
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    named = {"3": "<|im_start|>", "4": "<|im_end|>"}
    listed = {id: {"content": token, "special": True} for id, token in named.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed, "add_bos_token": True}))
    added = {"<img>": 330, "</img>": 331, "<IMG_CONTEXT>": 332, "<image>": 333}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read_tokenizer(write_words(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read_tokenizer(write_pieces(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(params=["words", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def spell(ids: list[int]) -> str:
    """The prompt as it reads, special tokens and all."""
    return "".join((SPECIAL + WORDS)[id] for id in ids)


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before", "between"),
    [
        ("internvl2-2b", "<s><|im_start|>system\n{s}<|im_end|>", ""),
        ("internvl2.5-2b", "<s><|im_start|>system\n{s}<|im_end|>\n", "\n"),
        ("internvl3-2b", "<s>", "\n"),
    ],
)
def test_internvl(name: str, before: str, between: str, words: Tokenizer) -> None:
    card = find(name)
    family = card.family
    context = SPECIAL.index("<IMG_CONTEXT>")
    system = CHATS[card.config["chat"]].system
    opening = before.format(s="" if system is None else spell(words.encode(system))) + "<|im_start|>user\n"
    after = f"<|im_end|>{between}<|im_start|>assistant\n"
    asked = family.written(card, "what is this?", ONE, words).ids
    ids = [context if id == family.image_token(card) else id for id in asked]
    assert spell(ids) == f"{opening}<img>{'<IMG_CONTEXT>' * 4}</img>\nwhat is this?{after}"
    assert spell(family.written(card, "what?", NONE, words).ids) == f"{opening}what?{after}"


def test_llava(words: Tokenizer) -> None:
    card = find("llava-1.5-7b")
    family = card.family
    image = SPECIAL.index("<image>")
    asked = family.written(card, "what is this?", ONE, words).ids
    ids = [image if id == family.image_token(card) else id for id in asked]
    assert spell(ids) == f"<s>USER: {'<image>' * 4}\nwhat is this? ASSISTANT:"
    assert spell(family.written(card, "what?", NONE, words).ids) == "<s>USER: what? ASSISTANT:"


def test_conversation(words: Tokenizer) -> None:
    card = find("internvl3-2b")
    family = card.family
    assert isinstance(family, InternVL)
    one, two = (family.placeholders(card, Image(((n, 1),))) for n in (1, 2))
    ids = family.conversation(card, [(("[", *one, "]", *two, "what?"), "cat"), (("is this?",), None)], words)
    drawn = [SPECIAL.index("<IMG_CONTEXT>") if id == family.image_token(card) else id for id in ids]
    assert spell(drawn) == (
        "<s><|im_start|>user\n[<img><IMG_CONTEXT></img>]<img><IMG_CONTEXT><IMG_CONTEXT></img>what?<|im_end|>\n"
        "<|im_start|>assistant\ncat<|im_end|>\n<|im_start|>user\nis this?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_side_by_side_is_one_run(pieces: Tokenizer) -> None:
    """Two runs could share a token, and in the reference they do."""
    assert encode_parts(["what i", "s", " this"], pieces) == [*pieces.prefix, *pieces.encode("what is this")]
    apart = encode_parts(["what i", Special("<img>"), "s"], pieces)
    assert apart == [*pieces.prefix, *pieces.encode("what i"), 330, *pieces.encode("s")]


# -- text is text ------------------------------------------------------------------------------------------------------

SPELT = st.sampled_from([*SPECIAL, "[UNUSED_0]", "[UNUSED_1]", "<tool>", "what", "cat"])
TEXT = st.lists(SPELT | st.text(max_size=6), max_size=6).map("".join)


def special_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.special(token) for token in SPECIAL if token != "<unk>"}


@given(TEXT)
def test_no_question_makes_a_special_token(words: Tokenizer, pieces: Tokenizer, text: str) -> None:
    for tokenizer in (words, pieces):
        assert special_ids(tokenizer).isdisjoint(tokenizer.encode(text))


@given(TEXT)
def test_sentencepiece_loses_no_character(pieces: Tokenizer, text: str) -> None:
    assume("\0" not in text and "▁" not in text)  # sentencepiece's own end of text, and its own space
    assert pieces.decode(pieces.encode(text)) == text.strip()


def test_a_spelling_the_vocabulary_holds(pieces: Tokenizer) -> None:
    """InternLM2's vocabulary spells <|im_start|> in a way a user can type; it does not start a turn."""
    assert pieces.special("<|im_start|>") == 3
    ids = pieces.encode("a [UNUSED_0] b")
    assert 3 not in ids
    assert pieces.decode(ids) == "a [UNUSED_0] b"


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_prefix(words: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    assert words.prefix == [1]  # and not the </s> its post-processor puts behind
    assert pieces.prefix == [1]
    assert read_tokenizer(write_words(tmp_path / "plain", bos=False)).prefix == []
    folder = write_pieces(tmp_path / "sp")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert read_tokenizer(folder).prefix == []


def test_decoding(tokenizer: Tokenizer) -> None:
    said = tokenizer.encode("what is this cat?")
    end, start = tokenizer.special("<|im_end|>"), tokenizer.special("<|im_start|>")
    assert tokenizer.decode([*tokenizer.prefix, *said, end]) == "what is this cat?"
    padded = [start, *tokenizer.encode("\n "), *said, *tokenizer.encode(" \n"), end, 2, 2]
    assert tokenizer.decode(padded) == "what is this cat?"
    assert tokenizer.decode([*said, end, *tokenizer.encode("cat")]) == "what is this cat?cat"
    assert tokenizer.decode([end]) == tokenizer.decode([]) == ""


def test_tokens_that_are_no_special_ones_are_spelt_out(words: Tokenizer) -> None:
    assert words.decode([len(SPECIAL + WORDS), *words.encode("cat")]) == "<tool>cat"


def test_ids_of_a_padded_vocabulary_say_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("what"), 5000, *tokenizer.encode(" cat")]) == "what cat"


def test_added_tokens_may_be_plain(tmp_path: Path) -> None:
    """``added_tokens.json`` lists both kinds and tells them not apart; the other file does."""
    added = {"<tool>": 90, "<img>": 91}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    assert special_tokens(tmp_path) == added
    listed = {str(id): {"content": token, "special": token == "<img>"} for token, id in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    assert special_tokens(tmp_path) == {"<img>": 91}


def test_a_token_the_prompt_needs_and_the_tokenizer_has_not(tokenizer: Tokenizer) -> None:
    with pytest.raises(WeightsError, match=r"has no token '<quad>'"):
        tokenizer.special("<quad>")


def test_json_comes_before_sentencepiece(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    write_words(tmp_path)
    assert type(read_tokenizer(tmp_path)).__name__ == "_Json"


def test_by_path_of_folder_or_file(tmp_path: Path) -> None:
    card = find("internvl2-2b")
    write_words(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        assert load_tokenizer(card, str(weights)).prefix == [1]


# -- what is wrong is said ---------------------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no tokenizer"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", ["", "{}", "[]", "\x00\x01"])
def test_broken_tokenizer(name: str, content: str, tmp_path: Path) -> None:
    if name == "tokenizer.model":
        pytest.importorskip("sentencepiece")
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=name) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_sentencepiece_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pieces(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(WeightsError, match=r"needs sentencepiece; install it with: pip install 'memprof-vlm\[hub\]'"):
        read_tokenizer(tmp_path)
