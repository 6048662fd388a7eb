"""torchrun: several processes write what one would, and a job outlives the death of one of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from conftest import TINY

import config
import evaluate
import inference_visualize
import train
from utils import load_checkpoint

ROOT = Path(__file__).parents[2]
TRAIN = (
    *TINY,
    "decoder.name=attention",
    "decoder.dropout=0",
    "train.mirror=true",
    "train.lr=1e-2",
    "data.shard_rows=4",
)
LONG = (*TRAIN, "run=long", "train.epochs=200", "train.checkpoint_every=3", "train.log_every=1000")


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(processes: int, script: str, *words: str, restarts: int = 0) -> list[str]:
    launch = ("torch.distributed.run", f"--nproc_per_node={processes}", f"--max-restarts={restarts}", "--standalone")
    return [sys.executable, "-m", *launch, "--", str(ROOT / script), *words]


def finish(script: str, *words: str) -> str:
    """Run a script in two processes to its end and return what it said."""
    done = subprocess.run(command(2, script, *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finish_here(module: ModuleType, *words: str) -> None:
    """Run a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *words])
        assert not config.cli(module.main)


def log(run: str) -> pd.DataFrame:
    return pd.read_csv(f"runs/{run}/loss_log.txt", sep="\t")


def kill_one(job: subprocess.Popen, rank: int) -> None:
    """SIGKILL the process of this rank once the run has some epochs behind it."""
    while not Path("runs/long/loss_log.txt").is_file() or len(log("long")) < 4:
        assert job.poll() is None
        time.sleep(0.1)
    [process] = [p for p in children(job.pid) if f"\0RANK={rank}\0" in Path(f"/proc/{p}/environ").read_text()]
    os.kill(process, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_two_processes_encode_train_and_caption_as_one(archive: Path) -> None:
    words = (*TRAIN, "train.epochs=3")
    said = finish("train.py", *words, "run=two", "data.cache=cache2")
    finish_here(train, *words, "run=one", "data.cache=cache1")
    assert len(re.findall("^Epoch .* val captions", said, re.MULTILINE)) == 3
    pd.testing.assert_frame_equal(log("two"), log("one"), rtol=1e-3, atol=1e-3)
    shards = [sorted(path.parent.name for path in Path(f"cache{n}").glob("*/*/features.npy")) for n in (1, 2)]
    assert shards[0] == shards[1] == ["00000", "00000", "00001", "00001", "00002"]  # 12 pictures; of 8, mirror images

    score = ("--run", "one", "--split", "val", "--tokeniser", "words")
    draw = ("--run", "one", "--images", "archive/images", "--out")
    finish("evaluate.py", *score, "--out", "two")
    finish("inference_visualize.py", *draw, "two")
    finish_here(evaluate, *score, "--out", "one")
    finish_here(inference_visualize, *draw, "one")
    for name in ("scores-val.json", "predictions-val.json", "predictions.json"):
        two, one = (json.loads(Path(folder, name).read_text()) for folder in ("two", "one"))
        assert two == one or two["captions"] == one["captions"]  # scores tell the speed, too
    assert sorted(path.name for path in Path("two/outputs").iterdir()) == [f"{number:02}.jpg" for number in range(12)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a process by its environment, as Linux shows it")
def test_the_death_of_one_process_ends_the_job_and_costs_nothing(archive: Path) -> None:
    job = subprocess.Popen(command(2, "train.py", *LONG), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    kill_one(job, rank=1)
    killed = time.monotonic()
    told = job.communicate(timeout=60)[1]
    assert job.returncode != 0 and time.monotonic() - killed < 60
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", told)
    history = load_checkpoint("runs/long/last.pth")["progress"]["history"]
    again = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--resume", "--run", "long"])
    while len(log("long")) < len(history) + 2:
        assert again.poll() is None
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    assert again.wait(30) == 130
    assert log("long").head(len(history)).to_dict("records") == history


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a process by its environment, as Linux shows it")
def test_torchrun_puts_another_process_in_the_place_of_a_dead_one(archive: Path) -> None:
    words = (*LONG, "train.epochs=40")
    job = subprocess.Popen(command(2, "train.py", *words, restarts=1), stderr=subprocess.DEVNULL)
    kill_one(job, rank=0)
    assert job.wait(120) == 0
    finish("train.py", *words, "run=undisturbed")
    assert log("long").equals(log("undisturbed"))
    own, other = (load_checkpoint(f"runs/{run}/last.pth")["decoder"] for run in ("long", "undisturbed"))
    assert all(torch.equal(own[name], other[name]) for name in own)
