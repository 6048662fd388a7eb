"""Captions as text, where people and programs look for it: tables, a .txt beside each picture, the picture's metadata.

Nothing that a person has written is written over without being asked.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cli import UserError, printable
from data.folders import MADE_HERE, plural
from utils import unique_name, write_atomically

Captioned = Sequence[tuple[Path, str, Sequence[Any]]]  # file, image id, captions with their text and log_prob
EMBEDDED_IN = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff")
HEADER = ["image", "caption", "log_prob"]


def own_folder(place: Path) -> Path:
    """Return `place`, or with a number behind it where that holds files of somebody else, marked as made here."""
    for folder in (place, *(place.with_name(f"{place.name}-{number}") for number in range(2, 1000))):
        if not folder.exists() or (folder / MADE_HERE).is_file() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MADE_HERE).touch()
            return folder
    raise UserError(f"{place} and 998 folders after it hold other files; name another folder with --out")


def write_tables(out: Path, captioned: Captioned) -> Iterator[str]:
    """Write captions.csv, a row for each caption, and captions.jsonl, a line for each picture; yields their names.

    A file of this name that was written elsewhere stays as it is, and the name has a number.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(HEADER)
    lines = []
    for _, image_id, captions in captioned:
        writer.writerows([image_id, each.text, round(each.log_prob, 4)] for each in captions)
        best, texts = captions[0], [each.text for each in captions]
        row = {"image": image_id, "captions": texts, "log_probs": [round(each.log_prob, 4) for each in captions]}
        if best.confidence is not None:
            row |= {"confidence": round(best.confidence, 3), "perhaps": list(best.perhaps)}
        lines.append(json.dumps(row, ensure_ascii=False))
    ours: dict[str, tuple[str, Callable[[str], bool]]] = {
        "captions.csv": (table.getvalue(), lambda first: first == ",".join(HEADER)),
        "captions.jsonl": ("\n".join([*lines, ""]), lambda first: '"log_probs": [' in first),
    }
    for name, (text, is_ours) in ours.items():
        stem, _, ending = name.partition(".")
        places = (out / name, *(out / f"{stem}-{number}.{ending}" for number in range(2, 1000)))
        path = next(place for place in places if not place.exists() or is_ours(first_line(place)))
        write_atomically(path, text.encode(errors="backslashreplace"))
        yield path.name


def first_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(1 << 16).rstrip("\n")


def write_sidecars(captioned: Captioned, existing: str) -> Iterator[str]:
    """Write photo.txt beside each photo.jpg, a caption a line; yields what is to be said of it.

    Args:
        existing: what happens to a .txt that is there: skip, overwrite or append.
    """
    written, kept = set[Path](), list[Path]()
    for path, _, captions in captioned:
        place, text = path.with_suffix(".txt"), "".join(f"{each.text}\n" for each in captions)
        if place in written or (place.exists() and existing == "skip"):  # of two pictures with one name, too
            kept.append(place)
            continue
        before = ""
        if place.exists() and existing == "append":
            before = place.read_text(encoding="utf-8", errors="surrogateescape")
            before += "" if before.endswith("\n") or not before else "\n"
        write_atomically(place, (before + text).encode(errors="surrogateescape"))
        written.add(place)
    yield f"wrote {plural(len(written), 'text', 'texts')} beside the pictures"
    if kept:
        yield (
            f"left {plural(len(kept), 'text', 'texts')} as they were, such as {printable(str(kept[0]))}; "
            "--existing overwrite or --existing append changes them"
        )


def embed(captioned: Captioned, folder: Path | None) -> Iterator[str]:
    """Write the best caption into the metadata of copies of the pictures in `folder`, or of the pictures themselves:
    XMP's description and alt text, and IPTC's caption; other metadata and the pixels stay. Yields what is to be said.
    """
    try:
        import pyexiv2
    except ImportError:
        raise UserError("--embed needs pyexiv2; install it: pip install -r requirements-extras.txt") from None
    pyexiv2.set_log_level(4)
    done, left, taken = 0, list[str](), set[str]()
    for path, _, (best, *_) in captioned:
        if path.suffix.lower() not in EMBEDDED_IN:
            left.append(f"{path.name}, whose kind of file has no place for it")
            continue
        name = f"{unique_name(path.stem, taken)}{path.suffix}"
        target = path if folder is None else folder / name
        unfinished = target.with_name(f".{target.name}.unfinished{path.suffix}")
        try:
            shutil.copy2(path, unfinished)
            text = {'lang="x-default"': best.text}
            with pyexiv2.Image(os.fsdecode(unfinished)) as picture:
                picture.modify_xmp({"Xmp.dc.description": text, "Xmp.iptc.AltTextAccessibility": text})
                if path.suffix.lower() != ".webp":  # which has no IPTC
                    utf8 = {"Iptc.Envelope.CharacterSet": "\x1b%G"}
                    picture.modify_iptc(utf8 | {"Iptc.Application2.Caption": best.text})
            os.replace(unfinished, target)
            done += 1
        except RuntimeError as error:  # of a file that is another one than its ending says
            left.append(f"{path.name} ({' '.join(str(error).split())})")
        finally:
            unfinished.unlink(missing_ok=True)
    where = "the pictures themselves" if folder is None else f"copies in {folder}/"
    yield f"wrote captions into the metadata of {plural(done, 'picture', 'pictures')}: {where}"
    if left:
        yield f"wrote no caption into {plural(len(left), 'picture', 'pictures')}, such as {printable(left[0])}"
