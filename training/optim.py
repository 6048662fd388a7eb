"""How weights move: the optimiser, the learning rate's schedule, and the average of the weights on their way."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.model import CaptionModel

SETTLED, EVERY = 100, 8  # the average is moved after each of the first steps, then after every eighth


def make_optimiser(model: CaptionModel) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices alone and a learning rate of its own for an unfrozen backbone."""
    config = model.config.train
    decay, encoder_scale = config.weight_decay, config.encoder_lr / config.lr
    groups = []
    for part, scale in ((model.decoder, 1.0), (model.encoder, encoder_scale)):
        trained = [p for p in part.parameters() if p.requires_grad]
        groups.append({"params": [p for p in trained if p.ndim > 1], "weight_decay": decay, "scale": scale})
        groups.append({"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "scale": scale})
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
    """Linear warm-up to `peak`, then a cosine down to 0 (Loshchilov and Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class WeightAverage:
    """The exponential moving average of a model's trained weights (Polyak and Juditsky 1992), kept beside them.

    Args:
        decay: the share of the average that stays at each step; 0 keeps no average, and the weights serve as they are.
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
        """Give the model the average for a while."""
        own = [parameter.clone() for parameter in self.trained]
        copy_all(self.weights or own, self.trained)
        try:
            yield
        finally:
            copy_all(own, self.trained)

    @torch.no_grad()
    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        copy_all(weights, self.weights)


def copy_all(values: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)
