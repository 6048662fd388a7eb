"""The gallery: one HTML page of captioned pictures with search, sorting by score and attention maps.

gallery.html is its template. To show more of each picture, add it to `row` here and to `card` there.
"""

import base64
import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from render.attention import AttentionMaps, split_before
from render.caption import NO_WORDS, display_size, frame_size
from render.fonts import plain_text

TEMPLATE = Path(__file__).with_name("gallery.html")
PLACES = re.compile(r"{{title}}|{{subtitle}}|/\* rows \*/|/\* scores \*/")


def row(
    image: str,
    captions: Sequence[str],
    references: Sequence[str] = (),
    *,
    size: tuple[int, int],
    name: str,
    doubt: str = "",
    attention: AttentionMaps | None = None,
) -> dict[str, Any]:
    """Return what the page holds of a picture as `draw_caption` saved it, and of its captions, the best first.

    Args:
        image: the file's path relative to the page, with forward slashes; `name` is shown below the captions.
        references: captions written by people.
        size: (width, height) of the picture itself; the page hides the strip below it.
        doubt: shown below the best caption where the model is unsure of it.
        attention: of the best caption; pointing at a word shows the regions that the model attended to.
    """
    found: dict[str, Any] = {
        # "./" keeps a file name from being read as a scheme or a host
        "image": "./" + quote(image, errors=sys.getfilesystemencodeerrors()),
        "name": plain_text(name),
        "frame_size": frame_size(size),
        "picture_size": display_size(size),  # centred in the frame
        "captions": [plain_text(caption) or NO_WORDS for caption in captions],
        "doubt": plain_text(doubt),
        "references": [plain_text(reference) or NO_WORDS for reference in references],
    }
    if attention and attention.words:
        alphas = base64.b64encode(attention.levels().tobytes()).decode()
        found["attention"] = {"words": split_before(captions[0], attention.words), "alphas": alphas}
    return found


def page(title: str, subtitle: str, rows: Sequence[dict[str, Any]], scores: Sequence[float] = ()) -> str:
    """Return the page of these rows; it can be sorted by the scores x100, of which each row has one, or none has."""
    texts = {
        "{{title}}": html.escape(plain_text(title)),
        "{{subtitle}}": html.escape(plain_text(subtitle)),
        "/* rows */": "".join(f"{as_script(row)},\n" for row in rows),
        "/* scores */": as_script([round(score, 1) for score in scores]),
    }
    return PLACES.sub(lambda found: texts[found[0]], TEMPLATE.read_text(encoding="utf-8"))


def as_script(content: Any) -> str:
    """Return JSON in which what could end the script element around it, or a string in it, is escaped."""
    code = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", code)
