"""Drawing for people: a picture with its caption below it or with what each word looked at, and the page of them all.

Needs Pillow, NumPy and matplotlib's font tools only, so that scripts can import this without waiting; the page's looks
and behaviour are in render.html.
"""

import base64
import contextlib
import functools
import html
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib import ft2font
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from models.model import Caption

LONGEST_SIDE = (448, 800)  # small pictures are enlarged until text next to them reads well, large ones shrunk
SHORTEST_SIDE = 240  # thinner pictures lie on a background this wide, so that a caption has room
NO_WORDS = "(no words)"  # shown for an empty caption
LONGEST_CAPTION = 600  # characters drawn; a model that never ends must not draw a tower
BACKGROUND = (226, 228, 231)
PAPER = (250, 250, 249)
INK = (31, 35, 40)

PANEL_SIDE = 240  # the longer one of a panel's picture
NARROWEST_PANEL = 120  # a word needs room
MOST_PANELS = 60  # words drawn; a model that never ends must not draw a tower
SHADE, OPACITY = (38, 44, 56), 0.75  # over what is not looked at, as on the page; grey, to be seen on black too

PAGE = Path(__file__).with_name("render.html")
ROWS, SCORES = "/* rows */", "/* scores */"  # where the page's template takes its data
ATTENTION = re.compile(r"/\* attention \*/\n(.*?)/\* end \*/\n(\n?)", re.DOTALL)  # only for a page with it

