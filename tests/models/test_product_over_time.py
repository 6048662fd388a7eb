"""The product inside a recurrence: plain autograd's gradients, and nothing left in memory."""

import gc

import torch

from models.product_over_time import ProductOverTime


def recurrence(matrix: torch.Tensor, fast: bool) -> None:
    """Multiply four times by the matrix, and add the gradient to it."""
    x = torch.linspace(-1, 1, 6).view(2, 3)
    product = ProductOverTime(matrix) if fast else matrix.__rmatmul__
    for _ in range(4):
        x = product(x).tanh()
    x.sum().backward()


def test_its_gradient_is_that_of_plain_products() -> None:
    matrices = [torch.linspace(0, 1, 9).view(3, 3).requires_grad_() for _ in range(2)]
    for matrix, fast in zip(matrices, (True, False), strict=True):
        recurrence(matrix, fast)
    torch.testing.assert_close(matrices[0].grad, matrices[1].grad)


def test_nothing_of_a_step_stays_in_memory() -> None:
    matrix = torch.eye(3).requires_grad_()
    counts = []
    for _ in range(3):
        recurrence(matrix, fast=True)
        gc.collect()
        counts.append(sum(type(each) is torch.Tensor for each in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]
