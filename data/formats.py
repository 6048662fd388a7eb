"""Caption files as people find them: each reader makes rows (image, image_id, caption, split) of one file.

`read` recognises a format by what is in the file. A picture may be named by its path or by its file name alone, as
the source has it: `data.annotations` finds it. Where a file names no split, it is None.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from cli import UserError, say, shorten
from cli.files import open_file
from config import pick
from data.folders import PICTURE_SUFFIXES, paths_below
from data.tables import CAPTION, IMAGE, encoding_of, find, plain_name, read_table, read_text

Row = tuple[str, str | int, str | None, str | None]
NUMBERED = re.compile(r"(.+?)#(?:\w+#)?(\d+)\s+(.*)")  # name.jpg#0 and a tab, or, of Flickr8k-CN, name.jpg#zhc#0
WORD = re.compile(r"\w")
LONGEST_CAPTION = 10_000  # characters
HEAD_SIZE = 1 << 16  # characters at the start of a file, by which its format is recognised
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
# What a reader raises for a file of another form.
UNLIKE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error)


def read(path: Path, name: str = "auto") -> pd.DataFrame:
    """Return the table of a captions file, without wordless captions; `name` overrules the format recognised."""
    name = recognise(path) if name == "auto" else name
    reader = pick(READERS, name, "data.format")
    try:
        rows = [
            (as_name(image, path), as_image_id(image_id, path), tidy(caption or ""), split)
            for image, image_id, caption, split in reader(path)
        ]
    except UNLIKE as error:
        raise UserError(
            f"{path} is not as {name} files are ({reason_of(error)}); take a whole copy of it, or set data.format=NAME"
        ) from None
    check_lengths((caption for _, _, caption, _ in rows), str(path))
    kept = [row for row in rows if WORD.search(row[2])]
    if len(kept) < len(rows):
        say(f"{path}: left out {len(rows) - len(kept):,} of {len(rows):,} captions, which have no words")
    return pd.DataFrame(kept, columns=["image", "image_id", "caption", "split"])


def reason_of(error: Exception) -> str:
    """Return what is wrong with a file, as one of UNLIKE tells it."""
    return shorten(f"{type(error).__name__}: {error}", 200)


def as_name(image: Any, where: str | Path) -> str:
    """Return the name of a picture as other systems write it; raises UserError for what is no name."""
    if not isinstance(image, str):
        raise UserError(f"{where} has a picture named {shorten(repr(image))}, which is no text; name its file")
    return whole_characters(image).replace("\\", "/")


def as_image_id(image_id: Any, where: str | Path) -> str | int:
    """Return a picture's id; raises UserError for what is neither a text nor a whole number."""
    if isinstance(image_id, bool) or not isinstance(image_id, str | int):
        raise UserError(f"{where} has the image_id {shorten(repr(image_id))}; make it a text or a whole number")
    return whole_characters(image_id)


def check_lengths(captions: Iterable[str], where: str) -> None:
    """Raise UserError for a caption that is none, by its length: memory grows with the longest."""
    for caption in captions:
        if len(caption) > LONGEST_CAPTION:
            raise UserError(
                f"{where} has a caption of {len(caption):,} characters ({shorten(caption)}), and at most "
                f"{LONGEST_CAPTION:,} are read; shorten it"
            )


def tidy(caption: str) -> str:
    """Return a caption with single blanks and whole characters."""
    return " ".join(whole_characters(caption).split())


def whole_characters(value: Any) -> Any:
    """Return a text with `?` for halves of characters, which JSON may hold; return other values as they are."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def recognise(path: Path) -> str:
    """Return the name in READERS of the file's format: `csv` when it shows the marks of no other."""
    if path.is_dir():
        return "texts"
    with open_file(path) as file:
        raw = file.read(HEAD_SIZE)
    head = raw.decode(encoding_of(raw), errors="replace").lstrip()
    first = head.partition("\n")[0]
    if head.startswith("["):
        return "json"
    if head.startswith("{"):
        if path.suffix == ".jsonl" or is_entry(first):
            return "jsonl"
        return (
            "karpathy" if '"sentences"' in head else "coco" if '"annotations"' in head or '"info"' in head else "json"
        )
    return "token" if NUMBERED.fullmatch(first.rstrip()) else "csv"


def is_entry(line: str) -> bool:
    """Whether a line is a JSON object with a picture and captions."""
    try:
        return len(line) < HEAD_SIZE and find_keys(json.loads(line)) is not None
    except UNLIKE:
        return False


def read_csv(path: Path) -> list[Row]:
    """Read a table of pictures and captions, see `data.tables`; a column `split` may say train, val or test."""
    return [make_row(image, caption, where, split) for image, caption, split, where in read_table(path)]


def read_texts(folder: Path) -> list[Row]:
    """Read the .txt beside each picture of a folder, and below: each of its lines is a caption."""
    found: list[Row] = []
    for image in sorted(paths_below(folder)):
        text = (folder / image).with_suffix(".txt")
        if image.lower().endswith(PICTURE_SUFFIXES) and text.is_file():
            found += [(image, image, line, None) for line in read_text(text).split("\n") if line.strip()]
    return found


