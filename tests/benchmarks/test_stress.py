"""What docs/reliability.md says can be tried again by its commands, and a little of it is tried here."""

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("posix", reason="the stress tests fork")

import fuzz
from conftest import TINY
from stress import test_faults, test_files, test_kills, test_pages, test_power, test_shared_cache
from stress.conftest import RESULTS
from stress.disk import Call, Disk
from stress.mutations import MUTATIONS, ROOT


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """The rows of docs/reliability.md, each by the name of its test."""
    tests = []
    for module in (test_faults, test_files, test_kills, test_pages, test_power, test_shared_cache):
        for name in (name for name in vars(module) if name.startswith("test_")):
            several = {"test_fuzzing": [*fuzz.READERS], "test_signals": [*test_kills.SIGNALS]}.get(name, [])
            path = f"{Path(module.__file__ or '').relative_to(fuzz.ROOT).as_posix()}::{name}"
            tests += [f"{path}[{each}]" for each in several] or [path]
    return sorted(tests)


def test_each_row_is_made_by_its_command_and_lost_nothing(rows: list[str]) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert sorted(row["command"].removeprefix("python -m pytest ").strip("'") for row in found) == rows
    for row in found:
        assert row["tried"] > 0 and row["lost"] == 0, f"measure it: {row['command']}"


def test_each_row_has_a_fault_that_fits_the_program_of_today(rows: list[str], tmp_path: Path) -> None:
    assert sorted({mutation.row for mutation in MUTATIONS}) == rows
    for mutation in MUTATIONS:
        content = (ROOT / mutation.file).read_text(encoding="utf-8")
        (tmp_path / mutation.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / mutation.file).write_text(content, encoding="utf-8")
        mutation.put_into(tmp_path)  # which raises where the program has changed
        compile((tmp_path / mutation.file).read_text(encoding="utf-8"), mutation.file, "exec")


def test_each_row_was_seen_to_fail() -> None:
    for row in json.loads(RESULTS.read_text(encoding="utf-8")):
        assert row.get("caught"), f"not seen to fail: python -m tests.stress.mutations {row['command']}"


def test_a_power_cut_leaves_what_was_flushed_and_anything_of_the_rest() -> None:
    disk = Disk(Path("/here"))

    def call(name: str, *texts: str, flags: str = "") -> None:
        disk.do(Call(name, [os.fsencode(text) for text in texts], flags))

    def states() -> dict[str, dict[str, bytes]]:
        return {
            re.sub("all names, but (.*) what was not flushed", r"\1", what): {str(path): state[path] for path in state}
            for what, state in disk.states().items()
        }

    call("mkdir", "runs")
    call("openat", "/here", "runs/.new", "/here/runs/.new", flags="O_WRONLY|O_CREAT")
    call("write", "/here/runs/.new", "x" * 1000)
    call("openat", "/here", "/elsewhere", "/elsewhere", flags="O_WRONLY|O_CREAT")
    assert states() == {
        "what was flushed": {},
        "everything": {"runs/.new": b"x" * 1000},
        "nothing in": {"runs/.new": b""},
        "zeros in": {"runs/.new": bytes(1000)},
        "one sector of": {"runs/.new": b"x" * 512 + bytes(488)},
    }
    call("fsync", "/here/runs/.new")
    call("rename", "runs/.new", "runs/last.pth")
    assert states() == {what: {"runs/last.pth": b"x" * 1000} for what in states()} | {"what was flushed": {}}
    call("fsync", "/here/runs")
    assert states()["what was flushed"] == {}  # nobody knows the folder
    call("fsync", "/here")
    assert states() == {what: {"runs/last.pth": b"x" * 1000} for what in states()}
    call("unlink", "runs/last.pth")
    assert states() == {what: {} for what in states()} | {"what was flushed": {"runs/last.pth": b"x" * 1000}}


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
