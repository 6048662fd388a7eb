"""The rows of docs/reliability.md: real kills, full disks, hostile files and fuzzing, on Linux and as root.

    python -m pytest tests/stress             # hours; the ordinary suite does not collect these
    python -m pytest tests/stress --short     # the same in a few minutes, with fewer tries

Each test is a row. It counts what it tries with `tally`, and fails if anything was lost. Without --short its row in
benchmarks/results/reliability.json is replaced; `python -m benchmarks.report` writes the page from that file. In
mutations.py each row has a fault of the program by which it must fail.
"""

import json
import shlex
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stress.runs import finish
from utils import as_json, write_atomically

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"


@dataclass
class Tally:
    """How often something was tried and how often something was lost by it; `figures` says what else was measured."""

    short: bool
    tried: int = 0
    lost: int = 0
    figures: str = ""

    def __call__(self, fine: bool, what: str, said: str = "") -> None:
        self.tried += 1
        if not fine:
            self.lost += 1
            print(f"LOST {what}: {said[-1500:]}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="try each stress test briefly, and write no results")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return Tally(request.config.getoption("--short"))


@pytest.fixture
def whole(archive: Path) -> Path:
    """The folder of a finished run that nothing disturbed; the working folder also holds its dataset, `archive`."""
    finish("whole")
    return Path("runs/whole")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Once a test has ended by itself, keep its row, and fail it if it lost anything."""
    done = yield
    tally = pyfuncitem.funcargs["tally"]
    assert isinstance(tally, Tally)
    if not tally.short:
        command = f"python -m pytest {shlex.quote(pyfuncitem.nodeid)}"
        title = ": ".join([pyfuncitem.function.__doc__, *([pyfuncitem.callspec.id] if "[" in command else [])])
        rows = {row["command"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}
        row = {"check": title, "tried": tally.tried, "lost": tally.lost, "figures": tally.figures, "command": command}
        rows[command] = rows.get(command, {}) | row  # what `mutations` found stays
        write_atomically(RESULTS, as_json([*rows.values()]) + b"\n")
    assert tally.tried and not tally.lost, f"lost {tally.lost} of {tally.tried}"
    return done
