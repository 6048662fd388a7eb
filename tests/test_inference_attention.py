"""`inference_visualize.py --attention`, with untrained models whose attention is sharp enough to tell words apart."""

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import read_rows
from captioners import save_captioner
from PIL import Image

import inference_visualize
from config import Config
from data.transforms import open_picture
from data.vocab import SOS
from models.checkpoint import load_model
from render.attention import AttentionMaps, draw_attention

Run = Callable[..., int]
PICTURES = ("--images", "archive/images/00.jpg", "archive/images/01.jpg", "archive/images/02.jpg")
SHORT = ("search.min_length=4", "search.max_length=6", "search.beam=5", "search.length_penalty=0")


@pytest.fixture(scope="module")
def checkpoints(drawn: Path, tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lstm.pth, attention.pth and transformer.pth (four heads), of 3 x 3 cells."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = ("decoder.num_layers=1", "decoder.num_heads=4", "encoder.image_size=96")
    for name, sharper in (("lstm", 1), ("attention", 2.5), ("transformer", 2)):
        config = tiny_config(f"decoder.name={name}", "train.seed=2", *sizes)
        save_captioner(folder / f"{name}.pth", config, drawn / "images", sharper=sharper)
    return folder


@pytest.fixture
def run(archive: Path, checkpoints: Path, call: Callable[..., int]) -> Run:
    """`run("lstm", …)` captions with that decoder and returns the exit code."""
    return lambda decoder, *words: call(
        inference_visualize.main, "--checkpoint", checkpoints / f"{decoder}.pth", *words
    )


def page_rows(folder: str = ".") -> list[dict[str, Any]]:
    return read_rows(Path(folder, "captions_result.html"))


def attention_of(checkpoint: Path, picture: str, caption: str, heads: slice) -> np.ndarray:
    """Return the alphas (words, 3, 3) of a decoder that is given `caption`, word by word."""
    model = load_model(checkpoint)
    tokens = torch.tensor([[SOS, *model.vocab.numericalize(caption)]])
    with torch.inference_mode():
        features = model.encoder(model.transform(open_picture(picture)).unsqueeze(0))
        _, attention = model.decoder(model.standardise(features), tokens, torch.tensor([0]))
    assert attention is not None
    return attention[0, :-1, heads].mean(1).view(-1, 3, 3).numpy()


@pytest.mark.parametrize(
    ("decoder", "words", "heads"),
    [
        ("attention", (), slice(None)),
        ("attention", ("1", "--num-captions", "3"), slice(None)),
        ("transformer", ("--num-captions", "3"), slice(None)),
        ("transformer", ("1",), slice(0, 1)),
        ("transformer", ("3", "--num-captions", "3"), slice(2, 3)),
    ],
)
def test_the_attention_shown_is_that_of_the_best_caption_in_one_drawing_for_each_picture(
    decoder: str, words: tuple[str, ...], heads: slice, run: Run, checkpoints: Path
) -> None:
    assert run(decoder, "--attention", *words, *PICTURES, *SHORT) == 0
    captions = [row["caption"] for row in json.loads(Path("predictions.json").read_text())]
    assert len(set(captions)) > 1
    for picture, caption, row in zip(PICTURES[1:], captions, page_rows(), strict=True):
        alphas = attention_of(checkpoints / f"{decoder}.pth", picture, caption, heads)
        expected = AttentionMaps(caption.split(), alphas)
        assert row["captions"][0] == caption and len(row["captions"]) == (3 if "--num-captions" in words else 1)
        assert [word.strip() for word in row["attention"]["words"]] == caption.split()
        shown = np.frombuffer(base64.b64decode(row["attention"]["alphas"]), np.uint8).reshape(-1, 3, 3)
        assert np.abs(shown.astype(int) - expected.levels()).max() <= 1
        assert np.ptp(shown, axis=0).max() > 50  # words attend to different regions, or this would show nothing
        drawn = Image.open(row["image"].replace(".jpg", "-attention.jpg"))
        sheet = draw_attention(open_picture(picture), expected)
        assert drawn.size == sheet.size
        assert np.abs(np.asarray(drawn, float) - np.asarray(sheet, float)).mean() < 3
    names = {path.name for path in Path("outputs").glob("*.jpg")}
    assert names == {f"0{number}{kind}.jpg" for number in range(3) for kind in ("", "-attention")}


def test_captions_are_the_same_without_attention_and_nothing_of_it_is_written(run: Run) -> None:
    run("attention", *PICTURES, *SHORT, "--out", "without")
    run("attention", "--attention", *PICTURES, *SHORT, "--out", "with")
    assert not any("attention" in row for row in page_rows("without"))
    without = [{key: value for key, value in row.items() if key != "attention"} for row in page_rows("with")]
    assert without == page_rows("without")
    for file in ("predictions.json", "outputs/00.jpg"):
        assert Path("with", file).read_bytes() == Path("without", file).read_bytes()
    assert {path.name for path in Path("without/outputs").glob("*.jpg")} == {"00.jpg", "01.jpg", "02.jpg"}
    pages = [Path(folder, "captions_result.html").read_text() for folder in ("without", "with")]
    assert ["point at a word to see its attention" in page for page in pages] == [False, True]


def test_drawings_do_not_collide_with_pictures_of_their_name(run: Run) -> None:
    Path("mine").mkdir()
    for name in ("x.jpg", "x-attention.jpg", "X.png"):
        shutil.copy("archive/images/00.jpg", f"mine/{name}")
    run("attention", "--attention", "--images", "mine", *SHORT)
    names = [path.name.lower() for path in Path("outputs").glob("*.jpg")]
    assert len(names) == len(set(names)) == 6
    assert len({Image.open(row["image"]).size for row in page_rows()}) == 1  # none of them a drawing of attention


@pytest.mark.parametrize(
    ("decoder", "asked", "words"),
    [
        ("lstm", (), ["lstm.pth", "writes without attention", "leave --attention out"]),
        ("lstm", ("2",), ["lstm.pth", "writes without attention"]),
        ("transformer", ("5",), ["--attention 5", "transformer.pth", "heads 1 to 4"]),
        ("transformer", ("0",), ["--attention 0", "heads 1 to 4"]),
        ("transformer", ("-1",), ["--attention -1", "heads 1 to 4"]),
        ("transformer", ("first",), ["--attention first", "heads 1 to 4"]),
        ("attention", ("2",), ["--attention 2", "attention.pth", "heads 1 to 1"]),
    ],
)
def test_attention_that_there_is_not_is_refused_before_anything_else(
    decoder: str, asked: tuple[str, ...], words: list[str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(decoder, "--attention", *asked, *PICTURES) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert all(word in message for word in words), message


def test_models_that_write_together_show_their_mean_attention_if_they_have_as_many_heads(
    run: Run, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("transformer", "--attention", *PICTURES, *SHORT)
    alone = page_rows()
    run("transformer", "--attention", "--checkpoint", checkpoints / "transformer.pth", *PICTURES, *SHORT)
    assert page_rows() == alone
    assert run("transformer", "--attention", "--checkpoint", checkpoints / "attention.pth", *PICTURES) == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert "transformer.pth, " in message and "attention.pth writes without attention" in message


# ---- files of any name -----------------------------------------------------------------------------------------------

ODD = [
    *(
        "..jpg",
        "...",
        ".jpg",
        ".hidden.jpg",
        "new\nline.jpg",
        "esc\x1b[2J.jpg",
        "trail .jpg",
        "trail.jpg ",
        "#?%2f.jpg",
    ),
    *("\udcff\udcfe.jpg", "\u202egpj.jpg", "-x.jpg", "train.lr=1.jpg", "'\";<script>.jpg", "x.JPG", "x.jpg"),
    *(letter * ((255 - len(end)) // len(os.fsencode(letter))) + end for letter in "aé🐱\udcff" for end in (".jpg", "")),
    *("a" * 240 + end for end in ("-attention.jpg", "é.jpg", ".png")),
]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take fewer names")
@pytest.mark.parametrize("embed", ["copies", "originals"])
def test_pictures_may_have_any_name(embed: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyexiv2", reason="metadata needs requirements-extras.txt")
    Path("mine").mkdir()
    for number, name in enumerate(ODD):
        Image.new("RGB", (40, 40), (number, 90, 90)).save(f"mine/{name}", "JPEG")
    paths = [f"mine/{name}" for name in ODD]
    options = ("--attention", "--sidecars", "--existing", "overwrite", "--embed", embed, "--out", "out")
    assert run("attention", *options, *SHORT, "--images", *paths) == 0
    assert f"wrote captions of {len(ODD)} pictures" in capsys.readouterr().err
    predictions = json.loads(Path("out/predictions.json").read_text(encoding="utf-8"))
    assert len({row["image_id"] for row in predictions}) == len(ODD)
    drawings = [path.name for path in Path("out/outputs").glob("*.jpg")]
    assert len(drawings) == 2 * len(ODD) and not any(name.startswith(".") for name in drawings)
    written = {name.removesuffix(".txt") for name in os.listdir("mine") if name.endswith(".txt")}
    without = {name for name in ODD if Path(name).stem not in written}
    assert without == {name for name in ODD if len(os.fsencode(Path(name).stem)) > 251}  # .txt does not fit behind it
    assert not [name for _, _, names in os.walk(".") for name in names if "unfinished" in name]
