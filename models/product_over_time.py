"""The product `x @ matrix` inside a recurrence, with a faster backward pass and the same values and gradients.

Over T time steps autograd computes the gradient of the matrix as a sum of T small products, and reads and writes all of
it for each. Here the backward pass collects both factors of these products, and multiplies them once at its end.
"""

from typing import Any

import torch

Factors = list[tuple[torch.Tensor, torch.Tensor]]  # of each time step: x, and the gradient of x @ matrix


class ProductOverTime:
    """Call it in place of `x @ matrix`, once per step: for x (N, H) and (H, O), or x (B, K, L) and (B, L, O)."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.factors: Factors = []
        self.matrix = Gather.apply(matrix, self.factors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return Multiply.apply(x, self.matrix, self.factors)


class Multiply(torch.autograd.Function):
    """x @ matrix, whose backward leaves the gradient of the matrix to Gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: torch.Tensor, factors: Factors) -> torch.Tensor:
        x = x.to(matrix.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.factors = factors
        return x @ matrix

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, matrix = ctx.saved_tensors
        ctx.factors.append((x.detach(), grad))  # not x itself: its graph would hold this list, and the list x
        return grad @ matrix.mT, None, None


class Gather(torch.autograd.Function):
    """The matrix itself, whose backward runs when those of all its products are done."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, factors: Factors) -> torch.Tensor:
        ctx.factors = factors
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, gradients = (torch.cat(each, dim=-2) for each in zip(*ctx.factors, strict=True))  # (…, T N, H), (…, T N, O)
        return x.mT @ gradients, None
