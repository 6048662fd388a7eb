"""A picture with its caption on a strip below it."""

from PIL import Image, ImageDraw, ImageFont

from render.fonts import choose_font, is_right_to_left, plain_text, undrawable

MIN_SIZE, MAX_SIZE = 448, 800  # pixels of a drawn picture's longer side: large enough to read text beside it
MIN_FRAME = 240  # a narrower picture lies on a background this wide, so that its caption has room
NO_WORDS = "(no words)"  # shown in place of an empty caption
NO_FONT = "(no font here can write this caption)"
BACKGROUND = (226, 228, 231)
PAPER = (250, 250, 249)
INK = (31, 35, 40)


def display_size(size: tuple[int, int], least: int = MIN_SIZE, most: int = MAX_SIZE) -> tuple[int, int]:
    """Scale a (width, height), proportions kept, so that the longer side is between `least` and `most`."""
    factor = min(max(max(size), least), most) / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def frame_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) above the strip in what `draw_caption` returns for a picture of this size."""
    width, height = display_size(size)
    return max(width, MIN_FRAME), max(height, MIN_FRAME)


def draw_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Return an RGB image: the picture, at its `display_size` and centred in its frame, above the caption's strip."""
    width, height = frame_size(picture.size)
    text = plain_text(caption) or NO_WORDS
    letters = [character for character in text if character.isalnum()]
    if sum(map(undrawable(text).__contains__, letters)) > len(letters) / 2:
        text = NO_FONT
    caption, font = choose_font(text, 16 + width // 100)
    margin, line_height = round(0.7 * font.size), round(1.4 * font.size)
    lines = wrap(caption, font, width - 2 * margin)

    sheet = Image.new("RGB", (width, height + len(lines) * line_height + 2 * margin), PAPER)
    scaled = picture.resize(display_size(picture.size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    sheet.paste(BACKGROUND, (0, 0, width, height))
    sheet.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))

    draw = ImageDraw.Draw(sheet)
    baseline = height + margin + (line_height + 0.7 * font.size) / 2  # capitals are 0.7 of the font's size high
    for number, line in enumerate(lines):
        place = round(baseline + number * line_height)
        if is_right_to_left(caption):
            draw.text((width - margin, place), line, INK, font, anchor="rs")
        else:
            draw.text((margin, place), line, INK, font, anchor="ls")
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels: between words, and inside a word wider than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
