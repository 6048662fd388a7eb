"""A tiny run to score, and how evaluate.py is called: shared by its tests."""

import contextlib
import csv
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk
import pytest
from conftest import TINY

import evaluate
import train
from cli import run_script
from data import formats

Run = Callable[..., int]
Refusal = Callable[..., None]
Captions = dict[Any, str]

SIGNED = f"scorer:pycocoevalcap-1.2|tok:nltk-words-{nltk.__version__}|refs:raw-5|split:test|n:2"
THEIRS = {"10.jpg": "A small blue triangle on grey .", "11.jpg": "A large red circle at the bottom of the picture"}
LEARNING = (
    *("train.epochs=11", "train.lr=3e-2", "train.warmup_steps=1", "train.ema=0.5", "train.seed=1"),
    *("train.label_smoothing=0", "decoder.dropout=0"),
)
SEARCH = ("beam=5", "length_penalty=0.7", "max_length=25")
RUN_PREDICTIONS = "runs/flickr8k/predictions-test.json"


@pytest.fixture(scope="session")
def scored(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the tiny dataset and a run, trained until its captions are right in part, then scored; what
    this printed is in printed.txt.
    """
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(drawn, folder / "archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, *LEARNING, *(f"search.{setting}" for setting in SEARCH)])
        assert run_script(train.main) == 0
        patch.setattr(sys, "argv", ["evaluate.py"])
        with open("printed.txt", "w") as file, contextlib.redirect_stdout(file):
            assert run_script(evaluate.main) == 0
    return folder


@pytest.fixture
def folder(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the working folder, as the working folder; models are large, and only read."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pth") else shutil.copy2)(source, target)

    shutil.copytree(scored, tmp_path, dirs_exist_ok=True, copy_function=copy)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("--split", "val")` runs the script and returns its exit code."""

    def command(*words: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate.py", *words])
            return run_script(evaluate.main)

    return command


@pytest.fixture
def refuses(run: Run, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """`refuses("--split test", "no test")` runs the script and expects one sentence with these words, and code 2."""

    def command(line: str, *words: str) -> None:
        capsys.readouterr()
        assert run(*line.split()) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"(evaluate\.py: )?error: ", message), message
        assert all(word in message for word in words), message
        assert not re.search(r"[.!?] [A-Z]", message), message

    return command


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pictures numbers as ids, as COCO does: 10.jpg is 10."""

    def read(path: Path) -> list[formats.Row]:
        return [(image, int(image[:2]), caption, split) for image, _, caption, split in formats.read_csv(path)]

    monkeypatch.setitem(formats.READERS, "csv", read)


def read_scores(path: str = "scores-test.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def read_run_scores() -> dict[str, Any]:
    return read_scores("runs/flickr8k/scores-test.json")


def read_captions(path: str = RUN_PREDICTIONS) -> Captions:
    return {row["image_id"]: row["caption"] for row in json.loads(Path(path).read_text())}


def write_captions(captions: Captions = THEIRS, path: str = "theirs.json") -> str:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps([{"image_id": name, "caption": text} for name, text in captions.items()]))
    return path


def read_references() -> dict[str, list[str]]:
    texts = defaultdict(list)
    with open("archive/captions.csv", newline="") as file:
        for row in csv.DictReader(file):
            texts[row["image"]].append(row["caption"])
    return texts


def list_pictures(split: str, *names: str) -> None:
    Path(f"archive/Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))
