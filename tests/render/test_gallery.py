"""The gallery page: what is written, and what a reader sees of it in a real browser."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import HOSTILE, browse, captions, needs_chromium, read_rows, title

from render.fonts import plain_text
from render.gallery import Gallery

Row = tuple[str, list[str], list[str]]  # image, captions, references


def write(path: Path, rows: list[Row], scores: Sequence[float | None] = ()) -> Path:
    with Gallery(path, "Flickr8k <test>", "run & score") as gallery:
        for image, texts, references in rows:
            probabilities = [0.5, 0.123456, 0.00456][: len(texts)] if len(texts) > 1 else []
            name = image.rpartition("/")[2]
            gallery.add(image, texts, references, size=(448, 448), name=name, probabilities=probabilities)
        gallery.score(scores)
    return path


def badges(dom: str) -> list[str]:
    return re.findall(r'<span class="badge"[^>]*>([^<]+)</span>', dom)  # not the template's, which is empty


def order_shown(dom: str) -> bool:
    return "hidden" not in re.findall(r"<select[^>]*>", dom)[0]


def test_an_exception_leaves_the_old_page_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    for path in (page, tmp_path / "new" / "page.html"):
        with pytest.raises(RuntimeError), Gallery(path, "t") as gallery:
            gallery.add("a.jpg", ["a dog"], size=(4, 3), name="a.jpg")
            raise RuntimeError
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_a_finished_page_replaces_the_old_one_and_needs_no_other_file(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    rows: list[Row] = [("outputs/a.jpg", ["a dog", "", "a cat"], ["dog <b>"]), ("b.jpg", ["a bird"], [])]
    text = write(page, rows, [12.345, None]).read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [page]
    assert "<h1>Flickr8k &lt;test&gt;</h1><p>run &amp; score</p>" in text
    assert '"dog \\u003cb\\u003e"' in text
    assert not re.search(r"https?:|\bon\w+=|<link|\{\{|/\* (rows|scores)|@import", text)
    first, second = read_rows(page)
    assert first["image"] == "./outputs/a.jpg" and first["name"] == "a.jpg"
    assert first["captions"] == ["a dog", "(no words)", "a cat"] and first["references"] == ["dog <b>"]
    assert first["probabilities"] == [0.5, 0.123, 0.00456]
    assert second["captions"] == ["a bird"] and second["references"] == second["probabilities"] == []
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
    rows: list[Row] = [(f"{n}.jpg", [str(n), f"{n} again", f"{n} at last"], []) for n in range(6)]
    return write(tmp_path_factory.mktemp("gallery") / "page.html", rows, [None, 30, 7.5, 0, None, 7.5])


@needs_chromium
@pytest.mark.parametrize(
    ("address", "order", "label"),
    [("#sort=best", "125304", "best first"), ("#sort=__proto__", "012345", "as given")],
)
def test_equal_scores_keep_their_order_and_pictures_without_a_score_come_last(
    small_page: Path, address: str, order: str, label: str
) -> None:
    dom = browse(small_page, address, script="document.title = sorting.selectedOptions[0].text;")
    assert captions(dom) == list(order)
    assert order_shown(dom) and title(dom) == label


@needs_chromium
def test_an_order_can_be_taken_back(small_page: Path) -> None:
    script = """
      const before = [...document.querySelectorAll("main .caption")].map(caption => caption.textContent).join("");
      sorting.value = ""; sorting.dispatchEvent(new Event("change"));
      document.title = `${before} ${location.hash}`;"""
    dom = browse(small_page, "#sort=worst", script=script)
    assert title(dom) == "325104 " and captions(dom) == list("012345")


@needs_chromium
def test_other_captions_follow_the_best_each_with_its_probability_per_word(small_page: Path) -> None:
    dom = browse(small_page, "#q=4+last")
    assert captions(dom) == ["4"]
    assert captions(dom, "other") == ["4 again", "4 at last"]
    shown = re.findall(r'<span class="probability" title="Probability per word[^"]*">(.*?)</span>', dom)
    assert shown == ["50% per word", "12% per word", "0.46% per word"]


@needs_chromium
@pytest.mark.parametrize("scores", [[], [None, None]])
def test_without_scores_there_are_no_badges_and_no_order_to_choose(tmp_path: Path, scores: list[None]) -> None:
    page = write(tmp_path / "page.html", [("a.jpg", ["a"], []), ("b.jpg", ["b"], [])], scores)
    dom = browse(page, "#sort=best")
    assert captions(dom) == ["a", "b"]
    assert not badges(dom) and not order_shown(dom)
