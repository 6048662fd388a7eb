"""Caption files become one table, or are refused by line; splits are per picture."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from config import load_config
from data import annotations

ROOT = Path(annotations.__file__).parents[1]
TWO = "image,caption\na.jpg,A dog .\nb.jpg,Two cats .\n"
Load = Callable[..., pd.DataFrame]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a captions file, (empty) pictures and split lists, and load them."""

    def write_and_load(
        text: str | bytes,
        name: str = "captions.csv",
        pictures: tuple[str, ...] = ("images/a.jpg", "images/b.jpg"),
        saved_splits: dict[str, list[str]] | None = None,
        **lists: str,
    ) -> pd.DataFrame:
        for picture in pictures:
            (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / picture).touch()
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for split, names in lists.items():
            (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(names)
        return annotations.load(load_config(overrides=[f"data.root={tmp_path}"]).data, saved_splits)

    return write_and_load


def rows(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(table["image"], table["caption"], strict=True))


def test_a_table_has_four_columns(load: Load) -> None:
    table = load(TWO, train="a.jpg\nb.jpg\n")
    assert list(table.columns) == ["image", "image_id", "caption", "split"]
    assert rows(table) == [("a.jpg", "A dog ."), ("b.jpg", "Two cats .")]
    assert list(table["image_id"]) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('a.jpg,"A dog, a cat"', "A dog, a cat"),
        ("a.jpg,A dog, a cat , and more", "A dog, a cat , and more"),
        ('a.jpg,"He says ""sit"""', 'He says "sit"'),
        ('a.jpg,A "good" dog', 'A "good" dog'),
        ("a.jpg,  A dog  ", "A dog"),
        ("a.jpg,Ein Hündchen", "Ein Hündchen"),
    ],
)
def test_quotes_and_commas_in_captions_are_kept(line: str, caption: str, load: Load) -> None:
    assert rows(load(f"image,caption\n{line}\n")) == [("a.jpg", caption)]


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: t + "\n\n"])
def test_a_byte_order_mark_windows_line_ends_and_empty_lines_do_not_matter(change: Callable, load: Load) -> None:
    assert rows(load(change(TWO))) == [("a.jpg", "A dog ."), ("b.jpg", "Two cats .")]


def test_columns_may_stand_in_any_order_among_others(load: Load) -> None:
    assert rows(load("Caption,number,Image\nA dog .,0,a.jpg\n")) == [("a.jpg", "A dog .")]


def test_kaggles_captions_txt_with_an_images_folder_loads(load: Load) -> None:
    table = load("image,caption\na.jpg,A dog , a cat .\n", "captions.txt", ("Images/a.jpg",))
    assert rows(table) == [("a.jpg", "A dog , a cat .")]


def test_pictures_may_lie_in_folders_below(load: Load) -> None:
    table = load("image,caption\nx/a.jpg,A dog\ny\\b.jpg,A cat\n", pictures=("images/x/a.jpg", "images/y/b.jpg"))
    assert list(table["image"]) == ["x/a.jpg", "y/b.jpg"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jpg,A dog .\n", "image,caption"),
        ("image,text\na.jpg,A dog .\n", "image,caption"),
        ("", "image,caption"),
        ("image,caption\n", "holds no captions"),
        ("image,caption\na.jpg\n", "line 2"),
        ("caption,image\nA dog, a cat,a.jpg\n", "line 2"),
        ("image,caption\na.jpg,A dog\nb.jpg,\n", "line 3"),
        ("image,caption\na.jpg,A dog\nb.jpg,  . \n", "line 3"),
        ("image,caption\n,A dog\n", "line 2"),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat\n', "a.jpg"),
        ('image,caption\na.jpg,"A dog\nb.jpg,"A cat"\n', "a.jpg"),
        (TWO.encode("utf-16"), "UTF-8"),
        ("image,caption\na.jpg,Ein Hündchen\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_a_captions_file_with_a_fault_is_refused(text: str | bytes, words: str, load: Load, refused: Callable) -> None:
    with refused("captions.csv", words):
        load(text)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "x/../../a.jpg", "..\\a.jpg", "\\\\host\\a.jpg", "C:\\a.jpg", "c:a.jpg"]
)
def test_a_name_that_leaves_the_picture_folder_is_refused(name: str, load: Load, refused: Callable) -> None:
    with refused("line 3", repr(name)):
        load(f"image,caption\na.jpg,A dog\n{name},A cat\n")


def test_missing_pictures_are_counted_and_the_first_five_shown(load: Load, refused: Callable) -> None:
    names = [f"m{number}.jpg" for number in range(7)]
    text = "image,caption\na.jpg,A dog\n" + "".join(f"{name},A cat\n{name},A kitten\n" for name in names)
    with refused("7 of 8", "m0.jpg, m1.jpg, m2.jpg, m3.jpg, m4.jpg, …"):
        load(text)


