"""How the learning rate moves, and the average that follows the weights."""

import copy
from collections.abc import Callable

import pytest
import torch

from models.model import CaptionModel
from training.optim import WeightAverage, clip_gradients, learning_rate, make_optimiser


def test_the_learning_rate_warms_up_in_equal_steps() -> None:
    assert [learning_rate(step, 100, 4, peak=8.0) for step in range(5)] == [2, 4, 6, 8, 8]


def test_the_learning_rate_then_falls_along_a_cosine_to_nearly_nothing() -> None:
    rates = [learning_rate(step, 100, 10, peak=1.0) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert rates[45] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 5), (3, 100), (10, 0)])
def test_a_run_shorter_than_its_warm_up_has_a_learning_rate_too(total: int, warmup: int) -> None:
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


def test_clipped_gradients_move_weights_as_pytorchs_own_clipping_does(model: CaptionModel) -> None:
    other = copy.deepcopy(model)
    ours, theirs = make_optimiser(model), make_optimiser(other)
    for size in (0.001, 10.0, 0.1):  # below the limit, above it, and below again
        for parameter, same in zip(model.decoder.parameters(), other.decoder.parameters(), strict=True):
            parameter.grad = size * torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        norm = clip_gradients(ours, limit=1.0)
        assert norm == torch.nn.utils.clip_grad_norm_(other.decoder.parameters(), 1.0)
        ours.step()
        theirs.step()
        for parameter, same in zip(model.decoder.parameters(), other.decoder.parameters(), strict=True):
            torch.testing.assert_close(parameter, same, rtol=1e-5, atol=1e-7)


def shift(model: CaptionModel, by: float) -> None:
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(by)


def test_the_average_follows_the_weights_with_the_decay_asked_for(model: CaptionModel) -> None:
    average = WeightAverage(model, decay=0.9)
    before = average.weights[0].clone()
    shift(model, 1.0)
    average.update(step=99)
    assert torch.allclose(average.weights[0], before + 0.1, atol=1e-6)


def test_later_eight_steps_are_taken_at_once(model: CaptionModel) -> None:
    average = WeightAverage(model, decay=0.9)
    before = average.weights[0].clone()
    shift(model, 1.0)
    for step in range(10_000, 10_016):
        average.update(step)
    assert torch.allclose(average.weights[0], before + 1 - 0.9**16, atol=1e-6)


def test_the_average_forgets_the_random_start_quickly(model: CaptionModel) -> None:
    average = WeightAverage(model, decay=0.999)
    shift(model, 1.0)
    for step in range(100):
        average.update(step)
    assert torch.allclose(average.weights[0], average.trained[0], atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_is_swapped_in_and_the_weights_come_back_exactly(decay: float, model: CaptionModel) -> None:
    average = WeightAverage(model, decay)
    shift(model, 1.0)
    own = [parameter.clone() for parameter in average.trained]
    expected = average.weights or own
    with average.swapped_in():
        assert all(map(torch.equal, average.trained, expected))
    assert all(map(torch.equal, average.trained, own))


def test_a_frozen_backbone_is_not_averaged(model: CaptionModel) -> None:
    assert len(WeightAverage(model, 0.9).weights) == len(list(model.decoder.parameters()))
