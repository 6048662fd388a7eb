"""Heat-maps: the panels of draw_attention, and the gallery's words that show their attention, in a real browser."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOSTILE, browse, captions, needs_chromium, read_rows, title
from PIL import Image

from data.vocab import TOKENISERS
from render import gallery
from render.attention import AttentionMaps, draw_attention, heat_map, split_before
from render.caption import NO_WORDS, PAPER
from render.fonts import plain_text

REGIONS = [(0, 0), (2, 4), (6, 6), (0, 6)]


def one_hot(*regions: tuple[int, int], side: int = 7) -> np.ndarray:
    """Return alphas (words, side, side): for each word all attention on one region (row, column)."""
    alphas = np.zeros((len(regions), side, side), np.float32)
    for word, (row, column) in enumerate(regions):
        alphas[word, row, column] = 1
    return alphas


@pytest.mark.parametrize("size", [(240, 240), (240, 160), (161, 240), (500, 33)])
@pytest.mark.parametrize("region", [(0, 0), (0, 6), (2, 5), (5, 1), (6, 6)])
def test_a_heat_map_covers_the_picture_region_by_region(size: tuple[int, int], region: tuple[int, int]) -> None:
    level = 255 * one_hot(region)[0].astype(np.uint8)
    shown = np.asarray(heat_map(Image.new("RGB", size, "white"), level).convert("L"), float)
    rows, columns = np.nonzero(shown > shown.min() + 0.9 * (shown.max() - shown.min()))
    for place, pixels, length in zip(region, (rows, columns), reversed(size), strict=True):
        assert place - 0.3 < pixels.min() * 7 / length and pixels.max() * 7 / length < place + 1.3
    assert shown[rows, columns].min() > 230
    assert np.median(shown) == shown.min() < 110


def test_regions_without_attention_are_shaded_on_black_pictures_too() -> None:
    shown = np.asarray(heat_map(Image.new("RGB", (70, 70)), 255 * one_hot((3, 3))[0].astype(np.uint8)))
    assert shown[35, 35].max() < 5 and shown[5, 5].min() > 25


def test_each_map_is_relative_to_its_own_largest_weight() -> None:
    alphas = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.25, 0.25], [0.25, 0.25]]])
    levels = AttentionMaps(["a", "dog"], alphas).levels()
    assert levels.tolist() == [[[64, 128], [191, 255]], [[255, 255], [255, 255]]]


def find_panels(sheet: np.ndarray, width: int, height: int) -> list[tuple[int, int]]:
    """Return the (top, left) of each rectangle of this size without paper, in reading order."""
    total = np.pad((sheet != PAPER).any(2).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    covered = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    return [(top, left) for top, left in np.argwhere(covered == width * height).tolist()]


def test_the_sheet_has_the_picture_and_then_a_titled_panel_for_each_word() -> None:
    blue = Image.new("RGB", (600, 400), (40, 90, 200))
    regions = [(number % 7, number * 3 % 7) for number in range(13)]
    sheet = np.asarray(draw_attention(blue, AttentionMaps(["word"] * 13, one_hot(*regions))))
    (top, left), *words = find_panels(sheet, 240, 160)
    assert (sheet[top : top + 160, left : left + 240] == (40, 90, 200)).all()
    assert len(words) == 13
    for (top, left), region in zip(words, regions, strict=True):
        panel = sheet[top : top + 160, left : left + 240]
        clear = np.argwhere((panel == (40, 90, 200)).all(2)).mean(0)
        assert np.abs(clear * 7 / [160, 240] - region - 0.5).max() < 0.5
        assert (sheet[top - 24 : top, left : left + 240].mean(2) < 128).sum() > 20  # the title
        assert (sheet[top - 2 : top, left - 10 : left + 250] == PAPER).all()
        assert (sheet[top : top + 160, [left - 1, left + 240]] == PAPER).all()
    assert 1 < sheet.shape[1] / sheet.shape[0] < 2


def test_titles_are_plain_and_no_wider_than_their_panels() -> None:
    picture = Image.new("RGB", (50, 240), "black")  # panels are 120 wide, for the titles

    def sheet(*words: str) -> np.ndarray:
        return np.asarray(draw_attention(picture, AttentionMaps(words, one_hot(*[(0, 0)] * len(words)))))

    assert (sheet("dog\u202e") == sheet("dog")).all()
    titles = sheet("x" * 50, "x" * 50)[:36]
    assert (titles[:, 12 + 2 * 132 - 12 : 12 + 2 * 132] == PAPER).all()  # between the panels of the two words
    assert (titles < 128).sum() > (sheet("xxxxx", "xxxxx")[:36] < 128).sum()


@pytest.mark.parametrize("size", [(30000, 10), (10, 30000), (1, 1)])
def test_a_picture_of_any_shape_gives_a_sheet_of_bearable_size(size: tuple[int, int]) -> None:
    for words in (0, 1, 60):
        maps = AttentionMaps(["dog"] * words, one_hot(*[(0, 1)] * words))
        assert max(draw_attention(Image.new("RGB", size), maps).size) < 4000


@pytest.mark.parametrize("language", ["en", "zh-characters"])
@pytest.mark.parametrize(
    "words", [["a", "dog", "'s", "toy"], ["一", "件", "red", "t恤"], ["x = 'y'", "a  'b", " ", "c"]]
)
def test_a_caption_is_split_before_its_words_however_they_were_joined(words: list[str], language: str) -> None:
    caption = TOKENISERS[language]().join(words)
    pieces = split_before(caption, words)
    assert "".join(pieces) == caption
    assert [piece.replace(" ", "") for piece in pieces] == [word.replace(" ", "") for word in words]


@pytest.fixture(scope="module")
def attention_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a narrow picture, whose words attend to REGIONS, and with hostile captions."""

    def row(name: str, words: list[str], regions: list[tuple[int, int]], texts: list[str]) -> dict[str, Any]:
        size = (896, 128) if name == "a.jpg" else (448, 448)
        return gallery.row(name, texts, size=size, name=name, attention=AttentionMaps(words, one_hot(*regions)))

    rows = [row("a.jpg", ["a", "dog", "'s", "toy"], REGIONS, ["a dog's toy", "a toy"])]
    for text in [*HOSTILE, "\u202efdp.exe"]:
        rows.append(row("b.jpg", text.split(" "), [(1, 1)] * len(text.split(" ")), [text]))
    page = tmp_path_factory.mktemp("gallery") / "page.html"
    page.write_text(gallery.page("Flickr8k <test>", "", [*rows, row("c.jpg", [], [], [""])]), encoding="utf-8")
    return page


