"""What docs/reliability.md says can be tried again by its commands, and a little of it is tried here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("posix", reason="the stress tests fork")

import fuzz
from conftest import TINY
from stress import test_faults
from stress.conftest import RESULTS


def test_each_row_is_made_by_its_command_and_lost_nothing() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/stress"]
    told = subprocess.run(command, cwd=fuzz.ROOT, capture_output=True, text=True, check=True).stdout
    tests = [line for line in told.splitlines() if "::" in line]
    assert sorted(row["command"].removeprefix("python -m pytest ").strip("'") for row in rows) == sorted(tests)
    assert all(row["tried"] > 0 and row["lost"] == 0 for row in rows)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_no_input_ends_in_a_traceback(name: str) -> None:
    assert fuzz.by_hypothesis(name, 20, again=True) >= 20


def test_a_fault_of_a_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(content: bytes) -> None:
        if b"caption" in content:
            raise KeyError("caption")

    monkeypatch.setitem(fuzz.READERS, "csv", careless)
    with pytest.raises((KeyError, ExceptionGroup)):
        fuzz.by_hypothesis("csv", 20, again=True)


def test_training_and_captioning_ask_nothing_of_the_network(archive: Path) -> None:
    for script, *words in (("train.py", *TINY, "train.epochs=1"), ("inference_visualize.py", "--help")):
        ended = test_faults.blocked(script, *words)
        assert ended.returncode == 0 and "BLOCKED" not in ended.stderr, ended.stderr
