"""The demo: its states by Streamlit's own tester, and as its user has it, in Chromium."""

import html
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import HOSTILE, needs_chromium
from captioners import save_captioner
from PIL import Image

pytest.importorskip("streamlit", reason="the demo needs requirements-extras.txt")
from demo import APP, open_demo
from streamlit.testing.v1 import AppTest

import render.attention
import utils
from config import Config
from data.transforms import open_picture
from data.vocab import SPECIALS, Vocabulary
from models import consensus
from models.checkpoint import load_model
from models.confidence import INPUTS
from models.model import Caption
from render.attention import AttentionMaps
from render.fonts import plain_text
from utils import load_checkpoint, save_checkpoint

Demo = Callable[..., AppTest]
MARKDOWN = ["![x](https://a.invalid/x.png)", "[x](javascript:alert(1))", "https://a.invalid/", ":material/bolt: $x$"]
SETTINGS = {
    "lstm": ("search.beam=2", "search.min_length=3", "search.max_length=8"),
    "attention": (
        *("decoder.name=attention", "search.beam=2", "search.min_length=3", "search.max_length=8"),
        "search.consensus=5",
    ),
    "hostile": ("decoder.name=attention", "search.min_length=8", "search.no_repeat_ngram=1"),  # each bad word once
    "sample": ("data.format=sample",),
}


