"""The tables of README and docs are those of the committed results."""

import json
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


def result(cider: float, seed: int = 0, meteor: float | None = 19.0, **settings: object) -> dict[str, Any]:
    scores = dict.fromkeys(report.TITLES, 20.0) | {"cider": cider, "meteor": meteor, "spice": None}
    made = {"recipe": "lstm", "seed": seed, "train_minutes": 12.4, "signature": "scorer:x"}
    return made | {"scores": scores, "config": settings}


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`keep(cider, variant, **settings)` writes a result, where the report reads them."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    folder = tmp_path / "results" / "flickr8k"
    (folder / "ablations").mkdir(parents=True)

    def write(cider: float, variant: str | None = None, settings: dict[str, object] | None = None, **own: Any) -> None:
        made = result(cider, **own) | {"variant": variant, "config": settings or {}}
        name = f"ablations/lstm-{variant}" if variant else "lstm"
        (folder / f"{name}-seed{made['seed']}.json").write_text(json.dumps(made))

    return write


def test_a_row_is_the_mean_and_the_spread_of_the_seeds(keep: Callable[..., None]) -> None:
    for seed, cider in enumerate([44.0, 45.0, 46.0]):
        keep(cider, seed=seed, meteor=None if seed else 19.0)
    _, _, row, *_ = report.dev_scores("flickr8k").splitlines()
    cells = [*["20.0 ± 0.0"] * 4, "–", "20.0 ± 0.0", "45.0 ± 1.0", "12 min"]
    assert row == f"| `configs/lstm.yaml` | 3 | {' | '.join(cells)} |"


def test_a_metric_that_older_results_lack_has_a_column_once_one_has_it(
    keep: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(44.0)
    before = report.dev_scores("flickr8k")
    monkeypatch.setitem(report.TITLES, "clip", "CLIPScore")
    assert report.dev_scores("flickr8k") == before


def test_an_ablation_names_what_was_changed_and_what_it_gained(keep: Callable[..., None]) -> None:
    settings: dict[str, object] = {"train.ema": 0.999, "decoder.dropout": 0.5}
    keep(44.0, None, settings)
    keep(42.5, "raw", settings | {"train.ema": 0})
    keep(42.5, "dry", settings | {"decoder.dropout": 0.0})
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0 | – | 20.0 | 44.0 |  |",
        "| lstm-seed0 | `decoder.dropout=0.0` | 20.0 | 42.5 | -1.5 |",
        "| lstm-seed0 | `train.ema=0` | 20.0 | 42.5 | -1.5 |",
    ]


def test_self_critical_epochs_of_older_results_are_told_by_their_settings_of_today(keep: Callable[..., None]) -> None:
    older: dict[str, object] = {"train.epochs": 2, "train.self_critical_epochs": 2, "train.self_critical_lr": 3e-5}
    keep(60.0, None, {"train.epochs": 2, "train.loss": "self_critical", "train.lr": 3e-5})
    keep(60.0, "older", older)
    keep(58.0, "faster", older | {"train.self_critical_lr": 1e-4})
    keep(50.0, "plain", older | {"train.self_critical_epochs": 0, "train.lr": 3e-5})
    assert report.ablations().splitlines()[3:] == [
        "| lstm-seed0 | `train.lr=0.0001` | 20.0 | 58.0 | -2.0 |",
        "| lstm-seed0 |  | 20.0 | 60.0 | +0.0 |",
        "| lstm-seed0 | `train.loss=cross_entropy` | 20.0 | 50.0 | -10.0 |",
    ]


def test_what_was_trained_otherwise_is_compared_with_the_recipe_trained_anew_by_the_same_code(
    keep: Callable[..., None],
) -> None:
    settings: dict[str, object] = {"train.ema": 0.999, "search.beam": 5}
    keep(44.0, None, settings)
    keep(43.0, "anew", settings)
    keep(42.5, "raw", settings | {"train.ema": 0})
    keep(45.0, "wide", settings | {"search.beam": 15})
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0 | – | 20.0 | 44.0 |  |",
        "| lstm-seed0 | `search.beam=15` | 20.0 | 45.0 | +1.0 |",
        "| lstm-seed0, trained anew | – | 20.0 | 43.0 |  |",
        "| lstm-seed0, trained anew | `train.ema=0` | 20.0 | 42.5 | -0.5 |",
    ]


def test_what_a_recipe_scores_without_consensus_is_told_beside_it(keep: Callable[..., None]) -> None:
    settings: dict[str, object] = {"search.consensus": 5, "train.ema": 0.999}
    keep(58.0, None, settings)
    keep(54.0, "alone", settings | {"search.consensus": 0})
    keep(53.0, "raw", {"search.consensus": 0, "train.ema": 0})
    _, _, without, ranked, *_ = report.dev_scores("flickr8k").splitlines()
    assert without.startswith("| `configs/lstm.yaml`, `search.consensus=0` | 1 |") and "| 54.0 |" in without
    assert ranked.startswith("| `configs/lstm.yaml` | 1 |") and "| 58.0 |" in ranked
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0, `search.consensus=0` | – | 20.0 | 54.0 |  |",
        "| lstm-seed0, `search.consensus=0` | `train.ema=0` | 20.0 | 53.0 | -1.0 |",
    ], "what was made without consensus is compared with what was scored without"


def test_an_ablation_of_nothing_is_refused(keep: Callable[..., None], refused: Callable) -> None:
    keep(44.0, "raw")
    with refused("lstm-raw-seed0.json", "lstm-seed0.json"):
        report.ablations()


def test_a_page_without_a_place_for_a_table_is_refused(refused: Callable) -> None:
    with refused("main-scores"):
        report.fill(report.README, "no place")


def test_the_scaling_table_is_arithmetic_on_measured_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    disk = "| Conceptual 12M | 12,423,374 | 12,423,374 | 50.9 GB | 2.49 TB |"
    assert f"{disk} – | – | – |" in report.scaling()
    (tmp_path / "results").mkdir()
    rates = {"encode_images_per_second": 100, "lstm_captions_per_second": 1000, "bytes_per_caption": 100}
    (tmp_path / "results" / "speed.json").write_text(json.dumps(rates))
    assert f"{disk} 1.24 GB | 35 h | 3 h |" in report.scaling()
