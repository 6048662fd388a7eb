"""`inference_visualize.py`: what it writes, prints and refuses."""

from cli import run_script

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from PIL import Image

import inference_visualize
import metrics
import train
from data.vocab import TOKENISERS

Run = Callable[..., int]


@pytest.fixture(scope="module")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the tiny dataset and a run trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(drawn, folder / "archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, "train.epochs=1"])
        assert run_script(train.main) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the script in a copy of the working folder and return its exit code."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["inference_visualize.py", *words])
        return run_script(inference_visualize.main)

    return command


def read_rows(path: str = "predictions.json") -> list[dict[str, Any]]:
    return json.loads(Path(path).read_text())


def predictions(path: str = "predictions.json") -> dict[str, str]:
    return {row["image_id"]: row["caption"] for row in read_rows(path)}


def page_rows(page: str = "runs/flickr8k/captions_result.html") -> list[dict[str, Any]]:
    return [json.loads(line.rstrip(",")) for line in Path(page).read_text().splitlines() if line.startswith('{"image"')]


def page_scores(page: str = "runs/flickr8k/captions_result.html") -> list[float | None]:
    found = re.search(r"const scores = (.*?);", Path(page).read_text())
    assert found
    return json.loads(found[1])


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


@pytest.mark.parametrize(
    "words",
    [
        *(["--images", "nowhere.jpg"], ["--images", "broken.jpg"], ["--limit", "0"], ["--num-captions", "0"]),
        *(
            ["--checkpoint", "runs/flickr8k/checkpoints.pth", "--run", "flickr8k"],
            ["--images", "archive/images", "--split", "val"],
        ),
    ],
)
def test_what_cannot_be_done_ends_in_code_2(words: list[str], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.jpg").write_bytes(b"")
    assert run(*words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_where_nothing_can_be_captioned_nothing_is_written(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", "archive/captions.csv", "--out", "there") == 2
    assert "nothing was captioned: cannot read the picture archive/captions.csv" in capsys.readouterr().err
    assert not Path("there").exists()


def test_limit_takes_the_first(run: Run) -> None:
    run("--images", "archive/images", "--limit", "3")
    assert [Path(name).name for name in predictions()] == ["00.jpg", "01.jpg", "02.jpg"]


def test_photographs_are_given_to_the_pretrained_model_rather_than_to_the_samples(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path("runs/flickr8k/config.yaml")
    config.write_text(config.read_text().replace("format: auto", "format: sample"))
    shutil.copy("runs/flickr8k/checkpoints.pth", "captioner.pth")
    monkeypatch.setattr(inference_visualize, "PRETRAINED", Path("captioner.pth"))
    assert run("--images", "archive/images") == 0
    assert "with captioner.pth" in capsys.readouterr().out
    assert run("--images", "archive/images", "--checkpoint", "runs/flickr8k/checkpoints.pth") == 0
    assert "with runs/flickr8k/checkpoints.pth" in capsys.readouterr().out


def test_a_checkpoint_and_pictures_are_all_it_takes(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("runs/flickr8k/checkpoints.pth", "model.pth")
    shutil.copy("archive/images/00.jpg", "photo.jpg")
    for folder in ("runs", "archive", "cache"):
        shutil.rmtree(folder)
    assert run("--images", "photo.jpg", "--checkpoint", "model.pth") == 0
    (row,) = read_rows()
    assert f"    photo.jpg: {row['caption'] or '(no words)'}\n" in capsys.readouterr().out


def test_one_caption_each_is_all_that_predictions_hold_by_default(run: Run) -> None:
    run()
    assert all(row.keys() == {"image_id", "caption"} for row in read_rows("runs/flickr8k/predictions.json"))
    assert all(len(row["captions"]) == 1 and not row["probabilities"] for row in page_rows())


def test_several_captions_come_best_first_and_the_best_is_the_caption(run: Run) -> None:
    run("--num-captions", "3", "search.length_penalty=0")
    rows = read_rows("runs/flickr8k/predictions.json")
    for row, shown in zip(rows, page_rows(), strict=True):
        captions = [each["caption"] for each in row["captions"]]
        assert captions == shown["captions"] and row["caption"] == captions[0]
        assert len(set(captions)) == len(shown["probabilities"]) == 3 and "<" not in "".join(captions)
        log_probs = [each["log_prob"] for each in row["captions"]]
        assert log_probs == sorted(log_probs, reverse=True)


def test_the_drawing_shows_the_best_of_several_captions_alone(run: Run) -> None:
    run("--images", "archive/images/00.jpg", "search.beam=3", "--out", "one")
    run("--images", "archive/images/00.jpg", "search.beam=3", "--num-captions", "3", "--out", "three")
    assert Path("one/outputs/00.jpg").read_bytes() == Path("three/outputs/00.jpg").read_bytes()


def test_drawn_captions_are_the_same_each_time(run: Run) -> None:
    drawn = []
    for folder in ("first", "second"):
        torch.seed()
        run("--images", "archive/images", "search.temperature=2", "--out", folder)
        drawn.append(predictions(f"{folder}/predictions.json"))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].values())) == 12


def test_search_settings_are_those_of_the_command_line(run: Run) -> None:
    run("--images", "archive/images", "search.beam=1", "search.min_length=4", "search.max_length=4")
    assert {len(caption.split()) for caption in predictions().values()} == {4}


def test_each_picture_of_a_split_has_its_own_cider_also_where_one_is_broken(run: Run) -> None:
    Path("archive/images/02.jpg").write_bytes(b"")
    assert run("--split", "train") == 0
    captions = predictions("runs/flickr8k/predictions.json")
    references = pd.read_csv("archive/captions.csv").groupby("image")["caption"].agg(list).to_dict()
    scores = metrics.evaluate(captions, references, metrics.batched(TOKENISERS["en"]()), "en", ["cider"])
    expected = scores.per_image["cider"]
    assert [row["name"] for row in page_rows()] == list(captions) and len(captions) == 7
    assert page_scores() == pytest.approx(expected, abs=0.06)
    assert len(set(page_scores())) > 3


@pytest.mark.parametrize("words", [["--split", "train", "--limit", "1"], ["--images", "archive/images"]])
def test_one_picture_and_pictures_without_references_have_no_scores(words: list[str], run: Run) -> None:
    assert run(*words, "--out", "there") == 0
    assert page_scores("there/captions_result.html") == []


def test_one_picture_is_not_called_pictures(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--limit", "1")
    page = Path("runs/flickr8k/captions_result.html").read_text()
    assert "<p>resnet18 and lstm</p>" in page
    printed = capsys.readouterr().out
    assert "captioning 1 picture with" in printed and "captions of 1 picture in" in printed
