"""torchrun: several processes write what one would, and a job outlives the death of one of them."""

from cli import UserError, run_script

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from conftest import TINY

import distributed
import evaluate
import train
from config import load_config
from data import write_tars
from utils import load_checkpoint

ROOT = Path(__file__).parents[2]
TRAIN = (
    *(*TINY, "decoder.name=attention", "decoder.dropout=0"),
    *("train.mirror=true", "train.lr=1e-2", "data.shard_rows=4"),
)
LONG = (*TRAIN, "train.epochs=60", "train.checkpoint_every=3", "train.log_every=1000")
SHORT = (*TRAIN, "train.epochs=3")
TARS = (*SHORT, "data.shards=tars/{00000..00002}.tar")
SCORE = ("--run", "two", "--split", "val", "--tokeniser", "words")
# What the two processes do, one after the other: starting them takes long.
JOBS = (
    (train, (*SHORT, "run=two", "data.cache=cache2")),
    (evaluate, (*SCORE, "--out", "two")),
    (train, (*TARS, "run=tars2", "data.cache=cache2")),
    (train, (*LONG, "run=undisturbed")),
)
DRIVER = f"""
import contextlib, sys
sys.path.insert(0, {str(ROOT)!r})
import evaluate, train
import distributed

with distributed.processes():
    distributed.processes = contextlib.nullcontext
    for script, words in {[(script.__name__, words) for script, words in JOBS]}:
        sys.argv = [script, *words]
        globals()[script].main()
"""


@pytest.fixture(scope="module")
def worked(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have done JOBS."""
    folder = tmp_path_factory.mktemp("worked")
    shutil.copytree(drawn, folder / "archive")
    (folder / "driver.py").write_text(DRIVER)
    write_tars.write(load_config(overrides=[f"data.root={folder / 'archive'}"]).data, folder / "tars", 4)
    done = subprocess.run(command("driver.py"), cwd=folder, env=one_thread_each(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^Epoch \[./3\] .* val captions", done.stdout, re.MULTILINE)) == 6  # said by one of them
    return folder


@pytest.fixture(autouse=True)
def there(worked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(worked)


def one_thread_each() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def command(script: str, *words: str, restarts: int = 0) -> list[str]:
    launch = ("torch.distributed.run", "--nproc_per_node=2", f"--max-restarts={restarts}", "--standalone")
    return [sys.executable, "-m", *launch, "--", script, *words]


def finish_here(module: ModuleType, *words: str) -> None:
    """Run a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *words])
        assert not run_script(module.main)


def log(run: str) -> pd.DataFrame:
    return pd.read_csv(f"runs/{run}/loss_log.txt", sep="\t")


@pytest.mark.parametrize(("words", "run"), [(SHORT, "two"), (TARS, "tars2")])
def test_two_processes_encode_and_train_as_one(words: tuple[str, ...], run: str) -> None:
    finish_here(train, *words, f"run={run}-by-one", f"data.cache={run}-by-one")
    pd.testing.assert_frame_equal(log(run), log(f"{run}-by-one"), rtol=1e-3, atol=1e-3)


def test_two_processes_encode_each_picture_once() -> None:
    folders = Path("cache2").glob("*/images-*")
    rows = [[len(np.load(path)) for path in sorted(folder.glob("*.npy"))] for folder in folders]
    assert sorted(rows) == [[4, 4], [4, 4, 4]]  # 8 mirrored training pictures, and all 12 as they are


def test_two_processes_caption_as_one() -> None:
    finish_here(evaluate, *SCORE, "--out", "one")
    for name in ("scores-val.json", "predictions-val.json"):
        two, one = (json.loads(Path(folder, name).read_text()) for folder in ("two", "one"))
        assert two == one or two["captions"] == one["captions"]  # scores tell the speed, too


def kill_one(job: subprocess.Popen, rank: int, epochs: int) -> None:
    """SIGKILL the process of this rank once the run has so many epochs behind it."""
    while not Path("runs/long/loss_log.txt").is_file() or len(log("long")) < epochs:
        assert job.poll() is None
        time.sleep(0.05)
    [process] = [p for p in children(job.pid) if f"\0RANK={rank}\0" in Path(f"/proc/{p}/environ").read_text()]
    os.kill(process, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a process by its environment, as Linux shows it")
def test_dead_processes_cost_nothing() -> None:
    words = command(str(ROOT / "train.py"), *LONG, "run=long", restarts=1)
    job = subprocess.Popen(words, env=one_thread_each(), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    kill_one(job, rank=0, epochs=4)  # in whose place torchrun puts another
    kill_one(job, rank=1, epochs=len(log("long")) + 2)  # for whom there is none
    killed = time.monotonic()
    errors = job.communicate(timeout=60)[1]
    assert job.returncode != 0 and time.monotonic() - killed < 60
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", errors)
    history = load_checkpoint("runs/long/last.pth")["progress"]["history"]
    assert len(history) >= 6
    assert history == log("undisturbed").head(len(history)).to_dict("records")

    finish_here(train, "--resume", "--run", "long")  # by one process
    assert len(log("long")) == 60 and log("long").head(len(history)).to_dict("records") == history


@pytest.mark.skipif(os.name != "posix", reason="torchrun is stopped by a POSIX signal")
@pytest.mark.parametrize(("restarts", "signals"), [(0, 0), (3, 1)])
def test_torchrun_does_not_repeat_a_mistake_of_the_user(
    restarts: int, signals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed, "join", lambda backend: None)
    monkeypatch.setattr(distributed.os, "kill", lambda *given: sent.append(given))
    monkeypatch.setattr(distributed.signal, "signal", lambda *given: None)
    for name, value in (("LOCAL_WORLD_SIZE", 1), ("WORLD_SIZE", 1), ("TORCHELASTIC_MAX_RESTARTS", restarts)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="no such thing"), distributed.processes():
        raise UserError("no such thing")
    assert sent == [(os.getppid(), signal.SIGTERM)] * signals
