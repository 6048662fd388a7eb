"""What people see: captions below pictures, and the gallery page, opened in a real browser where there is one."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

BLUE = (40, 90, 200)


def picture(width: int = 224, height: int = 224) -> Image.Image:
    return Image.new("RGB", (width, height), BLUE)


def strip(size: tuple[int, int], caption: str) -> Image.Image:
    """Return what `draw_caption` puts below a picture of this size."""
    sheet = render.draw_caption(picture(*size), caption)
    return sheet.crop((0, render.fit(size)[1], *sheet.size))


def ink(image: Image.Image) -> int:
    return sum(image.convert("L").histogram()[:128])


def test_importing_render_does_not_import_torch_or_pandas() -> None:
    check = "import sys, render; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(render.__file__).parent).returncode == 0


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((224, 224), (448, 448)),
        ((500, 333), (500, 333)),
        ((3000, 4000), (600, 800)),
        ((1, 1), (448, 448)),
        ((30000, 10), (800, 240)),
        ((10, 30000), (240, 800)),
    ],
)
def test_a_picture_of_any_shape_takes_a_readable_size(size: tuple[int, int], box: tuple[int, int]) -> None:
    assert render.fit(size) == box
    sheet = render.draw_caption(picture(*size), "a dog")
    assert sheet.width == box[0] and 0 < sheet.height - box[1] < 200


@pytest.mark.parametrize("size", [(224, 224), (333, 500), (640, 427)])
def test_the_caption_is_below_the_picture_and_not_on_it(size: tuple[int, int]) -> None:
    sheet = render.draw_caption(picture(*size), "a dog runs")
    assert sheet.crop((0, 0, *render.fit(size))).getcolors() == [(render.fit(size)[0] * render.fit(size)[1], BLUE)]
    assert ink(strip(size, "a dog runs")) > 100
    assert ink(strip(size, "")) == 0


@pytest.mark.parametrize("caption", ["many words " * 20, "W" * 200, "a " + "很长" * 60, "W" * 100_000])
def test_long_captions_are_broken_into_lines_inside_the_margins(caption: str) -> None:
    band = strip((224, 224), caption)
    assert 3 * strip((224, 224), "one line").height / 2 < band.height < 1000
    assert ink(band.crop((0, 0, 10, band.height))) == 0
    assert ink(band.crop((band.width - 10, 0, band.width, band.height))) == 0


def test_no_word_is_lost_in_wrapping() -> None:
    text = "a very long " + "x" * 90 + " word"
    lines = render.wrap(text, render.load_font(20), 300)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(render.load_font(20).getlength(line) <= 300 for line in lines)


def test_control_and_direction_characters_become_spaces() -> None:
    assert render.plain("a\tdog\nruns\x00\x1b \u202efast\u2066 \ud800") == "a dog runs fast"
    assert strip((224, 224), "a\ndog\u202e").tobytes() == strip((224, 224), "a dog").tobytes()


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
    font = render.load_font(17)
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


Row = tuple[str, list[str], list[str]]  # image, captions, references


def write(path: Path, rows: list[Row], scores: Sequence[float | None] = ()) -> Path:
    with render.Gallery(path, "Flickr8k <test>", "run & score") as gallery:
        for image, texts, references in rows:
            sure = [0.5, 0.123456, 0.00456][: len(texts)] if len(texts) > 1 else []
            name = image.rpartition("/")[2]
            gallery.add(image, texts, references, size=(448, 448), name=name, probabilities=sure)
        gallery.score(scores)
    return path


def test_an_exception_leaves_the_old_page_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(RuntimeError), render.Gallery(page, "t") as gallery:
        gallery.add("a.jpg", ["a dog"], size=(4, 3), name="a.jpg")
        raise RuntimeError
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_a_finished_page_replaces_the_old_one_and_needs_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    text = write(page, [("outputs/a.jpg", ["a dog"], ["dog <b>"])]).read_text(encoding="utf-8")
    assert "<h1>Flickr8k &lt;test&gt;</h1><p>run &amp; score</p>" in text
    assert '["./outputs/a.jpg",["a dog"],[],["dog \\u003cb\\u003e"],448,448,"a.jpg"],\n' in text
    assert not re.search(r"https?:|\bon\w+=|<link|\{\{|/\* (rows|scores)|@import", text)
    assert list(tmp_path.iterdir()) == [page]


def test_captions_and_scores_are_written_in_the_order_given(tmp_path: Path) -> None:
    rows: list[Row] = [("a.jpg", ["a dog", "a cat"], []), ("b.jpg", ["a bird"], [])]
    text = write(tmp_path / "page.html", rows, [12.345, None]).read_text(encoding="utf-8")
    assert '["./a.jpg",["a dog","a cat"],[0.5,0.123],[],448,448,"a.jpg"],\n["./b.jpg",["a bird"],[],[],' in text
    assert "const scores = [12.3,null];" in text


@pytest.mark.parametrize(
    ("image", "url"),
    [
        ("out/a b#1?.jpg", "./out/a%20b%231%3F.jpg"),
        ("javascript:alert(1)", "./javascript%3Aalert%281%29"),
        ("狗.jpg", "./%E7%8B%97.jpg"),
        ("caf\udce9.jpg", "./caf%E9.jpg"),  # a file name that is not UTF-8
    ],
)
def test_any_file_name_becomes_a_relative_address(tmp_path: Path, image: str, url: str) -> None:
    assert f'["{url}",["a dog"]' in write(tmp_path / "page.html", [(image, ["a dog"], [])]).read_text(encoding="utf-8")


def browse(page: Path, hash_: str = "", script: str = "") -> str:
    """Return the page's DOM as Chromium has it after three seconds, `script` having run at the end."""
    assert CHROMIUM
    scripted = page.with_name("scripted.html")
    scripted.write_text(page.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", scripted.as_uri() + hash_]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, encoding="utf-8").stdout


def captions(dom: str, kind: str = "caption") -> list[str]:
    """Return the best caption of each card, or the others with the kind `other`."""
    found = re.findall(rf'<p class="{kind}"[^>]*>(.*?)</p>', dom, re.S)
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in found]


