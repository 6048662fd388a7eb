"""`inference_visualize.py`: what it writes, prints and refuses."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browser import read_rows
from conftest import TINY
from PIL import Image

import inference_visualize
import metrics
import train
from cli import run_script
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
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., int]) -> Run:
    """Run the script in a copy of the working folder and return its exit code."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    return partial(call, inference_visualize.main)


def read_predictions(folder: str = "runs/flickr8k") -> list[dict[str, Any]]:
    return json.loads(Path(folder, "predictions.json").read_text())


def captions_of(folder: str = "runs/flickr8k") -> dict[str, str]:
    return {row["image_id"]: row["caption"] for row in read_predictions(folder)}


def page_rows() -> list[dict[str, Any]]:
    return read_rows(Path("runs/flickr8k/captions_result.html"))


def page_scores(folder: str = "runs/flickr8k") -> list[float]:
    found = re.search(r"const scores = (.*?);", Path(folder, "captions_result.html").read_text())
    assert found
    return json.loads(found[1])


def test_alone_it_captions_the_test_pictures_of_the_newest_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert captions_of().keys() == {"10.jpg", "11.jpg"}
    assert {path.name for path in Path("runs/flickr8k/outputs").glob("*.jpg")} == {"10.jpg", "11.jpg"}
    assert all(row.keys() == {"image_id", "caption"} for row in read_predictions())
    assert all(len(row["captions"]) == 1 and row["doubt"] == "" for row in page_rows())
    assert "<p>resnet18 and lstm</p>" in Path("runs/flickr8k/captions_result.html").read_text()
    assert "captioning 2 pictures with runs/flickr8k/checkpoints.pth" in capsys.readouterr().err


def test_cached_and_fresh_features_give_the_same_captions_and_the_page_has_the_references(run: Run) -> None:
    assert run("--split", "val") == run("--split", "dev", "data.cache=empty", "--out", "fresh") == 0
    assert captions_of() == captions_of("fresh")
    references = pd.read_csv("archive/captions.csv").groupby("image")["caption"].agg(list)
    assert [(row["image"], row["references"]) for row in page_rows()] == [
        (f"./outputs/{name}", references[name]) for name in ("08.jpg", "09.jpg")
    ]


def test_a_captioned_picture_is_the_picture_with_a_strip_below(run: Run) -> None:
    run("--images", "archive/images/00.jpg")
    drawn = Image.open("outputs/00.jpg")
    assert drawn.width == 448
    assert drawn.height > 448
    original = Image.open("archive/images/00.jpg").resize((448, 448))
    difference = np.abs(np.asarray(drawn.crop((0, 0, 448, 448)), float) - np.asarray(original, float))
    assert difference.mean() < 6


def test_files_folders_and_globs_are_taken_once_each_and_searched_as_the_command_line_says(run: Run) -> None:
    Path("mine/deep").mkdir(parents=True)
    shutil.copy("archive/images/03.jpg", "mine/deep/b.jpg")
    Path("mine/notes.txt").write_text("not a picture")
    search = ("search.beam=1", "search.min_length=4", "search.max_length=4")
    assert run("--images", "archive/images/00.jpg", "archive/images/0[01].jpg", "mine", *search) == 0
    assert captions_of(".").keys() == {"archive/images/00.jpg", "archive/images/01.jpg", "mine/deep/b.jpg"}
    assert {len(caption.split()) for caption in captions_of(".").values()} == {4}


def test_equal_names_from_different_folders_do_not_collide(run: Run) -> None:
    for folder, name in (("a", "x.jpg"), ("b", "x.jpg"), ("c", "X.png")):
        Path(folder).mkdir()
        Image.new("RGB", (40, 30), "red").save(Path(folder, name))
    run("--images", "a", "b", "c", "--out", "there")
    assert {path.name for path in Path("there/outputs").glob("*.jpg")} == {"x.jpg", "x-2.jpg", "X-3.jpg"}