def read_token(path: Path) -> list[Row]:
    """Read `name.jpg#0<tab>caption` lines (Flickr8k.token.txt), or Flickr8k-CN's `name.jpg#zhc#0 caption`.

    Left out: the captions of 2258277193_586949ec62.jpg.1 in Flickr8k.token.txt, a picture that was never published.
    """
    found: dict[tuple[str | Any, ...], Row] = {}  # each line once
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        parts = NUMBERED.fullmatch(line.strip())
        if parts is None:
            raise UserError(f"{path} line {number} has no number and caption; write it as: name.jpg#0<tab>caption")
        if not re.search(r"\.\w+\.\d$", parts[1]):
            found[parts.groups()] = make_row(parts[1], parts[3], f"{path} line {number}")
    return list(found.values())


def make_row(image: str, caption: str, where: str, split: str | None = None) -> Row:
    """Return the row of a line that a person wrote; raises UserError for one without picture."""
    if not image:
        raise UserError(f"{where} names no picture; fill it in, or remove the line")
    return image, image, caption, as_split(split, where)


def read_karpathy(path: Path) -> list[Row]:
    """Read a dataset_*.json of Karpathy and Fei-Fei (2015), with its splits; `restval` is trained on."""
    found: list[Row] = []
    for picture in load_json(path)["images"]:
        image = "/".join(filter(None, [picture.get("filepath"), picture["filename"]]))
        image_id, split = picture.get("cocoid", image), as_split(picture["split"], str(path))
        found += [(image, image_id, sentence["raw"], split) for sentence in picture["sentences"]]
    return found


def read_coco(path: Path) -> list[Row]:
    """Read COCO's captions_*.json: pictures and captions are two lists, joined by the picture's id.

    Raises UserError for an id of two pictures, as merged files have, and for captions of an id that no picture has.
    """
    content = load_json(path)
    pictures: dict[str, tuple[str, str | int]] = {}  # by id, which some files write as text
    for picture in content["images"]:
        name, number = as_name(picture["file_name"], path), as_image_id(picture["id"], path)
        if pictures.setdefault(str(number), (name, number))[0] != name:
            raise UserError(
                f"{path} has the id {number!r} for {pictures[str(number)][0]} and for {name}; give each picture an id "
                "of its own, or keep the merged files apart with data.root=[FOLDER, FOLDER]"
            )
    captions = content["annotations"]
    lost = [each["image_id"] for each in captions if str(each["image_id"]) not in pictures]
    if lost:
        raise UserError(
            f"{path} has captions of {len(set(map(str, lost))):,} ids that none of its pictures has, such as "
            f"{shorten(repr(lost[0]))}; add these pictures to its list images, or remove their captions"
        )
    return [(*pictures[str(each["image_id"])], each["caption"], None) for each in captions]


def read_json(path: Path) -> list[Row]:
    """Read a list of pictures with captions, such as AI Challenger's, or a dict from each picture to its captions."""
    content = load_json(path)
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1 and find_keys(lists[0][0]):
            content = lists[0]
        else:
            content = [
                value | {"image": key} if isinstance(value, dict) else {"image": key, "caption": value}
                for key, value in content.items()
            ]
    elif content and isinstance(content[0], list):
        content = [{"image": image, "caption": caption} for image, caption in content]
    return read_entries(path, content)


def read_jsonl(path: Path) -> list[Row]:
    """Read one JSON object a line: `image`, `caption` or `captions`, and optionally `image_id` and `split`."""
    entries = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            if line.strip():
                entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); fix it") from None
    return read_entries(path, entries)


def read_entries(path: Path, entries: Iterable[dict[str, Any]]) -> list[Row]:
    """Return the rows of JSON entries that name their picture, and have one caption or a list of them."""
    found: list[Row] = []
    for entry in entries:
        keys = find_keys(entry)
        if keys is None:
            raise UserError(
                f"{path} has an entry with the keys {shorten(', '.join(map(str, entry)))}, which do not say where its "
                "picture and its caption are; call them image and caption"
            )
        image = entry[keys[0]]
        captions, split = captions_of(entry, str(path), keys[1])
        found += [(image, entry.get("image_id", image), caption, split) for caption in captions]
    return found


def find_keys(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Return the keys of an entry's picture and of its captions; None where it lacks one of them."""
    keys = [plain_name(key) for key in entry]
    image, caption = find(keys, IMAGE), find(keys, CAPTION)
    names = list(entry)
    return None if image is None or caption is None else (names[image], names[caption])


def captions_of(entry: dict[str, Any], where: str, key: str | None = None) -> tuple[list[str | None], str | None]:
    """Return the captions of a picture's JSON entry, and its split, or None where it names none."""
    captions = entry[key or ("captions" if "captions" in entry else "caption")]
    several = captions if isinstance(captions, list) else [captions]
    texts = [each["raw"] if isinstance(each, dict) else each for each in several]
    if not all(isinstance(each, str | None) for each in texts):
        raise TypeError("a caption that is no text")
    return texts, as_split(entry.get("split"), where)


def as_split(name: str | None, where: str) -> str | None:
    """Return the split that a name means, None for None."""
    if name is None:
        return None
    if not isinstance(name, str) or name.strip().lower() not in SPLIT_NAMES:
        raise UserError(f"{where} has the split {shorten(repr(name))}; make it train, val or test")
    return SPLIT_NAMES[name.strip().lower()]


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "csv": read_csv,
    "token": read_token,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "json": read_json,
    "jsonl": read_jsonl,
    "texts": read_texts,
    "sample": read_csv,
}


def load_json(path: Path) -> Any:
    return json.loads(read_text(path))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; `splitlines` would also break at U+2028 and the like inside a caption."""
    return read_text(path).split("\n")