def badges(dom: str) -> list[str]:
    return re.findall(r'<span class="badge"[^>]*>([^<]+)</span>', dom)  # not the template's, which is empty


def order_shown(dom: str) -> bool:
    return "hidden" not in re.findall(r"<select[^>]*>", dom)[0]


HOSTILE = [
    "</script><script>document.title = 'injected'</script>",
    "<img src=x onerror=\"document.title = 'injected'\">",
    "<!--<script>",
    "`${document.title = 'injected'}` \\\" \u2028 ' &lt;",
]


@pytest.fixture(scope="module")
def big_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[Row] = [(f"{text}.jpg", [text, text], [text]) for text in [*HOSTILE, "\u202efdp.exe"]]
    rows += [(f"{n}.jpg", [f"a {'dog' if n % 1000 == 0 else 'cat'} number {n}"], ["a pet"] * 5) for n in range(19_995)]
    scores = [row * 7919 % 20_000 for row in range(20_000)]  # each once, shuffled
    return write(tmp_path_factory.mktemp("gallery") / "page.html", rows, scores)


@needs_chromium
def test_20000_hostile_rows_open_as_60_harmless_cards(big_page: Path) -> None:
    dom = browse(big_page)
    assert dom.count("<article") - 1 == len(captions(dom)) == 60  # one is the template
    assert ">20,000 pictures<" in dom
    assert "<title>Flickr8k &lt;test&gt;</title>" in dom
    harmless = [*map(render.plain, HOSTILE), "fdp.exe"]
    assert captions(dom)[:5] == captions(dom, "other") == harmless


@needs_chromium
def test_an_address_with_a_search_shows_what_matches_all_its_words(big_page: Path) -> None:
    dom = browse(big_page, "#q=DOG+pet+9000")
    assert ">2 of 20,000 pictures<" in dom
    assert captions(dom) == ["a dog number 9000", "a dog number 19000"]


@needs_chromium
def test_typing_searches_and_the_address_follows(big_page: Path) -> None:
    typed = "input.value = 'dog'; input.dispatchEvent(new Event('input'));"
    dom = browse(big_page, script=typed + "setTimeout(() => document.title = location.hash, 1000);")
    assert ">20 of 20,000 pictures<" in dom and "<title>#q=dog</title>" in dom


@needs_chromium
def test_choosing_an_order_sorts_what_was_searched_and_the_address_follows(big_page: Path) -> None:
    chosen = "sorting.value = 'worst'; sorting.dispatchEvent(new Event('change')); document.title = location.hash;"
    dom = browse(big_page, "#q=dog", script=chosen)
    assert "<title>#q=dog&amp;sort=worst</title>" in dom
    scores = {f"a dog number {n}": (n + 5) * 7919 % 20_000 for n in range(0, 19_995, 1000)}
    assert captions(dom) == sorted(scores, key=lambda text: scores[text])
    assert badges(dom) == [f"CIDEr {score}" for score in sorted(scores.values())]


