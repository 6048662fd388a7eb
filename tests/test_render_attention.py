"""What people see of attention: panels, and the page whose words light their places, opened in a real browser."""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from test_render import BLUE, HOSTILE, browse, captions, ink, needs_chromium, picture

import render
from data.vocab import TOKENISERS

CELLS = [(0, 0), (2, 4), (6, 6), (0, 6)]


def one_hot(*cells: tuple[int, int], side: int = 7) -> np.ndarray:
    """Return a map for each cell (row, column) that is looked at alone."""
    maps = np.zeros((len(cells), side, side), np.float32)
    for number, (row, column) in enumerate(cells):
        maps[number, row, column] = 1
    return maps


@pytest.mark.parametrize("size", [(240, 240), (240, 160), (161, 240), (500, 33)])
@pytest.mark.parametrize("cell", [(0, 0), (0, 6), (2, 5), (5, 1), (6, 6)])
def test_a_map_lies_over_the_whole_picture_cell_by_cell(size: tuple[int, int], cell: tuple[int, int]) -> None:
    white = Image.new("RGB", size, "white")
    lit = np.asarray(render.light(white, 255 * one_hot(cell)[0].astype(np.uint8)).convert("L"), float)
    rows, columns = np.nonzero(lit > lit.min() + 0.9 * (lit.max() - lit.min()))
    tops, lefts = rows * 7 / size[1], columns * 7 / size[0]  # in cells
    assert cell[0] - 0.3 < tops.min() and tops.max() < cell[0] + 1.3
    assert cell[1] - 0.3 < lefts.min() and lefts.max() < cell[1] + 1.3
    assert lit[rows, columns].min() > 230
    assert np.median(lit) == lit.min() < 110


def test_what_is_not_looked_at_is_shaded_also_where_the_picture_is_black() -> None:
    lit = render.light(Image.new("RGB", (70, 70)), 255 * one_hot((3, 3))[0].astype(np.uint8))
    assert np.asarray(lit)[35, 35].max() < 5
    assert np.asarray(lit)[5, 5].min() > 25


