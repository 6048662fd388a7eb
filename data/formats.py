"""Caption files as people find them: each reader makes rows (image, image_id, caption, split) of one file.

`read` recognises a format by what is in the file. A picture may be named by its path or by its file name alone, as
the source has it: `data.annotations` finds it. Where a file names no split (as `split`: in Karpathy's JSON, JSON lines,
a column of a CSV), it is None.
"""

from cli import UserError

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from config import pick

Row = tuple[str, str | int, str, str | None]
NUMBERED = re.compile(r"(.+?)#(?:\w+#)?(\d+)\s+(.*)")  # name.jpg#0 and a tab, or, of Flickr8k-CN, name.jpg#zhc#0
WORD = re.compile(r"\w")
PLAIN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # a path below a folder
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
HEAD_SIZE = 1 << 16  # characters at the start of a file, by which its format is recognised
SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "dev": "val", "test": "test"}


def read(path: Path, name: str = "auto") -> pd.DataFrame:
    """Return the table of a captions file; `name` overrules the format recognised.

    Captions without a word are left out.

    Raises UserError for a file that cannot be read, naming the line or the entry at fault.
    """
    name = recognise(path) if name == "auto" else name
    reader = pick(READERS, name, "data.format")
    try:
        rows = [(image, whole_characters(key), tidy(caption), split) for image, key, caption, split in reader(path)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); save it as such") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); take a whole copy of it") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; take another copy of it") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not as {name} files are ({error!r}); set the right one: data.format=NAME") from None
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

    A column `split` may say train, val (or dev) or test; all others are passed over.
    Flickr30k's results.csv has bars: `image_name| comment_number| comment`, and lacks one in a single line.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        bars = "|" in file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE) if bars else csv.reader(file)
        try:
            names = [name.strip().lower() for name in next(rows, [])]
            header = ["image", "number", "caption"] if names == ["image_name", "comment_number", "comment"] else names
            if "image" not in header or "caption" not in header:
                raise UserError(f"{path} starts with {','.join(names)!r}; its first line should be: image,caption")
            return [split_row(row, header, f"{path} line {rows.line_num}") for row in rows if row]
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); save it as such") from None


def split_row(row: list[str], header: list[str], where: str) -> Row:
    """Return a row; a caption in the last column may hold commas without quotes."""
    if header[-1] == "caption" and len(row) > len(header):
        row = [*row[: len(header) - 1], ",".join(row[len(header) - 1 :])]
    if header[1:] == ["number", "caption"] and len(row) == 2 and (parts := re.fullmatch(r"\s*(\d+)\s+(.*)", row[1])):
        row = [row[0], *parts.groups()]
    if len(row) != len(header):
        raise UserError(f"{where} has {len(row)} columns, not {len(header)}; write it as: image,caption")
    named = dict(zip(header, row, strict=True))
    image, caption = named["image"].strip(), named["caption"].strip()
    if "\n" in caption or "\r" in caption:
        raise UserError(f"{where}: the caption of {image} runs over several lines; close its quotation mark")
    return make_row(image, caption, where, named.get("split", "").strip() or None)


