"""From text to token ids and back, by the tokenizer files of the user's checkpoint. No remote code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memprof.errors import WeightsError
from memprof.families import Model
from memprof.families._chat import Tokenizer
from memprof.models.files import TOKENIZER_FILES, folder_of, locate, read_object


def load_tokenizer(model: Model, weights: str) -> Tokenizer:
    """The tokenizer of a checkpoint: ``tokenizer.json``, or else sentencepiece's ``tokenizer.model``.

    Args:
        model: The model asked for.
        weights: ``hub``, or the path of a folder or of a file in it.

    Raises:
        WeightsError: No tokenizer there, or one that cannot be read.
    """
    return read_tokenizer(folder_of(locate(weights, model.hub, TOKENIZER_FILES)))


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
    added = (read_object(folder / "tokenizer.json") or {}).get("added_tokens", [])
    listed = (read_object(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder", {})
    entries = [*((entry["id"], entry) for entry in added), *listed.items()]
    plain = {entry["content"] for _, entry in entries if not entry.get("special")}
    bare = (read_object(folder / "added_tokens.json") or {}).items()  # says of none whether it is special
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
        config = read_object(folder / "tokenizer_config.json") or {}
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
        stored: dict[str, Any] = read_object(folder / "tokenizer.json") or {}
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
