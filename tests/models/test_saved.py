"""A model of every family, saved by transformers and read back by memprof: the same tensors, the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import families, tiny_model

from memprof.api import spec
from memprof.bench import Bench
from memprof.models.build import build_model
from memprof.models.find import find
from memprof.models.heeding import cuts
from memprof.runner import complete_spec, run

#: The proving models come with memprof.
SAVED = [name for name in families() if not name.startswith("proving")]


@pytest.mark.parametrize("family", SAVED)
def test_what_transformers_saved_is_read_back(family: str, tmp_path: Path) -> None:
    _, card, model = tiny_model(family)
    model.save_pretrained(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    found = find(saved, saved)
    assert (found.layers, found.hidden, type(found.family)) == (card.layers, card.hidden, type(card.family))
    again = build_model(found, device="cpu", dtype="float32", weights=saved)
    mine, theirs = again.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    (tmp_path / "one.csv").write_text("width,height,text_tokens\n400,200,9\n")
    asked = spec(
        saved, device="cpu", weights=saved, dtype="float32", data=str(tmp_path / "one.csv"), max_new_tokens=2, warmup=0,
        max_tiles=4 if cuts(found) else None,
    )  # fmt: skip
    done = run(asked, tmp_path / "run", bench=Bench(complete_spec(asked).setup))
    assert [(sample.status, sample.error) for sample in done.samples] == [("ok", None)]
    assert done.record.static_bytes == sum(
        storage.nbytes() for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in _held(model)}.values()
    )


def _held(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