def test_a_missing_captions_file_or_picture_folder_is_refused(load: Load, refused: Callable, tmp_path: Path) -> None:
    with refused(f"no captions file in {tmp_path}/", "data.download", "data.root="):
        annotations.load(load_config(overrides=[f"data.root={tmp_path}"]).data)
    with refused(f"no file dogs.json in {tmp_path}/", "data.captions="):
        annotations.load(load_config(overrides=[f"data.root={tmp_path}", "data.captions=dogs.json"]).data)
    with refused(f"{tmp_path}/images", "data.images="):
        load(TWO, pictures=())


def test_official_lists_decide_alone(load: Load) -> None:
    pictures = tuple(f"images/{name}.jpg" for name in "abcd")
    text = "image,caption\n" + "".join(f"{name}.jpg,One\n{name}.jpg,Two\n" for name in "abcd")
    table = load(text, pictures=pictures, train="a.jpg\nc.jpg\n", dev="b.jpg\n")
    assert annotations.splits_of(table) == {"train": ["a.jpg", "c.jpg"], "val": ["b.jpg"], "test": []}
    assert len(table) == 6


def test_official_lists_win_over_saved_splits(load: Load) -> None:
    table = load(TWO, saved_splits={"train": ["a.jpg", "b.jpg"]}, train="a.jpg", dev="b.jpg")
    assert list(table["split"]) == ["train", "val"]


def test_a_picture_on_no_list_may_be_missing(load: Load) -> None:
    assert rows(load(TWO, pictures=("images/a.jpg",), train="a.jpg\n")) == [("a.jpg", "A dog .")]


def test_a_list_that_is_there_decides_even_when_it_is_empty(load: Load, refused: Callable) -> None:
    with refused("split lists"):
        load(TWO, train="\n")


def test_a_picture_on_two_lists_is_refused(load: Load, refused: Callable) -> None:
    with refused("devImages.txt", "b.jpg"):
        load(TWO, train="a.jpg\nb.jpg\n", dev="b.jpg\n")


def test_lists_that_name_no_picture_of_the_captions_are_refused(load: Load, refused: Callable) -> None:
    with refused("split lists", "captions.csv"):
        load(TWO, train="c.jpg\n")


def test_a_list_may_name_pictures_with_spaces(load: Load) -> None:
    text = "image,caption\nmy dog.jpg,A dog\nb.jpg,A cat\n"
    table = load(text, pictures=("images/my dog.jpg", "images/b.jpg"), train="my dog.jpg\r\nb.jpg\r\n")
    assert list(table["image"]) == ["my dog.jpg", "b.jpg"]


def test_a_list_that_is_not_text_is_refused(load: Load, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "Flickr_8k.testImages.txt").write_bytes(b"\xff\xfe\x00a")
    with refused("testImages.txt"):
        load(TWO)


def hundred(names: list[int]) -> tuple[str, tuple[str, ...]]:
    text = "image,caption\n" + "".join(f"{name}.jpg,caption {form}\n" for form in "ab" for name in names)
    return text, tuple(f"images/{name}.jpg" for name in names)


def test_without_lists_a_tenth_of_the_pictures_is_held_out_twice(load: Load) -> None:
    text, pictures = hundred(list(range(100)))
    splits = annotations.splits_of(load(text, pictures=pictures))
    assert {split: len(images) for split, images in splits.items()} == {"train": 80, "val": 10, "test": 10}


def test_no_picture_is_in_two_splits(load: Load) -> None:
    text, pictures = hundred(list(range(100)))
    assert (load(text, pictures=pictures).groupby("image")["split"].nunique() == 1).all()


def test_the_seeded_split_is_the_same_each_time_whatever_the_order_of_rows(load: Load) -> None:
    text, pictures = hundred(list(range(100)))
    first = load(text, pictures=pictures)
    backwards = load(hundred(list(range(99, -1, -1)))[0], pictures=pictures)
    split_of = dict(zip(first["image"], first["split"], strict=True))
    assert split_of == dict(zip(backwards["image"], backwards["split"], strict=True))


def test_saved_splits_are_used_again(load: Load) -> None:
    text, pictures = hundred(list(range(10)))
    table = load(text, pictures=pictures)
    saved = annotations.splits_of(table)
    more, more_pictures = hundred(list(range(20)))
    again = load(more, pictures=more_pictures, saved_splits=saved)
    assert annotations.splits_of(again) == saved


def test_three_pictures_are_enough_for_every_split(load: Load) -> None:
    text, pictures = hundred([1, 2, 3])
    assert set(load(text, pictures=pictures)["split"]) == set(annotations.SPLITS)


def test_reading_captions_does_not_import_torch() -> None:
    check = "import sys, data.annotations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_real_flickr8k_has_its_official_sizes(shared: Path) -> None:
    table = annotations.load(load_config(overrides=[f"data.root={shared / 'flickr8k'}"]).data)
    assert table.groupby("split")["image"].nunique().to_dict() == {"train": 6000, "val": 1000}
    assert table["split"].value_counts().to_dict() == {"train": 30_000, "val": 5_000}
    splits = annotations.splits_of(table)
    assert not set(splits["train"]) & set(splits["val"])


def test_a_link_to_itself_does_not_matter(load: Load, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/loop").symlink_to("loop")
    (tmp_path / "images/up").symlink_to("..")
    assert load(TWO)["image"].tolist() == ["a.jpg", "b.jpg"]
