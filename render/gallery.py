"""The gallery: one HTML page of captioned pictures with search, sorting by score and attention maps.

gallery.html is its template. To show more of each picture, add it to `row` in `Gallery.add` here and to `card` there.
"""

import base64
import contextlib
import html
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from render.attention import AttentionMaps, split_before
from render.caption import NO_WORDS, display_size, frame_size
from render.fonts import plain_text

TEMPLATE = Path(__file__).with_name("gallery.html")
ROWS, SCORES = "/* rows */", "/* scores */"  # replaced by the data
ATTENTION = re.compile(r"/\* attention \*/\n(.*?)/\* end \*/\n(\n?)", re.DOTALL)  # left out of a page without attention


class Gallery:
    """Writes the page row by row, so that its memory does not grow with the number of pictures.

    Use as `with Gallery(path, title, subtitle) as gallery:`. The whole page appears when the block ends; if it ends in
    an exception, an older page stays as it was. With `attention`, pointing at a word of a caption shows the regions
    that the model attended to. Raises OSError when the file cannot be written.
    """

    def __init__(self, path: str | Path, title: str, subtitle: str = "", attention: bool = False) -> None:
        self.path = Path(path)
        template = ATTENTION.sub(r"\1\2" if attention else "", TEMPLATE.read_text(encoding="utf-8"))
        head, self._tail = template.split(ROWS)
        texts = {"{{title}}": title, "{{subtitle}}": subtitle}
        self._head = re.sub("{{title}}|{{subtitle}}", lambda found: html.escape(plain_text(texts[found[0]])), head)
        self._scores: list[float | None] = []
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def __enter__(self) -> Self:
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "w", encoding="utf-8", newline="\n")
        self._file.write(self._head)
        return self

    def add(
        self,
        image: str,
        captions: Sequence[str],
        references: Sequence[str] = (),
        *,
        size: tuple[int, int],
        name: str,
        probabilities: Sequence[float] = (),
        attention: AttentionMaps | None = None,
    ) -> None:
        """Add a picture as `draw_caption` saved it, and its captions, the best first.

        Args:
            image: the file's path relative to the page, with forward slashes.
            references: captions written by people.
            size: (width, height) of the picture itself; the page hides the strip below it.
            name: shown below the captions.
            probabilities: of each caption, per word, between 0 and 1; empty where they are not to be shown.
            attention: of the best caption, in a page with attention.
        """
        row: dict[str, Any] = {
            # "./" keeps a file name from being read as a scheme or a host
            "image": "./" + quote(image, errors=sys.getfilesystemencodeerrors()),
            "name": plain_text(name),
            "frame_size": frame_size(size),
            "picture_size": display_size(size),  # centred in the frame
            "captions": [plain_text(caption) or NO_WORDS for caption in captions],
            "probabilities": [float(f"{probability:.3g}") for probability in probabilities],
            "references": [plain_text(reference) or NO_WORDS for reference in references],
        }
        if attention and attention.words:
            row["attention"] = {
                "words": split_before(captions[0], attention.words),
                "alphas": base64.b64encode(attention.levels().tobytes()).decode(),
            }
        code = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
        # escape what could end the script element that the row stands in, or a string in it
        self._file.write(re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", code) + ",\n")

    def score(self, scores: Sequence[float | None]) -> None:
        """Give every picture a score x100, or None, in the order they were added; the page can be sorted by it."""
        self._scores = [None if score is None else round(score, 1) for score in scores]

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file as file:
                if error is None:
                    file.write(self._tail.replace(SCORES, json.dumps(self._scores, separators=(",", ":"))))
                    file.flush()
                    os.fsync(file.fileno())
            if error is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
            if error and self._made_folder:
                with contextlib.suppress(OSError):  # it is not empty
                    self.path.parent.rmdir()
