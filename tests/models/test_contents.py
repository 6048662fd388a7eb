"""A checkpoint from a stranger is plain values, but any: it becomes a model or one sentence, in little memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import model as models
from models.model import CaptionModel


@pytest.fixture(scope="module")
def saved(tiny_model: CaptionModel) -> dict[str, Any]:
    return tiny_model.state()


def put(saved: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(saved)
    *parts, last = place.split("/")
    part = changed
    for name in parts:
        part = part[name]
    part[last] = value
    return changed


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(
            ("config", 7),
            ("config/run", {"": None}),
            ("config/decoder", [1]),
            ("config/encoder/name", {"a": 1}),
            ("config/train/lr", "x" * 9999),
        ),
        *(("vocabulary", "a dog"), ("vocabulary/words", [["a"]]), ("vocabulary/language", "tlh")),
        *(("transform", {}), ("transform/mean", (0.5, 0.5)), ("transform/image_size", "224")),
        *(("encoder", None), ("encoder/source", 7), ("encoder/more", 1)),
        *(("backbone", [1]), ("backbone/conv1.weight", 7), ("feature_mean", None), ("feature_scale", "1")),
        *(("decoder", {}), ("decoder/more", torch.ones(1)), ("decoder/output.bias", torch.ones(1).to_sparse())),
    ],
)
def test_a_part_of_another_kind_is_refused(place: str, value: object, saved: dict[str, Any], refused: Callable) -> None:
    with refused():
        CaptionModel.from_state(put(saved, place, value), "a.pth")


def test_weights_of_another_precision_are_refused(saved: dict[str, Any], refused: Callable) -> None:
    name = min(saved["decoder"])
    with refused("a.pth", name):
        CaptionModel.from_state(put(saved, f"decoder/{name}", saved["decoder"][name].double()), "a.pth")


def test_one_number_that_passes_for_many_is_refused(saved: dict[str, Any], refused: Callable) -> None:
    with refused("a.pth", "feature_mean"):
        CaptionModel.from_state(put(saved, "feature_mean", torch.ones(1).expand(10**12)), "a.pth")


def test_a_huge_network_is_not_built_for_a_small_file(
    saved: dict[str, Any], refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "EncoderCNN", None)
    with refused("a.pth", "less than a regnet_y_128gf"):
        CaptionModel.from_state(put(saved, "config/encoder/name", "regnet_y_128gf"), "a.pth")


def test_weights_that_overflow_caption_nothing_and_say_so(saved: dict[str, Any], refused: Callable) -> None:
    saved = copy.deepcopy(saved)
    for tensor in saved["decoder"].values():
        tensor.copy_(torch.where(tensor < 0, -3e38, 3e38))
    with refused("NaN or infinite"):
        CaptionModel.from_state(saved, "a.pth").describe(torch.ones(2, 512))
