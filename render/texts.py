"""Captions as text, where people and programs look for it: tables, a .txt beside each picture, the picture's metadata.

Nothing that a person has written is written over without being asked.
"""

import contextlib
import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cli import UserError
from cli.files import read_file
from data.features import read_ahead
from data.folders import MADE_HERE, MADE_TABLE, plural
from utils import unique_name, write_atomically

Captioned = Sequence[tuple[Path, str, Sequence[Any]]]  # file, image id, captions with their text and log_prob
DESCRIPTION, IPTC_CAPTION = "Xmp.dc.description", "Iptc.Application2.Caption"
EMBEDDED_IN = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff")
WRITERS = 16  # threads: a disk flushes many small files at once nearly as fast as one
HEADER = MADE_TABLE.split(",")


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
    for name, text in (("captions.csv", table.getvalue()), ("captions.jsonl", "\n".join([*lines, ""]))):
        path = own_file(out / name, ",".join(HEADER) if name == "captions.csv" else '"log_probs": [')
        write_atomically(path, text.encode(errors="backslashreplace"))
        yield path.name


def own_file(place: Path, mark: str) -> Path:
    """Return `place`, or with a number in its name where it holds a file of somebody else, whose start lacks `mark`."""
    places = (place, *(place.with_name(f"{place.stem}-{number}{place.suffix}") for number in range(2, 1000)))
    for each in places:
        if not each.exists() or mark in first_characters(each):
            return each
    raise UserError(f"{place} and 998 files after it are of somebody else; name another folder with --out")


def first_characters(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(1 << 12)


def write_sidecars(captioned: Captioned, existing: str) -> Iterator[str]:
    """Write photo.txt beside each photo.jpg, a caption a line; yields what is to be said of it.

    Args:
        existing: what happens to a .txt that is there: skip, overwrite or append.
    """
    texts, shared = dict[Path, str](), list[Path]()
    for path, _, captions in captioned:
        place = path.with_suffix(".txt")
        if place in texts:
            shared.append(path)
        else:
            texts[place] = "".join(f"{each.text}\n" for each in captions)
    written, kept, failed = 0, list[Path](), list[str]()
    write = partial(write_sidecar, existing=existing)
    results = chain.from_iterable(read_ahead(write, texts.items(), WRITERS, WRITERS))
    for place, result in zip(texts, results, strict=True):
        if isinstance(result, Exception):
            failed.append(str(result))
        elif result:
            written += 1
        else:
            kept.append(place)
    yield f"wrote {plural(written, 'text', 'texts')} beside the pictures"
    if kept:
        yield (
            f"left {plural(len(kept), 'text', 'texts')} as they were, such as {kept[0]}; "
            "--existing overwrite or --existing append changes them"
        )
    if shared:
        yield f"no text for {plural(len(shared), 'picture', 'pictures')} called as another one, such as {shared[0]}"
    if failed:
        yield f"could not write {plural(len(failed), 'text', 'texts')}: {failed[0].partition(';')[0]}"


def write_sidecar(item: tuple[Path, str], existing: str) -> bool | Exception:
    """Write a text where it belongs; returns whether it was written, or what went wrong."""
    place, text = item
    try:
        if place.exists() and existing == "skip":
            return False
        before = ""
        if place.exists() and existing == "append":
            before = read_file(place).decode(errors="surrogateescape")
            before += "" if before.endswith("\n") or not before else "\n"
        write_atomically(place, (before + text).encode(errors="surrogateescape"))
        return True
    except (UserError, OSError) as error:  # such as of a folder that is only to be read
        return error


def embed(captioned: Captioned, folder: Path | None, existing: str) -> Iterator[str]:
    """Write the best caption into the metadata of copies of the pictures in `folder`, or of the pictures themselves:
    XMP's description and alt text, and IPTC's caption; other metadata and the pixels stay. Yields what is to be said.

    Args:
        existing: what happens to a description that is there: skip, overwrite or append.
    """
    import pyexiv2

    pyexiv2.set_log_level(4)
    done, kept, left, taken = 0, list[str](), list[str](), dict[str, int]()
    for path, _, (best, *_) in captioned:
        if path.suffix.lower() not in EMBEDDED_IN:
            left.append(f"{path.name}, whose kind of file has no place for it")
            continue
        name = f"{unique_name(path.stem, taken)}{path.suffix}"
        target = path.resolve() if folder is None else folder / name  # a link stays one
        unfinished = target.with_name(f".{secrets.token_hex(4)}.unfinished{path.suffix}")  # in ASCII, for pyexiv2
        try:
            shutil.copy2(path, unfinished)
            with pyexiv2.Image(os.fsdecode(unfinished)) as picture:
                own = next(iter(picture.read_xmp().get(DESCRIPTION, {}).values()), "")
                own = own or picture.read_iptc().get(IPTC_CAPTION, "")
                if own and existing == "skip":
                    kept.append(path.name)
                else:
                    text = f"{own} {best.text}" if own and existing == "append" else best.text
                    worded = {'lang="x-default"': text}
                    picture.modify_xmp({DESCRIPTION: worded, "Xmp.iptc.AltTextAccessibility": worded})
                    if path.suffix.lower() != ".webp":  # which has no IPTC
                        picture.modify_iptc({"Iptc.Envelope.CharacterSet": "\x1b%G", IPTC_CAPTION: text})
                    done += 1
            os.replace(unfinished, target)
        # Of a folder to read only, of a file that is not what its ending says, of a folder's name that is not UTF-8.
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            left.append(f"{path.name} ({' '.join(str(reason).split())})")
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
    where = "the pictures themselves" if folder is None else f"copies in {folder}/"
    yield f"wrote captions into the metadata of {plural(done, 'picture', 'pictures')}: {where}"
    if kept:
        yield (
            f"left the descriptions of {plural(len(kept), 'picture', 'pictures')} as they were, such as that of "
            f"{kept[0]}; --existing overwrite or --existing append changes them"
        )
    if left:
        yield f"wrote no caption into {plural(len(left), 'picture', 'pictures')}, such as {left[0]}"
