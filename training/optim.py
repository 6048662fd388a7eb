"""Optimiser, learning rate schedule, and the moving average (EMA) of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.model import CaptionModel


def make_optimiser(model: CaptionModel) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, and with a learning rate of its own for a fine-tuned backbone.

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


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the learning rate of `step` (from 0) of `total`: linear warm-up, then cosine decay to 0.

    The warm-up takes a tenth of all steps at most: of a small set, most steps are to learn.
    """
    warmup = min(warmup, max(1, total // 10))
    # 1) linear warm-up: step `warmup - 1` is the first with the full rate
    if step < warmup:
        return peak * (step + 1) / warmup
    # 2) half a cosine from `peak` down to 0 over the steps that are left (Loshchilov and Hutter 2017)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class WeightAverage:
    """The exponential moving average (EMA) of a model's trained weights (Polyak and Juditsky 1992).

    `decay` is how much of the average is kept at each step; 0 turns averaging off, and `weights` is then empty.
    """

    def __init__(self, model: CaptionModel, decay: float) -> None:
        self.decay = decay
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.weights = [parameter.detach().clone() for parameter in self.trained] if decay else []

    def update(self, step: int) -> None:
        """Update the average after `step` (from 0); a smaller decay at first lets the random start be forgotten."""
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(self.weights, self.trained, None)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside a `with` block, and its own back at the end."""
        own = [parameter.clone() for parameter in self.trained]
        for parameter, average in zip(self.trained, self.weights or own, strict=True):
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, value in zip(self.trained, own, strict=True):
                parameter.copy_(value)
