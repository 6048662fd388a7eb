"""Captions below pictures, and the fonts they are drawn with."""

import pytest
from PIL import Image

from render import fonts
from render.caption import NO_FONT, draw_caption, frame_size, wrap

BLUE = (40, 90, 200)


def strip(size: tuple[int, int], caption: str) -> Image.Image:
    """Return what is drawn below a blue picture of this size, having seen that nothing is drawn on the picture."""
    sheet = draw_caption(Image.new("RGB", size, BLUE), caption)
    width, height = frame_size(size)
    if min(width, height) > 240:  # not in a frame
        assert sheet.crop((0, 0, width, height)).getcolors() == [(width * height, BLUE)]
    return sheet.crop((0, height, *sheet.size))


def ink(image: Image.Image) -> int:
    return sum(image.convert("L").histogram()[:128])


@pytest.mark.parametrize(
    ("size", "frame"),
    [
        *[((224, 224), (448, 448)), ((500, 333), (500, 333)), ((3000, 4000), (600, 800)), ((1, 1), (448, 448))],
        *[((30000, 10), (800, 240)), ((10, 30000), (240, 800))],
    ],
)
def test_a_picture_of_any_shape_gets_a_readable_size_and_caption(size: tuple[int, int], frame: tuple[int, int]) -> None:
    assert frame_size(size) == frame
    band = strip(size, "a dog runs")
    assert band.width == frame[0] and 0 < band.height < 200
    assert ink(band) > 100


@pytest.mark.parametrize("caption", ["many words " * 20, "W" * 200, "a " + "很长" * 60])
def test_long_captions_are_wrapped_inside_the_margins(caption: str) -> None:
    band = strip((224, 224), caption)
    assert 3 * strip((224, 224), "one line").height / 2 < band.height < 1000
    assert ink(band.crop((0, 0, 10, band.height))) == 0
    assert ink(band.crop((band.width - 10, 0, band.width, band.height))) == 0


def test_lines_break_between_words_and_inside_words_wider_than_a_line() -> None:
    _, font = fonts.choose_font("x", 20)
    for text in ("a very long " + "x" * 90 + " word", "x" * 90 + " and a long word", "a dog runs on the grass " * 9):
        lines = wrap(text, font, 300)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(0 < font.getlength(line) <= 300 for line in lines)
        assert {word for line in lines for word in line.split() if "x" not in word} <= set(text.split())


def test_control_and_direction_characters_become_spaces_and_no_words_are_shown_as_such() -> None:
    assert strip((224, 224), " ").tobytes() == strip((224, 224), "(no words)").tobytes()
    assert fonts.plain_text("a\tdog\nruns\x00\x1b \u202efast\u2066 \ud800") == "a dog runs fast"
    assert strip((224, 224), "a\ndog\u202e").tobytes() == strip((224, 224), "a dog").tobytes()


def test_chinese_is_drawn_with_a_font_that_has_it() -> None:
    text, font = fonts.choose_font("一只狗 dog", 20)
    if fonts.undrawable("一只狗"):
        pytest.skip("no Chinese font is installed here")
    assert text == "一只狗 dog"
    box = bytes(font.getmask("\uffff"))  # how a missing character is drawn
    assert all(bytes(font.getmask(character)) != box for character in "一只狗dog")


def test_characters_without_a_font_are_left_out_and_never_drawn_as_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    dejavu = fonts.installed_fonts()[:1]
    monkeypatch.setattr(fonts, "installed_fonts", lambda: dejavu)
    assert fonts.choose_font("T恤 dog", 20)[0] == "T dog"
    assert fonts.undrawable("T恤狗\u200d dog") == {"恤", "狗"}
    assert strip((300, 300), "一只狗").tobytes() == strip((300, 300), NO_FONT).tobytes()
