"""The model card is that of the checkpoint in pretrained/, and tells what was measured."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_limits import references

from benchmarks import card, limits
from config import flatten, load_config

SIGNATURE = "scorer:x|split:val"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a checkpoint and all results that its card is made from."""
    (tmp_path / "captioner.pth").write_bytes(b"weights")
    scores: dict[str, Any] = dict.fromkeys(card.TITLES, 20.0) | {"spice": None}
    intervals = {"bleu4": [19.0, 21.0], "cider": [48.0, 52.0]}
    result: dict[str, Any] = {
        "intervals": intervals,
        "train_minutes": 12.4,
        "peak_memory_gb": 2.5,
        "environment": {"processor": "Z80", "threads": 1, "torch": "2"},
    }
    for seed, cider in enumerate([49.0, 50.0, 48.0]):
        content = result | {"seed": seed, "scores": scores | {"cider": cider}}
        for recipe in (card.FIRST, card.RECIPE):
            path = tmp_path / f"{recipe}-seed{seed}.json"
            path.parent.mkdir(exist_ok=True)
            epochs = 8 if recipe == card.FIRST else 2
            config = load_config(overrides=[f"train.epochs={epochs}", "data.root=[a, b]", "data.weights=[1, 2]"])
            parts = {name: content["scores"] | {"intervals": intervals} for name in card.BOTH}
            path.write_text(json.dumps(content | {"config": flatten(config.model_dump()), "datasets": parts}))
    given = references(["two women"] * 5, ["a brown dog"] * 5, ["a man"] * 5)
    captions = dict(zip(given.captions, ["a man", "a black dog", "a man"], strict=True))
    found = limits.measure(captions, given)
    file = {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 12_345_678, "seed": 1, "image_size": 260}
    file |= {"features": [81, 1280], "decoder_weights": 6_100_000, "words": 2538}
    part = scores | {"cider": 49.9036, "intervals": intervals}
    kept = part | {
        "captions": found["one_person"],
        "signature": SIGNATURE,
        "datasets": dict.fromkeys(card.BOTH, part),
    }
    (tmp_path / limits.LIMITS.name).write_text(json.dumps({"checkpoint": file, "scores": kept, **found}))
    return tmp_path


def test_the_card_is_generated_from_the_results_of_this_checkpoint() -> None:
    made = card.make(limits.LIMITS.parent, card.PRETRAINED)
    assert card.CARD.read_text(encoding="utf-8") == made, "run: python -m benchmarks.card"
    made = card.make_chinese(card.CHINESE, card.LANGUAGES["zh"])
    assert card.CHINESE_CARD.read_text(encoding="utf-8") == made, "run: python -m benchmarks.card"


def test_the_card_tells_training_scores_and_limits(made: Path) -> None:
    text = card.make(made, made / "captioner.pth")
    about = yaml.safe_load(text.split("---\n")[1])  # which the Hub reads
    assert (about["license"], about["language"], about["pipeline_tag"]) == ("mit", "en", "image-to-text")
    for result in about["model-index"][0]["results"]:
        assert {each["name"]: each["value"] for each in result["metrics"]}["CIDEr-D"] == 49.9
    assert "$" not in text
    for block in (block for block in text.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| `train.epochs` | `8` | `2` |" in rows and not any("train.lr" in row for row in rows)
    each, mean = " 20.0 (19.0–21.0) | 20.0 | 49.0 (48.0–52.0) |", " 20.0 ± 0.0 | 20.0 ± 0.0 | 49.0 ± 1.0 |"
    assert f"| seed 0 |{each}{each}" in rows and f"| mean ± deviation |{mean}{mean}" in rows
    assert "| women or girls | 1 | 0 | 0 | 0 | 100 (100–100) | 0 |" in rows
    assert "| “two” | 1 | 0 | 100 | 0 | – | 100 |" in rows
    file = ("seed 1.", "12.3 MB", f"`{SIGNATURE}`")
    for told in (*file, "12, 12, 12 minutes and then 12, 12, 12,", "brown (1)", "calls 100 % of women"):
        assert told in text, told


def test_a_checkpoint_that_was_not_measured_or_is_not_the_best_has_no_card(made: Path, refused: Callable) -> None:
    measured = made / limits.LIMITS.name
    measured.write_text(measured.read_text().replace('"seed": 1', '"seed": 0'))
    with refused("seed", "1", "best CIDEr-D"):
        card.make(made, made / "captioner.pth")
    (made / "captioner.pth").write_bytes(b"other weights")
    with refused(limits.LIMITS.name, "benchmarks.limits"):
        card.make(made, made / "captioner.pth")
