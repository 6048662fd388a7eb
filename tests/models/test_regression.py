"""Pictures vote on others by how alike they look, by kernel ridge regression."""

import torch
import torch.nn.functional as F

from models.regression import Regression

LOOKS = F.normalize(torch.eye(6, 8).reshape(3, 2, 8).cumsum(1).flatten(0, 1))  # (6, 8): two of a kind look alike


def test_votes_sum_to_one_and_go_to_what_looks_alike() -> None:
    votes = Regression(LOOKS, 2.0, 0.1).votes(LOOKS)
    torch.testing.assert_close(votes.sum(1), torch.ones(6))
    assert votes.argmax(1).tolist() == [0, 1, 2, 3, 4, 5]
    assert votes[0, :2].min() > votes[0, 2:].max()


def test_they_predict_what_kernel_ridge_regression_does_beside_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    looks, others = (F.normalize(torch.randn(count, 8, generator=generator)) for count in (6, 3))
    known = torch.randn(6, generator=generator)
    kernel = torch.exp(3 * (looks @ looks.T - 1)) + 0.5 * torch.eye(6)
    similar = torch.exp(3 * (others @ looks.T - 1))
    predicted = known.mean() + similar @ torch.linalg.solve(kernel, known - known.mean())
    torch.testing.assert_close(Regression(looks, 3.0, 0.5).votes(others) @ known, predicted)


def test_a_picture_can_be_left_out_as_if_it_had_never_been_seen() -> None:
    looks = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    whole = Regression(looks, 2.0, 0.1)
    votes = whole.votes(looks, own=torch.tensor([0, 1, 2, -1, 4, 5]))
    for left_out in (0, 1, 2, 4, 5):
        others = [place for place in range(6) if place != left_out]
        without = Regression(looks[others], 2.0, 0.1).votes(looks[[left_out]])
        torch.testing.assert_close(votes[left_out, others], without[0], atol=1e-5, rtol=1e-4)
        assert votes[left_out, left_out] == 0
    torch.testing.assert_close(votes[3], whole.votes(looks)[3], atol=1e-5, rtol=1e-4)


def test_of_a_single_picture_that_is_left_out_nobody_votes() -> None:
    votes = Regression(LOOKS[:1], 2.0, 0.1).votes(LOOKS[:1], own=torch.tensor([0]))
    assert votes.tolist() == [[0.0]]
