"""Fuzz each reader of other people's files for ten minutes, where tests/benchmarks does so for a second."""

import importlib.util
import io
import math
import time

import fuzz
import pytest
from PIL import Image

from stress.conftest import Tally


@pytest.mark.parametrize("name", fuzz.READERS)
def test_fuzzing(tally: Tally, name: str) -> None:
    """fuzzing"""
    if name == "picture":  # what counts is memory beyond that of the largest one that Pillow's limit lets through
        side, largest = math.isqrt(Image.MAX_IMAGE_PIXELS or 0), io.BytesIO()
        Image.new("RGBA", (side, side)).save(largest, "PNG", compress_level=1)
        fuzz.check(name, largest.getvalue())
    seconds, before, counts = (2 if tally.short else 600), fuzz.memory(), {"hypothesis": 0}
    began = time.monotonic()
    while time.monotonic() - began < seconds / 2:
        counts["hypothesis"] += fuzz.by_hypothesis(name, 20 if tally.short else 100)
    if importlib.util.find_spec("atheris") or not tally.short:
        counts["atheris"] = fuzz.by_atheris(name, seconds / 2)
    grown = fuzz.memory() - before
    tally.tried, tally.lost = sum(counts.values()), int(grown > fuzz.GROWTH)
    engines = ", ".join(f"{count:,} by {engine}" for engine, count in counts.items())
    tally.figures = f"{engines}, in {seconds} s; {grown:+.0f} MB"
