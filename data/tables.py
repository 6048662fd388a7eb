"""Tables of captions as spreadsheets and scripts write them: any usual separator, encoding and naming of columns."""

import csv
import difflib
import functools
import io
import itertools
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import UserError, say, shorten
from cli.files import open_file, read_file
from data.folders import PICTURE_SUFFIXES

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# What people call the columns, without case, blanks, - and _; of several that are there, the first here.
IMAGE = (
    *("image", "filename", "imagename", "imagefile", "imagefilename", "imagepath", "filepath", "file", "path"),
    *("picture", "photo", "img", "imgname", "imgpath", "imgfile", "name", "imageid", "key", "url"),
)
CAPTION = (
    *("caption", "captions", "text", "texts", "description", "descriptions", "sentence", "sentences", "comment"),
    *("rawcaption", "alttext", "alt", "title", "label"),
)
SPLIT = ("split", "set", "subset", "partition", "phase")
NUMBERED = re.compile(rf"({'|'.join(CAPTION)})\d+")
TITLES = 5  # lines in which a header is looked for, below a title
MOST_LINES = 20  # of a caption in quotation marks: beyond, the second mark is missing
MOST_OF_WORKBOOK = 1 << 28  # bytes, unpacked
MOST_ROWS, MOST_COLUMNS = 1 << 20, 100  # of a workbook; Excel has no more rows
FOREIGN = 0.2  # of the bytes of a text beyond ASCII: more is no European language in Windows' encoding

Cells = list[str]


@dataclass(frozen=True)
class Columns:
    """Where the columns of a table are."""

    image: int
    captions: tuple[int, ...]
    split: int | None
    count: int

    @classmethod
    def of(cls, names: Cells) -> "Columns | None":
        """Return the columns of a header; None where it names no pictures or no captions."""
        plain = [plain_name(name) for name in names]
        numbered = [place for place, name in enumerate(plain) if NUMBERED.fullmatch(name)]
        image, caption, split = (find(plain, known) for known in (IMAGE, CAPTION, SPLIT))
        captions = tuple(dict.fromkeys([*([] if caption is None else [caption]), *numbered]))
        return None if image is None or not captions else cls(image, captions, split, len(names))


