"""A folder of captions and pictures becomes one table; what is missing, or may be meant in two ways, is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import load, put, run

from data import annotations, splits

ROOT = Path(annotations.__file__).parents[1]
TWO = "image,caption\na.jpg,A dog .\nb.jpg,Two cats .\n"


def test_a_picture_may_lie_deeper_but_never_beside(tmp_path: Path, refused: Callable) -> None:
    put(tmp_path, "captions.csv", text="image,caption\na.jpg,A dog\n")
    put(tmp_path, "images/x/a.jpg")
    assert load(tmp_path)["image"].tolist() == ["x/a.jpg"]
    put(tmp_path, "images/y/a.jpg")
    with refused("x/a.jpg", "y/a.jpg", "with its folder"):
        load(tmp_path)
    put(tmp_path, "captions.csv", text="image,caption\ny/a.jpg,A dog\nx\\a.jpg,A cat\n")  # as the sentence says
    assert load(tmp_path)["image"].tolist() == ["y/a.jpg", "x/a.jpg"]
    put(tmp_path, "captions.csv", text="image,caption\nz/a.jpg,A dog\n")
    with refused("1 of 1", "z/a.jpg"):
        load(tmp_path)


def test_a_link_to_itself_does_not_matter(tmp_path: Path) -> None:
    put(tmp_path, "images/a.jpg", "images/b.jpg")
    put(tmp_path, "captions.csv", text=TWO)
    (tmp_path / "images/loop").symlink_to("loop")
    (tmp_path / "images/up").symlink_to("..")
    assert load(tmp_path)["image"].tolist() == ["a.jpg", "b.jpg"]


def test_no_picture_is_taken_from_outside_its_folder(tmp_path: Path, refused: Callable) -> None:
    put(tmp_path, "images/a.jpg", "b.jpg")
    put(
        tmp_path, "captions.csv", text=f"image,caption\nC:\\mine\\a.jpg,A dog\n../b.jpg,A cat\n{tmp_path}/b.jpg,A cat\n"
    )
    with refused("2 of 3", "../b.jpg"):
        load(tmp_path)


def test_missing_pictures_are_counted_and_the_first_five_shown(tmp_path: Path, refused: Callable) -> None:
    put(tmp_path, "images/a.jpg")
    names = ["a.jpg", *(f"m{number}.jpg" for number in range(7))]
    put(tmp_path, "captions.csv", text="image,caption\n" + "".join(f"{name},A cat\n" * 2 for name in names))
    with refused("7 of 8", "m0.jpg, m1.jpg, m2.jpg, m3.jpg, m4.jpg, …", "remove their rows"):
        load(tmp_path)


def test_what_is_not_there_is_refused_until_its_place_is_set(tmp_path: Path, refused: Callable) -> None:
    with refused(f"no captions file in {tmp_path}/", "docs/data.md", "data.root="):
        load(tmp_path)
    with refused(f"no file dogs.json in {tmp_path}/", "data.captions=FILE"):
        load(tmp_path, "data.captions=dogs.json")
    put(tmp_path, "elsewhere/dogs.csv", text=TWO)
    captions = f"data.captions={tmp_path}/elsewhere/dogs.csv"
    with refused(f"{tmp_path}/images", "data.images=FOLDER"):
        load(tmp_path, captions)
    put(tmp_path / "elsewhere", "photos/a.jpg", "photos/b.jpg")
    for place in ("elsewhere/photos", tmp_path / "elsewhere/photos"):
        assert len(load(tmp_path, captions, f"data.images={place}")) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [(("train", "val", "test"), "x/a.jpg in train and val"), (("train", None, "test"), "b.jpg (without one: 1)")],
)
def test_no_picture_is_in_two_splits_or_left_out_unsaid(
    given: tuple[str | None, ...], said: str, tmp_path: Path, refused: Callable
) -> None:
    names = ("x/a.jpg", "a.jpg" if given[1] else "b.jpg", "c.jpg")  # a.jpg is the same picture
    lines = [{"image": name, "caption": "A dog"} for name in names]
    lines = [line | ({"split": split} if split else {}) for line, split in zip(lines, given, strict=True)]
    put(tmp_path, "images/x/a.jpg", "images/b.jpg", "images/c.jpg")
    put(tmp_path, "captions.jsonl", text="\n".join(map(json.dumps, lines)))
    with refused("captions.jsonl", said):
        load(tmp_path)


def test_reading_captions_does_not_import_torch() -> None:
    check = "import sys, data.annotations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_a_dataset_is_described_in_numbers(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open("archive/captions.csv", "a") as file:
        file.write("11.jpg,A zebra .\n11.jpg,A zebra .\n")
    (archive / "images/11.jpg").unlink()
    (archive / "captions.xlsx").touch()
    assert run(annotations.main, "archive", "data.min_count=1") == 0
    said = capsys.readouterr().out
    assert "captions:   archive/captions.csv (csv)" in said
    assert "not used: archive/captions.xlsx; choose with data.captions=FILE" in said
    assert "pictures:   12, in archive/images; 1 missing: add them or remove their rows" in said
    assert "missing: 11.jpg" in said
    assert "5 to 7 captions each, 62 in all, 1 of them repeated" in said
    assert all(f"{split}:" in said for split in splits.SPLITS) and "8 pictures, 40 captions" in said
    assert "% of the words in test" in said and "a caption, 2 to " in said
    rows = [row for row in Path("archive/captions.csv").read_text().splitlines() if not row.startswith("11.jpg")]
    Path("archive/captions.csv").write_text("\n".join(rows))
    assert run(annotations.main, "archive", "data.min_count=1") == 0
    said = capsys.readouterr().out
    assert "pictures:   11, in archive/images\n" in said and "5 captions each, 55 in all\n" in said
    assert "the first:  00.jpg: " in said and "test:       1 picture, 5 captions" in said
    assert run(annotations.main, "nowhere") == 2
    assert "there is no folder nowhere; check the path" in capsys.readouterr().err


def test_real_flickr8k_has_its_official_sizes(shared: Path) -> None:
    table = load(shared / "flickr8k", "data.language=en")
    assert table.groupby("split")["image"].nunique().to_dict() == {"train": 6000, "val": 1000}
    assert table["split"].value_counts().to_dict() == {"train": 30_000, "val": 5_000}