@pytest.fixture(scope="module")
def checkpoints(drawn: Path, tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model for each of SETTINGS; the words of `hostile` would act."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, settings in SETTINGS.items():
        vocab = Vocabulary([*SPECIALS, *HOSTILE, *MARKDOWN]) if name == "hostile" else None
        config = tiny_config(*settings, "encoder.image_size=96", "train.seed=2")
        model = save_captioner(folder / name / "checkpoints.pth", config, drawn / "images", vocab)
        if config.search.consensus:
            size, read = model.encoder.feature_shape[-1], model.vocab.numericalize
            words = torch.tensor([read("a small red circle"), read("a large blue star")])
            remembered = consensus.Consensus(torch.eye(2, size), torch.zeros(size), words, torch.arange(2))
            remembered.save(folder / name / consensus.FILE)
    return folder


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """`demo("--checkpoint", …)` opens the demo in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "LANGUAGES", {"en": Path("captioner.pth"), "zh": Path("captioner.zh.pth")})

    def open_page(*words: object) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, words)])
        return run(AppTest.from_file(str(APP), default_timeout=60))

    return open_page


def run(page: AppTest) -> AppTest:
    page.run()
    assert not page.exception
    return page


def drop(page: AppTest, *files: Path | tuple[str, bytes]) -> AppTest:
    for file in files:
        name, content = file if isinstance(file, tuple) else (file.name, file.read_bytes())
        page.file_uploader[0].upload(name, content)
    return run(page)


def slide(page: AppTest, label: str, value: float) -> AppTest:
    next(slider for slider in page.slider if slider.label.startswith(label)).set_value(value)
    return run(page)


def markup(page: AppTest) -> str:
    return "".join(element.proto.body for element in page.get("html") if not element.proto.body.startswith("<style"))


def texts(page: AppTest, kind: str) -> list[str]:
    """Return what the paragraphs of this kind say, in the order of the page."""
    found = re.findall(f'<p class="{kind}">(.*?)</p>', markup(page))
    return [html.unescape(re.sub("<.*?>", " " if kind == "other" else "", text)).strip() for text in found]


def solid(text: str) -> str:
    """Return plain text without blanks, of which joining words drops some before an apostrophe."""
    return plain_text(text).replace(" ", "")


def captions_of(checkpoint: Path, picture: Path, num_captions: int = 3, **search: Any) -> list[Caption]:
    """Return the captions that a model has for a picture on its own."""
    model = load_model(checkpoint)
    with torch.inference_mode():
        features = model.encoder(model.transform(open_picture(picture)).unsqueeze(0))
    return model.generate(features, model.config.search.model_copy(update=search), num_captions, keep_attention=True)[0]


def test_photographs_go_to_the_newest_run_and_to_the_model_of_shapes_last(demo: Demo, checkpoints: Path) -> None:
    for age, run_name in enumerate(["sample", "new", "old"]):
        place = Path("runs", run_name, "checkpoints.pth")
        place.parent.mkdir(parents=True)
        shutil.copy(checkpoints / ("sample" if run_name == "sample" else "lstm") / "checkpoints.pth", place)
        os.utime(place, (10**9 - age, 10**9 - age))
    Path("runs/sample/config.yaml").write_text("data: {format: sample}")
    shutil.copy(checkpoints / "lstm/checkpoints.pth", "captioner.pth")
    page = demo()
    assert page.selectbox[0].options == ["runs/new", "runs/old", "pretrained", "runs/sample"]
    assert page.selectbox[0].value == Path("runs/new/checkpoints.pth") and "photographs" not in markup(page)
    for name in ("runs/new", "runs/old"):
        shutil.rmtree(name)
    shutil.copy("captioner.pth", "captioner.zh.pth")
    assert demo().selectbox[0].options == ["pretrained", "pretrained, Chinese", "runs/sample"]
    for name in ("captioner.pth", "captioner.zh.pth"):
        Path(name).unlink()
    assert "It learned from drawn shapes and knows no photographs." in texts(demo(), "quiet")


def test_a_picture_gets_its_best_captions_searched_as_chosen(demo: Demo, checkpoints: Path, drawn: Path) -> None:
    model, picture = checkpoints / "lstm/checkpoints.pth", drawn / "images/03.jpg"
    page, own = drop(demo("--checkpoint", model), picture), captions_of(model, picture)
    said = [*texts(page, "caption"), *texts(page, "other")]
    assert said == [caption.text for caption in own] and len(set(said)) == 3
    assert not texts(page, "doubt")  # of a model that was never calibrated
    calibrated = load_checkpoint(model) | {"confidence": {"weights": [0.0] * len(INPUTS), "bias": -9.0}}
    save_checkpoint(Path("calibrated.pth"), calibrated)
    assert texts(drop(demo("--checkpoint", "calibrated.pth"), picture), "doubt")[0].startswith("unsure")

    chosen = {"beam": 4, "length_penalty": 0.0, "max_length": 5}
    for label, value in (("Captions", 2), *zip(("Beam", "Length penalty", "Most words"), chosen.values(), strict=True)):
        slide(page, label, value)
    own = captions_of(model, picture, 2, **chosen)
    assert [*texts(page, "caption"), texts(page, "other")[0]] == [each.text for each in own]
    slide(page, "Temperature", 2.0)
    drawn_words = texts(page, "caption")
    assert drawn_words != [own[0].text] and texts(run(page), "caption") == drawn_words


def test_example_photographs_can_be_tried(demo: Demo, checkpoints: Path) -> None:
    page = demo("--checkpoint", checkpoints / "lstm/checkpoints.pth")
    assert not texts(page, "caption")
    [pills] = page.button_group
    assert sorted(pills.options) == ["astronaut", "cat", "cup"]
    pills.set_value(["cat", "cup"])
    run(page)
    assert len(texts(page, "caption")) == 2


def test_it_is_said_what_the_captioner_knows(demo: Demo, checkpoints: Path) -> None:
    page = demo("--checkpoint", checkpoints / "lstm/checkpoints.pth")
    assert any("knows what it was trained on" in text for text in texts(page, "quiet"))


def test_a_broken_file_is_told_beside_the_captions_of_the_others(demo: Demo, checkpoints: Path, drawn: Path) -> None:
    first, second = drawn / "images/00.jpg", drawn / "images/01.jpg"
    broken = [("cut.jpg", first.read_bytes()[:700]), ("text.jpg", b"no picture")]
    page = drop(demo("--checkpoint", checkpoints / "lstm/checkpoints.pth"), first, *broken, second)
    assert texts(page, "caption") == [
        captions_of(checkpoints / "lstm/checkpoints.pth", each)[0].text for each in (first, second)
    ]
    cut, text = texts(page, "refusal")
    assert re.fullmatch(r"cannot read the picture cut\.jpg \(.*truncated.*\); replace it or leave it out", cut)
    assert text == "cannot read the picture text.jpg (unknown format); replace it or leave it out"


def test_sliding_through_the_words_shows_the_attention_of_each(
    demo: Demo, checkpoints: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lit: list[np.ndarray] = []

    def light(picture: Image.Image, level: np.ndarray) -> Image.Image:
        lit.append(level)
        return picture

    monkeypatch.setattr(render.attention, "heat_map", light)
    picture = drawn / "images/03.jpg"
    page = drop(demo("--checkpoint", checkpoints / "attention/checkpoints.pth"), picture)
    assert not lit and "<mark>" not in markup(page)
    best = captions_of(checkpoints / "attention/checkpoints.pth", picture)[0]
    attention = AttentionMaps.of(best)
    assert attention
    for word in (1, len(best.words)):
        slide(page, "Attention", word)
        assert re.findall("<mark>(.*?)</mark>", markup(page)) == [best.words[word - 1]]
        assert np.abs(lit.pop().astype(int) - attention.levels()[word - 1]).max() <= 1
    assert not lit and texts(page, "caption") == [best.text]


def test_two_models_stand_side_by_side(demo: Demo, checkpoints: Path, drawn: Path) -> None:
    picture = drawn / "images/03.jpg"
    paths = [checkpoints / "attention/checkpoints.pth", checkpoints / "lstm/checkpoints.pth"]
    page = drop(demo("--checkpoint", *paths), picture)
    page.selectbox[1].set_value(paths[1])
    assert texts(run(page), "caption") == [captions_of(path, picture)[0].text for path in paths]
    assert [f"{path.parent}: 03.jpg" in texts(page, "quiet") for path in paths] == [True, True]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "there is no trained captioner under runs/ yet; train one with: python train.py"),
        (("--checkpoint", "broken.pth"), "broken.pth is not a checkpoint of this project"),
        (("--checkpoint", "none.pth"), "there is no checkpoint at none.pth"),
        (("--limit", "3"), "there is no --limit; there are --checkpoint"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_sentence(demo: Demo, words: tuple[str, ...], told: str) -> None:
    Path("broken.pth").write_text("no model")
    (message,) = texts(demo(*words), "refusal")
    assert message.startswith(told)


def test_words_and_names_that_would_act_are_shown_as_text(demo: Demo, checkpoints: Path, drawn: Path) -> None:
    content = (drawn / "images/00.jpg").read_bytes()
    names = [f"{word.replace('/', '')}.jpg" for word in (*HOSTILE, *MARKDOWN)]
    page = drop(demo("--checkpoint", checkpoints / "hostile/checkpoints.pth"), *((name, content) for name in names))
    assert all(plain_text(name) in texts(page, "quiet") for name in names)
    slide(page, "Attention", 2)
    assert all(solid(word) in solid(texts(page, "caption")[0]) for word in [*HOSTILE, *MARKDOWN])
    assert re.sub(r'<p class="\w+">|</p>|</?span>|</?mark>', "", markup(page)).count("<") == 0
    assert not page.markdown and not page.caption


@needs_chromium
def test_in_a_browser_a_picture_is_captioned_and_nothing_is_asked_of_others(
    checkpoints: Path, drawn: Path, tmp_path: Path
) -> None:
    pytest.importorskip("playwright", reason="the browser is steered by playwright, of tests/requirements.txt")
    (tmp_path / "runs/hostile").mkdir(parents=True)
    shutil.copy(checkpoints / "hostile/checkpoints.pth", tmp_path / "runs/hostile/checkpoints.pth")
    picture = drawn / "images/00.jpg"
    (best, *_) = captions_of(checkpoints / "hostile/checkpoints.pth", picture)
    with open_demo(tmp_path) as (page, asked):
        page.set_input_files("input[type=file]", picture)
        assert page.locator("p.caption").inner_text() == plain_text(best.text)
        slider = page.locator(".stMain .stSlider").get_by_role("slider")
        slider.focus()
        slider.press("ArrowRight")
        assert solid(page.locator("p.caption mark").inner_text()) == solid(best.words[0])
        with page.expect_download() as download:
            page.get_by_text("Download captions").click()
        (row,) = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert (row["image_id"], row["caption"], len(row["captions"])) == ("00.jpg", best.text, 3)
        assert page.title() == "Image captioning"
        assert asked() == {"localhost", "None"} or asked() == {"localhost"}
