import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import inference_visualize
import train
import utils

Run = Callable[..., int]


@pytest.fixture(scope="module")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the tiny dataset and a run trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(drawn, folder / "archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, "train.epochs=1"])
        assert utils.cli(train.main) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the script in a copy of the working folder and return its exit code."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["inference_visualize.py", *words])
        return utils.cli(inference_visualize.main)

    return command


def predictions(path: str = "predictions.json") -> dict[str, str]:
    return {row["image_id"]: row["caption"] for row in json.loads(Path(path).read_text())}


def test_alone_it_captions_the_test_pictures_of_the_newest_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert predictions("runs/flickr8k/predictions.json").keys() == {"10.jpg", "11.jpg"}
    assert {path.name for path in Path("runs/flickr8k/outputs").iterdir()} == {"10.jpg", "11.jpg"}
    assert "runs/flickr8k/checkpoints.pth" in capsys.readouterr().out


def test_the_page_knows_captions_and_references(run: Run) -> None:
    run("--split", "dev")
    page = Path("runs/flickr8k/captions_result.html").read_text()
    assert "./outputs/08.jpg" in page
    references = [row for row in Path("archive/captions.csv").read_text().splitlines() if row.startswith("08.jpg")]
    assert references[0].partition(",")[2] in page


def test_cached_and_fresh_features_give_the_same_captions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--split", "val")
    fresh = run("--split", "val", "data.cache=empty", "--out", "fresh")
    assert fresh == 0
    assert predictions("fresh/predictions.json") == predictions("runs/flickr8k/predictions.json")


def test_a_captioned_picture_is_the_picture_with_a_strip_below(run: Run) -> None:
    run("--images", "archive/images/00.jpg")
    drawn = Image.open("outputs/00.jpg")
    assert drawn.width == 448
    assert drawn.height > 448
    original = Image.open("archive/images/00.jpg").resize((448, 448))
    difference = np.abs(np.asarray(drawn.crop((0, 0, 448, 448)), float) - np.asarray(original, float))
    assert difference.mean() < 6


def test_files_folders_and_globs_are_taken_once_each(run: Run) -> None:
    Path("mine/deep").mkdir(parents=True)
    shutil.copy("archive/images/03.jpg", "mine/deep/b.jpg")
    Path("mine/notes.txt").write_text("not a picture")
    assert run("--images", "archive/images/00.jpg", "archive/images/0[01].jpg", "mine", "search.max_length=5") == 0
    assert predictions().keys() == {"archive/images/00.jpg", "archive/images/01.jpg", "mine/deep/b.jpg"}
    assert all(len(caption.split()) <= 5 for caption in predictions().values())


def test_equal_names_from_different_folders_do_not_collide(run: Run) -> None:
    for folder, name in (("a", "x.jpg"), ("b", "x.jpg"), ("c", "X.png")):
        Path(folder).mkdir()
        Image.new("RGB", (40, 30), "red").save(Path(folder, name))
    run("--images", "a", "b", "c", "--out", "there")
    assert {path.name for path in Path("there/outputs").iterdir()} == {"x.jpg", "x-2.jpg", "X-3.jpg"}


def test_broken_pictures_are_skipped_and_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/broken.jpg").write_bytes(Path("archive/images/00.jpg").read_bytes()[:400])
    shutil.copy("archive/images/00.jpg", "mine/good.jpg")
    assert run("--images", "mine") == 0
    assert predictions().keys() == {"mine/good.jpg"}
    assert "skipped: cannot read the picture mine/broken.jpg" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--images", "nowhere.jpg"], ["--images", "broken.jpg"], ["--limit", "0"]])
def test_what_cannot_be_done_ends_in_code_2(words: list[str], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.jpg").write_bytes(b"")
    try:
        code: object = run(*words)
    except SystemExit as exit_:  # argparse's own way
        code = exit_.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_limit_takes_the_first(run: Run) -> None:
    run("--images", "archive/images", "--limit", "3")
    assert [Path(name).name for name in predictions()] == ["00.jpg", "01.jpg", "02.jpg"]


def test_photographs_are_not_given_to_the_samples_model(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path("runs/flickr8k/config.yaml")
    config.write_text(config.read_text().replace("format: auto", "format: sample"))
    assert run("--images", "archive/images") == 2
    assert "learned from photographs" in capsys.readouterr().err
    assert run("--images", "archive/images", "--checkpoint", "runs/flickr8k/checkpoints.pth") == 0


def test_a_checkpoint_and_pictures_are_all_it_takes(run: Run, tmp_path: Path) -> None:
    shutil.copy("runs/flickr8k/checkpoints.pth", "model.pth")
    shutil.copy("archive/images/00.jpg", "photo.jpg")
    for folder in ("runs", "archive", "cache"):
        shutil.rmtree(folder)
    assert run("--images", "photo.jpg", "--checkpoint", "model.pth") == 0


def test_captions_hold_no_special_words(run: Run) -> None:
    run("--images", "archive/images")
    assert not any("<" in caption for caption in predictions().values())
    assert torch.get_num_threads() == 1