INVISIBLE = frozenset("\u200d\ufe0f")  # they join emoji
# Control characters, marks that turn the direction of the text after them, and halves of characters.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
FONTS = (
    str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
    *("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),  # Linux
    *("PingFang.ttc", "Hiragino Sans GB.ttc"),  # macOS
    *("msyh.ttc", "simsun.ttc"),  # Windows
)


def plain(text: str) -> str:
    """Return `text` on one line, without what would disturb the text around it."""
    return " ".join(UNPRINTABLE.sub(" ", text).split())


# ---- a picture and its caption ---------------------------------------------------------------------------------------


def fit(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that a picture of `size` takes at the top of what `draw_caption` returns."""
    width, height = scale(size)
    return max(width, SHORTEST_SIDE), max(height, SHORTEST_SIDE)


def scale(size: tuple[int, int]) -> tuple[int, int]:
    """Return `size` with its longest side brought between the two of LONGEST_SIDE, proportions kept."""
    smallest, largest = LONGEST_SIDE
    factor = min(max(max(size), smallest), largest) / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def draw_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Return an RGB picture, resized to `fit(picture.size)`, with its caption on a strip of paper below it."""
    caption = plain(caption) or NO_WORDS
    width, height = fit(picture.size)
    caption, font = drawable(caption, 16 + width // 100)
    margin, line_height = round(0.7 * font.size), round(1.4 * font.size)
    lines = wrap(shorten(caption), font, width - 2 * margin)

    sheet = Image.new("RGB", (width, height + len(lines) * line_height + 2 * margin), PAPER)
    scaled = picture.resize(scale(picture.size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if scaled.size != (width, height):
        sheet.paste(BACKGROUND, (0, 0, width, height))
    sheet.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))

    draw = ImageDraw.Draw(sheet)
    baseline = height + margin + (line_height + 0.7 * font.size) / 2  # 0.7: the height of a capital
    for number, line in enumerate(lines):
        draw.text((margin, round(baseline + number * line_height)), line, INK, font, anchor="ls")
    return sheet


def shorten(caption: str) -> str:
    return caption if len(caption) <= LONGEST_CAPTION else caption[: LONGEST_CAPTION - 1] + "…"


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels: between words, and inside a word longer than a line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines += break_word(word, font, width)
    return lines or [""]


def break_word(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    if font.getlength(word) <= width:
        return [word]
    pieces = [""]
    for character in word:
        if font.getlength(pieces[-1] + character) <= width:
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return `text` without the characters that `undrawable` tells, and the font that has the others."""
    font, glyphs = best_font(text)
    return "".join(character for character in text if character in glyphs), load_font(font, size)


def undrawable(text: str) -> set[str]:
    """Return the characters of `text` that are not in the font that has most of them."""
    return set(text) - best_font(text)[1] - INVISIBLE


def best_font(text: str) -> tuple[str, frozenset[str]]:
    """Return the font that lacks the fewest characters of `text`, and the characters it has."""
    return min(fonts(), key=lambda font: len(set(text) - font[1]))


@functools.cache
def fonts() -> list[tuple[str, frozenset[str]]]:
    """Return the fonts there are, each with its characters: DejaVu Sans of matplotlib, and Chinese ones."""
    found = []
    for name in (*FONTS, *packaged_fonts()):
        with contextlib.suppress(OSError):
            path = str(load_font(name, 16).path)
            found.append((path, frozenset(map(chr, ft2font.FT2Font(path).get_charmap()))))
    return found


def packaged_fonts() -> list[str]:
    """Return the Chinese font that comes with the Python package zhplot, where that is installed."""
    package = importlib.util.find_spec("zhplot")
    places = package.submodule_search_locations if package else None
    return [str(Path(place, "fonts", "NotoSansSC-Regular.ttf")) for place in places or ()]


@functools.cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size)


# ---- a picture and its attention maps --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordMaps:
    """Where a model looked as it wrote each of `words`: `maps` (words, side, side), each over the whole picture."""

    words: Sequence[str]
    maps: np.ndarray

    @classmethod
    def of(cls, caption: "Caption", heads: slice | None = slice(None)) -> Self | None:
        """Return the mean of these of the decoder's heads, or None where there are none or no maps were kept."""
        if heads is None or caption.attention is None:
            return None
        maps = caption.attention[:, heads].mean(1).float().cpu()  # (words, L)
        side = math.isqrt(maps.shape[1])
        return cls(caption.words, maps.unflatten(1, (side, side)).numpy())

    def levels(self) -> np.ndarray:
        """Return the maps as uint8 (words, side, side), the strongest cell of each being 255."""
        return np.rint(255 * self.maps / self.maps.max(axis=(1, 2), keepdims=True)).astype(np.uint8)


def draw_attention(picture: Image.Image, looks: WordMaps) -> Image.Image:
    """Return an RGB sheet of panels: the picture, then for each word the picture, shaded where it was not looked at."""
    factor = PANEL_SIDE / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    scaled = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    titles = [plain(word) for word in looks.words[:MOST_PANELS]]
    if len(looks.words) > MOST_PANELS:
        titles[-1] += " …"
    panels = [light(scaled, level) for level in looks.levels()[:MOST_PANELS]]
    return arrange(["", *titles], [scaled, *panels], (max(size[0], NARROWEST_PANEL), size[1]))


def light(picture: Image.Image, level: np.ndarray) -> Image.Image:
    """Shade the picture but where `level`, uint8 (side, side), is high; its cells lie over the whole picture."""
    mask = Image.fromarray(level).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, SHADE), OPACITY), mask)


def arrange(titles: list[str], panels: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Return a sheet, about half as wide again as high, of panels in boxes of `size` (width, height), titled above."""
    font_size, margin = 17, 12
    width, height = size[0] + margin, size[1] + margin + round(1.5 * font_size)
    columns = min(len(panels), max(1, round(math.sqrt(1.5 * len(panels) * height / width))))
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left, bottom = margin + number % columns * width, (1 + number // columns) * height
        title, font = drawable(title, font_size)
        draw.text((left, bottom - size[1] - 0.4 * font_size), cut(title, font, size[0]), INK, font, anchor="ls")
        sheet.paste(panel, (left, bottom - size[1]))
    return sheet


def cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return `text`, cut to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    return break_word(text, font, width - round(font.getlength("…")))[0] + "…"


# ---- the page of captioned pictures ----------------------------------------------------------------------------------


class Gallery:
    """Writes one HTML file that shows captioned pictures and searches them; each is written as it comes.

    Use as `with Gallery(path, title, subtitle) as gallery:`. The page appears, whole, when the block ends; if it ends
    in an exception, an older page stays as it was. With `attention`, the words of a caption light what they looked at.
    Raises OSError when the disk cannot take it.
    """

    def __init__(self, path: str | Path, title: str, subtitle: str = "", attention: bool = False) -> None:
        self.path = Path(path)
        page = ATTENTION.sub(r"\1\2" if attention else "", PAGE.read_text(encoding="utf-8"))
        head, self._tail = page.split(ROWS)
        texts = {"{{title}}": title, "{{subtitle}}": subtitle}
        self._head = re.sub("{{title}}|{{subtitle}}", lambda found: html.escape(plain(texts[found[0]])), head)
        self._scores: list[float | None] = []
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def __enter__(self) -> Self:
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "w", encoding="utf-8", newline="\n")
        self._file.write(self._head)
        return self

    def add(
        self,
        image: str,
        captions: Sequence[str],
        references: Sequence[str] = (),
        *,
        size: tuple[int, int],
        name: str,
        probabilities: Sequence[float] = (),
        looks: WordMaps | None = None,
    ) -> None:
        """Add a picture, as `draw_caption` made it, and its captions, the best first.

        Args:
            image: its path relative to the page, with forward slashes.
            size: (width, height) of the picture itself; the page leaves out the strip below it.
            name: is shown below it.
            probabilities: how probable each caption is per word, between 0 and 1, where that is to be shown.
            looks: of the words of the best caption, in a page with attention.
        """
        url = "./" + quote(image, errors=sys.getfilesystemencodeerrors())  # "./": never taken for a scheme or a host
        texts = [[plain(text) or NO_WORDS for text in group] for group in (captions, references)]
        rounded = [float(f"{probability:.3g}") for probability in probabilities]
        row: list[Any] = [url, texts[0], rounded, texts[1], *fit(size), plain(name)]
        if looks and looks.words:
            maps = base64.b64encode(looks.levels().tobytes()).decode()
            row.append([split_before(captions[0], looks.words), maps, *scale(size)])
        self._file.write(script_safe(json.dumps(row, ensure_ascii=False, separators=(",", ":"))) + ",\n")

    def score(self, scores: Sequence[float | None]) -> None:
        """Give each picture added its score, x100, or None, in their order; the page can then be sorted by it."""
        self._scores = [None if score is None else round(score, 1) for score in scores]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file as file:
                if kind is None:
                    file.write(self._tail.replace(SCORES, json.dumps(self._scores, separators=(",", ":"))))
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
            if kind and self._made_folder:
                with contextlib.suppress(OSError):  # it is not empty
                    self.path.parent.rmdir()


def split_before(caption: str, words: Sequence[str]) -> list[str]:
    """Split a caption before each of `words`, which it is made of: `["a", " dog", "'s", " toy"]`.

    Tokenisers join words with blanks or without, and a stranger's word may have blanks of its own: they do not count.
    """
    ends = [place for place, character in enumerate(caption, start=1) if character != " "]
    counts = itertools.accumulate(len(word.replace(" ", "")) for word in words)
    places = [0, *(ends[count - 1] if count else 0 for count in counts)]
    return [UNPRINTABLE.sub(" ", caption[start:end]) for start, end in itertools.pairwise(places)]


def script_safe(code: str) -> str:
    """Escape in JSON what could end the script it stands in, or a string literal."""
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", code)