def test_each_map_is_shown_relative_to_its_own_strongest_cell() -> None:
    maps = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.25, 0.25], [0.25, 0.25]]])
    levels = render.WordMaps(["a", "dog"], maps).levels()
    assert levels.tolist() == [[[64, 128], [191, 255]], [[255, 255], [255, 255]]]


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The titles and panels of the sheet drawn last, before they are arranged."""
    seen: dict[str, list[Any]] = {}

    def note(titles: list[str], panels: list[Image.Image], size: tuple[int, int]) -> Image.Image:
        seen.update(titles=titles, panels=panels)
        return arrange(titles, panels, size)

    arrange = render.arrange
    monkeypatch.setattr(render, "arrange", note)
    return seen


def test_the_sheet_has_the_picture_and_a_titled_panel_for_each_word(arranged: dict[str, list[Any]]) -> None:
    cells = [(0, 0), (6, 6), (3, 2)]
    render.draw_attention(picture(600, 400), render.WordMaps(["a", "dog\u202e", "'s"], one_hot(*cells)))
    assert arranged["titles"] == ["", "a", "dog", "'s"]
    whole, *panels = arranged["panels"]
    assert whole.size == (240, 160) and whole.getcolors() == [(240 * 160, BLUE)]
    for panel, (row, column) in zip(panels, cells, strict=True):
        lit = np.argwhere(np.asarray(ImageChops.difference(panel, whole).convert("L")) == 0).mean(0)
        assert np.abs(lit * 7 / [160, 240] - [row + 0.5, column + 0.5]).max() < 0.5


def test_panels_stand_in_reading_order_below_their_titles_and_apart() -> None:
    colours = [(10 * number, 255 - 10 * number, 100) for number in range(14)]
    panels = [Image.new("RGB", (120, 80), colour) for colour in colours]
    sheet = np.asarray(render.arrange(["word"] * 14, panels, (120, 80)))
    corners = []
    for colour in colours:
        rows, columns = np.nonzero((sheet == colour).all(2))
        top, left = rows.min(), columns.min()
        assert len(rows) == 120 * 80 and (rows.max() - top, columns.max() - left) == (79, 119)
        assert ink(Image.fromarray(sheet[top - 24 : top, left : left + 120])) > 20
        assert (sheet[top - 2 : top, left - 10 : left + 130] == render.PAPER).all()
        assert (sheet[top : top + 80, [left - 1, left + 120]] == render.PAPER).all()
        corners.append((top, left))
    assert corners == sorted(corners)
    assert 1 < sheet.shape[1] / sheet.shape[0] < 2


def test_a_title_wider_than_its_panel_is_cut() -> None:
    _, font = render.drawable("dog", 17)
    assert render.cut("dog", font, 120) == "dog"
    assert re.fullmatch("x{5,}…", render.cut("x" * 50, font, 120))
    assert font.getlength(render.cut("x" * 50, font, 120)) <= 120


@pytest.mark.parametrize("size", [(30000, 10), (10, 30000), (1, 1)])
@pytest.mark.parametrize("words", [0, 1, 1000])
def test_any_shape_and_length_gives_a_sheet_of_bearable_size(
    size: tuple[int, int], words: int, arranged: dict[str, list[Any]]
) -> None:
    sheet = render.draw_attention(picture(*size), render.WordMaps(["dog"] * words, one_hot(*[(0, 1)] * words)))
    assert max(sheet.size) < 4000
    assert arranged["titles"] == ["", *["dog"] * min(words, 59), *["dog …"] * (words > 60)]
    assert len(arranged["panels"]) == len(arranged["titles"])


@pytest.mark.parametrize("language", ["en", "zh-characters"])
@pytest.mark.parametrize(
    "words", [["a", "dog", "'s", "toy"], ["一", "件", "red", "t恤"], ["x = 'y'", "a  'b", " ", "c"]]
)
def test_a_caption_is_split_before_its_words_however_they_were_joined(words: list[str], language: str) -> None:
    caption = TOKENISERS[language]().join(words)
    pieces = render.split_before(caption, words)
    assert "".join(pieces) == caption
    assert [piece.replace(" ", "") for piece in pieces] == [word.replace(" ", "") for word in words]


@pytest.fixture(scope="module")
def attention_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a thin picture, whose words looked at CELLS, and of hostile captions."""
    page = tmp_path_factory.mktemp("gallery") / "page.html"
    with render.Gallery(page, "Flickr8k <test>", attention=True) as gallery:
        looks = render.WordMaps(["a", "dog", "'s", "toy"], one_hot(*CELLS))
        gallery.add("a.jpg", ["a dog's toy", "a toy"], size=(896, 128), name="a.jpg", looks=looks)
        for number, text in enumerate([*HOSTILE, "\u202efdp.exe"]):
            looks = render.WordMaps(text.split(" "), one_hot(*[(1, 1)] * len(text.split(" "))))
            gallery.add(f"{number}.jpg", [text], size=(448, 448), name="b.jpg", looks=looks)
        gallery.add("silent.jpg", [""], size=(448, 448), name="c.jpg", looks=render.WordMaps([], one_hot()))
    return page


def test_a_row_holds_the_words_as_they_stand_in_the_caption_their_maps_and_the_size(attention_page: Path) -> None:
    lines = attention_page.read_text(encoding="utf-8").splitlines()
    first, *_, silent = [json.loads(line.rstrip(",")) for line in lines if line.startswith('["./')]
    assert first[1] == ["a dog's toy", "a toy"]
    words, maps, *size = first[7]
    assert words == ["a", " dog", "'s", " toy"]
    assert list(base64.b64decode(maps)) == (255 * one_hot(*CELLS)).flatten().tolist()
    assert (size, first[4:6]) == ([800, 114], [800, 240])
    assert len(silent) == 7


