"""What many tests share: a tiny dataset in Flickr8k's own form, a model of it, how scripts run and how they refuse."""

import csv
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import run

import metrics
from cli import UserError
from config import Config, load_config
from data import sample
from data.dataset import Flickr8kDataset
from data.features import Features
from data.folders import ImageFolders
from data.tokens import tokenise
from data.transforms import Transform
from data.vocab import Vocabulary, build_vocab
from models.model import CaptionModel

pytest_plugins = ["evaluation"]
SCENES = [scene for _, scene in sample.choose_scenes()[:12]]
TINY = (
    *("encoder.name=resnet18", "encoder.weights=null", "encoder.image_size=32", "data.min_count=1"),
    *("decoder.embed_size=16", "decoder.hidden_size=32", "train.batch_size=20", "train.precision=fp32"),
)


def pytest_configure() -> None:
    """Take Ctrl-C as usual, also where the tests run in the background of a shell, which has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_java(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """No Java is found but where a test asks for `java`: METEOR reads for ten seconds. Yields PATH as it was."""
    (folder := tmp_path_factory.mktemp("bin")).joinpath("java").write_text("#!/bin/sh\nexit 1\n")
    (folder / "java").chmod(0o755)
    path = os.environ["PATH"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{path}")
        yield path


@pytest.fixture
def java(no_java: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", no_java)
    if not metrics.has_java():
        pytest.skip("needs Java")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures with five captions each: eight for train, two for val, two for test."""
    root = tmp_path_factory.mktemp("drawn")
    (root / "images").mkdir()
    rows = [("image", "caption")]
    for number, scene in enumerate(SCENES):
        sample.draw_scene(scene, np.random.default_rng(number)).resize((64, 64)).save(root / f"images/{number:02}.jpg")
        rows += [(f"{number:02}.jpg", caption) for caption in sample.describe(scene)]
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    for split, numbers in {"train": range(8), "dev": range(8, 10), "test": range(10, 12)}.items():
        (root / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{number:02}.jpg\n" for number in numbers))
    return root


@pytest.fixture
def archive(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the drawn dataset at `archive/`, where config.yaml looks for it, below an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(drawn, tmp_path / "archive"))


def load_tiny_config(*overrides: str) -> Config:
    return load_config(overrides=[*TINY, *overrides])


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """Make a Config of the smallest sizes, with `key.sub=value` overrides."""
    return load_tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> CaptionModel:
    """An untrained model of the smallest sizes, in eval mode; to read, not to change."""
    captions = [caption for scene in SCENES for caption in sample.describe(scene)]
    return CaptionModel.build(load_tiny_config(), build_vocab(captions, min_count=1)).eval()


def make_dataset(
    captions: Sequence[tuple[str, str]], vocab: Vocabulary, features: torch.Tensor | None = None
) -> Flickr8kDataset:
    """Return the dataset of these (picture, caption) pairs; `features` are those of its pictures, in their order."""
    images = list(dict.fromkeys(image for image, _ in captions))
    image_of = np.array([images.index(image) for image, _ in captions])
    tokens = tokenise([caption for _, caption in captions], vocab.language).numericalize(vocab)
    known = None if features is None else Features([features.half()], images)
    return Flickr8kDataset(images, image_of, tokens, vocab, ImageFolders({}), Transform(32), known)


@pytest.fixture(scope="session")
def call() -> Callable[..., int]:
    """`call(train.main, "run=a")` runs a script's `main` with these words on its command line: its exit code."""
    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: real Flickr8k without its test pictures."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout, with real Flickr8k")
    return folder


@contextmanager
def one_sentence_with(*words: str) -> Iterator[None]:
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert not re.search(r"\n|[.!?] [A-Z]", message), message


@pytest.fixture(scope="session")
def refused() -> Callable[..., AbstractContextManager[None]]:
    """`with refused("train.lr"):` expects a UserError of one sentence that holds these words."""
    return one_sentence_with


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(n):` really lets no file grow beyond `n` bytes."""
    resource = pytest.importorskip("resource", reason="file size limits exist on Linux and macOS only")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
