"""What docs/reliability.md says can be tried again by its commands, and a little of it is tried here."""

import json
from pathlib import Path

import pytest

pytest.importorskip("posix", reason="the stress tests fork")

import fuzz
from conftest import TINY
from stress import test_faults, test_files, test_kills, test_pages
from stress.conftest import RESULTS


def test_each_row_is_made_by_its_command_and_lost_nothing() -> None:
    rows, tests = json.loads(RESULTS.read_text(encoding="utf-8")), []
    for module in (test_faults, test_files, test_kills, test_pages):
        for name in (name for name in vars(module) if name.startswith("test_")):
            several = {"test_fuzzing": [*fuzz.READERS], "test_signals": [*test_kills.SIGNALS]}.get(name, [])
            path = f"{Path(module.__file__ or '').relative_to(fuzz.ROOT).as_posix()}::{name}"
            tests += [f"{path}[{each}]" for each in several] or [path]
    assert sorted(row["command"].removeprefix("python -m pytest ").strip("'") for row in rows) == sorted(tests)
    assert all(row["tried"] > 0 and row["lost"] == 0 for row in rows)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_no_input_ends_in_a_traceback(name: str) -> None:
    assert fuzz.check_inputs(name, 20, again=True) >= 20


def test_a_fault_of_a_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(content: bytes) -> None:
        if b"caption" in content:
            raise KeyError("caption")

    monkeypatch.setitem(fuzz.READERS, "csv", careless)
    with pytest.raises((KeyError, ExceptionGroup)):
        fuzz.check_inputs("csv", 20, again=True)


def test_training_asks_nothing_of_the_network(archive: Path) -> None:
    ended = test_faults.blocked("train.py", *TINY, "train.epochs=1")
    assert ended.returncode == 0 and "BLOCKED" not in ended.stderr, ended.stderr
