"""The fonts of captions and titles, which characters they have, and text made safe to draw."""

import contextlib
import functools
import re
import unicodedata
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont, features

# Tried in this order: DejaVu Sans, which comes with matplotlib, then fonts with Chinese characters where installed.
FONTS = (
    str(Path(find_spec("matplotlib").origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf"),  # type: ignore
    *("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),  # Linux
    *("PingFang.ttc", "Hiragino Sans GB.ttc"),  # macOS
    *("msyh.ttc", "simsun.ttc"),  # Windows
    # Thai, Hindi and others: Linux, macOS, Windows
    *("NotoSansThai-Regular.ttf", "Loma.ttf", "NotoSansDevanagari-Regular.ttf", "NotoSansBengali-Regular.ttf"),
    *("NotoSansTamil-Regular.ttf", "NotoSansKhmer-Regular.ttf", "NotoSansMyanmar-Regular.ttf", "FreeSerif.ttf"),
    *("Thonburi.ttc", "Kohinoor.ttc", "leelawui.ttf", "Nirmala.ttf", "Nirmala.ttc"),
)
ASCII = frozenset(map(chr, range(32, 127)))
# Hebrew, Arabic and Syriac, the scripts of India, Thai to Burmese, and Khmer.
SHAPED = re.compile("[\u0590-\u08ff\u0900-\u0dff\u0e80-\u0fff\u1000-\u109f\u1780-\u17ff\ufb1d-\ufdff\ufe70-\ufeff]")
JOINERS = frozenset("\u200d\ufe0f")  # invisible characters that combine emoji; no loss if a font lacks them
# Control characters, marks that change the direction of writing, and surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

load_font = functools.cache(ImageFont.truetype)


def plain_text(text: str) -> str:
    """Return `text` on one line, with a space in place of control characters and direction marks."""
    return " ".join(UNPRINTABLE.sub(" ", text).split())


def choose_font(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return `text` without the characters that its font lacks, and this font, the one that has the most of them."""
    path, characters = best_font(text)
    return "".join(character for character in text if character in characters), load_font(path, size)


def is_right_to_left(text: str) -> bool:
    """Whether a text begins in a script that is written from right to left."""
    directions = (unicodedata.bidirectional(character) for character in text)
    return next((each for each in directions if each in ("L", "R", "AL")), "L") != "L"


def needs_shaping(text: str) -> bool:
    """Whether letters take other forms side by side, or run from right to left, which Pillow leaves to Raqm."""
    return bool(SHAPED.search(text))


def undrawable(text: str) -> set[str]:
    """Return the characters of `text` that are left out when it is drawn, because its font lacks them, or Pillow what
    shapes them.
    """
    if needs_shaping(text) and not features.check("raqm"):
        return set(SHAPED.findall(text))
    return set(text) - best_font(text)[1] - JOINERS


def advice(characters: str) -> str:
    """Return what to install for characters that cannot be drawn."""
    if needs_shaping(characters) and not features.check("raqm"):
        return "Pillow lacks Raqm here, which shapes this script: install a Pillow from PyPI"
    if re.search("[\u2e80-\u9fff\uac00-\ud7af]", characters):
        return "for Chinese: apt install fonts-noto-cjk, or pip install -r requirements-extras.txt"
    return "install a font of this script, such as those of: apt install fonts-noto-core"


def best_font(text: str) -> tuple[str, frozenset[str]]:
    """Return the path and the characters of the font that has the most characters of `text`, the first of equals."""
    if text.isascii():  # which DejaVu has, and looking into fonts takes a moment
        return FONTS[0], ASCII
    return min(installed_fonts(), key=lambda font: len(set(text) - font[1]))


@functools.cache
def installed_fonts() -> list[tuple[str, frozenset[str]]]:
    """Return the path and the characters of each of FONTS that is installed, and of the one in the package zhplot."""
    names = list(FONTS)
    package = find_spec("zhplot")  # of requirements-extras.txt
    if package and package.origin:
        names.append(str(Path(package.origin).with_name("fonts") / "NotoSansSC-Regular.ttf"))
    from matplotlib import ft2font

    found = []
    for name in names:
        with contextlib.suppress(OSError):  # not installed
            path = str(load_font(name, 16).path)
            found.append((path, frozenset(map(chr, ft2font.FT2Font(path).get_charmap()))))
    return found
