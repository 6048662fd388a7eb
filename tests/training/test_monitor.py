"""What a run shows is there once, however often it was killed; and what is not finite is never kept."""

import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

import train
from training.state import TrainState
from utils import load_checkpoint

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
BOARD = ("decoder.name=attention", "train.tensorboard=true")


@pytest.fixture
def run(archive: Path, call: Callable[..., int]) -> Run:
    """Train `runs/a` for two epochs, with these words on the command line, and return the exit code."""
    return lambda *words: call(train.main, *TINY, "run=a", "train.epochs=2", "train.log_every=1", *words)


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a SIGKILL, which nothing in training catches."""


def test_a_run_that_was_killed_shows_each_step_once(
    run: Run, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    save = TrainState.save

    def save_or_die(state: TrainState, path: Path) -> None:
        """Be killed after the second epoch is shown and before last.pth says that it is over."""
        if state.progress.epoch == 2:
            raise Killed
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "save", save_or_die)
        with pytest.raises(Killed):
            run(*BOARD)
    assert call(train.main, "--resume") == 0
    shown = accumulators.EventAccumulator("runs/a/tensorboard").Reload()
    steps = {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    assert steps["step/train_loss"] == steps["step/lr"] == [1, 2, 3, 4]
    log = Path("runs/a/loss_log.txt").read_text().splitlines()
    cider = [round(event.value, 2) for event in shown.Scalars("epoch/val_cider")]
    assert cider == [float(row.split("\t")[-1]) for row in log[1:]]
    assert steps["epoch/val_cider"] == [2, 4]
    assert set(shown.Tags()["images"]) == {
        f"{kind}/{name}.jpg" for kind in ("captions", "attention") for name in ("08", "09")
    }
    assert [event.step for event in shown.Images("attention/08.jpg")] == [2, 4]


def test_a_tensorboard_that_is_missing_is_named_before_anything_is_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(*BOARD) == 2
    assert "pip install -r requirements-extras.txt" in capsys.readouterr().err
    assert not Path("runs").exists()


# ---- NaN -------------------------------------------------------------------------------------------------------------


def assert_kept(step: int) -> None:
    """Check that last.pth is of this step, with finite weights, and that no epoch was taken for the best."""
    last = load_checkpoint("runs/a/last.pth")
    assert last["progress"]["step"] == step
    assert all(tensor.isfinite().all() for tensor in last["decoder"].values())
    assert Path("runs/a/checkpoints.pth").exists() == (step > 1)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pictures(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    read_shares, seen = train.read_shares, list[set[str]]()

    def watched(dataset: Any, *args: Any) -> Iterator[Any]:
        for share, batch in read_shares(dataset, *args):
            if len(dataset.images) == 8:  # those of train
                seen.append({dataset.images[image] for image in batch.image_ids})
            yield share, batch

    monkeypatch.setattr(train, "read_shares", watched)
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: math.nan if step == 4 else 1e-4)
    assert run("decoder.name=attention", "train.batch_size=10") == 2  # batches of two pictures
    error = capsys.readouterr().err
    assert "the loss became NaN or infinite in step 6 of runs" in error and "checkpoint is of step 4" in error
    assert set(re.findall(r"0\d.jpg", error)) == seen[5] != seen[4]
    assert_kept(4)


def test_a_gradient_that_is_not_finite_is_never_kept_though_the_loss_was(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    clip = train.clip_gradients

    def poison(optimiser: torch.optim.AdamW, limit: float) -> torch.Tensor:
        optimiser.param_groups[0]["params"][0].grad.fill_(math.inf)
        return clip(optimiser, limit)

    monkeypatch.setattr(train, "clip_gradients", poison)
    assert run("train.log_every=100") == 2
    assert "in step 1 of runs" in capsys.readouterr().err
    assert_kept(0)


def test_weights_that_are_not_finite_are_never_kept_though_loss_and_gradient_were(run: Run, capsys: Capture) -> None:
    assert run("train.warmup_steps=2", "train.batch_size=100", "train.lr=3e38", "train.ema=0") == 2
    assert "in step 1 of runs" in capsys.readouterr().err
    assert_kept(0)
