"""Several datasets, each in its own format and with its own splits, are trained on and scored as one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, make_dataset
from dataset_files import run
from test_every_format import as_coco, as_karpathy

import evaluate
import inference_visualize
import train
from config import load_config
from data import annotations, write_tars
from data.dataset import make_batches
from data.folders import image_folders
from models.model import CaptionModel

BOTH = "data.root=[archive, other]"


@pytest.fixture
def both(drawn: Path, archive: Path) -> Path:
    """Two datasets whose pictures have the same names: archive/ as CSV, other/ in Karpathy's format."""
    as_karpathy(drawn, Path("other"))
    return archive


def table(*overrides: str) -> pd.DataFrame:
    return annotations.load(load_config(overrides=[BOTH, *overrides]).data)


def test_two_formats_are_trained_on_scored_and_drawn_as_one(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(train.main, "--config", Path(__file__).parents[1] / "configs/pretrained.yaml", *TINY, BOTH, "run=it",
               "data.weights=[1, 2]", "train.epochs=2", "train.lr=0.01", "train.corners=0") == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "data: archive/captions.csv: train 8 pictures with 40 captions, val 2 " in told
    assert "data: other/dataset_flickr8k.json: train 8 pictures with 40 captions, val 2 " in told
    assert "data: together: train 16 pictures with 80 captions, val 4 pictures with 20 captions" in told
    assert "    archive: CIDEr" in told and "    other: CIDEr" in told and "    other/08.jpg: " in told

    assert run(evaluate.main, "--split", "val") == run(inference_visualize.main) == 0
    told = capsys.readouterr().out
    assert "of these archive alone: BLEU-1" in told and "of these other alone: BLEU-1" in told
    scores = json.loads(Path("runs/it/scores-val.json").read_text())
    assert [scores["datasets"][name]["pictures"] for name in ("archive", "other")] == [2, 2]
    assert {"bleu4", "cider", "intervals"} < scores["datasets"]["other"].keys()
    written = [row["image_id"] for row in json.loads(Path("runs/it/predictions.json").read_text())]
    assert written == ["archive/10.jpg", "archive/11.jpg", "other/10.jpg", "other/11.jpg"]
    assert "other/11.jpg" in Path("runs/it/captions_result.html").read_text()

    assert run(evaluate.main, "--split", "val", "data.root=other", "--out", "alone") == 0  # scored as it was trained
    alone = json.loads(Path("alone/scores-val.json").read_text())
    assert alone["datasets"] == {} and alone["bleu4"] == scores["datasets"]["other"]["bleu4"]


def test_folders_of_one_name_are_told_apart(both: Path) -> None:
    shutil.copytree("archive", "lists/archive")  # a folder of the same name, elsewhere
    mixed = annotations.load(load_config(overrides=["data.root=[archive, lists/archive, other]"]).data)
    assert mixed.groupby("dataset", sort=False)["image"].nunique().to_dict() == {
        "archive": 12,
        "archive-2": 12,
        "other": 12,
    }
    assert not mixed.drop_duplicates("image")["image_id"].duplicated().any()
    folders = image_folders(load_config(overrides=["data.root=[archive, lists/archive, other]"]).data)
    assert folders.path("archive-2/03.jpg") == Path("lists/archive/images/03.jpg")
    assert [len(names) for _, _, names in folders.group(mixed["image"].unique())] == [12, 12, 12]


def test_a_dataset_without_splits_is_split_by_itself_and_keeps_its_splits_with_the_run(both: Path) -> None:
    for path in Path("archive").glob("*Images.txt"):
        path.unlink()
    drawn_by_seed = table()
    alone = annotations.load(load_config().data)
    ours = drawn_by_seed[drawn_by_seed["dataset"] == "archive"]
    assert ours["split"].tolist() == alone["split"].tolist() and ours["split"].nunique() == 3
    saved = {"train": ["archive/00.jpg"], "val": ["archive/01.jpg"], "test": []}
    again = annotations.load(load_config(overrides=[BOTH]).data, saved)
    assert set(again[again["dataset"] == "archive"]["image"]) == {"archive/00.jpg", "archive/01.jpg"}
    assert again[again["dataset"] == "other"]["image"].nunique() == 12  # whose files name the splits


def test_a_picture_is_encoded_once_whatever_it_is_trained_with(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def encoded() -> list[str]:
        return [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("encoding")]

    assert run(train.main, *TINY, "run=a", "train.epochs=1") == 0
    assert encoded() == ["encoding 12 pictures"]
    assert run(train.main, *TINY, BOTH, "run=b", "train.epochs=1") == 0
    assert encoded() == ["encoding 12 pictures"]  # those of other/
    assert run(train.main, *TINY, "data.root=[other, archive]", "run=c", "train.epochs=1") == 0
    assert encoded() == []


def test_a_run_goes_on_digit_for_digit(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (*TINY, BOTH, "data.weights=[0.5, 1.75]", "train.epochs=3", "train.checkpoint_every=1")
    assert run(train.main, *settings, "run=whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "validate", interrupt)
        assert run(train.main, *settings, "run=parts") == 130
    assert run(train.main, "--resume", "--run", "parts") == 0
    assert Path("runs/parts/loss_log.txt").read_text() == Path("runs/whole/loss_log.txt").read_text()
    capsys.readouterr()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("by_image", [True, False])
def test_weights_say_how_often_an_epoch_sees_a_picture(by_image: bool, tiny_model: CaptionModel) -> None:
    captions = [(f"{number // 2}.jpg", "a red circle") for number in range(20)]  # of ten pictures, two each
    dataset = make_dataset(captions, tiny_model.vocab)
    dataset.weights = np.array([0.5] * 4 + [1.0] * 2 + [2.25] * 4)
    seen = []
    for seed in range(8):
        batches = make_batches(dataset, 6, by_image, np.random.default_rng(seed))
        seen.append(np.bincount(np.concatenate(batches), minlength=20))
    assert {int(each.sum()) for each in seen} == {4 + 4 + 18}  # in every epoch as many
    mean = np.mean(seen, axis=0)
    assert (mean[8:12] == 1).all() and (mean[12:] >= 2).all()
    assert len({tuple(each) for each in seen}) > 1  # but not the same ones


def test_tars_hold_both_and_are_trained_on(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    assert run(write_tars.main, "tars", "--pictures", "10", BOTH) == 0
    assert run(train.main, *TINY, "data.shards=tars/{00000..00002}.tar", "run=tars", "train.epochs=1") == 0
    assert "train 16 pictures with 80 captions, val 4 pictures with 20 captions" in capsys.readouterr().out
    assert run(evaluate.main, "--split", "val") == 0
    written = {row["image_id"] for row in json.loads(Path("runs/tars/predictions-val.json").read_text())}
    assert written == {"archive/08.jpg", "archive/09.jpg", "other/08.jpg", "other/09.jpg"}


def test_a_trained_backbone_reads_the_pictures_of_both(both: Path) -> None:
    assert run(train.main, *TINY, BOTH, "run=it", "train.epochs=1", "encoder.frozen=false", "train.num_workers=0") == 0
    assert torch.load("runs/it/checkpoints.pth", weights_only=True)["backbone"] is not None


def test_annotations_report_each_and_the_sum(both: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_coco(drawn, Path("coco"))
    assert run(annotations.main, "archive", "coco") == 0
    parts = capsys.readouterr().out.split("\n\n")
    assert parts[0].startswith("captions:   archive/captions.csv (csv)\npictures:   12, in archive/")
    assert "captions_train2014.json and coco/annotations/captions_val2014.json (coco)" in parts[1]
    assert parts[2].startswith("together:   archive and coco\npictures:   24\n")
    assert "train:      16 pictures, 80 captions" in parts[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root=[archive, nowhere]"], "there is no folder nowhere"),
        (["data.root=[]"], "data.root = [] (from the command line) cannot be used"),
        ([BOTH, "data.weights=[1]"], "data.weights has 1 numbers for archive and other; give one for each folder"),
        ([BOTH, "data.weights=[1, 0]"], "data.weights[1] = 0"),
        ([BOTH, "data.captions=captions.csv"], "data.root names several; leave them out"),
    ],
)
def test_mistakes_are_named(words: list[str], told: str, both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(train.main, *TINY, *words) == 2
    assert told in capsys.readouterr().err and not Path("runs").exists()
