"""Folders as systems, phones and people leave them: which pictures are found, and what is said of the rest."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, Literal
from unittest import mock

import pytest
from dataset_files import load, put, run
from PIL import Image

import data.folders
import data.transforms
import inference_visualize
from data import annotations
from data.folders import list_folder, pictures_at
from data.splits import find_again
from data.transforms import open_picture

OF_SYSTEMS = (
    *("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "lost+found/x.jpg"),
    *(".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/._a.jpg", ".Trash-1000/old.jpg", "$RECYCLE.BIN/b.jpg"),
)


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in pictures_at(str(folder))[0]]


def test_what_systems_keep_beside_pictures_is_left_aside_and_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b/c.PNG", "notes.txt", *OF_SYSTEMS)
    assert names(tmp_path) == ["a.jpg", "b/c.PNG"]
    assert pictures_at(str(tmp_path))[1] == [
        f"left aside: {len(OF_SYSTEMS)} files of the system, such as {sorted(list_folder(tmp_path).aside)[0]}"
    ]


def test_folders_may_be_as_deep_as_they_like(tmp_path: Path) -> None:
    deep = "/".join("abcdefghij")
    put(tmp_path, f"{deep}/x.jpg")
    assert names(tmp_path) == [f"{deep}/x.jpg"]
    put(tmp_path, "captions.csv", text="image,caption\nx.jpg,A dog\n")
    assert load(tmp_path)["image"].tolist() == [f"{deep}/x.jpg"]


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_folder_that_is_linked_is_entered_once(tmp_path: Path) -> None:
    put(tmp_path, "photos/2024/a.jpg", "elsewhere/b.jpg")
    for name, target in (("loop", ".."), ("again", "2024"), ("other", "../elsewhere"), ("itself", "itself")):
        (tmp_path / "photos" / name).symlink_to(target)
    found = names(tmp_path / "photos")
    assert sorted(path.rpartition("/")[2] for path in found) == ["a.jpg", "b.jpg"]


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_link_leads_out_of_no_folder_that_was_named(tmp_path: Path) -> None:
    put(tmp_path, "all/a.jpg", "all/some/b.jpg")
    (tmp_path / "all/some/loop").symlink_to("..")
    assert names(tmp_path / "all/some") == ["b.jpg"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_and_case_do_not_matter(form: Literal["NFC", "NFD"], tmp_path: Path) -> None:
    put(tmp_path, f"images/{unicodedata.normalize(form, 'Hündchen é')}.JPG", "images/B.jpg")
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    table = f"image,caption\n{unicodedata.normalize(other, 'hündchen é')}.jpg,A dog\nb.JPG,A cat\n"
    put(tmp_path, "captions.csv", text=table)
    assert [unicodedata.normalize("NFC", name) for name in load(tmp_path)["image"]] == ["Hündchen é.JPG", "B.jpg"]
    typed = tmp_path / "images" / f"{unicodedata.normalize(other, 'Hündchen é')}.JPG"
    assert len(pictures_at(str(typed))[0]) == 1


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path: Path, refused: Callable) -> None:
    put(tmp_path, "images/a.jpg", "images/A.jpg")
    put(tmp_path, "captions.csv", text="image,caption\na.jpg,A dog\nA.jpg,A cat\n")
    assert load(tmp_path)["image"].tolist() == ["a.jpg", "A.jpg"]
    put(tmp_path, "captions.csv", text="image,caption\na.JPG,A dog\n")
    with refused("A.jpg, a.jpg", "for a.JPG"):
        load(tmp_path)


def test_links_that_lead_back_are_entered_once_by_a_glob_with_two_stars_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "in/a/x.jpg", "in/a/b/y.JPG", "in/a/notes.txt", "in/.hidden/z.jpg", "in/drawn/d.jpg")
    (tmp_path / "in/drawn/.made-by-image-captioning").touch()
    for number in range(20):
        (tmp_path / f"in/a/b/link{number}").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    everything = ["in/a/x.jpg", "in/a/b/y.JPG"]
    for pattern in ("in/**", "in/**/*", "**/*.[jJ][pP][gG]", "i*/**/?.*", f"{tmp_path}/**/a/**", "in/**/**/**"):
        found, notes = pictures_at(pattern)
        assert [path.absolute() for path in found] == [Path(name).absolute() for name in everything], pattern
        assert any("drawn" in line for line in notes)
    assert pictures_at("in/**/*.jpg")[0] == [Path("in/a/x.jpg")] and pictures_at("in/**/b/*")[0] == [
        Path(everything[1])
    ]
    assert pictures_at("nowhere/**/*.jpg")[0] == pictures_at("in/**/c/*")[0] == []


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".ppm", ".mpo", ".avif", ".JPEG", ".Tif", ".WebP"])
def test_pictures_of_all_these_endings_are_taken(ending: str, tmp_path: Path) -> None:
    forms = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "MPO"}
    Image.new("RGB", (32, 32), "red").save(tmp_path / f"a{ending}", format=forms.get(ending))
    [path], _ = pictures_at(str(tmp_path))
    assert open_picture(path).size == (32, 32)


def test_pictures_of_phones_are_read_or_counted_with_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    put(tmp_path, "a.jpg", "IMG_1.HEIC", "IMG_2.heic")
    for module in (data.folders, data.transforms):
        monkeypatch.setattr(module, "PICTURE_SUFFIXES", (".jpg",))  # as without pillow-heif
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    paths, [note] = pictures_at(str(tmp_path))
    assert [path.name for path in paths] == ["a.jpg"]
    assert note == "left out: 2 HEIC pictures, such as IMG_1.HEIC; to read them: pip install pillow-heif"
    with refused("IMG_1.HEIC (HEIC, which needs a package: pip install pillow-heif)"):
        open_picture(tmp_path / "IMG_1.HEIC")


def test_a_heic_picture_is_read(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs requirements-extras.txt")
    heif.register_heif_opener()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.heic", format="HEIF")
    [path], _ = pictures_at(str(tmp_path))
    assert open_picture(path).size == (64, 48)


def test_a_dataset_that_moved_or_is_nested_in_another_way_is_found_again(refused: Callable) -> None:
    saved = {"train": ["Images/a.jpg", "Images/x/b.jpg"], "val": ["Images/y/b.jpg"], "test": []}
    assert find_again(saved, ["Images/a.jpg", "new.jpg"])["Images/a.jpg"] == "train"
    now = find_again(saved, ["a.jpg", "x/b.jpg", "deep/y/b.jpg"])
    assert [now[name] for name in ("a.jpg", "x/b.jpg", "deep/y/b.jpg")] == ["train", "train", "val"]
    with refused("the run's pictures have changed their names", "1.jpg", "train a new run"):
        find_again(saved, ["1.jpg", "2.jpg"])


@pytest.mark.parametrize("ending", [".jpg", ""])
def test_pictures_of_equal_names_in_many_folders_are_not_compared_with_each_other(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"{folder:02}/{number}.jpg" for folder in range(40) for number in range(5)]
    put(tmp_path, *paths)
    looked_at = mock.Mock(wraps=data.folders.same_name)
    monkeypatch.setattr(data.folders, "same_name", looked_at)
    named = [f"images/{path.removesuffix('.jpg')}{ending}" for path in paths]
    assert data.folders.find_names(tmp_path, named) == (dict(zip(named, paths, strict=True)), [])
    assert looked_at.call_count <= 3 * len(paths)  # each name once, and each path, without its ending, too


def test_splits_are_found_again_without_comparing_equal_names(monkeypatch: pytest.MonkeyPatch) -> None:
    split = list[str]()

    class Name(str):
        def split(self, *words: Any, **more: Any) -> list[str]:
            split.append(self)
            return super().split(*words, **more)

    saved = [Name(f"images/{folder}/1.jpg") for folder in range(100)]
    now = [Name(f"{folder}/1.jpg") for folder in range(100)]
    found = find_again({"train": list(saved[:60]), "val": list(saved[60:]), "test": []}, list(now))
    assert [found[name] for name in now] == ["train"] * 60 + ["val"] * 40
    assert len(split) <= len(saved) + len(now)


def test_pictures_of_a_glob_are_not_compared_with_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"{number}.jpg" for number in range(100)), "drawn/a.jpg", f"drawn/{data.folders.MADE_HERE}")
    compared = list[Path]()

    def is_equal(one: Path, other: object) -> bool:
        compared.append(one)
        return str(one) == str(other)

    monkeypatch.setattr(PurePath, "__eq__", is_equal)
    assert len(pictures_at(f"{tmp_path}/*.jpg")[0]) == 100
    assert len(compared) <= 400
    monkeypatch.undo()
    assert pictures_at(f"{tmp_path}/*/*.jpg") == (
        [],
        [f"left out: {tmp_path}/drawn/, which holds what this project has drawn"],
    )


def test_a_command_line_is_checked_without_listing_all_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *(f"{folder}/a.jpg" for folder in range(50)))
    entered = mock.Mock(wraps=os.scandir)
    monkeypatch.setattr(os, "scandir", entered)
    monkeypatch.setattr("sys.argv", ["inference_visualize.py", str(tmp_path)])
    inference_visualize.options.inference_visualize()
    assert entered.call_count == 2  # the folder itself, and the first one in it


def test_all_broken_pictures_are_listed_before_training(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(annotations.main, "archive", "--check") == 0
    assert "all 12 pictures can be read" in capsys.readouterr().out
    for name in ("03.jpg", "08.jpg"):
        (archive / "images" / name).write_bytes(b"\xff\xd8\xff half a picture")
    assert run(annotations.main, "archive", "--check") == 2
    printed = capsys.readouterr()
    assert "03.jpg: cannot read the picture" in printed.out and "08.jpg: cannot" in printed.out
    assert "2 of 12 pictures cannot be read" in printed.err and "data.broken=skip" in printed.err


def test_a_folder_of_a_mac_is_captioned_and_what_is_left_aside_is_told(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(archive / "images", "stick/DCIM/100APPLE")
    put(Path("stick"), "DCIM/100APPLE/._00.jpg", ".DS_Store", text=b"\0\5\x16\7")
    assert run(inference_visualize.main, "stick", "--out", "out") == 0
    printed = capsys.readouterr().err
    assert "captioning 12 pictures" in printed and "skipped" not in printed
    assert "left aside: 2 files of the system" in printed
