"""Every caption format people have is recognised by its content and becomes the same table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_files import load, put, rows

from data import formats

CSV = "image,caption\na.jpg,A dog , a cat .\nb.jpg,Two cats .\n"
RESULTS = "image_name| comment_number| comment\na.jpg| 0| A dog , a cat .\nb.jpg| 4   Two cats .\n"  # as line 19,999 is
TOKEN = "a.jpg#0\tA dog , a cat .\na.jpg.1#0\tAn ox .\nb.jpg#0\tTwo cats .\nb.jpg#0\tTwo cats .\n"
CHINESE = "a.jpg#zhc#0 一只狗，一只猫。\na.jpg#zhc#1 狗和猫\nb.jpg#zhc#0 两只猫 🐱\n"
KARPATHY: dict[str, Any] = {
    "images": [
        {"filename": "a.jpg", "imgid": 0, "split": "restval", "sentences": [{"raw": "A dog , a cat .", "sentid": 0}]},
        {"filename": "b.jpg", "imgid": 1, "split": "val", "sentences": [{"raw": "Two cats .\n", "sentid": 1}]},
        {"filename": "c.jpg", "imgid": 2, "split": "test", "sentences": []},
    ],
    "dataset": "flickr8k",
}
COCO: dict[str, Any] = {
    "info": {"description": "COCO 2014 Dataset", "year": 2014},
    "images": [
        {"license": 5, "file_name": f"{name}.jpg", "height": 640, "width": 480, "id": number}
        for name, number in (("a", 57870), ("b", 384029), ("c", 222016))
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 57870, "id": 787980, "caption": "A dog , a cat ."},
        {"image_id": 384029, "id": 787981, "caption": "Two cats .\n"},
        {"image_id": 384029, "id": 787982, "caption": " . "},
    ],
}
AI_CHALLENGER = [
    {"url": "http://img5.cache.netease.com/a.jpg", "image_id": "a.jpg", "caption": ["一只狗，一只猫。", "狗和猫"]},
    {"url": "http://m4.biz.itc.cn/b.jpg", "image_id": "b.jpg", "caption": ["两只猫 🐱"]},
    {"url": "http://m4.biz.itc.cn/c.jpg", "image_id": "c.jpg", "caption": []},
]
JSONL = '{"image": "a.jpg", "caption": "A dog , a cat ."}\n\n{"image": "b.jpg", "captions": ["Two cats ."]}\n'

ENGLISH_ROWS = [("a.jpg", "A dog , a cat ."), ("b.jpg", "Two cats .")]
CHINESE_ROWS = [("a.jpg", "一只狗，一只猫。"), ("a.jpg", "狗和猫"), ("b.jpg", "两只猫 🐱")]
FILES = {
    "csv": ("captions.csv", CSV, "csv", ENGLISH_ROWS),
    "kaggle": ("captions.txt", CSV, "csv", ENGLISH_ROWS),
    "flickr30k": ("results.csv", RESULTS, "csv", ENGLISH_ROWS),
    "token": ("Flickr8k.token.txt", TOKEN, "token", ENGLISH_ROWS),
    "flickr8k-cn": ("flickr8kzhc.caption.txt", CHINESE, "token", CHINESE_ROWS),
    "karpathy": ("dataset_flickr8k.json", json.dumps(KARPATHY), "karpathy", ENGLISH_ROWS),
    "coco": ("annotations/captions_train2014.json", json.dumps(COCO), "coco", ENGLISH_ROWS),
    "coco, indented": ("captions_val2017.json", json.dumps(COCO, indent=2), "coco", ENGLISH_ROWS),
    "ai challenger": (
        "caption_train_annotations_20170902.json",
        json.dumps(AI_CHALLENGER, ensure_ascii=False),
        "json",
        CHINESE_ROWS,
    ),
    "jsonl": ("captions.jsonl", JSONL, "jsonl", ENGLISH_ROWS),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    return tmp_path


CHANGES: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "byte order mark": lambda text: "\ufeff" + text,
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "empty lines": lambda text: text + "\n\n",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_a_file_is_found_recognised_and_read(file: str, change: str, root: Path) -> None:
    name, text, kind, expected = FILES[file]
    put(root, name, text=CHANGES[change](text))
    assert formats.recognise(root / name) == kind
    assert rows(load(root)) == expected


def test_chinese_captions_are_never_split_as_english_ones(root: Path, refused: Callable) -> None:
    put(root, "flickr8kzhc.caption.txt", text=CHINESE)
    with refused("flickr8kzhc.caption.txt", "data.language=zh"):
        load(root, "data.language=en")


LINES = {
    'a.jpg,"A dog, a cat"': "A dog, a cat",
    "a.jpg,A dog, a cat , and more": "A dog, a cat , and more",
    'a.jpg,"He says ""sit"""': 'He says "sit"',
    'a.jpg,A "good" dog': 'A "good" dog',
    "a.jpg,  A dog  ": "A dog",
    "a.jpg,Ein Hündchen": "Ein Hündchen",
}


