"""Optimiser, gradient clipping, learning rate schedule, and the moving average (EMA) of the weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.model import CaptionModel

SETTLED, EVERY = 100, 8  # the average is moved after each of the first steps, then after every eighth


def make_optimiser(model: CaptionModel) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, and with a learning rate of its own for a trained backbone.

    Each parameter group's `scale` is the ratio of its learning rate to `train.lr`.
    """
    config = model.config.train
    groups = []
    for part, scale in ((model.decoder, 1.0), (model.encoder, config.encoder_lr / config.lr)):
        trained = [p for p in part.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "scale": scale})
        groups.append({"params": vectors, "weight_decay": 0.0, "scale": scale})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=True)


def clip_gradients(optimiser: torch.optim.AdamW, limit: float) -> torch.Tensor:
    """Scale gradients down to the norm `limit`, by the next step at the latest; returns their norm before.

    On a CPU fused AdamW does it as it reads them, as for a GradScaler, which saves a pass over memory.
    """
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.is_cpu:
        optimiser.grad_scale = (norm / limit).clamp(min=1)  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the learning rate of `step` (from 0) of `total`: linear warm-up, then cosine decay to 0."""
    # 1) linear warm-up: step `warmup - 1` is the first with the full rate
    if step < warmup:
        return peak * (step + 1) / warmup
    # 2) half a cosine from `peak` down to 0 over the steps that are left (Loshchilov and Hutter 2017)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class WeightAverage:
    """The exponential moving average (EMA) of a model's trained weights (Polyak and Juditsky 1992).

    Args:
        decay: how much of the average is kept at each step; with 0 there is no average, and the weights are used.

    Attributes:
        weights: the averages of the parameters that are trained, in their order; none with a decay of 0.
    """

    def __init__(self, model: CaptionModel, decay: float) -> None:
        self.decay = decay
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.weights = [parameter.detach().clone() for parameter in self.trained] if decay else []

    def update(self, step: int) -> None:
        """Move the average towards the weights after a step; faster at first, to forget the random start.

        Later it moves at every eighth step only, by as much as in eight, since that reads and writes all weights.
        """
        each = 1 if step < SETTLED else EVERY
        if self.weights and step % each == 0:
            decay = min(self.decay, (1 + step) / (10 + step)) ** each
            get_ema_multi_avg_fn(decay)(self.weights, self.trained, None)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside a `with` block, and its own back at the end."""
        own = [parameter.clone() for parameter in self.trained]
        copy_weights(self.weights or own, self.trained)
        try:
            yield
        finally:
            copy_weights(own, self.trained)

    @torch.no_grad()
    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        """Go on from the averages in a checkpoint; raises RuntimeError or ValueError when these do not fit."""
        copy_weights(weights, self.weights)


def copy_weights(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    for value, parameter in zip(source, target, strict=True):
        parameter.copy_(value)
