"""Concepts: words and pairs of words that are expected of a picture, which the decoder is told before it writes.

Decoders that are told what a picture shows write better captions (Wu et al. 2016, arXiv:1506.01144; Gan et al. 2017,
arXiv:1611.08002). There a classifier detects concepts; here kernel ridge regression expects them from what is said of
similar pictures (models.consensus). What is said of a training picture itself has no part in what is expected of it, so
that the decoder learns how far to believe it.
"""

import torch
from torch import nn

DROPOUT = 0.5  # of concepts: a decoder that hears all of them each time learns pictures by heart from them


class Concepts(nn.Module):
    """What `count` concepts that are expected of a picture add to each of its cells, as `size` numbers."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.count = count
        self.dropout = nn.Dropout(DROPOUT)
        self.told = nn.Linear(count, size, bias=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(1))

    def fit_scale(self, expected: torch.Tensor) -> None:
        """Let what is expected of training pictures (P, count) have variance 1 on average from now on."""
        self.scale.copy_(expected.float().square().mean().sqrt().clamp(min=1e-6))

    def forward(self, expected: torch.Tensor) -> torch.Tensor:
        """Return what is added (..., size) by what is expected (..., count)."""
        return self.told(self.dropout(expected.float() / self.scale))
