"""How the learning rate moves, and the average that follows the weights."""

from collections.abc import Callable

import pytest
import torch

from models.model import CaptionModel
from training.optim import WeightAverage, learning_rate, make_optimiser


def test_the_learning_rate_warms_up_in_equal_steps_and_then_falls_along_a_cosine_to_nearly_nothing() -> None:
    assert [learning_rate(step, 100, 4, peak=8.0) for step in range(5)] == [2, 4, 6, 8, 8]
    rates = [learning_rate(step, 100, 10, peak=1.0) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[45], rates[-1]) == (pytest.approx(0.5), pytest.approx(0))
    for total, warmup in ((1, 0), (5, 5), (3, 100), (10, 0)):  # shorter than its warm-up
        assert all(0 < learning_rate(step, total, warmup, peak=1.0) <= 1 for step in range(total))


@pytest.fixture
def model(tiny_config: Callable, tiny_model: CaptionModel) -> CaptionModel:
    return CaptionModel.build(tiny_config(), tiny_model.vocab)


def test_the_backbone_has_its_own_learning_rate_and_vectors_do_not_decay(
    tiny_config: Callable, tiny_model: CaptionModel
) -> None:
    config = tiny_config("encoder.frozen=false", "train.lr=1e-2", "train.encoder_lr=1e-4", "train.weight_decay=0.5")
    model = CaptionModel.build(config, tiny_model.vocab)
    groups = make_optimiser(model).param_groups
    assert [group["scale"] for group in groups] == pytest.approx([1, 1, 0.01, 0.01])
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.5}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def shift(model: CaptionModel, by: float) -> None:
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(by)


@pytest.mark.parametrize(
    ("decay", "steps", "left"),
    [
        *((0.9, range(99, 100), 0.9), (0.9, range(10_000, 10_003), 0.9**3)),
        (0.999, range(100), 0),  # the random start is forgotten quickly
    ],
)
def test_the_average_follows_the_weights_at_every_step_with_the_decay_asked_for(
    decay: float, steps: range, left: float, model: CaptionModel
) -> None:
    average = WeightAverage(model, decay)
    assert len(average.weights) == len(list(model.decoder.parameters()))  # not those of a frozen backbone
    before = average.weights[0].clone()
    shift(model, 1.0)
    for step in steps:
        average.update(step)
    torch.testing.assert_close(average.weights[0], before + 1 - left, atol=1e-3 if left == 0 else 1e-6, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_is_swapped_in_and_the_weights_come_back_exactly(decay: float, model: CaptionModel) -> None:
    average = WeightAverage(model, decay)
    shift(model, 1.0)
    own = [parameter.clone() for parameter in average.trained]
    expected = average.weights or own
    with average.swapped_in():
        assert all(map(torch.equal, average.trained, expected))
    assert all(map(torch.equal, average.trained, own))