def test_broken_pictures_are_skipped_and_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/broken.jpg").write_bytes(Path("archive/images/00.jpg").read_bytes()[:400])
    shutil.copy("archive/images/00.jpg", "mine/good.jpg")
    assert run("--images", "mine") == 0
    assert captions_of(".").keys() == {"mine/good.jpg"}
    assert "skipped: cannot read the picture mine/broken.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--images nowhere.jpg", "there is no picture at nowhere.jpg"),
        ("hollow", "there is no picture in the folder hollow"),
        ("-dash.jpg", "-dash.jpg begins as options do; write ./-dash.jpg"),
        ("./-dash.jpg", "cannot read the picture -dash.jpg (an empty file)"),
        ("./-dash.jpg archive/captions.csv", "leave it out, as 1 more"),
        ("--images archive/captions.csv", "nothing was captioned: cannot read the picture archive/captions.csv"),
        ("--limit 0", "must be at least 1"),
        ("--num-captions 0", "must be at least 1"),
        ("--num-captions 101", "must be at most 100"),
        ("--num-captions 10000000", "must be at most 100"),
        (f"--num-captions {10**400}", "must be at most 100"),
        ("--num-captions 0x10", "invalid"),
        ("--num-captions 1e2", "invalid"),
        ("--checkpoint runs/flickr8k/checkpoints.pth --run flickr8k", "not allowed"),
        ("--images archive/images --split val", "--split val and archive/images both say which pictures"),
    ],
)
def test_what_cannot_be_done_ends_in_code_2(line: str, said: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hollow").mkdir()
    Path("-dash.jpg").touch()
    assert run(*line.split(), "--out", "there") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert not Path("there").exists()


def test_a_full_disk_is_reported_with_the_drawing_that_did_not_fit(
    run: Run, full_disk: Callable[[int], AbstractContextManager[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(500):
        assert run("--images", "archive/images/00.jpg", "--out", "there") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot write {Path('there/outputs/00.jpg')}: " in error and "another place with --out" in error
    assert not list(Path("there/outputs").glob("*.jpg"))


def test_limit_takes_the_first_and_one_picture_or_none_with_references_has_no_score(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--images", "archive/images", "--limit", "3")
    assert [Path(name).name for name in captions_of(".")] == ["00.jpg", "01.jpg", "02.jpg"]
    run("--split", "train", "--limit", "1", "--out", "there")
    assert page_scores(".") == page_scores("there") == []
    printed = capsys.readouterr().err
    assert "captioning 1 picture with" in printed and "captions of 1 picture in" in printed


def test_photographs_are_given_to_the_pretrained_model_rather_than_to_the_samples(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path("runs/flickr8k/config.yaml")
    config.write_text(config.read_text().replace("format: auto", "format: sample"))
    shutil.copy("runs/flickr8k/checkpoints.pth", "captioner.pth")
    monkeypatch.setattr(inference_visualize, "PRETRAINED", Path("captioner.pth"))
    assert run("--images", "archive/images") == 0
    assert "with captioner.pth" in capsys.readouterr().err
    assert run("--images", "archive/images", "--checkpoint", "runs/flickr8k/checkpoints.pth") == 0
    assert "with runs/flickr8k/checkpoints.pth" in capsys.readouterr().err


def test_the_captioner_of_another_language_can_be_taken(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", "archive/images/00.jpg", "--language", "zh") == 0
    assert "captioner.zh.pth" in capsys.readouterr().err
    assert re.fullmatch("[\u4e00-\u9fff]+", captions_of(".")["archive/images/00.jpg"])
    assert run("--language", "zh") == 2
    assert "name the pictures to caption, too" in capsys.readouterr().err


def test_a_caption_that_is_probably_wrong_is_marked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", "archive/images/00.jpg", "--language", "en") == 0
    [row] = read_predictions(".")
    assert 0 < row["confidence"] < 0.5  # a drawing, which it knows nothing of
    printed = capsys.readouterr()
    assert printed.out == f"archive/images/00.jpg\t{row['caption']}\n"
    assert "unsure of 1 of 1 captions, such as that of 00.jpg (unsure" in printed.err
    [shown] = read_rows(Path("captions_result.html"))
    assert shown["doubt"].startswith("unsure")


def test_a_checkpoint_and_pictures_are_all_it_takes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("runs/flickr8k/checkpoints.pth", "model.pth")
    shutil.copy("archive/images/00.jpg", "photo.jpg")
    for folder in ("runs", "archive", "cache"):
        shutil.rmtree(folder)
    assert run("--images", "photo.jpg", "--checkpoint", "model.pth") == 0
    assert f"photo.jpg\t{captions_of('.')['photo.jpg'] or '(no words)'}\n" == capsys.readouterr().out


def test_several_captions_come_best_first_and_the_best_is_the_caption(run: Run) -> None:
    run("--num-captions", "3", "search.length_penalty=0")
    for row, shown in zip(read_predictions(), page_rows(), strict=True):
        captions = [each["caption"] for each in row["captions"]]
        assert captions == shown["captions"] and row["caption"] == captions[0]
        assert len(set(captions)) == 3 and "<" not in "".join(captions)
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
        drawn.append(captions_of(folder))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].values())) == 12


def test_each_picture_of_a_split_has_its_own_cider_also_where_one_is_broken(run: Run) -> None:
    Path("archive/images/02.jpg").write_bytes(b"")
    assert run("--split", "train") == 0
    captions = captions_of()
    references = pd.read_csv("archive/captions.csv").groupby("image")["caption"].agg(list).to_dict()
    scores = metrics.evaluate(captions, references, metrics.batched(TOKENISERS["en"]()), "en", ["cider"])
    expected = scores.per_image["cider"]
    assert [row["name"] for row in page_rows()] == list(captions) and len(captions) == 7
    assert page_scores() == pytest.approx(expected, abs=0.06)
    assert len(set(page_scores())) > 3
