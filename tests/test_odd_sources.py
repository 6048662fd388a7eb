"""Whatever lies where captions, lists, tars or predictions are looked for, nothing waits for it or fills memory.

A pipe would block, a device would never end, a file can claim a terabyte, and JSON can be deeper than Python reads.
"""

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from dataset_files import load, put

from cli import UserError
from cli.files import read_file
from data import formats, splits, tars
from evaluate import References, read_predictions
from metrics import pick_tokeniser
from models.model import Caption
from render.comparison import search_of
from render.texts import write_sidecars


def predictions(path: Path) -> object:
    references = References("test", {"a.jpg": "a.jpg"}, {}, {}, [], "en", pick_tokeniser("words", "en"))
    return read_predictions(path, references)


def beside(path: Path) -> object:
    *_, said = write_sidecars([(path.with_suffix(".jpg"), "a", [Caption("A dog", ("A", "dog"), -1.0, -1.0)])], "append")
    raise UserError(said)  # where a text cannot be written, a run goes on


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # the name of a file, and what reads it
    **{name: ("captions.txt", partial(formats.read, name=name)) for name in formats.READERS},
    "auto": ("captions.txt", formats.read),
    "dataset": ("captions.csv", lambda path: load(path.parent, f"data.captions={path}")),
    "list": ("Flickr_8k.trainImages.txt", lambda path: splits.official_splits(path.parent)),
    "tar": ("0.tar", lambda path: list(tars.samples(path))),
    "tar's stamp": ("0.tar", tars.stamp_of),
    "predictions": ("captions.json", predictions),
    "text beside a picture": ("a.txt", beside),
    "anything": ("a", read_file),
}
del READERS["texts"]  # of a folder


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def listening(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))  # whose paths are short


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "folder": Path.mkdir,
    "socket": listening,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "terabyte": sparse,
}


@pytest.mark.timeout(10)  # also in the middle of reading from a pipe
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(
    reader: str, odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, read = READERS[reader]
    fine = {("auto", "folder"), ("dataset", "folder"), ("tar's stamp", "terabyte")}
    if (reader, odd) in fine or (reader == "text beside a picture" and odd.startswith("link")):
        pytest.skip("can be read, or written over")
    monkeypatch.chdir(tmp_path)
    ODD[odd](tmp_path / name)
    expected = (UserError, FileNotFoundError, OSError) if odd.startswith("link") else UserError
    with pytest.raises(expected) as caught:
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


DEEP = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 100_000 + "]" * 100_000,
    "dicts": '{"a":' * 100_000,
    "in an entry": '[{"image": "a.jpg", "image_id": "a.jpg", "captions": ' + "[" * 100_000,
    "long number": '[{"image_id": ' + "9" * 5000 + ', "image": "a.jpg", "caption": "A dog"}]',
    "NaN": '[{"image_id": NaN, "image": "a.jpg", "caption": NaN}]',
    "huge number": '[{"image_id": 1e999, "image": "a.jpg", "caption": 1e999}]',
}


@pytest.mark.parametrize("kind", DEEP)
def test_json_that_is_too_deep_or_has_odd_numbers_is_one_sentence(kind: str, tmp_path: Path, refused: Callable) -> None:
    path = tmp_path / "file.json"
    put(tmp_path, "file.json", "scores-val.json", "splits.json", "predictions-val.json", text=DEEP[kind])
    for name in ("auto", "json", "jsonl", "coco", "karpathy"):
        with refused("file.json"):
            formats.read(path, name)
    with refused("file.json is not in COCO's results form"):
        predictions(path)
    with refused("scores-val.json is damaged"):
        search_of(tmp_path / "predictions-val.json", "val")
    with refused("splits.json is damaged"):
        splits.read_splits(tmp_path)
    with refused("0/1.json"):
        tars.read_sample("1", {"json": DEEP[kind].removeprefix("[").removesuffix("]").encode()}, Path("0"))


@pytest.mark.parametrize("value", ["[1]", "{}", "3", "null", "true", "1.5", '{"a": [1]}', "[[]]"])
def test_names_and_ids_of_another_kind_are_one_sentence(value: str, tmp_path: Path, refused: Callable) -> None:
    good = {"image": "a.jpg", "image_id": "a", "caption": "A dog", "split": "train"}
    for key, caption in ((key, caption) for key in good for caption in ("caption", "captions")):
        if (key, value) in (("image_id", "3"), ("split", "null"), ("caption", "null")):
            continue
        entry = json.dumps(good | {key: "?"}).replace('"?"', value).replace('"caption"', f'"{caption}"')
        picture, rest = entry.replace('"image"', '"filename"'), entry.replace('"image_id"', '"id"')
        for name, text in {
            "json": f"[{entry}]",
            "jsonl": entry,
            "karpathy": f'{{"images": [{picture[:-1]}, "cocoid": {value}, "sentences": [{{"raw": {value}}}]}}]}}',
            "coco": f'{{"images": [{rest[:-1]}, "file_name": {value}}}], "annotations": [{entry}]}}',
        }.items():
            put(tmp_path, "file.json", text=text)
            with refused("file.json"):
                formats.read(tmp_path / "file.json", name)
        if key != "image":
            with refused("0/1.json"):
                tars.read_sample("1", {"json": entry.encode()}, Path("0"))
