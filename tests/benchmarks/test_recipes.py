"""Variants of recipes: what has to be trained for them."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.recipes import SITTINGS, only_searches_otherwise
from config import Config
from utils import save_checkpoint


def test_a_variant_that_only_searches_otherwise_needs_no_training(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "checkpoints.pth", {"config": tiny_config("search.consensus=5").model_dump()})
    assert not only_searches_otherwise(tmp_path, ["search.consensus=0"]), "it does not say how it was trained"
    (tmp_path / SITTINGS).write_text("[]")
    assert only_searches_otherwise(tmp_path, ["search.consensus=0", "data.root=elsewhere"])
    assert not only_searches_otherwise(tmp_path, ["search.consensus=0", "train.epochs=1"])


def test_without_a_run_a_variant_is_trained(tmp_path: Path) -> None:
    assert not only_searches_otherwise(tmp_path / "none", ["search.consensus=0"])
