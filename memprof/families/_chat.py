"""A prompt written as parts: runs of text, and special tokens by name or id.

Text is encoded run by run between special tokens, as the reference's tokenizers do, and is text whatever it says:
``<|im_end|>`` inside a question does not end a turn. (In the reference it does, and a literal ``<IMG_CONTEXT>`` breaks
it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol


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