def test_a_row_holds_the_words_with_their_spaces_and_their_alphas(attention_page: Path) -> None:
    first, *_, empty = read_rows(attention_page)
    assert first["captions"] == ["a dog's toy", "a toy"]
    assert first["attention"]["words"] == ["a", " dog", "'s", " toy"]
    assert list(base64.b64decode(first["attention"]["alphas"])) == (255 * one_hot(*REGIONS)).flatten().tolist()
    assert (first["picture_size"], first["frame_size"]) == ([800, 114], [800, 240])
    assert "attention" not in empty


@needs_chromium
def test_hostile_words_are_harmless_one_by_one_too(attention_page: Path) -> None:
    dom = browse(attention_page)
    assert title(dom) == "Flickr8k <test>"
    assert list(map(plain_text, captions(dom))) == ["a dog's toy", *map(plain_text, HOSTILE), "fdp.exe", NO_WORDS]
    assert re.findall('<span class="word" tabindex="0">(.*?)</span>', dom)[:4] == ["a", "dog", "'s", "toy"]
    assert captions(dom, "other") == ["a toy"]


@needs_chromium
def test_the_word_pointed_at_or_focused_last_shows_its_attention_until_it_is_left(attention_page: Path) -> None:
    hostile = [HOSTILE[0].split(" ")[0], "b.jpg", [[1, 1]]]
    steps: list[tuple[str, int, list[Any]]] = [  # an event, at which word (negative: elsewhere), and what is shown then
        ("pointerover", 1, [["dog", "a.jpg", [[2, 4]]]]),
        ("focusin", 3, [["toy", "a.jpg", [[0, 6]]]]),
        ("pointerover", 0, [["a", "a.jpg", [[0, 0]]]]),
        ("pointerover", -1, [["toy", "a.jpg", [[0, 6]]]]),
        ("focusout", 3, []),
        ("focusin", 2, [["'s", "a.jpg", [[6, 6]]]]),
        ("pointerover", 4, [hostile]),
        ("focusout", 2, [hostile]),
        ("pointerover", -2, []),
    ]
    script = f"""{{
      const words = [...document.querySelectorAll(".word")], regions = [...Array(49).keys()], seen = [];
      for (const [event, word] of {json.dumps([step[:2] for step in steps])}) {{
        (words[word] ?? document.body).dispatchEvent(new Event(event, {{bubbles: true}}));
        seen.push([...document.querySelectorAll("canvas")].map(canvas => {{
          const opacity = ([row, column]) => canvas.getContext("2d").getImageData(
            (column + 0.5) / 7 * canvas.width, (row + 0.5) / 7 * canvas.height, 1, 1).data[3];
          const clear = regions.map(region => [Math.floor(region / 7), region % 7]).filter(at => opacity(at) < 77);
          const active = document.querySelector(".word.active").textContent;
          return [active, canvas.parentNode.querySelector("img").alt, clear];
        }}));
      }}
      document.title = JSON.stringify(seen);
    }}"""
    assert json.loads(title(browse(attention_page, script=script))) == [shown for _, _, shown in steps]


@needs_chromium
def test_the_heat_map_covers_the_picture_and_not_the_margin_of_a_narrow_one(attention_page: Path) -> None:
    script = """{
      document.querySelector(".word").dispatchEvent(new Event("pointerover", {bubbles: true}));
      const canvas = document.querySelector("canvas"), image = canvas.parentNode.querySelector("img");
      const [own, picture] = [canvas, image].map(node => node.getBoundingClientRect());
      const margin = (own.height - own.width * canvas.height / canvas.width) / 2 / own.width;
      const places = [own.left - picture.left, own.top - picture.top, own.width - picture.width, margin];
      document.title = [getComputedStyle(canvas).objectFit, ...places];
    }"""
    fitted, *places = title(browse(attention_page, script=script)).split(",")
    assert fitted == "contain"
    assert list(map(float, places)) == pytest.approx([0, 0, 0, (240 - 114) / 2 / 800], abs=2e-3)
