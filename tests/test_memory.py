"""memprof's own memory gates, by its own plug-in: what the pages say of cards, and what a cache must come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from memprof.testing.held import Watched


@pytest.mark.memory_prediction(model="internvl2-2b", card="l4", fits=True)
@pytest.mark.memory_prediction(model="internvl2-2b", card="4GiB", fits=False)
def test_where_internvl2_2b_fits() -> None:
    """Its weights alone are above 4 GiB."""


# 34.9 MiB when all is made, and one layer's twice for the moment in which it grows.
@pytest.mark.memory_prediction(model="internvl2-2b", card="h100", part="kv_cache", limit="36MiB", images=[(448, 448)])
def test_the_cache_is_no_larger_than_its_tokens(memory_profile: Watched) -> None:
    (found,) = memory_profile.predictions
    sample = found.samples[0]
    tokens = sample.visual_tokens + sample.text_tokens
    a_token = 24 * 2 * 8 * 128 * 2  # layers, keys and values, heads, numbers, bytes; the last token is never fed back
    assert sample.tokens.kv_bytes == [a_token * (tokens + made) for made in range(16)]