@functools.cache
def plain_name(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def find(names: Collection[str], known: Iterable[str]) -> int | None:
    """Return the place in `names` of the first of the `known` ones that is there."""
    return next((list(names).index(name) for name in known if name in names), None)


def read_table(path: Path) -> Iterator[tuple[str, str, str | None, str]]:
    """Yield (image, caption, split, where) of each caption in a table, unquoted separators in captions included.

    The first line may name the columns; else the first column is the picture and the rest its caption. Raises UserError
    for a table without pictures or captions, and for a line that does not fit its header.
    """
    rows, separator = read_rows(path)
    top = list(itertools.islice(rows, TITLES))
    stripped = [[cell.strip() for cell in cells] for _, cells in top] or [[""]]
    header, headers = stripped[0], [number for number, cells in enumerate(stripped) if Columns.of(cells)]
    columns = Columns.of(stripped[headers[0]]) if headers else without_header(header)
    if columns is None:
        raise UserError(not_understood(path, header, stripped[1] if len(stripped) > 1 else [], separator))
    rows = itertools.chain(top[headers[0] + 1 :] if headers else top, rows)
    for line, cells in rows:
        where = f"{path} line {line}"
        cells = fit(cells, columns, separator, where)
        image, split = cells[columns.image], cells[columns.split] if columns.split is not None else None
        for place in columns.captions:
            check_quotes(cells[place], where, image)
            if cells[place] or len(columns.captions) == 1:
                yield image, cells[place], split or None, where


def without_header(first: Cells) -> Columns | None:
    """Return the columns of a table without header: the picture is where its first line has one, the caption beside."""
    places = [place for place, cell in enumerate(first) if cell.lower().endswith(PICTURE_SUFFIXES)]
    if len(places) != 1 or len(first) < 2:
        return None
    if places == [0]:
        numbered = len(first) > 2 and first[1].isdigit()  # name, number, caption
        return Columns(0, (2 if numbered else 1,), None, 3 if numbered else 2)
    others = [place for place in range(len(first)) if place not in places]
    return Columns(places[0], (max(others, key=lambda place: len(first[place])),), None, len(first))


def fit(cells: Cells, columns: Columns, separator: str, where: str) -> Cells:
    """Return as many cells as there are columns: those of a caption that holds the separator are joined."""
    count, caption = columns.count, columns.captions[0]
    while len(cells) > count and not cells[-1].strip():
        cells = cells[:-1]
    after = count - 1 - caption  # columns behind the caption
    if len(cells) > count and len(columns.captions) == 1:
        end = len(cells) - after
        cells = [*cells[:caption], separator.join(cells[caption:end]), *cells[end:]]
    if (
        len(cells) == 2 and count == 3 and (parts := re.fullmatch(r"\s*(\d+)\s+(.*)", cells[1]))
    ):  # Flickr30k lacks one bar
        cells = [cells[0], *parts.groups()]
    least = max(columns.image, caption, columns.split or 0) + 1
    if least <= len(cells) < count:
        cells = [*cells, *[""] * (count - len(cells))]
    if len(cells) != count:
        hint = f"put a caption that holds {SEPARATORS[separator]} into quotation marks"
        if len(cells) < count:
            hint = "fill in what is missing, or remove the line"
        raise UserError(f"{where} has {len(cells)} columns, not {count}; {hint}")
    return [cell.strip() for cell in cells]


def check_quotes(caption: str, where: str, image: str) -> None:
    """Raise UserError for a caption that has swallowed the lines below it: its quotation mark is not closed."""
    below = caption.splitlines()[1:]
    swallowed = any(re.match(r"[^,;|\t]*\.\w{3,4}\s*[,;|\t]", line) for line in below)
    if swallowed or len(below) > MOST_LINES:
        raise UserError(f"{where}: the caption of {shorten(image)} runs over other lines; close its quotation mark")


def not_understood(path: Path, header: Cells, second: Cells, separator: str) -> str:
    """Say what the first line of a table is, and what would work in its place; the second may show a picture."""
    if header == [""]:
        return f"{path} is empty; write a line image,caption and below it one for each caption"
    workbook = path.suffix.lower() == ".xlsx"
    by = "" if workbook else f" by {SEPARATORS[separator]}"
    parts = f"{len(header)} columns{by}" if len(header) > 1 else "no columns"
    plain, better = [plain_name(name) for name in header], list(header)
    for wanted, known in (("image", IMAGE), ("caption", CAPTION)):
        if find(plain, known) is None and not (wanted == "caption" and any(map(NUMBERED.fullmatch, plain))):
            near = [
                place
                for place, name in enumerate(plain)
                if difflib.get_close_matches(re.sub(r"(en|de|fr|es|it)$", "", name), known, n=1, cutoff=0.7)
            ]
            if len(header) == 2 and not near:  # the other one
                near = [1 - place for place in [find(plain, IMAGE), find(plain, CAPTION)] if place is not None]
            better[near[0] if near else 0] = wanted if near else ""
    pictures = [place for place, cell in enumerate(second) if cell.lower().endswith(PICTURE_SUFFIXES)]
    if "" in better and len(pictures) == 1 and len(second) == len(header) > 1:
        better = list(header)
        better[pictures[0]] = "image"
        if find(plain, CAPTION) is None:  # the longest of the others
            others = [place for place in range(len(second)) if place not in pictures]
            better[max(others, key=lambda place: len(second[place]))] = "caption"
    line = shorten(separator.join(header))
    advice = f"add a first line such as {separator.join(['image', 'caption'])}"
    if len(header) > 2:
        advice = f"add a first line that names all {len(header)} columns, two of them image and caption"
    if len(header) > 1 and "" not in better and better != header:
        advice = f"name them in this line: {shorten(separator.join(better), 200)}"
    return f"{path} starts with {line!r}: {parts}, which do not say where pictures and captions are; {advice}"


def read_rows(path: Path) -> tuple[Iterator[tuple[int, Cells]], str]:
    """Return the rows of a table that are not empty, each with its line, and what separates its cells."""
    with open_file(path) as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        return read_workbook(path), ","
    if start.startswith(b"\xd0\xcf\x11\xe0"):
        raise UserError(f"{path} is a workbook of old Excel versions; save it as .xlsx or CSV")
    text, skipped = read_text(path), 0
    if told := re.match(r"sep=(.)\r?\n", text):  # Excel's own first line
        text, skipped = text[told.end() :], 1
    separator = told[1] if told else choose_separator(text)
    lines = io.StringIO(text, newline="")
    if separator == "|":  # Flickr30k's captions hold single quotes
        reader = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=separator)

    def rows() -> Iterator[tuple[int, Cells]]:
        first = 1 + skipped  # line of a row: a quotation may run over several
        for row in reader:
            if any(cell.strip() for cell in row):
                yield first, row
            first = reader.line_num + 1 + skipped

    return rows(), separator