def test_quotes_and_commas_in_captions_are_kept(root: Path) -> None:
    put(root, "captions.csv", text="\n".join(["image,caption", *LINES, ""]))
    assert load(root)["caption"].tolist() == list(LINES.values())
    put(root, "captions.csv", text="Caption,number,Image\nA dog, a cat,0,a.jpg\n")  # in any order, among others
    assert rows(load(root)) == [("a.jpg", "A dog, a cat")]


@pytest.mark.parametrize("name", ["captions.jsonl", "Flickr8k.token.txt"])
def test_only_a_line_end_ends_a_line(name: str, root: Path) -> None:
    caption = "A dog\u2028a cat\x85 a cow"
    entry = json.dumps({"image": "a.jpg", "caption": caption}, ensure_ascii=False)
    put(root, name, text=entry + "\n" if name.endswith("jsonl") else f"a.jpg#0\t{caption}\n")
    assert load(root)["caption"].tolist() == ["A dog a cat a cow"]


def test_a_format_named_overrules_the_one_recognised(root: Path, refused: Callable) -> None:
    put(root, "captions.txt", text="image,caption\na.jpg#0 x,A dog\n")
    put(root, "images/a.jpg#0 x")
    assert rows(load(root)) == [("a.jpg#0 x", "A dog")]
    with refused("captions.txt line 1", "name.jpg#0"):
        load(root, "data.format=token")
    with refused("captions.txt is not as coco files are", "data.format=NAME"):
        load(root, "data.format=coco")


def test_karpathys_splits_are_kept_and_restval_is_trained_on(root: Path) -> None:
    put(root, "dataset_flickr8k.json", text=json.dumps(KARPATHY))
    assert load(root)["split"].tolist() == ["train", "val"]


def test_karpathys_coco_has_folders_and_coco_ids(root: Path) -> None:
    pictures = [{**KARPATHY["images"][0], "filepath": "val2014", "filename": "x.jpg", "cocoid": 391895}]
    put(root, "dataset_coco.json", text=json.dumps({"images": pictures, "dataset": "coco"}))
    put(root, "images/val2014/x.jpg", "images/train2014/x.jpg")
    table = load(root)
    assert (table["image"][0], table["image_id"][0]) == ("val2014/x.jpg", 391895)


def test_a_pattern_chooses_among_years(root: Path, refused: Callable) -> None:
    for year in (2014, 2017):
        for place, split in enumerate(("train", "val")):
            part = COCO | {"annotations": COCO["annotations"][place : place + 1]}
            put(root, f"annotations/captions_{split}{year}.json", text=json.dumps(part))
    with refused("captions_train2014.json, captions_train2017.json", "data.captions"):
        load(root)
    assert len(load(root, "data.captions=annotations/captions_train2017.json")) == 1
    assert len(load(root, "data.captions=annotations/captions_*2017.json")) == 2


