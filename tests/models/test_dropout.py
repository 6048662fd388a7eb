import pytest
import torch

from models.dropout import Dropout


@pytest.mark.parametrize("p", [0.3, 0.5, 0.999])
def test_the_share_asked_for_is_dropped_and_the_mean_kept(p: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(1001, 1001))
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=1 / 256)
    assert dropped.mean().item() == pytest.approx(1, rel=0.03)
    assert (dropped[:-1, 0] == dropped[1:, 0]).float().mean().item() == pytest.approx(p**2 + (1 - p) ** 2, abs=0.05)


def test_the_gradient_is_that_of_what_is_kept_and_nothing_is_dropped_after_training() -> None:
    values = torch.rand(7, 5, dtype=torch.bfloat16, requires_grad=True)
    dropped = (dropout := Dropout(0.4))(values)
    dropped.sum().backward()
    assert values.grad is not None and torch.equal(values.grad.eq(0), dropped.eq(0))
    assert dropped.dtype == torch.bfloat16
    assert torch.equal(dropout.eval()(values), values)
