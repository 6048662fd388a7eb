"""Kernel ridge regression from what pictures look like: how much each of many has to say of another."""

from functools import cached_property

import torch

AT_ONCE = 500  # pictures whose likeness is computed together


class Regression:
    """Kernel ridge regression with a Gaussian kernel (Saunders et al. 1998), for P pictures and what is known of each.

    Args:
        pictures: what they look like, as unit vectors (P, D).
        sharpness: of the kernel exp(sharpness (cosine - 1)); ridge: what is added to the equations' diagonal.
    """

    def __init__(self, pictures: torch.Tensor, sharpness: float, ridge: float) -> None:
        self.pictures, self.sharpness, self.ridge = pictures, sharpness, ridge

    @torch.autocast("cpu", enabled=False)  # in bfloat16 nobody would be left out exactly
    def votes(self, looks: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """Return how much each of the pictures has to say of those that look so (B, P): 1 in all, some less than 0.

        Their sum over what is known of each is the prediction of kernel ridge regression on what differs from the mean.

        Args:
            looks: unit vectors (B, D).
            own: for those which are among the pictures themselves, in which row (B,), else -1. All but this one then
                vote, as if it had never been seen.
        """
        similar = self.kernel(self.pictures @ looks.T)  # (P, B)
        solved = torch.cholesky_solve(similar, self.factor).T if own is None else self.weigh_others(similar, own)
        voting = torch.ones_like(solved)
        if own is not None:
            voting[own >= 0, own[own >= 0]] = 0
        rest = 1 - solved.sum(1, keepdim=True)  # (B, 1): of the mean, to which all that vote add alike
        return solved + rest * voting / voting.sum(1, keepdim=True).clamp(min=1)

    def weigh_others(self, similar: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the solutions (B, P) of the equations for kernels `similar` (P, B), each without row and column `own`
        (B,): what this one contributed is eliminated again.
        """
        weights = (self.inverse @ similar).T  # (B, P)
        known = (own >= 0).nonzero().squeeze(1)  # (b,)
        row = own[known]  # (b,)
        share = weights[known, row] / self.inverse.diagonal()[row]  # (b,)
        weights[known] -= share.unsqueeze(1) * self.inverse[row]  # its column: the matrix is symmetric
        weights[known, row] = 0  # and not a rounding error
        return weights

    def kernel(self, cosines: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.sharpness * (cosines - 1))

    @cached_property
    def factor(self) -> torch.Tensor:
        return self.factorise()

    @cached_property
    def inverse(self) -> torch.Tensor:
        """The inverse of the equations' matrix (P, P): three times the work, and pays where many are left out."""
        return torch.cholesky_inverse(self.factorise())

    def factorise(self) -> torch.Tensor:
        """Return the Cholesky factor of the equations (P, P), a quarter of a gigabyte for 8,000 pictures."""
        count = len(self.pictures)
        between = torch.empty(count, count)  # of which Cholesky's algorithm reads the lower half
        for first in range(0, count, AT_ONCE):
            last = min(count, first + AT_ONCE)
            between[first:last, :last] = self.kernel(self.pictures[first:last] @ self.pictures[:last].T)
        between.diagonal().add_(self.ridge)
        return torch.linalg.cholesky(between, out=between)
