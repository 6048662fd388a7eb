"""What a run shows is there once, however often it was killed; and what is not finite is never kept."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

import train
from data.dataset import Batch, Flickr8kDataset
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
    replace, saves = os.replace, list[str]()

    def replace_or_die(source: str, target: Path) -> None:
        """Be killed after the second epoch is shown and before last.pth says that it is over."""
        saves.extend([target.name] * (target.name == "last.pth"))
        if len(saves) == 3:  # before training, and after each epoch
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(Killed):
            run(*BOARD)
    assert len(Path("runs/a/loss_log.txt").read_text().splitlines()) == 1 + 1
    assert call(train.main, "--resume") == 0
    shown = accumulators.EventAccumulator("runs/a/tensorboard").Reload()
    steps = {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    assert steps["step/train_loss"] == steps["step/lr"] == [1, 2, 3, 4]
    log = Path("runs/a/loss_log.txt").read_text().splitlines()
    cider = [round(event.value, 2) for event in shown.Scalars("epoch/val_cider")]
    assert cider == [float(row.split("\t")[-1]) for row in log[1:]]
    assert steps["epoch/val_cider"] == [2, 4]
    images = {f"{kind}/{name}.jpg" for kind in ("captions", "attention") for name in ("08", "09")}
    assert set(shown.Tags()["images"]) == images
    assert [event.step for event in shown.Images("attention/08.jpg")] == [2, 4]


def test_weights_and_biases_gets_the_same_and_a_resumed_run_goes_on_with_it(
    run: Run, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="train.wandb needs requirements-extras.txt")
    sent: list[tuple[int, dict]] = []
    from training.boards import Wandb

    log = Wandb.scalars

    def note_and_log(self: Wandb, step: int, values: dict) -> None:
        sent.append((step, values))
        log(self, step, values)

    monkeypatch.setattr(Wandb, "scalars", note_and_log)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run("train.wandb=true", "decoder.name=attention") == 0
    assert [step for step, values in sent if "step/train_loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in sent if "epoch/val_cider" in values] == [2, 4]
    kept = Path("runs/a/wandb/id.txt").read_text()
    assert len(list(Path("runs/a/wandb").glob("offline-run-*"))) == 1
    assert run("train.wandb=true", "--overwrite") == 0
    assert Path("runs/a/wandb/id.txt").read_text() != kept


def test_a_tensorboard_that_is_missing_is_named_before_anything_is_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(*BOARD) == 2
    assert "pip install -r requirements-extras.txt" in capsys.readouterr().err
    assert not Path("runs").exists()


# ---- NaN -------------------------------------------------------------------------------------------------------------


def assert_kept(step: int) -> None:
    """Check that last.pth is of this step, with finite weights, and that no epoch was taken for the best."""
    last = load_checkpoint("runs/a/last.pth")
    assert last["progress"]["step"] == step
    assert all(tensor.isfinite().all() for tensor in last["decoder"].values())
    assert not Path("runs/a/checkpoints.pth").exists()


@pytest.mark.parametrize(("every", "last_good"), [(1, 1), (100, 0)])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pictures_sooner_or_later(
    every: int, last_good: int, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    read, seen = Flickr8kDataset.__getitem__, list[set[str]]()

    def watched(dataset: Flickr8kDataset, captions: list[int]) -> Batch:
        batch = read(dataset, captions)
        seen.append({dataset.images[image] for image in batch.image_ids})
        return batch

    monkeypatch.setattr(Flickr8kDataset, "__getitem__", watched)
    words = ("train.lr=1e30", "train.clip_norm=1e30", f"train.log_every={every}", f"train.checkpoint_every={every}")
    assert run("decoder.name=attention", "train.batch_size=10", *words) == 2  # batches of two pictures
    error = capsys.readouterr().err
    assert "NaN or infinite in step 2 of runs" in error and f"checkpoint is of step {last_good}:" in error
    assert set(re.findall(r"0\d.jpg", error)) == seen[1] != seen[0]
    assert_kept(last_good)


def test_weights_that_are_not_finite_are_never_kept_though_loss_and_gradient_were(run: Run, capsys: Capture) -> None:
    words = ("train.warmup_steps=2", "train.batch_size=100", "train.checkpoint_every=1")
    assert run(*words, "train.lr=3e38", "train.ema=0") == 2
    assert "in step 1 of runs" in capsys.readouterr().err
    assert_kept(0)
