"""Whatever format captions come in, the same three scripts train on them, score them and draw pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import TINY
from dataset_files import run

import evaluate
import inference_visualize
import train

CHINESE = ("一个红色的圆形。", "图片里有一个圆", "上面是蓝色，下面是红色", "一个很大的正方形", "两个图形")
SPLITS = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}


def captions_of(drawn: Path) -> dict[str, list[str]]:
    return pd.read_csv(drawn / "captions.csv").groupby("image")["caption"].agg(list).to_dict()


def as_karpathy(drawn: Path, root: Path) -> None:
    shutil.copytree(drawn / "images", root / "images")
    split_of = {f"{number:02}.jpg": split for split, numbers in SPLITS.items() for number in numbers}
    images = [
        {"filename": name, "imgid": place, "split": split_of[name], "sentences": [{"raw": text} for text in texts]}
        for place, (name, texts) in enumerate(captions_of(drawn).items())
    ]
    (root / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))


def as_coco(drawn: Path, root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    captions = captions_of(drawn)
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        (root / f"{split}2014").mkdir()
        content: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        for number in numbers:
            name = f"COCO_{split}2014_{number:012}.jpg"
            shutil.copy(drawn / f"images/{number:02}.jpg", root / f"{split}2014/{name}")
            content["images"].append({"id": number, "file_name": name, "height": 64, "width": 64})
            texts = captions[f"{number:02}.jpg"]
            content["annotations"] += [{"image_id": number, "id": 5 * number, "caption": text} for text in texts]
        (root / f"annotations/captions_{split}2014.json").write_text(json.dumps(content))


def as_ai_challenger(drawn: Path, root: Path) -> None:
    for split, date, numbers in (("train", "20170902", range(8)), ("validation", "20170910", range(8, 12))):
        folder = root / f"ai_challenger_caption_{split}_{date}"
        (folder / f"caption_{split}_images_{date}").mkdir(parents=True)
        for number in numbers:
            shutil.copy(drawn / f"images/{number:02}.jpg", folder / f"caption_{split}_images_{date}")
        entries = [{"url": "", "image_id": f"{number:02}.jpg", "caption": list(CHINESE)} for number in numbers]
        (folder / f"caption_{split}_annotations_{date}.json").write_text(json.dumps(entries, ensure_ascii=False))


FORMATS: dict[str, tuple[Callable[[Path, Path], object], str, int]] = {  # how it is made, its language, pictures shown
    "csv": (shutil.copytree, "en", 2),
    "karpathy": (as_karpathy, "en", 2),
    "coco": (as_coco, "en", 4),
    "ai_challenger": (as_ai_challenger, "zh", 4),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dataset_is_trained_on_scored_and_drawn(
    kind: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, language, shown = FORMATS[kind]
    make(drawn, tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)

    settings = (f"data.language={language}", "run=it", "train.epochs=2", "train.lr=0.01")
    assert run(train.main, *TINY, "data.root=dataset", *settings) == 0, capsys.readouterr().err
    assert run(evaluate.main) == run(inference_visualize.main) == 0, capsys.readouterr().err
    written = json.loads(Path("runs/it/predictions.json").read_text())
    assert len(written) == len(list(Path("runs/it/outputs").glob("*.jpg"))) == shown
    scores = json.loads(next(Path("runs/it").glob("scores-*.json")).read_text())
    assert ("tok:characters" if language == "zh" else "tok:nltk-words") in scores["signature"]
    assert all(isinstance(row["image_id"], int) for row in written) == (kind == "coco")
    assert all(row["caption"].isascii() == (language == "en") for row in written if row["caption"])
