"""How sure a caption is: a calibrated chance, stored in the checkpoint, and what an unsure caption does not name."""

import math
from collections.abc import Callable

import pytest
import torch

from data.vocab import UNK
from models import imagenet
from models.checkpoint import restore_confidence
from models.confidence import INPUTS, Confidence, evidence
from models.search import Hypothesis

NUMBERS = torch.Generator().manual_seed(0)


def test_chances_are_how_often_captions_with_such_inputs_are_right() -> None:
    inputs = torch.randn(4000, len(INPUTS), generator=NUMBERS)
    truth = (2 * inputs[:, 0] - inputs[:, 3] + 0.5).sigmoid()
    right = torch.rand(4000, generator=NUMBERS) < truth
    chances = torch.tensor(Confidence.fit(inputs, right).chances(inputs))
    assert float((chances - truth).abs().mean()) < 0.03
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (chances >= low) & (chances < low + 0.25)
        assert float(chances[chosen].mean()) == pytest.approx(float(right[chosen].float().mean()), abs=0.06)


def test_an_input_that_no_caption_had_does_not_count_and_one_that_is_missing_leaves_no_chance() -> None:
    inputs = torch.randn(200, len(INPUTS), generator=NUMBERS)
    right = inputs[:, 0] > 0
    missing = torch.tensor([[0.0, 0.0, 0.0, math.nan]])
    assert Confidence.fit(inputs, right).chances(missing) == [None]
    without = inputs.clone()
    without[:, 3] = math.nan
    fitted = Confidence.fit(without, right)
    assert fitted.weights[3] == 0
    assert fitted.chances(without[:3]) == fitted.chances(inputs[:3])
    assert all(chance is not None for chance in fitted.chances(missing))


def test_evidence_is_what_the_caption_names_of_what_the_classifier_sees() -> None:
    kinds, words = torch.tensor([[0.5, 0.3, 0.1]]), torch.tensor([7, 8, UNK])
    [row] = evidence([[Hypothesis([4, 8], -3.0, -1.0, cider=0.9), Hypothesis([UNK], -2.0, -1.0)]], 25, kinds, words)[:1]
    assert row.tolist() == pytest.approx([-1.0, 0.3, 0.5, 0.9])
    row = evidence([[Hypothesis([UNK], -2.0, -1.0)]], 25, kinds, words)[0]
    assert row[:3].tolist() == pytest.approx([-1.0, 0.0, 0.5]) and row[3].isnan()


def test_things_are_called_as_people_call_them() -> None:
    probs = torch.zeros(1000)
    numbers = {name: imagenet.names().index(name) for name in ("tabby", "school bus", "Egyptian cat")}
    probs[[numbers["tabby"], numbers["Egyptian cat"], numbers["school bus"]]] = torch.tensor([0.2, 0.2, 0.5])
    named = {kind: imagenet.name_of_kind(imagenet.kinds().index(kind), probs) for kind in ("cat", "bus")}
    assert named == {"cat": "cat", "bus": "school bus"}


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        "x",
        {"weights": [1.0], "bias": 0.0},
        {"weights": [1.0, 1.0, 1.0, math.nan], "bias": 0.0},
        {"weights": None, "bias": 0.0},
        {"weights": [1.0] * 4, "bias": "a"},
    ],
)
def test_a_damaged_calibration_is_refused(state: object, refused: Callable, tmp_path: object) -> None:
    with refused("the calibration inside", "python calibrate.py"):
        restore_confidence({"confidence": state}, "model.pth")
    assert restore_confidence({}, "model.pth") is None
