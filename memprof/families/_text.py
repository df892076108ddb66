"""From a question to token ids and back, by the tokenizer files of the user's checkpoint. No remote code.

A prompt is written as parts: runs of text, and special tokens by name or id. Text is encoded run by run between special
tokens, as the reference's tokenizers do, and is text whatever it says: ``<|im_end|>`` inside a question does not end a
turn. (In the reference it does, and a literal ``<IMG_CONTEXT>`` breaks it.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from memprof.errors import WeightsError
from memprof.families import Card
from memprof.families._files import TOKENIZER_FILES, folder_of, locate, read_json

# -- tokenizers --------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What memprof needs of a tokenizer."""

    @property
    def prefix(self) -> list[int]:
        """Ids every prompt begins with: BOS, or nothing."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no BOS; special tokens spelt out in it stay text."""

    def special(self, token: str) -> int:
        """Id of the special token called ``token``; raises WeightsError where there is none."""

    def decode(self, ids: Iterable[int]) -> str:
        """The answer ``ids`` spell: special tokens left out, white space at both ends too.

        Ids the tokenizer does not know (a padded vocabulary has some) are left out. Ids behind an end-of-turn token
        count: ``generate()`` stops there by itself, and the reference cuts nothing.
        """


def load_tokenizer(card: Card, weights: str) -> Tokenizer:
    """The tokenizer of a checkpoint: ``tokenizer.json``, or else sentencepiece's ``tokenizer.model``.

    Args:
        card: The model asked for.
        weights: ``hub``, or the path of a folder or of a file in it.

    Raises:
        WeightsError: No tokenizer there, or one that cannot be read.
    """
    return read_tokenizer(folder_of(locate(weights, card.hub, TOKENIZER_FILES)))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose files are in ``folder``; raises WeightsError where there is none or it cannot be read."""
    for name, reader in (("tokenizer.json", _Json), ("tokenizer.model", _SentencePiece)):
        if (folder / name).is_file():
            try:
                return reader(folder)
            except WeightsError:
                raise
            except Exception as error:  # both libraries raise bare Exception or RuntimeError
                raise WeightsError(f"{folder / name} cannot be read: {' '.join(str(error).split())}") from None
    raise WeightsError(f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model), which prompts need")


def special_tokens(folder: Path) -> dict[str, int]:
    """Special tokens by name as the files in ``folder`` list them; empty where it has no tokenizer.

    Raises:
        WeightsError: One of the files is not JSON.
    """
    added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens", [])
    listed = (read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder", {})
    entries = [*((entry["id"], entry) for entry in added), *listed.items()]
    plain = {entry["content"] for _, entry in entries if not entry.get("special")}
    bare = (read_json(folder / "added_tokens.json") or {}).items()  # says of none whether it is special
    return {token: int(id) for token, id in bare if token not in plain} | {
        entry["content"]: int(id) for id, entry in entries if entry["content"] not in plain
    }


class _Base:
    """What both readers share. ``_raw`` and ``_spell`` are the library's own encoding and decoding."""

    prefix: list[int]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._special = special_tokens(folder)
        self._dropped = set(self._special.values())
        #: Special tokens that text could spell, with how the vocabulary spells them.
        self._spelt: dict[int, str] = {id: token for token, id in self._special.items()}

    def _raw(self, text: str) -> list[int]:
        raise NotImplementedError

    def _spell(self, ids: list[int]) -> str:
        raise NotImplementedError

    def special(self, token: str) -> int:
        if token not in self._special:
            raise WeightsError(f"the tokenizer in {self.folder} has no token {token!r}, which the model's prompts need")
        return self._special[token]

    def encode(self, text: str) -> list[int]:
        ids = self._raw(text)
        if self._spelt.keys().isdisjoint(ids):
            return ids
        # The vocabulary itself holds the spelling (InternLM2's "[UNUSED_TOKEN_146]" is <|im_start|>): cut it in two.
        cut = "|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in self._spelt.values() if len(s) > 1)
        return [id for piece in re.split(cut, text) for id in self._raw(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._spell([id for id in ids if id not in self._dropped]).strip()


class _SentencePiece(_Base):
    """``tokenizer.model`` and its ``added_tokens.json``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            import sentencepiece
        except ImportError:
            raise WeightsError(
                f"{folder / 'tokenizer.model'} needs sentencepiece; install it with: pip install 'memprof-vlm[hub]'"
            ) from None
        sentencepiece.set_min_log_level(2)
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        size = self._model.vocab_size()
        for id in range(size):
            if self._model.is_control(id) or self._model.is_unknown(id):
                self._special.setdefault(self._model.id_to_piece(id), id)
        self._dropped = set(self._special.values())
        self._spelt = {
            id: self._model.id_to_piece(id) for id in self._dropped if id < size and not self._model.is_unknown(id)
        }
        config = read_json(folder / "tokenizer_config.json") or {}
        self.prefix = [self._model.bos_id()] if config.get("add_bos_token", True) else []

    def _raw(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def _spell(self, ids: list[int]) -> str:
        return str(self._model.decode([id for id in ids if id < self._model.vocab_size()]))


class _Json(_Base):
    """``tokenizer.json``, by the tokenizers library."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Library

        super().__init__(folder)
        stored: dict[str, Any] = read_json(folder / "tokenizer.json") or {}
        for entry in stored.get("added_tokens", []):
            entry["special"] = True  # so that none of them is found in text
        self._model = Library.from_str(json.dumps(stored))
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        unknown = (stored.get("model") or {}).get("unk_token")
        self._spelt = {id: token for id, token in self._spelt.items() if token != unknown}
        begun = self._model.encode("x")
        self.prefix = begun.ids[: begun.special_tokens_mask.index(0)]  # others may stand behind, which a prompt has not

    def _raw(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def _spell(self, ids: list[int]) -> str:
        return str(self._model.decode(ids, skip_special_tokens=False))


# -- prompts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Special:
    """A special token by name or id, ``times`` over."""

    token: str | int
    times: int = 1


Part = str | Special


def encode_parts(parts: Iterable[Part], tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole prompt, BOS included; text that stands side by side is encoded as one run."""
    ids = list(tokenizer.prefix)
    for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
        if is_text:
            ids += tokenizer.encode("".join(str(part) for part in run))
            continue
        for part in run:
            assert isinstance(part, Special)
            token = part.token if isinstance(part.token, int) else tokenizer.special(part.token)
            ids += [token] * part.times
    return ids


@dataclass(frozen=True)
class Chat:
    """A chat written in turns between ``<|im_start|>`` and ``<|im_end|>``.

    Attributes:
        system: The system message, or None for no system turn.
        between: Text between two turns.
    """

    system: str | None
    between: str

    def parts(self, turns: Sequence[tuple[Sequence[Part], str | None]]) -> list[Part]:
        """A conversation: each turn is what the user sent and what the model answered, None if it is to answer now."""
        said: list[tuple[str, Sequence[Part]]] = [] if self.system is None else [("system", [self.system])]
        for user, answer in turns:
            said.append(("user", user))
            if answer is not None:
                said.append(("assistant", [answer]))
        parts: list[Part] = []
        for role, what in said:
            parts += [Special("<|im_start|>"), f"{role}\n", *what, Special("<|im_end|>"), self.between]
        return [*parts, Special("<|im_start|>"), "assistant\n"]


#: By the names that conversation.py of OpenGVLab/InternVL (commit 2410d1d) gives them. ``hf`` is the chat template of
#: the ``-hf`` checkpoints, which has no system message unless the user writes one.
CHATS: Mapping[str, Chat] = {
    "internlm2-chat": Chat(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。",
        between="",
    ),
    "internvl2_5": Chat(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
        "多模态大语言模型。",
        between="\n",
    ),
    "hf": Chat(None, between="\n"),
}
