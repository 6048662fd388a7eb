"""The gallery page: what is written, and what a reader sees of it in a real browser."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import HOSTILE, browse, captions, needs_chromium, read_rows, title

from render import gallery
from render.fonts import plain_text

Row = tuple[str, list[str], list[str]]  # image, captions, references


def write(path: Path, rows: list[Row], scores: Sequence[float] = ()) -> Path:
    made = []
    for image, texts, references in rows:
        doubt = "unsure" if len(texts) > 1 else ""
        name = image.rpartition("/")[2]
        made.append(gallery.row(image, texts, references, size=(448, 448), name=name, doubt=doubt))
    path.write_text(gallery.page("Flickr8k <test>", "run & score", made, scores), encoding="utf-8")
    return path


def badges(dom: str) -> list[str]:
    return re.findall(r'<span class="badge"[^>]*>([^<]+)</span>', dom)  # not the template's, which is empty


def order_shown(dom: str) -> bool:
    return "hidden" not in re.findall(r"<select[^>]*>", dom)[0]


def test_the_page_holds_each_picture_and_needs_no_other_file(tmp_path: Path) -> None:
    rows: list[Row] = [("outputs/a.jpg", ["a dog", "", "a cat"], ["dog <b>"]), ("b.jpg", ["a bird"], [])]
    page = write(tmp_path / "page.html", rows, [12.345, 0])
    text, (first, second) = page.read_text(encoding="utf-8"), read_rows(page)
    assert "<h1>Flickr8k &lt;test&gt;</h1><p>run &amp; score</p>" in text
    assert '"dog \\u003cb\\u003e"' in text and "const scores = [12.3,0];" in text
    assert not re.search(r"https?:|\bon\w+=|<link|\{\{|/\* (rows|scores)|@import", text)
    assert first["image"] == "./outputs/a.jpg" and first["name"] == "a.jpg"
    assert first["captions"] == ["a dog", "(no words)", "a cat"] and first["references"] == ["dog <b>"]
    assert first["doubt"] == "unsure" and second["doubt"] == ""
    assert second["captions"] == ["a bird"] and second["references"] == []


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
    assert read_rows(write(tmp_path / "page.html", [(image, ["a dog"], [])]))[0]["image"] == url


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
    assert title(dom) == "Flickr8k <test>"
    assert captions(dom)[:5] == captions(dom, "other") == [*map(plain_text, HOSTILE), "fdp.exe"]


@needs_chromium
def test_typing_shows_what_matches_all_words_and_the_address_follows(big_page: Path) -> None:
    typed = "input.value = 'DOG pet 9000'; input.dispatchEvent(new Event('input'));"
    dom = browse(big_page, script=typed + "setTimeout(() => document.title = location.hash, 1000);")
    assert ">2 of 20,000 pictures<" in dom and title(dom) == "#q=DOG+pet+9000"
    assert captions(dom) == ["a dog number 9000", "a dog number 19000"]


@needs_chromium
def test_choosing_an_order_sorts_what_the_search_found_and_the_address_follows(big_page: Path) -> None:
    chosen = "sorting.value = 'worst'; sorting.dispatchEvent(new Event('change')); document.title = location.hash;"
    dom = browse(big_page, "#q=dog", script=chosen)
    assert title(dom) == "#q=dog&sort=worst"
    scores = {f"a dog number {n}": (n + 5) * 7919 % 20_000 for n in range(0, 19_995, 1000)}
    assert captions(dom) == sorted(scores, key=lambda text: scores[text])
    assert badges(dom) == [f"CIDEr {score}" for score in sorted(scores.values())]


@needs_chromium
def test_cards_that_come_with_scrolling_continue_the_order(big_page: Path) -> None:
    dom = browse(big_page, "#sort=best", script="showMore(); showMore();")
    assert badges(dom) == [f"CIDEr {score}" for score in range(19_999, 19_819, -1)]


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[Row] = [(f"{n}.jpg", [str(n), f"{n} again", f"{n} at last"], []) for n in range(4)]
    return write(tmp_path_factory.mktemp("gallery") / "page.html", rows, [30, 7.5, 0, 7.5])


@needs_chromium
def test_equal_scores_keep_their_order_and_an_order_can_be_taken_back(small_page: Path) -> None:
    dom = browse(small_page, "#sort=best", script="document.title = sorting.selectedOptions[0].text;")
    assert captions(dom) == list("0132") and title(dom) == "best first" and order_shown(dom)
    script = """
      const before = [...document.querySelectorAll("main .caption")].map(caption => caption.textContent).join("");
      sorting.value = ""; sorting.dispatchEvent(new Event("change"));
      document.title = `${before} ${location.hash}`;"""
    dom = browse(small_page, "#sort=worst", script=script)
    assert title(dom) == "2130 " and captions(dom) == list("0123")


@needs_chromium
def test_other_captions_follow_the_best_and_only_the_best_has_its_doubt(small_page: Path) -> None:
    dom = browse(small_page, "#q=2+last")
    assert captions(dom) == ["2"]
    assert captions(dom, "other") == ["2 again", "2 at last"]
    assert re.findall(r'<span class="doubt" title="By its own estimate[^"]*">(.*?)</span>', dom) == ["unsure"]


@needs_chromium
def test_without_scores_there_are_no_badges_and_no_order_to_choose(tmp_path: Path) -> None:
    dom = browse(write(tmp_path / "page.html", [("a.jpg", ["a"], []), ("b.jpg", ["b"], [])]), "#sort=best")
    assert captions(dom) == ["a", "b"]
    assert not badges(dom) and not order_shown(dom)
