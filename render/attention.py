"""Attention heat-maps: the regions of a picture that a decoder attended to as it generated each word."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image, ImageDraw

from models.model import Caption
from render.caption import INK, PAPER, display_size, wrap
from render.fonts import UNPRINTABLE, choose_font, plain_text

SHADE, OPACITY = (38, 44, 56), 0.75  # laid over regions without attention; grey shows on black pictures too
PANEL_SIZE = 240  # pixels of the longer side of the picture in a panel
MIN_PANEL_WIDTH = 120  # so that the word above it has room
TITLE_SIZE, MARGIN = 17, 12  # pixels


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of each word over the regions of a picture: `alphas` (words, side, side)."""

    words: Sequence[str]
    alphas: np.ndarray

    @classmethod
    def of(cls, caption: Caption, heads: slice | None = None) -> Self | None:
        """Return the mean of the given heads, or of all; None where the caption was generated without its attention."""
        if caption.attention is None:
            return None
        alphas = caption.attention[:, heads or slice(None)].mean(1).float().cpu()  # (words, A, L) → (words, L)
        side = math.isqrt(alphas.shape[1])
        return cls(caption.words, alphas.unflatten(1, (side, side)).numpy())

    def levels(self) -> np.ndarray:
        """Return the alphas as uint8 (words, side, side), each word's scaled so that its largest is 255."""
        return np.rint(255 * self.alphas / self.alphas.max(axis=(1, 2), keepdims=True)).astype(np.uint8)


def heat_map(picture: Image.Image, level: np.ndarray) -> Image.Image:
    """Shade the picture where `level`, uint8 (side, side) for the regions of the whole picture, is low."""
    mask = Image.fromarray(level).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, SHADE), OPACITY), mask)


def draw_attention(picture: Image.Image, attention: AttentionMaps) -> Image.Image:
    """Return an RGB sheet of panels: the picture, then for each word its heat-map, with the word above it."""
    size = display_size(picture.size, PANEL_SIZE, PANEL_SIZE)
    scaled = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    panels = [scaled, *(heat_map(scaled, level) for level in attention.levels())]
    titles = ["", *map(plain_text, attention.words)]

    # As many columns as make the sheet about 1.5 times as wide as it is high, in rows of equal length.
    panel_width = max(size[0], MIN_PANEL_WIDTH)
    width, height = panel_width + MARGIN, round(1.5 * TITLE_SIZE) + size[1] + MARGIN
    columns = min(len(panels), max(1, round(math.sqrt(1.5 * len(panels) * height / width))))
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)

    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left, top = MARGIN + number % columns * width, (1 + number // columns) * height - size[1]
        title, font = choose_font(title, TITLE_SIZE)
        if font.getlength(title) > panel_width:
            title = wrap(title, font, panel_width - round(font.getlength("…")))[0] + "…"
        draw.text((left, top - 0.4 * TITLE_SIZE), title, INK, font, anchor="ls")
        sheet.paste(panel, (left, top))
    return sheet


def split_before(caption: str, words: Sequence[str]) -> list[str]:
    """Split a caption before each of the words that it consists of: `["a", " dog", "'s", " toy"]`.

    Spaces are ignored in finding the words: some tokenisers join words without them, and a word may contain some.
    """
    ends = [position for position, character in enumerate(caption, start=1) if character != " "]
    counts = itertools.accumulate(len(word.replace(" ", "")) for word in words)
    cuts = [0, *(ends[count - 1] if count else 0 for count in counts)]
    return [UNPRINTABLE.sub(" ", caption[start:end]) for start, end in itertools.pairwise(cuts)]