def read_token(path: Path) -> list[Row]:
    """Read `name.jpg#0<tab>caption` lines (Flickr8k.token.txt), or Flickr8k-CN's `name.jpg#zhc#0 caption`.

    Left out: the captions of 2258277193_586949ec62.jpg.1 in Flickr8k.token.txt, a picture that was never published.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        parts = NUMBERED.fullmatch(line.strip())
        if parts is None:
            raise UserError(f"{path} line {number} has no number and caption; write it as: name.jpg#0<tab>caption")
        image, place, caption = parts[1], parts[2], parts[3]
        if not re.search(r"\.\w+\.\d$", image):
            found.setdefault((image, place, caption), make_row(image, caption, f"{path} line {number}"))
    return list(found.values())


def read_karpathy(path: Path) -> list[Row]:
    """Read a dataset_*.json of Karpathy and Fei-Fei (2015), with its splits; `restval` is trained on."""
    found: list[Row] = []
    for place, picture in enumerate(load_json(path)["images"]):
        where = f"{path} images[{place}]"
        split = as_split(picture["split"], where)
        image = safe_path("/".join(filter(None, [picture.get("filepath"), picture["filename"]])), where)
        for sentence in picture["sentences"]:
            found.append((image, picture.get("cocoid", image), sentence["raw"], split))
    return found


def read_coco(path: Path) -> list[Row]:
    """Read COCO's captions_*.json: pictures and captions are two lists, joined by the picture's id."""
    content = load_json(path)
    names = {picture["id"]: safe_path(picture["file_name"], str(path)) for picture in content["images"]}
    found: list[Row] = []
    for place, entry in enumerate(content["annotations"]):
        image_id = entry["image_id"]
        if image_id not in names:
            raise UserError(f"{path} annotations[{place}] is of picture {image_id}, which it does not list; remove it")
        found.append((names[image_id], image_id, entry["caption"], None))
    return found


def read_ai_challenger(path: Path) -> list[Row]:
    """Read caption_*_annotations_*.json of AI Challenger 2017: a list of pictures, each with a list of captions."""
    return read_entries(path, load_json(path), "image_id")


def read_jsonl(path: Path) -> list[Row]:
    """Read one JSON object a line: `image`, `caption` or `captions`, and optionally `image_id` and `split`."""
    lines = enumerate(read_lines(path), start=1)
    return read_entries(path, (parse_json(line, path, number) for number, line in lines if line.strip()), "image")


def read_entries(path: Path, entries: Iterable[dict[str, Any]], key: str) -> list[Row]:
    """Return the rows of JSON entries that name their picture under `key`, and have one caption or a list of them."""
    found: list[Row] = []
    for place, entry in enumerate(entries):
        where = f"{path} entry {place + 1}"
        image = safe_path(entry[key], where)
        captions, split = captions_of(entry, where)
        found += [(image, entry.get("image_id", image), caption, split) for caption in captions]
    return found


def captions_of(entry: dict[str, Any], where: str) -> tuple[list[str], str | None]:
    """Return the captions of a picture's JSON entry, and its split, or None where it names none."""
    captions = entry["captions"] if "captions" in entry else entry["caption"]
    return [captions] if isinstance(captions, str) else captions, as_split(entry.get("split"), where)


def as_split(name: str | None, where: str) -> str | None:
    """Return the split that a name means, None for None; raises UserError for an unknown name."""
    if name is not None and name not in SPLIT_NAMES:
        raise UserError(f"{where} has the split {name!r}; make it train, val or test")
    return None if name is None else SPLIT_NAMES[name]


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


def parse_json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); fix it") from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; `splitlines` would also break at U+2028 and the like inside a caption."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def make_row(image: str, caption: str, where: str, split: str | None = None) -> Row:
    """Return the row of a line that a person wrote; raises UserError for one without picture or words."""
    if not WORD.search(caption):
        raise UserError(f"{where}: the caption of {image or 'an unnamed picture'} is empty; fill or remove it")
    image = safe_path(image, where)
    return image, image, caption, as_split(split, where)


def safe_path(image: str, where: str) -> str:
    """Return the path of a picture with forward slashes; raises UserError for one outside its folder."""
    if PLAIN.fullmatch(image):
        return image
    if not image or leaves_folder(image):
        raise UserError(f"{where} names the picture {image!r}, which is not inside the image folder; fix or remove it")
    if whole_characters(image) != image:
        raise UserError(f"{where} names the picture {image!r}, which holds half a character; fix or remove it")
    return PurePosixPath(image.replace("\\", "/")).as_posix()


def leaves_folder(name: str) -> bool:
    """Whether a path from a file, with slashes of either kind, leads out of the folder it is to be taken in."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name))
