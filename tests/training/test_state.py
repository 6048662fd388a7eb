"""last.pth is resumed as it was written, or refused before a tensor of it is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import model_from_state
from models.model import CaptionModel
from training.runs import LOG_COLUMNS
from training.state import TrainState
from utils import load_checkpoint

ROW = dict.fromkeys(LOG_COLUMNS, 1.0) | {"epoch": 1, "step": 3}


def take_step(state: TrainState) -> None:
    torch.stack([weight.square().sum() for weight in state.model.parameters()]).sum().backward()
    state.optimiser.step()
    state.count_step(10, torch.tensor(2.0))


@pytest.fixture(scope="module")
def path(tiny_model: CaptionModel, tiny_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A last.pth after an epoch of two steps and one step of the next."""
    state = TrainState(CaptionModel.build(tiny_config(), tiny_model.vocab))
    for _ in range(2):
        take_step(state)
    state.end_epoch(dict(ROW))
    take_step(state)
    path = tmp_path_factory.mktemp("run") / "last.pth"
    state.save(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> CaptionModel:
    return model_from_state(load_checkpoint(path), str(path))


def resume(path: Path) -> TrainState:
    saved = load_checkpoint(path)
    state = TrainState(model_from_state(saved, str(path)))
    state.restore(saved, path)
    return state


def test_a_run_is_resumed_with_all_that_was_saved(path: Path, tmp_path: Path) -> None:
    once = resume(path)
    assert (once.progress.step, once.progress.epoch, once.progress.batch, once.progress.words) == (3, 1, 1, 10)
    once.save(tmp_path / "again.pth")
    take_step(once)
    twice = resume(tmp_path / "again.pth")
    take_step(twice)
    for one, two in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(*pair) for pair in zip(once.ema.weights, twice.ema.weights, strict=True))


MOMENTS = "optimiser/state/0/"
NAN = float("nan")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        # moments that are not as the weights are: fused AdamW would write beyond their end
        *((f"{MOMENTS}exp_avg", torch.zeros(1)), (f"{MOMENTS}exp_avg_sq", torch.zeros(0))),
        *((f"{MOMENTS}exp_avg", torch.zeros(3, 5, 7)), (f"{MOMENTS}exp_avg", lambda own: own.double())),
        *((f"{MOMENTS}exp_avg", lambda own: own.T), (f"{MOMENTS}exp_avg", lambda own: own / 0)),
        *((f"{MOMENTS}exp_avg_sq", lambda own: own - 1), (f"{MOMENTS}exp_avg_sq", lambda own: own.long())),
        *((f"{MOMENTS}exp_avg", 3), (f"{MOMENTS}exp_avg", None), (f"{MOMENTS}exp_avg", [1.0])),
        *((f"{MOMENTS}step", torch.tensor(-1.0)), (f"{MOMENTS}step", torch.tensor(1e30)), (f"{MOMENTS}step", 3)),
        *((f"{MOMENTS}step", torch.tensor(NAN)), (f"{MOMENTS}step", torch.zeros(4)), (f"{MOMENTS}more", 1)),
        *(("optimiser/state/0", {}), ("optimiser/state/0", None), ("optimiser/state/999", {}), ("optimiser/state", 1)),
        *(("optimiser/state/-1", "0"), ("optimiser", {}), ("optimiser", None), ("optimiser/param_groups", [])),
        *(("optimiser/param_groups/0", {}), ("optimiser/param_groups/0/lr", NAN)),
        *(("optimiser/param_groups/0/lr", -1.0), ("optimiser/param_groups/0/lr", "a"), ("optimiser/param_groups", 1)),
        # averages
        *(("averaged", []), ("averaged", None), ("averaged/0", torch.zeros(1)), ("averaged/0", lambda own: own / 0)),
        *(("averaged/0", 1), ("averaged/0", lambda own: own.half())),
        # how far it is
        *(("progress", {}), ("progress", None), ("progress", []), ("progress/more", 1), ("progress/step", -1)),
        *(("progress/step", 2.5), ("progress/step", "3"), ("progress/step", 2**60), ("progress/step", True)),
        *(
            ("progress/step", 2**31),
            ("optimiser/state", {}),
            ("progress/step", 0),
            ("progress/batch", -1),
            ("progress/batch", 0),
            ("progress/words", 0),
        ),
        *(("progress/words", -5), ("progress/epoch", 2), ("progress/epoch", 0), ("progress/epoch", 1000)),
        *(("progress/history", []), ("progress/history", None), ("progress/history", [1])),
        *(("progress/history/0", {}), ("progress/history/0/epoch", 2), ("progress/history/0/val_cider", NAN)),
        *(("progress/history/0/val_cider", "high"), ("progress/history/0/val_loss", None)),
        *(("progress/history/0/lr", float("inf")), ("progress/history/0/more", 1.0)),
        *(("nll", NAN), ("nll", -1.0), ("nll", "a"), ("nll", None), ("nll", float("inf"))),
    ],
)
def test_a_state_that_no_training_writes_is_refused(
    place: str, value: Any, path: Path, model: CaptionModel, refused: Callable
) -> None:
    saved = load_checkpoint(path)
    *parts, last = [int(part) if part.isdecimal() else part for part in place.split("/")]
    inner: Any = saved
    for part in parts:
        inner = inner[part]
    inner[last] = value(inner[last]) if callable(value) else value
    with refused("last.pth does not hold the whole state of a training run", "start the run again"):
        TrainState(model).restore(saved, path)
