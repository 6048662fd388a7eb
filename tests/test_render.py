"""What people see: captions below pictures, and the gallery page, opened in a real browser where there is one."""

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

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


def test_a_caption_without_words_is_said_to_have_none(tmp_path: Path) -> None:
    assert strip((224, 224), " ").tobytes() == strip((224, 224), "(no words)").tobytes()
    with render.Gallery(tmp_path / "page.html", "t") as gallery:
        gallery.add("a.jpg", [""], ["a dog"], size=(4, 3), name="a.jpg")
    assert '["./a.jpg",["(no words)"],[],["a dog"],' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("caption", ["many words " * 20, "W" * 200, "a " + "很长" * 60, "W" * 100_000])
def test_long_captions_are_broken_into_lines_inside_the_margins(caption: str) -> None:
    band = strip((224, 224), caption)
    assert 3 * strip((224, 224), "one line").height / 2 < band.height < 1000
    assert ink(band.crop((0, 0, 10, band.height))) == 0
    assert ink(band.crop((band.width - 10, 0, band.width, band.height))) == 0


def test_no_word_is_lost_in_wrapping() -> None:
    text = "a very long " + "x" * 90 + " word"
    _, font = render.drawable(text, 20)
    lines = render.wrap(text, font, 300)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 300 for line in lines)


def test_control_and_direction_characters_become_spaces() -> None:
    assert render.plain("a\tdog\nruns\x00\x1b \u202efast\u2066 \ud800") == "a dog runs fast"
    assert strip((224, 224), "a\ndog\u202e").tobytes() == strip((224, 224), "a dog").tobytes()


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
    assert sure == ["50% per word", "12% per word", "0.46% per word"]


@needs_chromium
@pytest.mark.parametrize("scores", [[], [None, None]])
def test_without_scores_there_are_no_badges_and_no_order_to_choose(tmp_path: Path, scores: list[None]) -> None:
    page = write(tmp_path / "page.html", [("a.jpg", ["a"], []), ("b.jpg", ["b"], [])], scores)
    dom = browse(page, "#sort=best")
    assert captions(dom) == ["a", "b"]
    assert not badges(dom) and not order_shown(dom)


def test_chinese_is_drawn_with_a_font_that_has_it() -> None:
    text, font = render.drawable("一只狗 dog", 20)
    if render.undrawable("一只狗"):
        pytest.skip("no Chinese font is installed here")
    assert text == "一只狗 dog"
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
    assert all((font.getmask(c).getbbox(), bytes(font.getmask(c))) != missing for c in "一只狗dog")


def test_what_no_font_has_is_left_out_never_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "FONTS", render.FONTS[:1])
    monkeypatch.setattr(render, "packaged_fonts", list)
    render.fonts.cache_clear()
    try:
        assert render.drawable("T恤 dog", 20)[0] == "T dog"
        assert render.undrawable("T恤狗\u200d dog") == {"恤", "狗"}
        assert ink(strip((300, 300), "一只狗")) == 0
    finally:
        render.fonts.cache_clear()