def test_a_line_may_say_its_split_and_id(root: Path) -> None:
    entry = {"image": "a.jpg", "image_id": 7, "captions": ["A dog", "An animal"], "split": "dev"}
    put(root, "captions.jsonl", text=json.dumps(entry) + '\n{"image": "b.jpg", "caption": "A cat", "split": "train"}')
    table = load(root)
    assert table["split"].tolist() == ["val", "val", "train"]
    assert table["image_id"].tolist() == [7, 7, "b.jpg"]


def test_a_csv_may_have_a_column_of_splits(root: Path, refused: Callable) -> None:
    put(root, "captions.csv", text="image,caption,split,lang\na.jpg,A dog,test,en\nb.jpg,A cat,dev,en\n")
    assert load(root)["split"].tolist() == ["test", "val"]
    put(root, "captions.csv", text="image,caption,split\na.jpg,A dog,all\n")
    with refused("captions.csv line 2", "'all'"):
        load(root)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("captions.csv", "", "image,caption"),
        ("captions.csv", "image,caption\n", "holds no captions"),
        ("captions.csv", "image,caption\na.jpg\n", "line 2"),
        ("captions.csv", "image,caption\n,A dog\n", "line 2"),
        ("captions.csv", 'image,caption\na.jpg,"A dog\nb.jpg,A cat\n', "a.jpg"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "A dog"}\n{"image": "b.jpg"', "line 2 is not JSON"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "A dog", "split": "all"}', "the split 'all'"),
        ("captions.jsonl", '{"image": "\\ud83d.jpg", "caption": "A dog"}', "not in"),
        ("captions.jsonl", '{"x": "a.jpg", "caption": "A dog"}', "has an entry with the keys x, caption"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": 7}', "jsonl"),
        ("dataset.json", json.dumps(KARPATHY).replace("restval", "dev2"), "the split 'dev2'"),
        ("dataset.json", json.dumps(KARPATHY).replace('"filename"', '"name"'), "'filename'"),
        (
            "captions_val2014.json",
            json.dumps(COCO).replace('"image_id": 57870', '"image_id": 1'),
            "1 ids that none of its pictures",
        ),
        ("captions_val2014.json", json.dumps(COCO)[:200], "JSONDecodeError"),
        ("caption_x_annotations.json", "[]", "holds no captions"),
        ("dataset.json", '{"sentences":' + "[" * 100_000, "RecursionError"),
        ("dataset.json", json.dumps(KARPATHY).replace('"imgid": 0', '"imgid": ' + "9" * 5000), "karpathy"),
        ("Flickr8k.token.txt", "a.jpg#0\tA dog\na.jpg A dog\n", "line 2"),
    ],
)
def test_a_fault_is_named_with_its_place(
    name: str, text: str | bytes, words: str, root: Path, refused: Callable
) -> None:
    put(root, name, text=text)
    with refused(name, words):
        load(root)


def test_half_a_character_becomes_a_question_mark(root: Path) -> None:
    put(root, "captions.jsonl", text='{"image": "a.jpg", "image_id": "\\ud83d", "caption": "A dog \\ud83d"}\n')
    table = load(root)
    assert table["caption"].tolist() == ["A dog ?"]
    assert table["image_id"].tolist() == ["?"]


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "captions.json"])
def test_a_caption_as_long_as_a_book_is_refused(name: str, tmp_path: Path, refused: Callable) -> None:
    caption = "a dog " * 2000
    rows = {"captions.csv": f"image,caption\na.jpg,{caption}\n"}
    entry = json.dumps({"image": "a.jpg", "caption": caption})
    rows |= {"captions.jsonl": entry, "captions.json": f"[{entry}]"}
    (tmp_path / name).write_text(rows[name])
    with refused(f"{name} has a caption of 11,999 characters", "at most 10,000 are read; shorten it"):
        formats.read(tmp_path / name)
