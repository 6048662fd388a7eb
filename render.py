"""Drawing for people: a picture with its caption below it, and the page of captioned pictures.

Pillow and the standard library only, so that scripts can import this without waiting; the page's looks and behaviour
are in render.html.
"""

import functools
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import matplotlib
from PIL import Image, ImageDraw, ImageFont

LONGEST_SIDE = (448, 800)  # small pictures are enlarged until text beside them reads well, large ones shrunk
SHORTEST_SIDE = 240  # thinner pictures lie on a background this wide, so that a caption has room
LONGEST_CAPTION = 600  # characters drawn; a model that never ends must not draw a tower
BACKGROUND = (226, 228, 231)
PAPER = (250, 250, 249)
INK = (31, 35, 40)

PAGE = Path(__file__).with_name("render.html")
ROWS, SCORES = "/* rows */", "/* scores */"  # where the page's template takes its data

# Control characters, marks that turn the direction of the text after them, and halves of characters.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
CJK_FONTS = (
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
    caption = plain(caption)
    width, height = fit(picture.size)
    font = load_font(16 + width // 100, bool(CJK.search(caption)))
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


@functools.cache
def load_font(size: int, cjk: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans, or, for Chinese, Japanese and Korean, the first such font installed here."""
    for name in CJK_FONTS if cjk else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


# ---- the page of captioned pictures ----------------------------------------------------------------------------------


class Gallery:
    """Writes one HTML file that shows captioned pictures and searches them; each is written as it comes.

    Use as `with Gallery(path, title, subtitle) as gallery:`. The page appears, whole, when the block ends; if it ends
    in an exception, an older page stays as it was. Raises OSError when the disk cannot take it.
    """

    def __init__(self, path: str | Path, title: str, subtitle: str = "") -> None:
        self.path = Path(path)
        page = PAGE.read_text(encoding="utf-8")
        head, self._tail = page.split(ROWS)
        texts = {"{{title}}": title, "{{subtitle}}": subtitle}
        self._head = re.sub("{{title}}|{{subtitle}}", lambda found: html.escape(plain(texts[found[0]])), head)
        self._scores: list[float | None] = []
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def __enter__(self) -> Self:
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
    ) -> None:
        """Add a picture and its captions, the best first.

        The page shows the top of the picture, `size` (width, height) in proportion, and so leaves out a strip drawn
        below it: give `fit(picture.size)` for what `draw_caption` made.

        Args:
            image: its path relative to the page, with forward slashes.
            name: is shown below it.
            probabilities: how probable each caption is per word, between 0 and 1, where that is to be shown.
        """
        url = "./" + quote(image, errors="surrogateescape")  # "./": never taken for a scheme or a host
        texts = [[plain(text) for text in group] for group in (captions, references)]
        rounded = [float(f"{probability:.3g}") for probability in probabilities]
        row = [url, texts[0], rounded, texts[1], *size, plain(name)]
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


def script_safe(code: str) -> str:
    """Escape in JSON what could end the script it stands in, or a string literal."""
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", code)
