"""captioning.py: the same captions whoever asks, from paths, PIL images and cached features."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from captioners import save_captioner
from PIL import Image

from captioning import Captioner, Picture, caption_dataset, doubt, encode_dataset, prediction
from config import Config
from data.folders import ImageFolders
from data.transforms import open_picture
from models.model import Caption


@pytest.fixture
def captioner(paths: list[Path], tiny_config: Callable[..., Config]) -> Captioner:
    config = tiny_config("encoder.image_size=96", "train.seed=2", "search.max_length=8")
    save_captioner(Path("model.pth"), config, paths[0].parent)
    return Captioner.load("model.pth")


@pytest.fixture
def paths(archive: Path) -> list[Path]:
    return sorted((archive / "images").iterdir())


def test_paths_and_images_one_or_many_get_the_same_captions(captioner: Captioner, paths: list[Path]) -> None:
    captions = captioner.caption(paths, beam=2)
    assert len(captions) == 12 and len(set(captions)) > 1
    assert captioner.caption([Image.open(path) for path in paths], beam=2) == captions
    assert (
        captioner.caption(str(paths[3]), beam=2) == captioner.caption(open_picture(paths[3]), beam=2) == [captions[3]]
    )
    assert captioner.caption([]) == []


def test_cached_features_give_the_captions_of_the_pictures(captioner: Captioner, paths: list[Path]) -> None:
    names = [path.name for path in paths]
    features = encode_dataset(captioner.model, names, ImageFolders({"": paths[0].parent}))
    assert list(caption_dataset(captioner.model, features, names).values()) == captioner.caption(paths)
    pictures = [Picture(path, path.name, path.name) for path in paths]
    for known in (features, None):
        [(found, _)] = captioner.caption_pictures(pictures, known)
        assert [captions[0].text for _, captions in found] == captioner.caption(paths)


def test_a_setting_that_there_is_not_and_a_broken_picture_are_refused(
    captioner: Captioner, paths: list[Path], refused: Callable[..., AbstractContextManager[None]]
) -> None:
    with refused("search.beams", "search.beam"):
        captioner.caption(paths, beams=3)
    paths[1].write_bytes(b"")
    with refused("cannot read the picture", "01.jpg"):
        captioner.caption(paths)


def test_doubt_is_said_of_captions_that_are_probably_wrong_with_what_the_picture_may_show() -> None:
    caption = Caption("a dog", ("a", "dog"), -1.0, -0.5)
    assert doubt(caption) == ""  # of a model that was never calibrated
    assert doubt(replace(caption, confidence=0.5)) == ""
    assert doubt(replace(caption, confidence=0.49)) == "unsure"
    unsure = replace(caption, confidence=0.2, perhaps=("school bus", "cat"))
    assert doubt(unsure) == "unsure; perhaps: school bus, cat"
    assert prediction("1.jpg", [caption], 1) == {"image_id": "1.jpg", "caption": "a dog"}
    told = {"confidence": 0.2, "perhaps": ["school bus", "cat"]}
    assert prediction("1.jpg", [unsure], 1) == {"image_id": "1.jpg", "caption": "a dog", **told}
