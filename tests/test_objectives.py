"""What is scored."""

import math

import pytest
import torch
import torch.nn.functional as F

from data.vocab import PAD
from objectives import caption_loss

TARGETS = torch.tensor([[5, 6, 2, PAD], [7, 2, PAD, PAD]])


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_more_padding_does_not_change_the_loss(logits: torch.Tensor, smoothing: float) -> None:
    longer = torch.cat([logits, 50 * torch.ones(2, 6, 9)], dim=1)
    padded = F.pad(TARGETS, (0, 6), value=PAD)
    assert caption_loss(longer, padded, smoothing) == caption_loss(logits, TARGETS, smoothing)


def test_what_is_predicted_behind_the_end_does_not_matter(logits: torch.Tensor) -> None:
    changed = torch.where((TARGETS == PAD).unsqueeze(2), torch.full_like(logits, 1e4), logits)
    assert caption_loss(changed, TARGETS, 0.1) == caption_loss(logits, TARGETS, 0.1)


def test_padding_has_no_gradient(logits: torch.Tensor) -> None:
    logits.requires_grad_()
    caption_loss(logits, TARGETS, 0.1)[0].backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(2) > 0, TARGETS != PAD)


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.5])
def test_the_objective_is_pytorchs_own_label_smoothing(logits: torch.Tensor, smoothing: float) -> None:
    expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=PAD, label_smoothing=smoothing)
    torch.testing.assert_close(caption_loss(logits, TARGETS, smoothing)[0], expected)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_logged_loss_is_the_mean_over_real_words_and_never_smoothed(logits: torch.Tensor, smoothing: float) -> None:
    rows, places = (TARGETS != PAD).nonzero(as_tuple=True)
    expected = -logits.log_softmax(-1)[rows, places, TARGETS[rows, places]].mean()
    loss = caption_loss(logits, TARGETS, smoothing)[1]
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


def test_evenly_spread_logits_cost_the_log_of_the_vocabulary() -> None:
    assert caption_loss(torch.zeros(2, 4, 9), TARGETS, 0)[1] == pytest.approx(math.log(9))


def test_the_loss_of_bf16_logits_is_computed_in_fp32(logits: torch.Tensor) -> None:
    objective, loss = caption_loss(logits.bfloat16(), TARGETS, 0.1)
    assert objective.dtype == loss.dtype == torch.float32