def test_a_page_without_attention_knows_nothing_of_it_and_one_with_it_needs_nothing_else(
    attention_page: Path, tmp_path: Path
) -> None:
    with render.Gallery(tmp_path / "page.html", "title") as gallery:
        gallery.add("a.jpg", ["a dog's toy", "a toy"], size=(896, 128), name="a.jpg")
    without, with_ = (path.read_text(encoding="utf-8") for path in (tmp_path / "page.html", attention_page))
    assert not re.search("canvas|attention|[.]word|focusin|pointerover|/[*] end", without)
    assert "canvas" in with_ and not re.search("https?:|<link|@import|/[*] (attention|end)", with_)


@needs_chromium
def test_words_that_can_be_pointed_at_are_as_harmless(attention_page: Path) -> None:
    dom = browse(attention_page)
    assert "<title>Flickr8k &lt;test&gt;</title>" in dom
    shown = [render.plain(caption) for caption in captions(dom)]
    assert shown == ["a dog's toy", *map(render.plain, HOSTILE), "fdp.exe", render.NO_WORDS]
    assert re.findall('<span class="word" tabindex="0">(.*?)</span>', dom)[:4] == ["a", "dog", "'s", "toy"]
    assert captions(dom, "other") == ["a toy"]


def light_up(page: Path, *events: tuple[str, int]) -> list[Any]:
    """Return, after each event at a word (below 0: elsewhere), the word lit, its picture and its unshaded cells."""
    script = f"""{{
      const words = [...document.querySelectorAll(".word")], cells = [...Array(49).keys()], seen = [];
      for (const [event, place] of {json.dumps(events)}) {{
        (words[place] ?? document.body).dispatchEvent(new Event(event, {{bubbles: true}}));
        const pixel = (x, y) => shade.getContext("2d").getImageData(x, y, 1, 1).data;
        const clear = cells.map(cell => [Math.floor(cell / 7), cell % 7]).filter(([row, column]) =>
          pixel((column + 0.5) / 7 * shade.width, (row + 0.5) / 7 * shade.height)[3] < 0.3 * 255);
        const canvases = [...document.querySelectorAll("canvas")];
        seen.push(canvases.map(canvas => [lit.textContent, canvas.parentNode.querySelector("img").alt, clear]));
      }}
      document.title = JSON.stringify(seen);
    }}"""
    found = re.search("<title>(.*)</title>", browse(page, script=script))
    assert found
    return json.loads(html.unescape(found[1]))


@needs_chromium
def test_the_word_pointed_at_or_focused_last_lights_its_place_until_it_is_left(attention_page: Path) -> None:
    steps: dict[tuple[str, int], list[Any]] = {
        ("pointerover", 1): [["dog", "a.jpg", [[2, 4]]]],
        ("focusin", 3): [["toy", "a.jpg", [[0, 6]]]],
        ("pointerover", 0): [["a", "a.jpg", [[0, 0]]]],
        ("pointerover", -1): [["toy", "a.jpg", [[0, 6]]]],
        ("focusout", 3): [],
        ("focusin", 2): [["'s", "a.jpg", [[6, 6]]]],
        ("pointerover", 4): [[HOSTILE[0].split(" ")[0], "b.jpg", [[1, 1]]]],
        ("focusout", 2): [[HOSTILE[0].split(" ")[0], "b.jpg", [[1, 1]]]],
        ("pointerover", -2): [],
    }
    assert light_up(attention_page, *steps) == list(steps.values())


@needs_chromium
def test_the_shade_lies_on_the_picture_and_not_on_the_margin_of_a_thin_one(attention_page: Path) -> None:
    script = """{
      light(document.querySelector(".word"));
      const [own, picture] = [shade, shade.parentNode.querySelector("img")].map(node => node.getBoundingClientRect());
      const margin = (own.height - own.width * shade.height / shade.width) / 2 / own.width;
      const places = [own.left - picture.left, own.top - picture.top, own.width - picture.width, margin];
      document.title = [getComputedStyle(shade).objectFit, ...places];
    }"""
    found = re.search("<title>(.*)</title>", browse(attention_page, script=script))
    assert found
    fitted, *places = found[1].split(",")
    assert fitted == "contain"
    assert list(map(float, places)) == pytest.approx([0, 0, 0, (240 - 114) / 2 / 800], abs=2e-3)
