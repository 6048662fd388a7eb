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

from cli import UserError
from config import pick

Row = tuple[str, str | int, str, str | None]
NUMBERED = re.compile(r"(.+?)#(?:\w+#)?(\d+)\s+(.*)")  # name.jpg#0 and a tab, or, of Flickr8k-CN, name.jpg#zhc#0
WORD = re.compile(r"\w")
HEAD_SIZE = 1 << 16  # characters at the start of a file, by which its format is recognised
SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "dev": "val", "test": "test", None: None}
FLICKR30K = {"image_name": "image", "comment_number": "number", "comment": "caption"}  # columns of its results.csv
# What a reader raises for a file of another form.
UNLIKE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error)


def read(path: Path, name: str = "auto") -> pd.DataFrame:
    """Return the table of a captions file, without wordless captions; `name` overrules the format recognised."""
    name = recognise(path) if name == "auto" else name
    reader = pick(READERS, name, "data.format")
    try:
        rows = [
            (whole_characters(image).replace("\\", "/"), whole_characters(image_id), tidy(caption), split)
            for image, image_id, caption, split in reader(path)
        ]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); save it as such") from None
    except UNLIKE as error:
        raise UserError(
            f"{path} is not as {name} files are ({error!r}); take a whole copy of it, or set data.format=NAME"
        ) from None
    return pd.DataFrame([row for row in rows if WORD.search(row[2])], columns=["image", "image_id", "caption", "split"])


def tidy(caption: str) -> str:
    """Return a caption with single blanks and whole characters."""
    return " ".join(whole_characters(caption).split())


def whole_characters(value: Any) -> Any:
    """Return a text with `?` for halves of characters, which JSON may hold; return other values as they are."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def recognise(path: Path) -> str:
    """Return the name in READERS of the file's format: `csv` when it shows the marks of no other."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = file.read(HEAD_SIZE).lstrip()
    first = head.partition("\n")[0]
    if head.startswith("["):
        return "ai_challenger"
    if head.startswith("{"):
        if re.match(r'\{.*"captions?"\s*:.*\}\s*$', first) and '"annotations"' not in first:
            return "jsonl"
        return "karpathy" if '"sentences"' in head else "coco"
    return "token" if NUMBERED.fullmatch(first.rstrip()) else "csv"


def read_csv(path: Path) -> list[Row]:
    """Read `image,caption` rows below such a header (Flickr8k, Kaggle's captions.txt), unquoted commas included.

    A column `split` may say train, val (or dev) or test. Flickr30k's results.csv has bars, and lacks one in one line.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        bars = "|" in file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE) if bars else csv.reader(file)
        names = [name.strip().lower() for name in next(rows, [])]
        header = [FLICKR30K.get(name, name) for name in names]
        if "image" not in header or "caption" not in header:
            raise UserError(f"{path} starts with {','.join(names)!r}; its first line should be: image,caption")
        return [split_row(row, header, f"{path} line {rows.line_num}") for row in rows if row]


def split_row(row: list[str], header: list[str], where: str) -> Row:
    """Return a row; a caption in the last column may hold commas without quotes."""
    if header[-1] == "caption" and len(row) > len(header):
        row = [*row[: len(header) - 1], ",".join(row[len(header) - 1 :])]
    if header[1:] == ["number", "caption"] and len(row) == 2 and (parts := re.fullmatch(r"\s*(\d+)\s+(.*)", row[1])):
        row = [row[0], *parts.groups()]
    if len(row) != len(header):
        raise UserError(f"{where} has {len(row)} columns, not {len(header)}; write it as: image,caption")
    named = dict(zip(header, map(str.strip, row), strict=True))
    if "\n" in named["caption"] or "\r" in named["caption"]:
        raise UserError(f"{where}: the caption of {named['image']} runs over several lines; close its quotation mark")
    return make_row(named["image"], named["caption"], where, named.get("split") or None)


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
    """Return the row of a line that a person wrote; raises UserError for one without picture or words."""
    if not image or not WORD.search(caption):
        raise UserError(f"{where} has no picture, or a caption without words; fill or remove it")
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
    """Read COCO's captions_*.json: pictures and captions are two lists, joined by the picture's id."""
    content = load_json(path)
    names = {picture["id"]: picture["file_name"] for picture in content["images"]}
    return [(names[each["image_id"]], each["image_id"], each["caption"], None) for each in content["annotations"]]


def read_ai_challenger(path: Path) -> list[Row]:
    """Read caption_*_annotations_*.json of AI Challenger 2017: a list of pictures, each with a list of captions."""
    return read_entries(path, load_json(path), "image_id")


def read_jsonl(path: Path) -> list[Row]:
    """Read one JSON object a line: `image`, `caption` or `captions`, and optionally `image_id` and `split`."""
    entries = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            if line.strip():
                entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); fix it") from None
    return read_entries(path, entries, "image")


def read_entries(path: Path, entries: Iterable[dict[str, Any]], key: str) -> list[Row]:
    """Return the rows of JSON entries that name their picture under `key`, and have one caption or a list of them."""
    found: list[Row] = []
    for entry in entries:
        captions, split = captions_of(entry, str(path))
        found += [(entry[key], entry.get("image_id", entry[key]), caption, split) for caption in captions]
    return found


def captions_of(entry: dict[str, Any], where: str) -> tuple[list[str], str | None]:
    """Return the captions of a picture's JSON entry, and its split, or None where it names none."""
    captions = entry["captions"] if "captions" in entry else entry["caption"]
    return [captions] if isinstance(captions, str) else captions, as_split(entry.get("split"), where)


def as_split(name: str | None, where: str) -> str | None:
    """Return the split that a name means, None for None."""
    if name not in SPLIT_NAMES:
        raise UserError(f"{where} has the split {name!r}; make it train, val or test")
    return SPLIT_NAMES[name]


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "csv": read_csv,
    "token": read_token,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "ai_challenger": read_ai_challenger,
    "jsonl": read_jsonl,
    "sample": read_csv,
}


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; `splitlines` would also break at U+2028 and the like inside a caption."""
    return path.read_text(encoding="utf-8-sig").split("\n")
