"""Captions in other scripts are trained on, scored and drawn, or refused with what is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from dataset_files import load, put, run
from PIL import Image, features

import evaluate
import inference_visualize
import train
from data.vocab import TOKENISERS
from render import fonts
from render.caption import NO_FONT, draw_caption

CAPTIONS = {
    "Thai": "สุนัขสีน้ำตาลกำลังวิ่ง",
    "Japanese": "犬が草の上を走っています。",
    "Hindi": "एक भूरा कुत्ता घास पर दौड़ रहा है।",
    "Arabic": "كلب بني يركض على العشب",
}


@pytest.mark.parametrize("language", CAPTIONS)
def test_another_script_is_not_taken_for_english(language: str, archive: Path, refused: Callable) -> None:
    rows = "".join(f"{number:02}.jpg,{CAPTIONS[language]}\n" for number in range(12))
    put(archive, "captions.csv", text=f"image,caption\n{rows}")
    with refused("are not in Latin letters", "data.language=unicode"):
        load(archive, "data.language=en")


@pytest.mark.parametrize("language", ["Thai", "Arabic"])  # without blanks, and with
def test_a_caption_is_never_one_word(language: str, archive: Path) -> None:
    text = CAPTIONS[language]
    rows = "".join(f"{number:02}.jpg,{text}\n" for number in range(12))
    put(archive, "captions.csv", text=f"image,caption\n{rows}")
    words = (*TINY, "data.language=unicode", "train.epochs=8", "train.lr=3e-2", "decoder.dropout=0", "train.ema=0")
    assert run(train.main, *words, "run=it") == 0
    assert run(evaluate.main, "--run", "it") == 0
    assert json.loads(Path("runs/it/scores-test.json").read_text())["bleu4"] > 30
    assert run(inference_visualize.main, "--run", "it") == 0
    [caption, *_] = {row["caption"] for row in json.loads(Path("runs/it/predictions.json").read_text())}
    tokenise = TOKENISERS["unicode"]()
    assert len(tokenise(caption)) > 3 and set(tokenise(caption)) <= set(tokenise(text))
    assert (" " in caption) == (" " in text)


def strip(caption: str) -> np.ndarray:
    """The strip below a picture, which is dark where something is written."""
    drawn = draw_caption(Image.new("RGB", (480, 300), "white"), caption)
    return np.asarray(drawn.convert("L"))[300:] < 128


def test_a_script_is_drawn_in_its_direction() -> None:
    if not features.check("raqm"):
        pytest.skip("Pillow has no Raqm here")
    for caption, side in (("כלב חום", "right"), (CAPTIONS["Arabic"], "right"), ("Собака бежит", "left")):
        columns = np.flatnonzero(strip(caption).any(0))
        left, right = columns.min(), 480 - columns.max()
        assert (left > right) == (side == "right"), caption


def test_what_no_font_can_write_is_told_in_place_of_an_empty_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    latin = [font for font in fonts.installed_fonts() if font[0].endswith("DejaVuSans.ttf")]
    monkeypatch.setattr(fonts, "installed_fonts", lambda: latin)
    assert (strip(CAPTIONS["Thai"]) == strip(NO_FONT)).all()
    assert "fonts-noto-core" in fonts.advice(CAPTIONS["Thai"]) and "Chinese" in fonts.advice("狗")
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    assert (strip(CAPTIONS["Arabic"]) == strip(NO_FONT)).all() and "Raqm" in fonts.advice(CAPTIONS["Arabic"])


def test_left_and_right_are_not_swapped_in_a_language_that_is_not_known(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train.main, *TINY, "data.language=unicode", "train.mirror=true") == 2
    assert "set train.mirror=false" in capsys.readouterr().err
