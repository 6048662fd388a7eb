"""What TensorBoard shows of a run is there once, however often the run was killed."""

from cli import run_script

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

import train
from training import tensorboard

BOARD = [*TINY, "run=a", "decoder.name=attention", "train.epochs=2", "train.log_every=1", "train.tensorboard=true"]


@pytest.fixture
def run(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        return run_script(train.main)

    return command


class Killed(BaseException):
    """As a SIGKILL, which nothing in training catches."""


def test_a_run_that_was_killed_shows_each_step_once(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def finish(trainer: train.Trainer) -> None:
        """Validate the second epoch, have the board on the disk, and be killed before the checkpoint is."""
        monkeypatch.setattr(trainer, "save_last", kill)
        trainer.validate()
        trainer.board.flush()
        trainer.save_last()

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        whole = train.Trainer.finish_epoch
        patch.setattr(train.Trainer, "finish_epoch", lambda one: (finish if one.progress.epoch else whole)(one))
        with pytest.raises(Killed):
            run(*BOARD)
    assert run("--resume") == 0
    shown = accumulators.EventAccumulator(str(Path("runs/a", tensorboard.FOLDER))).Reload()
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
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(*BOARD) == 2
    assert "pip install -r requirements-extras.txt" in capsys.readouterr().err
    assert not Path("runs").exists()
