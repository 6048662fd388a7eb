"""The page on reliability is that of the committed rows, and what they measured is tried again in short."""

import json
from pathlib import Path

import pytest

pytest.importorskip("posix", reason="the checks fork")

from benchmarks.reliability import fuzz, offline, page
from benchmarks.reliability.__main__ import CHECKS
from benchmarks.reliability.tiny import SMALLEST


def test_the_page_is_generated_from_the_rows() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text) == text, "run: python -m benchmarks.reliability"


def test_each_row_names_a_check_and_lost_nothing() -> None:
    rows = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    commands = [f"python -m benchmarks.reliability {name}" for name in CHECKS]
    assert [row["command"] for row in rows] == [command for command in commands if command in str(rows)]
    assert all(row["tried"] > 0 and row["lost"] == 0 for row in rows)


@pytest.mark.parametrize("name", [*fuzz.TASTERS, "state"])
def test_no_input_ends_in_a_traceback(name: str) -> None:
    assert fuzz.try_some(*fuzz.strategy_for(name), most=20) >= 20


def test_training_and_captioning_ask_nothing_of_the_network(archive: Path) -> None:
    for script, *words in (
        ("train.py", *SMALLEST, "train.epochs=1"),
        ("inference_visualize.py", "--help"),
    ):
        ended = offline.blocked(script, *words)
        assert ended.returncode == 0 and "BLOCKED" not in ended.stderr, ended.stderr


def test_a_fault_of_a_taster_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(content: bytes) -> None:
        if b"caption" in content:
            raise KeyError("caption")

    monkeypatch.setitem(fuzz.TASTERS, "csv", careless)
    with pytest.raises((KeyError, ExceptionGroup)):
        fuzz.try_some(*fuzz.strategy_for("csv"), most=20)
