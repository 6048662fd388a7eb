"""Watches for a loss or a gradient that is NaN or infinite, without making a GPU wait at every step."""

from pathlib import Path

import torch
from torch import nn

import distributed

NEVER = 2**31 - 1
SHOWN = 10  # pictures named


class Poison:
    """Remembers the first step whose loss or gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.tensor(NEVER, dtype=torch.int32, device=device)

    def note(self, step: int, *signs: torch.Tensor) -> None:
        """Look at what a step has computed; the weights it leaves are not finite where one of these is not."""
        healthy = torch.stack([sign.detach().float().isfinite() for sign in signs]).all()
        self.first = torch.where(healthy, self.first, self.first.clamp(max=step))

    def step(self) -> int | None:
        """Return that step, whichever process met it, or None; to be called in all of them."""
        first = min(distributed.gather([int(self.first)]))
        return None if first == NEVER else first


def is_finite(model: nn.Module) -> bool:
    """Whether all weights that are trained are finite."""
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def tell(step: int, pictures: list[str], run: Path, kept: int) -> str:
    """Return the sentence on a step, counted from 0, on these pictures; `kept` is the step of last.pth."""
    shown = ", ".join(pictures[:SHOWN]) + (", …" if len(pictures) > SHOWN else "")
    return (
        f"the loss became NaN or infinite in step {step + 1} of {run}, on {shown}; the last good checkpoint is of step "
        f"{kept}: look at these pictures and their captions, or train a new run with a lower train.lr"
    )
