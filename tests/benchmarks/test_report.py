"""The tables of README and docs are those of the committed results."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def test_tables_are_generated_from_the_results() -> None:
    for path in report.TABLES:
        page = path.read_text(encoding="utf-8")
        assert report.fill(path, page) == page, "run: python -m benchmarks.report"


def test_every_result_says_how_it_was_made() -> None:
    for path in (report.HERE / "results").rglob("*-seed*.json"):
        result = json.loads(path.read_text())
        variant = f"-{result['variant']}" if result.get("variant") else ""
        assert path.name == f"{result['recipe']}{variant}-seed{result['seed']}.json"
        assert (path.parent.name == "ablations") == bool(variant)
        assert result["split"] == "val"
        chinese = path.is_relative_to(report.HERE / "results" / "flickr8k_cn")
        assert ("tok:characters" if chinese else "tok:ptb-java") in result["signature"]
        assert {"config", "environment", "train_minutes", "peak_memory_gb"} <= result.keys()
        assert "/" not in json.dumps(result["config"])


def result(seed: int, cider: float, meteor: float | None = 19.0) -> dict[str, Any]:
    scores = dict.fromkeys(report.NAMES, 20.0) | {"cider": cider, "meteor": meteor, "spice": None}
    return {"recipe": "lstm", "seed": seed, "scores": scores, "train_minutes": 12.4, "signature": "scorer:x"}


def test_a_row_is_the_mean_and_the_spread_of_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    folder = tmp_path / "results" / "flickr8k"
    folder.mkdir(parents=True)
    for seed, cider in enumerate([44.0, 45.0, 46.0]):
        made = result(seed, cider, meteor=None if seed else 19.0)
        (folder / f"lstm-seed{seed}.json").write_text(json.dumps(made))
    _, _, row, *_ = report.dev_scores("flickr8k").splitlines()
    cells = [*["20.0 ± 0.0"] * 4, "–", "20.0 ± 0.0", "45.0 ± 1.0", "12 min"]
    assert row == f"| `configs/lstm.yaml` | 3 | {' | '.join(cells)} |"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are, none yet."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    folder = tmp_path / "results" / "flickr8k"
    (folder / "ablations").mkdir(parents=True)
    return folder


def keep(folder: Path, cider: float, settings: dict[str, object], variant: str | None = None) -> None:
    path = folder / "ablations" / f"lstm-{variant}-seed0.json" if variant else folder / "lstm-seed0.json"
    config = settings | {"run": path.stem}
    path.write_text(json.dumps(result(0, cider) | {"config": config, "variant": variant}))


def test_an_ablation_names_what_was_changed_and_what_it_gained(folder: Path) -> None:
    settings: dict[str, object] = {"train.ema": 0.999, "decoder.dropout": 0.5}
    keep(folder, 44.0, settings)
    keep(folder, 42.5, settings | {"train.ema": 0}, "raw")
    keep(folder, 42.5, settings | {"decoder.dropout": 0.0}, "dry")
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0 | – | 20.0 | 44.0 |  |",
        "| lstm-seed0 | `decoder.dropout=0.0` | 20.0 | 42.5 | -1.5 |",
        "| lstm-seed0 | `train.ema=0` | 20.0 | 42.5 | -1.5 |",
    ]


def test_what_was_trained_otherwise_is_compared_with_the_recipe_trained_anew_by_the_same_code(folder: Path) -> None:
    settings: dict[str, object] = {"train.ema": 0.999, "search.beam": 5}
    keep(folder, 44.0, settings)
    keep(folder, 43.0, settings, "anew")
    keep(folder, 42.5, settings | {"train.ema": 0}, "raw")
    keep(folder, 45.0, settings | {"search.beam": 15}, "wide")
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0 | – | 20.0 | 44.0 |  |",
        "| lstm-seed0 | `search.beam=15` | 20.0 | 45.0 | +1.0 |",
        "| lstm-seed0, trained anew | – | 20.0 | 43.0 |  |",
        "| lstm-seed0, trained anew | `train.ema=0` | 20.0 | 42.5 | -0.5 |",
    ]


def test_what_a_recipe_scores_without_consensus_is_told_beside_it(folder: Path) -> None:
    settings: dict[str, object] = {"search.consensus": 5, "train.ema": 0.999}
    keep(folder, 58.0, settings)
    keep(folder, 54.0, settings | {"search.consensus": 0}, "alone")
    keep(folder, 53.0, {"search.consensus": 0, "train.ema": 0}, "raw")
    _, _, without, ranked, *_ = report.dev_scores("flickr8k").splitlines()
    assert without.startswith("| `configs/lstm.yaml`, `search.consensus=0` | 1 |")
    assert "| 54.0 |" in without
    assert ranked.startswith("| `configs/lstm.yaml` | 1 |")
    assert "| 58.0 |" in ranked
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0, `search.consensus=0` | – | 20.0 | 54.0 |  |",
        "| lstm-seed0, `search.consensus=0` | `train.ema=0` | 20.0 | 53.0 | -1.0 |",
    ], "what was made without consensus is compared with what was scored without"


def test_a_page_without_a_place_for_a_table_is_refused(refused: Callable) -> None:
    with refused("main-scores"):
        report.fill(report.README, "no place")


def test_the_speed_tables_tell_every_figure_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.speed() == ""
    told = " ".join(text for row in report.FIGURES for text in row)
    found: dict[str, Any] = dict.fromkeys(re.findall(r"{(\w+)", told), 2.5)
    found |= {"stream_captions": [10, 1000], "stream_memory_gb": [0.5, 0.51], "captioned_pictures": 1000}
    for _, text in report.PER_DECODER:
        found |= {f"{name}_{key}": 7 for name in report.DECODERS for key in re.findall(r"{(\w+)", text)}
    found["transformer_step_ms"] = 99.4
    machine = {"processor": "Z80", "threads": 1, "capability": "DEFAULT", "python": "3", "torch": "2", "load": 0.0}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "speed.json").write_text(json.dumps(found | {"environment": machine}))
    table = report.speed()
    assert "memory of training on 1,000 captions in tars against 10 | 2.50 times: 0.51 GB, not 0.50 |" in table
    assert "| ms a step of 64 captions | 7 | 7 | 99 |" in report.speed_by_decoder()
    assert table.splitlines()[-1].startswith("Z80, 1 threads")


def test_the_scaling_table_is_arithmetic_on_measured_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    disk = "| Conceptual 12M | 12,423,374 | 12,423,374 | 50.9 GB | 2.49 TB |"
    assert f"{disk} – | – | – |" in report.scaling()
    (tmp_path / "results").mkdir()
    rates = {"encode_images_per_second": 100, "lstm_captions_per_second": 1000, "stream_bytes_per_caption": 100}
    (tmp_path / "results" / "speed.json").write_text(json.dumps(rates))
    assert f"{disk} 1.24 GB | 35 h | 3 h |" in report.scaling()