def choose_separator(text: str) -> str:
    """Return the separator by which one of the first lines names pictures and captions, or the first has a picture."""
    first = list(itertools.islice((line for line in text.splitlines() if line.strip()), TITLES)) or [""]
    rows = {each: [next(csv.reader([line], delimiter=each), []) for line in first] for each in SEPARATORS}
    named = [each for each, lines in rows.items() if any(map(Columns.of, lines))]
    pictures = [each for each, [line, *_] in rows.items() if without_header([cell.strip() for cell in line])]
    return (*named, *pictures, max(SEPARATORS, key=lambda each: len(rows[each][0])))[0]


def read_workbook(path: Path) -> Iterator[tuple[int, Cells]]:
    """Yield the rows of the first sheet of an Excel workbook."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{path} is a workbook, for which openpyxl is needed; run: pip install -r requirements-extras.txt, "
            "or save it as CSV"
        ) from None
    try:
        with zipfile.ZipFile(path) as content:
            unpacked = sum(member.file_size for member in content.infolist())
        if unpacked > MOST_OF_WORKBOOK:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, and at most {MOST_OF_WORKBOOK:,} are read")
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        # With bounds, since a cell in the last row and column that Excel has fills up all others.
        rows: Iterator[tuple[Any, ...]] = sheet.iter_rows(max_row=MOST_ROWS, max_col=MOST_COLUMNS, values_only=True)
        filled = [(line, row) for line, row in enumerate(rows, start=1) if any(cell is not None for cell in row)]
    except Exception as error:  # whatever a damaged zip or XML makes openpyxl raise
        reason = shorten(" ".join(str(error).split()), 200)
        raise UserError(f"{path} is not a workbook that can be read ({reason}); save it as CSV") from None
    for line, row in filled:
        cells = ["" if cell is None else str(cell).strip() for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            yield line, cells


def read_text(path: Path) -> str:
    """Return a file's text, in UTF-8 or UTF-16, or of Windows' European encoding; raises UserError for another one."""
    raw = read_file(path)
    encoding = encoding_of(raw)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        foreign = sum(byte > 127 for byte in raw) / len(raw)
    if encoding != "utf-8-sig" or foreign > FOREIGN:
        raise UserError(f"{path} is text in an encoding that is not known here; save it as UTF-8")
    say(f"{path} is not in UTF-8: read as Windows-1252, the encoding of Excel in Europe and America")
    return raw.decode("cp1252", errors="replace")


def encoding_of(raw: bytes) -> str:
    """Return the encoding that the first bytes of a text tell: UTF-16 by its mark or its zeros, or else UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\0" in raw[:1000]:
        return "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
    return "utf-8-sig"
