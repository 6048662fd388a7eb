"""The benchmark of large folders: what it measures is what the program does, and its slope is 1 for what is linear."""

import json
from pathlib import Path

import pytest

from benchmarks import folders, report
from benchmarks.folder_steps import STEPS, write_folders

IN_THIS_PROCESS = [step for step in STEPS if step not in ("page", "search", "start")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    write_folders(root, 230)
    return root


def test_the_made_up_datasets_have_names_that_differ_and_names_that_do_not(made: Path) -> None:
    flat, equal = (sorted((made / name / "images").rglob("*.jpg")) for name in ("flat", "equal"))
    assert len(flat) == len({path.name for path in flat}) == len(equal) == 230
    assert len({path.name for path in equal}) == 100
    rows = (made / "equal" / "captions.csv").read_text().splitlines()
    assert len(rows) == 1 + 5 * 230 and rows[1].startswith("images/0000/0000.jpg,")


@pytest.mark.parametrize("step", IN_THIS_PROCESS)
def test_every_step_works_on_them(step: str, made: Path) -> None:
    _, make = STEPS[step]
    found = folders.measure(make(made, 230))
    assert found["seconds"] > 0 and found["memory_mb"] >= 0


def test_the_steps_do_all_of_their_work(made: Path) -> None:
    results = {step: STEPS[step][1](made, 230)() for step in ("list", "glob", "name", "table-equal", "splits-equal")}
    assert len(results["list"][0]) == len(results["glob"][0]) == len(set(results["name"])) == 230
    assert len(results["table-equal"]) == 5 * 230
    assert sum(name.startswith("moved/") for name in results["splits-equal"]) == 230
    assert len(STEPS["cache"][1](made, 230)().names) == 230
    STEPS["results"][1](made, 230)()
    assert len(json.loads((made / "out" / "predictions.json").read_text())) == 230
    STEPS["sidecars"][1](made, 230)()
    assert len(list((made / "flat" / "images").glob("*.txt"))) == 230


def test_the_slope_is_1_for_what_is_linear_and_2_for_what_is_quadratic() -> None:
    sizes = (10, 1000, 10_000)
    for power in (1, 2):
        found = [{"seconds": 3.0 * size**power, "memory_mb": 1.0} for size in sizes]
        assert folders.as_columns(found, sizes)["slope"] == power


def test_the_chart_names_each_step_beside_its_line_without_covering_another() -> None:
    result = report.read(folders.OUT)
    texts = folders.draw(result).axes[0].texts
    assert [text.get_text().rpartition(" (")[0] for text in texts] == [
        step["title"].replace("`", "") for step in result["steps"].values()
    ]
    assert folders.spread_out([0.0, 3.0, 0.01, 0.0], 0.5) == [0.0, 3.0, 1.0, 0.5]
