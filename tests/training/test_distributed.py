"""torchrun: several processes write what one would, and a job outlives the death of one of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from dataset_files import run

import evaluate
import train
from config import load_config
from data import write_tars

ROOT = Path(__file__).parents[2]
TRAIN = (
    *(*TINY, "decoder.name=attention", "decoder.dropout=0", "data.shard_rows=4"),
    *("train.mirror=true", "train.lr=1e-2", "train.epochs=3", "train.checkpoint_every=1"),
)
TARS = (*TRAIN, "data.shards=tars/{00000..00002}.tar")
SCORE = ("--run", "two", "--split", "val", "--tokeniser", "words")
# What the two processes do, one after the other: starting them takes long.
JOBS = (
    (train, (*TRAIN, "run=two", "data.cache=cache2")),
    (evaluate, (*SCORE, "--out", "two")),
    (train, (*TARS, "run=tars2", "data.cache=cache2")),
)
DRIVER = f"""
import contextlib, os, shutil, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import evaluate, train
import distributed

def die_in_the_second_epoch():
    log = Path("runs/two/loss_log.txt")
    while not log.is_file() or len(log.read_text().splitlines()) < 2:
        time.sleep(0.01)
    shutil.copytree("runs/two", "runs/half", ignore=shutil.ignore_patterns(".*"))
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=die_in_the_second_epoch).start()
with distributed.processes():
    distributed.processes = contextlib.nullcontext
    for script, words in {[(script.__name__, words) for script, words in JOBS]}:
        sys.argv = [script, *words]
        globals()[script].main()
"""


def torchrun(count: int, restarts: int, folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    launch = ("torch.distributed.run", f"--nproc_per_node={count}", f"--max-restarts={restarts}", "--standalone")
    command = [sys.executable, "-m", *launch, "--", script, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def worked(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have done JOBS, though one of them was killed on the way."""
    folder = tmp_path_factory.mktemp("worked")
    shutil.copytree(drawn, folder / "archive")
    (folder / "driver.py").write_text(DRIVER)
    write_tars.write(load_config(overrides=[f"data.root={folder / 'archive'}"]).data, folder / "tars", 4)
    done = torchrun(2, 1, folder, "driver.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Epoch [3/3] train loss") == 2  # of two runs, said by one of the processes
    return folder


@pytest.fixture(autouse=True)
def there(worked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(worked)


@pytest.mark.parametrize(
    ("words", "by_one", "by_two"),
    [
        ((*TRAIN, "run=one", "data.cache=cache-one"), "one", "two"),
        ((*TARS, "run=tars1", "data.cache=cache-tars"), "tars1", "tars2"),
        (("--resume", "--run", "half"), "half", "two"),  # from where one of two processes was killed
    ],
)
def test_two_processes_encode_and_train_as_one(words: tuple[str, ...], by_one: str, by_two: str) -> None:
    assert run(train.main, *words) == 0
    one, two = (pd.read_csv(f"runs/{name}/loss_log.txt", sep="\t") for name in (by_one, by_two))
    pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-3)


def test_two_processes_encode_each_picture_once() -> None:
    folders = Path("cache2").glob("*/images-*")
    rows = [[len(np.load(path)) for path in sorted(folder.glob("*.npy"))] for folder in folders]
    assert sorted(rows) == [[4, 4], [4, 4, 4]]  # 8 mirrored training pictures, and all 12 as they are


def test_two_processes_caption_as_one() -> None:
    assert run(evaluate.main, *SCORE, "--out", "one") == 0
    for name in ("scores-val.json", "predictions-val.json"):
        two, one = (json.loads(Path(folder, name).read_text()) for folder in ("two", "one"))
        assert two == one or two["captions"] == one["captions"]  # scores tell the speed, too


def test_torchrun_does_not_repeat_a_mistake_of_the_user() -> None:
    done = torchrun(1, 3, Path.cwd(), str(ROOT / "train.py"), "data.root=elsewhere")
    assert done.returncode != 0
    assert done.stderr.count("there is no folder") == 1
