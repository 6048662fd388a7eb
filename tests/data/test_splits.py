"""Which pictures are for training, validation and test: by official lists, a file, a saved run, or a seeded draw."""

from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import load, put, rows

from data import splits
from data.folders import split_in_name

TWO = "image,caption\na.jpg,A dog .\nb.jpg,Two cats .\n"


def lists(root: Path, **names: str | bytes) -> None:
    for split, text in names.items():
        put(root, f"Flickr_8k.{split}Images.txt", text=text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two pictures with a caption each."""
    put(tmp_path, "images/a.jpg", "images/b.jpg")
    put(tmp_path, "captions.csv", text=TWO)
    return tmp_path


def numbered(root: Path, names: list[int]) -> Path:
    """Two captions of each of these pictures."""
    put(root, *(f"images/{name}.jpg" for name in names))
    lines = [f"{name}.jpg,caption {form}" for form in "ab" for name in names]
    put(root, "captions.csv", text="\n".join(["image,caption", *lines]))
    return root


def test_official_lists_decide_alone(tmp_path: Path) -> None:
    numbered(tmp_path, [1, 2, 3, 4])
    lists(tmp_path, train="1.jpg\n3.jpg\n", dev="2.jpg\n")
    saved = {"train": ["1.jpg", "2.jpg"], "val": ["4.jpg"], "test": []}
    table = load(tmp_path, saved=saved)
    assert splits.splits_of(table) == {"train": ["1.jpg", "3.jpg"], "val": ["2.jpg"], "test": []}
    assert len(table) == 6


def test_a_picture_on_no_list_may_be_missing(root: Path) -> None:
    lists(root, train="a.jpg\n")
    (root / "images/b.jpg").unlink()
    assert rows(load(root)) == [("a.jpg", "A dog .")]


@pytest.mark.parametrize(
    ("train", "dev", "said"),
    [
        ("\n", "", ["split lists", "captions.csv"]),
        ("c.jpg\n", "", ["split lists", "captions.csv"]),
        ("a.jpg\nb.jpg\n", "b.jpg\n", ["devImages.txt", "b.jpg", "in train"]),
        ("a.jpg\n", b"\xff\xfe\x00a", ["devImages.txt", "UTF-8"]),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(
    train: str, dev: str | bytes, said: list[str], root: Path, refused: Callable
) -> None:
    lists(root, train=train, dev=dev)
    with refused(*said):
        load(root)


def test_a_list_may_name_pictures_with_spaces_and_have_windows_line_ends(root: Path) -> None:
    put(root, "images/my dog.jpg")
    put(root, "captions.csv", text="image,caption\nmy dog.jpg,A dog\nb.jpg,A cat\n")
    lists(root, train="my dog.jpg\r\nb.jpg\r\n")
    assert list(load(root)["image"]) == ["my dog.jpg", "b.jpg"]


def test_without_lists_a_tenth_of_the_pictures_is_held_out_twice(tmp_path: Path) -> None:
    table = load(numbered(tmp_path, list(range(100))))
    chosen = splits.splits_of(table)
    assert {split: len(images) for split, images in chosen.items()} == {"train": 80, "val": 10, "test": 10}
    assert (table.groupby("image")["split"].nunique() == 1).all()
    backwards = load(numbered(tmp_path, list(range(99, -1, -1))))  # the same pictures, whatever the order of rows
    assert {split: set(images) for split, images in splits.splits_of(backwards).items()} == {
        split: set(images) for split, images in chosen.items()
    }


def test_saved_splits_are_used_again_by_where_pictures_were_found(tmp_path: Path) -> None:
    saved = splits.splits_of(load(numbered(tmp_path, list(range(10)))))
    assert splits.splits_of(load(numbered(tmp_path, list(range(20))), saved=saved)) == saved
    (tmp_path / "images").rename(tmp_path / "x")
    put(tmp_path, "images/other.jpg")
    (tmp_path / "x").rename(tmp_path / "images/x")
    assert all(name.startswith("x/") for names in splits.splits_of(load(tmp_path)).values() for name in names)
    held_out = load(tmp_path, saved={"test": ["x/3.jpg"], "val": ["x/5.jpg"]})
    assert dict(zip(held_out["image"], held_out["split"], strict=True)) == {"x/3.jpg": "test", "x/5.jpg": "val"}


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"train": []}', b'{"train": 1, "val": [], "test": []}'])
def test_damaged_splits_of_a_run_are_refused(content: bytes, tmp_path: Path, refused: Callable) -> None:
    assert splits.read_splits(tmp_path) is None
    put(tmp_path, "splits.json", text=content)
    with refused("splits.json is damaged", "train a new run"):
        splits.read_splits(tmp_path)


def test_a_split_is_chosen_by_name(archive: Path, refused: Callable) -> None:
    table = load(archive)
    assert [splits.choose_split(table, name, "x")[0] for name in (None, "dev", "train")] == ["test", "val", "train"]
    without = table[table["split"] != "test"]
    assert splits.choose_split(without, None, "x")[1]["image"].unique().tolist() == ["08.jpg", "09.jpg"]
    with refused("archive has no test pictures", "--split"):
        splits.choose_split(without, "test", "archive")


def test_a_split_in_a_file_counts_more_than_its_name(root: Path) -> None:
    put(root, "train.jsonl", text='{"image": "a.jpg", "caption": "A dog", "split": "test"}')
    put(root, "val.jsonl", text='{"image": "b.jpg", "caption": "A cat"}')
    assert load(root, "data.captions=*.jsonl")["split"].tolist() == ["test", "val"]


def test_a_split_in_a_name_is_a_word_of_it() -> None:
    names = ("captions_train2014.json", "caption_validation_annotations.json", "my-TEST.csv", "contrainte.json")
    assert [split_in_name(Path(name)) for name in names] == ["train", "val", "test", None]