@needs_chromium
def test_the_cards_that_come_with_scrolling_go_on_in_the_order(big_page: Path) -> None:
    dom = browse(big_page, "#sort=best", script="showMore(); showMore();")
    assert badges(dom) == [f"CIDEr {score}" for score in range(19_999, 19_819, -1)]


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[Row] = [(f"{n}.jpg", [str(n), f"{n} again", f"{n} at last"], []) for n in range(6)]
    return write(tmp_path_factory.mktemp("gallery") / "page.html", rows, [None, 30, 7.5, 0, None, 7.5])


@needs_chromium
@pytest.mark.parametrize(
    ("address", "order"),
    [("#sort=worst", "325104"), ("#sort=best", "125304"), ("#sort=__proto__", "012345")],
)
def test_equal_scores_stay_as_given_and_pictures_without_come_last(small_page: Path, address: str, order: str) -> None:
    dom = browse(small_page, address, script="document.title = sorting.selectedOptions[0].text;")
    assert captions(dom) == list(order)
    assert order_shown(dom)
    wanted = {"#sort=worst": "worst first", "#sort=best": "best first"}.get(address, "as given")
    assert f"<title>{wanted}</title>" in dom


@needs_chromium
def test_an_order_can_be_taken_back(small_page: Path) -> None:
    taken_back = "sorting.value = ''; sorting.dispatchEvent(new Event('change'));"
    dom = browse(small_page, "#sort=worst", script=taken_back + "document.title = `[${location.hash}]`;")
    assert captions(dom) == list("012345")
    assert "<title>[]</title>" in dom


@needs_chromium
def test_other_captions_stand_below_the_best_each_with_its_probability_per_word(small_page: Path) -> None:
    dom = browse(small_page, "#q=4+last")
    assert captions(dom) == ["4"]
    assert captions(dom, "other") == ["4 again", "4 at last"]
    sure = re.findall(r'<span class="sure" title="Probability per word[^"]*">(.*?)</span>', dom)
    assert sure == ["50%", "12%", "0.46%"]


@needs_chromium
@pytest.mark.parametrize("scores", [[], [None, None]])
def test_without_scores_there_are_no_badges_and_no_order_to_choose(tmp_path: Path, scores: list[None]) -> None:
    page = write(tmp_path / "page.html", [("a.jpg", ["a"], []), ("b.jpg", ["b"], [])], scores)
    dom = browse(page, "#sort=best")
    assert captions(dom) == ["a", "b"]
    assert not badges(dom) and not order_shown(dom)


CELLS = [(0, 0), (2, 4), (6, 6), (0, 6)]


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


def test_a_page_without_attention_knows_nothing_of_it(small_page: Path, attention_page: Path) -> None:
    without, with_ = (path.read_text(encoding="utf-8") for path in (small_page, attention_page))
    assert not re.search("canvas|attention|[.]word|focusin|pointerover|/[*] end", without)
    assert "canvas" in with_ and not re.search("https?:|<link|@import|/[*] (attention|end)", with_)


@needs_chromium
def test_words_that_can_be_pointed_at_are_as_harmless(attention_page: Path) -> None:
    dom = browse(attention_page)
    assert "<title>Flickr8k &lt;test&gt;</title>" in dom
    shown = [render.plain(caption) for caption in captions(dom)]
    assert shown == ["a dog's toy", *map(render.plain, HOSTILE), "fdp.exe", ""]
    assert re.findall('<span class="word" tabindex="0">(.*?)</span>', dom)[:4] == ["a", "dog", "'s", "toy"]
    assert captions(dom, "other") == ["a toy"]


def light_up(page: Path, *events: tuple[str, int]) -> list[Any]:
    """Return, after each event at a word (-1: elsewhere), the word lit, its picture and the cells left unshaded."""
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
    }
    assert light_up(attention_page, *steps) == list(steps.values())


@needs_chromium
def test_the_shade_lies_on_the_picture_and_not_on_the_margin_of_a_thin_one(attention_page: Path) -> None:
    script = """{
      light(document.querySelector(".word"));
      const [own, picture] = [shade, shade.parentNode.querySelector("img")].map(node => node.getBoundingClientRect());
      const margin = (own.height - own.width * shade.height / shade.width) / 2 / own.width;
      document.title = [own.left - picture.left, own.top - picture.top, own.width - picture.width, margin];
    }"""
    found = re.search("<title>(.*)</title>", browse(attention_page, script=script))
    assert found
    assert [float(number) for number in found[1].split(",")] == pytest.approx(
        [0, 0, 0, (240 - 114) / 2 / 800], abs=2e-3
    )
