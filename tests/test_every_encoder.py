"""Whatever family an encoder is of, the scripts train on its cached features, caption with it and show attention."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import read_rows
from conftest import TINY

import inference_visualize
import train
from models.backbones import FAMILIES, family_of

ENCODERS = {  # regions of a picture of 96 pixels
    "resnet18": 9,
    "efficientnet_lite0": 9,
    "timm/test_vit": 36,  # a class token is none
    "timm/test_efficientnet": 9,
    "timm/test_mambaout": 9,  # channels last
}
SIZES = ("encoder.image_size=96", "decoder.name=attention", "train.epochs=1", "run=it", "search.min_length=4")


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_trained_on_and_its_captions_are_drawn_with_attention(
    name: str,
    archive: Path,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(train.main, *TINY, *SIZES, f"encoder.name={name}") == 0, capsys.readouterr().err
    [cached] = Path("cache").glob(f"{name.replace('/', '_')}-*")
    assert list(cached.glob("*/*.npy"))
    capsys.readouterr()
    assert call(inference_visualize.main, "--attention") == 0
    assert "cached features" in capsys.readouterr().err
    assert len(json.loads(Path("runs/it/predictions.json").read_text())) == 2
    for row in read_rows(Path("runs/it/captions_result.html")):
        attention = row["attention"]
        assert len(base64.b64decode(attention["alphas"])) == len(attention["words"]) * ENCODERS[name]


def test_no_family_is_left_out() -> None:
    assert {family_of(name) for name in ENCODERS} == set(FAMILIES)
