"""Captions as spreadsheets, scripts and image trainers write them are read; what is not understood is said plainly."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import load, put, rows

from cli import UserError
from data import tables

CAPTIONS = [("a.jpg", "A dog, running"), ("b.jpg", "Two cats")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "images/a.jpg", "images/b.jpg")
    return tmp_path


def table(header: str, *lines: str) -> str:
    return "".join(f"{line}\n" for line in [header, *lines] if line)


TABLES = {
    "semicolons": table("image;caption", "a.jpg;A dog, running", "b.jpg;Two cats"),
    "tabs": table("image\tcaption", "a.jpg\tA dog, running", "b.jpg\tTwo cats"),
    "bars": table("image|caption", "a.jpg|A dog, running", "b.jpg|Two cats"),
    "commas without quotes": table("image,caption", "a.jpg,A dog, running", "b.jpg,Two cats"),
    "commas before another column": table("image,caption,split", "a.jpg,A dog, running,train", "b.jpg,Two cats,val"),
    "a quotation over several lines": table("image,caption", 'a.jpg,"A dog,\nrunning"', "b.jpg,Two cats"),
    "Excel's empty columns": table("image;caption;;", "a.jpg;A dog, running;;", "b.jpg;Two cats;;", ";;;"),
    "an extra column": table("nr;image;who;caption", "1;a.jpg;me;A dog, running", "2;b.jpg;you;Two cats"),
    "an index without a name": table(",image,caption", '0,a.jpg,"A dog, running"', "1,b.jpg,Two cats"),
    "filename,text": table("filename,text", 'a.jpg,"A dog, running"', "b.jpg,Two cats"),
    "file_name,description": table("file_name,description", 'a.jpg,"A dog, running"', "b.jpg,Two cats"),
    "image_path": table("image_path,caption", 'data/images/a.jpg,"A dog, running"', "data/images/b.jpg,Two cats"),
    "Image Name; Alt-Text": table("Image Name;Alt-Text", "a.jpg;A dog, running", "b.jpg;Two cats"),
    "image_id without endings": table("image_id,caption", 'a,"A dog, running"', "b,Two cats"),
    "other case": table("image,caption", 'A.JPG,"A dog, running"', "b.Jpg,Two cats"),
    "no header": table("", 'a.jpg,"A dog, running"', "b.jpg,Two cats"),
    "no header, tabs": table("", "a.jpg\tA dog, running", "b.jpg\tTwo cats"),
    "no header, numbers": table("", "a.jpg\t0\tA dog, running", "b.jpg\t0\tTwo cats"),
    "empty lines between": "image;caption\r\n\r\na.jpg;A dog, running\r\n;\r\nb.jpg;Two cats\r\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read_however_it_is_separated_named_and_encoded(kind: str, encoding: str, root: Path) -> None:
    put(root, "captions.csv", text=TABLES[kind].encode(encoding))
    assert rows(load(root)) == CAPTIONS


@pytest.mark.parametrize("name", ["captions.tsv", "captions.txt", "my table.csv", "annotated.tsv"])
def test_a_table_is_found_by_its_ending(name: str, root: Path) -> None:
    put(root, name, text=TABLES["tabs"])
    assert rows(load(root)) == CAPTIONS


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_windows_encoding_is_understood_and_told(encoding: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, "captions.csv", text="image;caption\na.jpg;Ein Hündchen läuft über die Straße\n".encode(encoding))
    assert rows(load(root)) == [("a.jpg", "Ein Hündchen läuft über die Straße")]
    assert "captions.csv is not in UTF-8: read as Windows-1252" in capsys.readouterr().out


def test_several_columns_of_captions_are_several_captions(root: Path) -> None:
    lines = ("a.jpg,A dog,An animal,,", 'b.jpg,"Two cats, asleep",Cats,Pets,,')
    put(root, "captions.csv", text=table("image,caption1,caption2,caption3,caption4", *lines))
    assert rows(load(root)) == [
        *(("a.jpg", "A dog"), ("a.jpg", "An animal")),
        *(("b.jpg", "Two cats, asleep"), ("b.jpg", "Cats"), ("b.jpg", "Pets")),
    ]


def test_a_workbook_is_read(root: Path, refused: Callable) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="workbooks need requirements-extras.txt")
    book = openpyxl.Workbook()
    for row in (["filename", "text", "subset"], ["a.jpg", "A dog, running", "Train"], [], ["b.jpg", "Two cats", "dev"]):
        book.active.append(row)
    book.save(root / "captions.xlsx")
    assert rows(load(root)) == CAPTIONS and load(root)["split"].tolist() == ["train", "val"]
    whole = (root / "captions.xlsx").read_bytes()
    put(root, "captions.xlsx", text=whole[: len(whole) // 2])
    with refused("captions.xlsx is not a workbook that can be read", "save it as CSV"):
        load(root)
    put(root, "captions.xlsx", text=b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100))
    with refused("old Excel", "save it as .xlsx or CSV"):
        load(root)


def change_sheet(path: Path, before: bytes, after: bytes, part: str = "xl/worksheets/sheet1.xml") -> None:
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    assert before in parts[part]
    parts[part] = parts[part].replace(before, after)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, content in parts.items():
            book.writestr(name, content)


def test_a_workbook_that_swells_is_refused_or_read_within_bounds(
    root: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="workbooks need requirements-extras.txt")
    monkeypatch.setattr(tables, "MOST_ROWS", 1000)
    monkeypatch.setattr(tables, "MOST_OF_WORKBOOK", 1 << 22)
    path, book = root / "captions.xlsx", openpyxl.Workbook()
    for row in (["image", "caption"], ["a.jpg", "A dog, running"], ["b.jpg", "Two cats"]):
        book.active.append(row)
    book.active.cell(1, 16384, "far right")
    book.active.cell(1048576, 1, "far below")
    book.save(path)
    assert len(load(root)) == 2
    for number in (b"1048576", b"99999999999"):  # beyond what Excel has
        change_sheet(path, b"1048576", number)
        assert len(load(root)) == 2
    change_sheet(path, b"<sheetData>", b"<sheetData>" + b" " * (5 << 20))
    assert path.stat().st_size < 1 << 20
    with refused("captions.xlsx is not a workbook that can be read", "it unpacks to 5,", "save it as CSV"):
        load(root)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("Train", "training", "TRN", " train "), "train"),
        (("validation", "valid", "Val", "dev", "Development"), "val"),
        (("Test", "testing"), "test"),
    ],
)
def test_splits_are_called_as_people_call_them(names: tuple[str, ...], split: str, root: Path) -> None:
    for name in names:
        put(root, "captions.csv", text=table("image,caption,set", f"a.jpg,A dog,{name}", f"b.jpg,Two cats,{name}"))
        assert load(root)["split"].tolist() == [split, split]


def test_captions_lie_in_a_text_beside_each_picture(root: Path, refused: Callable) -> None:
    put(root, "images/a.txt", text="A dog, running\nAn animal\n\n")
    put(root, "images/b.txt", text="Two cats")
    assert rows(load(root)) == [CAPTIONS[0], ("a.jpg", "An animal"), CAPTIONS[1]]
    put(root, "images/notes.txt", text="nothing")  # of no picture
    assert len(load(root)) == 3


METADATA = [{"file_name": "a.jpg", "text": "A dog, running"}, {"file_name": "b.jpg", "text": "Two cats"}]
JSONS = {
    "metadata.jsonl": "\n".join(map(json.dumps, METADATA)),
    "captions.json": json.dumps(METADATA),
    "captions.json, a dict": json.dumps(dict(CAPTIONS)),
    "captions.json, a dict of lists": json.dumps({image: [caption] for image, caption in CAPTIONS}),
    "captions.json, a dict of dicts": json.dumps({image: {"captions": [caption]} for image, caption in CAPTIONS}),
    "captions.json, pairs": json.dumps(CAPTIONS),
    "captions.json, within": json.dumps({"version": 1, "data": METADATA}, indent=1),
    "captions.json, sentences": json.dumps([{"filename": i, "sentences": [{"raw": c}]} for i, c in CAPTIONS]),
}


@pytest.mark.parametrize("file", JSONS)
def test_json_is_a_list_or_a_dict_of_captions(file: str, root: Path) -> None:
    put(root, file.partition(",")[0], text=JSONS[file])
    assert rows(load(root)) == CAPTIONS


def test_an_image_folder_of_hugging_face_has_its_splits_in_folders(tmp_path: Path) -> None:
    for split, name in (("train", "a.jpg"), ("validation", "a.jpg"), ("test", "b.jpg")):
        put(tmp_path, f"{split}/{name}")
        put(tmp_path, f"{split}/metadata.jsonl", text=json.dumps({"file_name": name, "text": f"In {split}"}))
    table = load(tmp_path)
    assert sorted(zip(table["image"], table["split"], table["caption"], strict=True)) == [
        ("test/b.jpg", "test", "In test"),
        ("train/a.jpg", "train", "In train"),
        ("validation/a.jpg", "val", "In validation"),
    ]


def test_metadata_from_elsewhere_names_pictures_as_they_are(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(elsewhere, "metadata.jsonl", text=JSONS["metadata.jsonl"])
    assert rows(load(root, f"data.captions={elsewhere}/metadata.jsonl")) == CAPTIONS


def test_a_pipe_or_a_folder_is_no_table_and_a_long_number_no_picture(root: Path, refused: Callable) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "captions.tsv")  # which nobody writes to: reading it would wait for ever
    (root / "captions.txt").mkdir()
    put(root, "captions.csv", text=f"image,caption\n{'9' * 5000},A dog\n")
    with refused("names 1 of 1 pictures that are not in"):
        load(root)
    put(root, "captions.csv", text="image,caption\n2.jpg,A dog\n")
    put(root, "images/002.jpg")
    with refused("(2.jpg)"):  # with its ending, it is another picture
        load(root)


def coco(*pictures: tuple[object, str], captions: list[tuple[object, str | None]]) -> str:
    images = [{"id": number, "file_name": name} for number, name in pictures]
    return json.dumps({"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in captions]})


def test_cocos_ids_may_be_texts_but_each_is_one_picture(root: Path, refused: Callable) -> None:
    put(
        root,
        "captions.json",
        text=coco(("7", "a.jpg"), (8, "b.jpg"), captions=[(7, "A dog, running"), ("8", "Two cats")]),
    )
    assert rows(load(root)) == CAPTIONS
    put(root, "captions.json", text=coco((7, "a.jpg"), (7, "b.jpg"), captions=[(7, "A dog")]))
    with refused("the id 7 for a.jpg and for b.jpg", "an id of its own"):
        load(root)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.json", coco((7, "a.jpg"), (8, "b.jpg"), captions=[(7, "A dog"), (7, None), (8, " . ")])),
        ("captions.jsonl", '{"image": "a.jpg", "captions": ["A dog", null, ""]}'),
        ("captions.csv", "image,caption\na.jpg,A dog\na.jpg,\nb.jpg, .\n"),
        ("Flickr8k.token.txt", "a.jpg#0\tA dog\na.jpg#1\t .\na.jpg#2\t-\n"),
    ],
)
def test_captions_without_words_are_left_out_and_counted(
    name: str, text: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(root, name, text=text)
    assert rows(load(root)) == [("a.jpg", "A dog")]
    assert f"{name}: left out 2 of 3 captions, which have no words" in capsys.readouterr().out


def test_a_file_of_val_alone_is_val(root: Path) -> None:
    put(root, "annotations/captions_val2017.json", text=coco((7, "a.jpg"), captions=[(7, "A dog")]))
    assert load(root)["split"].tolist() == ["val"]


def test_the_lemmas_of_the_official_zip_are_left_aside(root: Path) -> None:
    for name, text in (("token", "A dog"), ("lemma.token", "A dog be")):
        put(root, f"Flickr8k.{name}.txt", text=f"a.jpg#0\t{text}\n")
    assert rows(load(root)) == [("a.jpg", "A dog")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("photo;words\na.jpg;A dog\n", ["'photo;words': 2 columns by semicolons", "in this line: photo;caption"]),
        ("image,captoin\na.jpg,A dog\n", ["in this line: image,caption"]),
        ("image,caption_en,caption_de\na.jpg,A dog,Ein Hund\n", ["in this line: image,caption,caption_de"]),
        (
            "Bild;Gewicht;Beschreibung\na.jpg;1,5;Ein Hund im Schnee\n",
            ["3 columns by semicolons", "name them in this line: image;Gewicht;caption"],
        ),
        ("foo,caption,note\na.jpg,A dog,seen on a long walk\n", ["name them in this line: image,caption,note"]),
        ("001;2;A dog\n002;3;A cat\n", ["add a first line that names all 3 columns, two of them image and caption"]),
        ("a dog runs\n", ["'a dog runs': no columns", "add a first line such as image,caption"]),
        ("001;A dog\n002;A cat\n", ["add a first line such as image;caption"]),
        ("image;caption\na.jpg;A dog;x\ny.jpg\n", ["line 3 has 1 columns, not 2; fill in what is missing"]),
        ("image,caption1,caption2\na.jpg,A dog, a cat,x\n", ["line 2 has 4 columns, not 3", "quotation marks"]),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat\n', ["line 2", "close its quotation mark"]),
        ("image,caption\n,A dog\n", ["line 2 names no picture"]),
        (
            "图片,描述\n" + "a.jpg,一只狗在草地上奔跑，旁边还有一只猫\n" * 9,
            ["an encoding that is not known here", "save it as UTF-8"],
        ),
    ],
)
def test_what_is_not_understood_is_answered_with_what_was_found(
    text: str, told: list[str], root: Path, refused: Callable
) -> None:
    put(root, "captions.csv", text=text.encode("gb18030"))
    with refused("captions.csv", *told):
        load(root)


@pytest.mark.parametrize("first", ["photo;words", "file;captoin", "x;y;z"])
def test_the_advice_works(first: str, root: Path) -> None:
    lines = "".join(f"{';'.join([image, caption, 'me'][: first.count(';') + 1])}\n" for image, caption in CAPTIONS)
    put(root, "captions.csv", text=f"{first}\n{lines}")
    with pytest.raises(UserError) as caught:
        load(root)
    put(root, "captions.csv", text=f"{str(caught.value).partition('in this line: ')[2]}\n{lines}")
    assert rows(load(root)) == CAPTIONS


def test_a_title_and_excels_own_line_above_the_header_are_skipped(root: Path) -> None:
    for above in ("sep=;\n", "My captions\n\n", "Course project 2026;;\nGroup 3;;\n"):
        put(root, "captions.csv", text=f"{above}image;caption\na.jpg;A dog, running\nb.jpg;Two cats\n")
        assert rows(load(root)) == CAPTIONS


def test_the_picture_may_stand_behind_its_caption_without_a_header(root: Path) -> None:
    put(root, "captions.csv", text='"A dog, running",a.jpg\nTwo cats,b.jpg\n')
    assert rows(load(root)) == CAPTIONS


def test_numbers_that_a_spreadsheet_has_shortened_find_their_pictures(tmp_path: Path) -> None:
    put(tmp_path, "images/001.jpg", "images/002.jpg")
    put(tmp_path, "captions.csv", text="image,caption\n1,A dog\n2.0,Two cats\n")
    assert load(tmp_path)["image"].tolist() == ["001.jpg", "002.jpg"]


def test_tables_of_this_project_and_lock_files_are_no_datasets(root: Path) -> None:
    put(root, "captions.csv", text="image,caption,log_prob\na.jpg,a dog runs,-3.1\n")
    put(root, "~$mine.csv", ".~lock.mine.csv#", text="locked")
    put(root, "mine.csv", text=TABLES["semicolons"])
    assert rows(load(root)) == CAPTIONS


def test_a_pattern_that_is_asked_for_takes_all_its_files(root: Path) -> None:
    for number, (image, caption) in enumerate(CAPTIONS):
        put(root, f"group{number}.csv", text=f"image;caption\n{image};{caption}\n")
    assert rows(load(root, "data.captions=group*.csv")) == CAPTIONS
