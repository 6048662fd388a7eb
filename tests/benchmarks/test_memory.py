"""The memory of training on tars is measured on tars that train.py reads."""

from pathlib import Path

import pytest

from benchmarks import memory
from config import load_config
from data import annotations


def test_made_up_tars_are_read_and_the_memory_of_a_caption_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset", reason="tars need requirements-extras.txt")
    monkeypatch.chdir(tmp_path)
    tars = memory.write_tars(Path(), 10_000)
    table = annotations.load(load_config(overrides=[f"data.shards={tars}", *memory.SETTINGS]).data)
    assert (table["split"] == "val").sum() == 5 * memory.VALIDATION
    monkeypatch.setattr(memory, "COUNTED", 10_000)
    assert 20 < memory.held_per_caption() < 300
