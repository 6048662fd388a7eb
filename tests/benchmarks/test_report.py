"""The tables of README and docs are those of the committed results."""

import json
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`keep(cider, variant, **{"train.ema": 0})` writes a result, where the report reads them."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    folder = tmp_path / "results" / "flickr8k"
    (folder / "ablations").mkdir(parents=True)

    def write(cider: float, variant: str | None = None, seed: int = 0, **settings: object) -> None:
        scores = dict.fromkeys(report.TITLES, 20.0) | {"cider": cider, "meteor": None if seed else 19.0, "spice": None}
        made = {"recipe": "lstm", "seed": seed, "variant": variant, "scores": scores, "config": settings}
        name = f"ablations/lstm-{variant}" if variant else "lstm"
        (folder / f"{name}-seed{seed}.json").write_text(json.dumps(made | {"train_minutes": 12.4, "signature": "x"}))

    return write


def test_a_row_is_the_mean_and_the_spread_of_the_seeds(keep: Callable[..., None]) -> None:
    for seed, cider in enumerate([44.0, 45.0, 46.0]):
        keep(cider, seed=seed)
    _, _, row, *_ = report.dev_scores("flickr8k").splitlines()
    cells = [*["20.0 ± 0.0"] * 4, "–", "20.0 ± 0.0", "45.0 ± 1.0", "12 min"]
    assert row == f"| `configs/lstm.yaml` | 3 | {' | '.join(cells)} |"


def test_an_ablation_names_what_was_changed_and_what_it_gained(keep: Callable[..., None]) -> None:
    settings = {"train.ema": 0.999, "decoder.dropout": 0.5, "search.beam": 5}
    keep(44.0, **settings)
    keep(42.5, "raw", **settings | {"train.ema": 0})
    keep(45.0, "wide", **settings | {"search.beam": 15})
    base, wide, raw = [
        "| lstm-seed0 | – | 20.0 | 44.0 |  |",
        "| lstm-seed0 | `search.beam=15` | 20.0 | 45.0 | +1.0 |",
        "| lstm-seed0 | `train.ema=0` | 20.0 | 42.5 | -1.5 |",
    ]
    assert report.ablations().splitlines()[2:] == [base, raw, wide]
    keep(43.0, "anew", **settings)  # with which what was trained otherwise is compared, for it has the same code
    assert report.ablations().splitlines()[2:] == [
        *(base, wide, "| lstm-seed0, trained anew | – | 20.0 | 43.0 |  |"),
        "| lstm-seed0, trained anew | `train.ema=0` | 20.0 | 42.5 | -0.5 |",
    ]


def test_what_a_recipe_scores_without_consensus_is_told_beside_it(keep: Callable[..., None]) -> None:
    keep(58.0, **{"search.consensus": 5, "train.ema": 0.999})
    keep(54.0, "alone", **{"search.consensus": 0, "train.ema": 0.999})
    keep(53.0, "raw", **{"search.consensus": 0, "train.ema": 0})
    _, _, without, ranked, *_ = report.dev_scores("flickr8k").splitlines()
    assert without.startswith("| `configs/lstm.yaml`, `search.consensus=0` | 1 |") and "| 54.0 |" in without
    assert ranked.startswith("| `configs/lstm.yaml` | 1 |") and "| 58.0 |" in ranked
    assert report.ablations().splitlines()[2:] == [
        "| lstm-seed0, `search.consensus=0` | – | 20.0 | 54.0 |  |",
        "| lstm-seed0, `search.consensus=0` | `train.ema=0` | 20.0 | 53.0 | -1.0 |",
    ], "what was made without consensus is compared with what was scored without"


def test_the_scaling_table_is_arithmetic_on_measured_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    rates = {"encode_images_per_second": 100, "lstm_captions_per_second": 1000, "bytes_per_caption": 100}
    (tmp_path / "results" / "speed.json").write_text(json.dumps(rates))
    row = "| Conceptual 12M | 12,423,374 | 12,423,374 | 50.9 GB | 2.49 TB | 1.24 GB | 35 h | 3 h |"
    assert row in report.scaling().splitlines()


def test_a_row_of_reliability_names_the_fault_with_which_it_was_seen_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    row = {
        "check": "a kill",
        "tried": 1200,
        "lost": 0,
        "figures": "",
        "command": "pytest a",
        "mutation": "b is left out",
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results/reliability.json").write_text(json.dumps([row | {"caught": True}, row | {"caught": False}]))
    _, _, seen, unseen, *_ = report.reliability().splitlines()
    assert seen == "| a kill | 1,200 | 0 |  | b is left out | `pytest a` |"
    assert unseen == "| a kill | 1,200 | 0 |  | – | `pytest a` |"
