"""The state of a training run: all that last.pth holds, so that a resumed run ends with the same bits."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

import distributed
from cli import UserError, say
from cli.safe_load import DAMAGED
from config import Section, TrainConfig
from models.checkpoint import model_state
from models.model import CaptionModel
from training.optim import WeightAverage, make_optimiser
from training.runs import LOG_COLUMNS
from utils import save_checkpoint

Count = Annotated[int, Field(ge=0, lt=2**31 - 1)]


@dataclass
class Progress:
    """How far a run has come, as plain values."""

    step: int = 0  # optimiser steps taken
    epoch: int = 0  # epochs finished
    batch: int = 0  # batches read in the current epoch
    words: int = 0  # target words, without padding, read in it
    history: list[dict[str, float]] = field(default_factory=list)  # a row of loss_log.txt for each finished epoch

    @property
    def best(self) -> dict[str, float]:
        """The row of the epoch with the highest CIDEr, ties broken by the lower loss; needs a finished epoch."""
        return max(self.history, key=lambda row: (row["val_cider"], -row["val_loss"]))

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether all epochs are over, or the last `train.patience` ones brought no better captions."""
        stalled = config.patience and self.history and self.epoch - self.best["epoch"] >= config.patience
        return self.epoch >= config.epochs or bool(stalled)


class SavedProgress(Section):
    """What `Progress` may be in a file."""

    step: Count
    epoch: Count
    batch: Count
    words: Annotated[int, Field(ge=0, lt=2**53)]
    history: list[dict[str, float]]


class TrainState:
    """Model, optimiser, averaged weights and progress."""

    def __init__(self, model: CaptionModel) -> None:
        self.model, self.optimiser, self.progress = model, make_optimiser(model), Progress()
        self.ema = WeightAverage(model, model.config.train.ema)
        kind = torch.float32 if model.device.type == "mps" else torch.float64
        # of the words that this process has read in the current epoch: their summed negative log-likelihood
        self.nll = torch.zeros((), dtype=kind, device=model.device)
        self.saved_step = 0  # the step of last.pth

    def count_step(self, words: int, nll: torch.Tensor) -> None:
        """Record a step on a batch of `words` target words; `nll` is this process's part of their mean NLL."""
        self.ema.update(self.progress.step)
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.words += words
        self.nll += nll * words

    def train_loss(self) -> float:
        """Return the mean negative log-likelihood per word in the current epoch, over all processes."""
        return distributed.total(float(self.nll))[0] / self.progress.words

    def end_epoch(self, row: dict[str, float]) -> None:
        """Record the end of an epoch, whose row of loss_log.txt is `row`."""
        progress = self.progress
        progress.history.append(row)
        progress.epoch, progress.batch, progress.words = progress.epoch + 1, 0, 0
        self.nll.zero_()

    def save(self, path: Path) -> None:
        """Write last.pth. Call it on every rank; only rank 0 writes."""
        [nll] = distributed.total(float(self.nll))
        if distributed.rank() == 0:
            training = {
                "optimiser": self.optimiser.state_dict(),
                "progress": asdict(self.progress),
                "nll": nll,
                "averaged": self.ema.weights,
            }
            save_checkpoint(path, model_state(self.model) | training)
        self.saved_step = self.progress.step

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Resume from what `save` wrote to `path`; the model is built from it by `models.checkpoint`.

        Raises UserError for anything that this model and its optimiser would not have written.
        """
        try:
            SavedProgress.model_validate(saved["progress"])
            self.progress = Progress(**saved["progress"])
            self.check_progress()
            self.check_tensors(saved)
            rates = [float(group["lr"]) for group in saved["optimiser"]["param_groups"]]
            if len(rates) != len(self.optimiser.param_groups) or not all(0 <= rate < math.inf for rate in rates):
                raise ValueError("learning rates")
            nll = float(saved["nll"])
            if not 0 <= nll < math.inf:
                raise ValueError("loss")
        except (*DAMAGED, ValidationError):
            raise UserError(
                f"{path} does not hold the whole state of a training run, so it cannot be resumed; start the run again"
            ) from None
        own = self.optimiser.state_dict()["param_groups"]  # all but the rates is as the config says
        groups = [group | {"lr": rate} for group, rate in zip(own, rates, strict=True)]
        self.optimiser.load_state_dict({"state": saved["optimiser"]["state"], "param_groups": groups})
        self.nll.fill_(nll if distributed.rank() == 0 else 0)
        for average, weight in zip(self.ema.weights, saved["averaged"], strict=True):
            average.copy_(weight)
        self.saved_step = self.progress.step
        if self.progress.is_finished(self.model.config.train):
            again = (
                f"python train.py --config {path.parent}/config.yaml run=NAME train.start={path.parent}/checkpoints.pth"
            )
            say(f"{path.parent} is finished; to train on: {again}")
        else:
            say(f"resuming {path.parent} from step {self.saved_step}")

    def check_progress(self) -> None:
        """Raise ValueError for numbers that no run can have come to."""
        progress, rows = self.progress, self.progress.history
        numbered = [row["epoch"] for row in rows] == list(range(1, progress.epoch + 1))
        columns = all(set(row) == set(LOG_COLUMNS) for row in rows)
        begun = progress.words > 0 if progress.batch else progress.words == 0
        counted = progress.step >= progress.batch + progress.epoch and progress.epoch <= self.model.config.train.epochs
        if not (numbered and columns and begun and counted):
            raise ValueError("progress")

    def check_tensors(self, saved: dict[str, Any]) -> None:
        """Raise ValueError unless the averages and the optimiser's moments are finite and as large as the weights:
        AdamW would write beyond the end of smaller ones.
        """
        weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
        if bool(saved["optimiser"]["state"]) != (self.progress.step > 0):
            raise ValueError("moments")
        pairs = list(zip(self.ema.weights, saved["averaged"], strict=True))
        for number, moments in saved["optimiser"]["state"].items():
            if type(number) is not int or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError("moments")
            weight, step, squares = weights[number], moments["step"], moments["exp_avg_sq"]
            pairs += [(weight, moments["exp_avg"]), (weight, squares), (torch.zeros(()), step)]
            if number < 0 or not 0 <= float(step) <= self.progress.step or bool((squares < 0).any()):
                raise ValueError("moments")
        for own, found in pairs:
            if found.shape != own.shape or found.dtype != own.dtype or not found.isfinite().all():
                raise ValueError("a tensor")
