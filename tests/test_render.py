"""What people see: captions below pictures, and the gallery page, opened in a real browser where there is one."""

import html
import re
import shutil
import subprocess
import sys
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


def write(path: Path, rows: list[tuple[str, str, list[str]]]) -> Path:
    with render.Gallery(path, "Flickr8k <test>", "run & score") as gallery:
        for image, caption, references in rows:
            gallery.add(image, caption, references, size=(448, 448), name=image.rpartition("/")[2])
    return path


def test_an_exception_leaves_the_old_page_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(RuntimeError), render.Gallery(page, "t") as gallery:
        gallery.add("a.jpg", "a dog", size=(4, 3), name="a.jpg")
        raise RuntimeError
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_a_finished_page_replaces_the_old_one_and_needs_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    text = write(page, [("outputs/a.jpg", "a dog", ["dog <b>"])]).read_text(encoding="utf-8")
    assert "<h1>Flickr8k &lt;test&gt;</h1><p>run &amp; score</p>" in text
    assert '["./outputs/a.jpg","a dog",["dog \\u003cb\\u003e"],448,448,"a.jpg"],\n' in text
    assert not re.search(r"https?:|\bon\w+=|<link|\{\{|@import", text)
    assert list(tmp_path.iterdir()) == [page]


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
    assert f'["{url}","a dog"' in write(tmp_path / "page.html", [(image, "a dog", [])]).read_text(encoding="utf-8")


def browse(page: Path, hash_: str = "", script: str = "") -> str:
    """Return the page's DOM as Chromium has it after three seconds, `script` having run at the end."""
    assert CHROMIUM
    scripted = page.with_name("scripted.html")
    scripted.write_text(page.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", scripted.as_uri() + hash_]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, encoding="utf-8").stdout


def captions(dom: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r'<p class="caption"[^>]*>(.*?)</p>', dom, re.S)]


HOSTILE = [
    "</script><script>document.title = 'injected'</script>",
    "<img src=x onerror=\"document.title = 'injected'\">",
    "<!--<script>",
    "`${document.title = 'injected'}` \\\" \u2028 ' &lt;",
]


@pytest.fixture(scope="module")
def big_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(f"{text}.jpg", text, [text]) for text in [*HOSTILE, "\u202efdp.exe"]]
    rows += [(f"{n}.jpg", f"a {'dog' if n % 1000 == 0 else 'cat'} number {n}", ["a pet"] * 5) for n in range(19_995)]
    return write(tmp_path_factory.mktemp("gallery") / "page.html", rows)


@needs_chromium
def test_20000_hostile_rows_open_as_60_harmless_cards(big_page: Path) -> None:
    dom = browse(big_page)
    assert dom.count("<article") - 1 == len(captions(dom)) - 1 == 60  # one is the template
    assert ">20,000 pictures<" in dom
    assert "<title>Flickr8k &lt;test&gt;</title>" in dom
    assert [text for text in captions(dom) if text][:5] == [*map(render.plain, HOSTILE), "fdp.exe"]


@needs_chromium
def test_an_address_with_a_search_shows_what_matches_all_its_words(big_page: Path) -> None:
    dom = browse(big_page, "#q=DOG+pet+9000")
    assert ">2 of 20,000 pictures<" in dom
    assert [text for text in captions(dom) if text] == ["a dog number 9000", "a dog number 19000"]


@needs_chromium
def test_typing_searches_and_the_address_follows(big_page: Path) -> None:
    typed = "input.value = 'dog'; input.dispatchEvent(new Event('input'));"
    dom = browse(big_page, script=typed + "setTimeout(() => document.title = location.hash, 1000);")
    assert ">20 of 20,000 pictures<" in dom and "<title>#q=dog</title>" in dom
