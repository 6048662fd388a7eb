"""Draw when pictures are opened, encoded, searched and drawn: `python -m benchmarks.trace --images FOLDER`.

Takes what inference_visualize.py takes, writes docs/images/trace.png, and prints the seconds of each step. Rows are
threads; gaps are waiting.
"""

from cli import run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import functools
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import inference_visualize
from captioning import Picture
from data.features import Extractor
from models.model import CaptionModel

OUT = Path(__file__).parents[1] / "docs" / "images" / "trace.png"
STEPS = {  # what is shown: of which object it is a method
    "open": (Picture, "open"),
    "encode": (Extractor, "__call__"),
    "search": (CaptionModel, "generate"),
    "draw": (inference_visualize, "draw_caption"),
}
COLOURS = {"open": "#4c78a8", "encode": "#54a24b", "search": "#e45756", "draw": "#b279a2"}


def main() -> None:
    spans: dict[str, list[tuple[int, float, float]]] = defaultdict(list)  # of a step: thread, begin, seconds
    for name, (owner, attribute) in STEPS.items():
        setattr(owner, attribute, record(getattr(owner, attribute), spans[name]))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += ["--out", folder]
        inference_visualize.main()
    took = time.perf_counter() - began
    first = min(begin for parts in spans.values() for _, begin, _ in parts)
    draw(spans, first)
    busy = {name: sum(seconds for *_, seconds in parts) for name, parts in spans.items()}
    print(f"{took:.1f} s, of which {began + took - first:.1f} s since the first picture was opened; by all threads:")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in busy.items()))
    print(f"wrote {OUT}")


def record(function: Any, spans: list[tuple[int, float, float]]) -> Any:
    @functools.wraps(function)
    def recorded(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **options)
        spans.append((threading.get_ident(), begin, time.perf_counter() - begin))
        return result

    return recorded


def draw(spans: dict[str, list[tuple[int, float, float]]], first: float) -> None:
    threads = sorted(
        {thread for parts in spans.values() for thread, *_ in parts}, key=lambda t: t != threading.get_ident()
    )
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(threads) + 1.3))
    for name, parts in spans.items():
        for row, thread in enumerate(threads):
            own = [(begin - first, seconds) for each, begin, seconds in parts if each == thread]
            axes.broken_barh(own, (row - 0.4, 0.8), color=COLOURS[name], label=name if row == 0 else None)
    axes.set_yticks(range(len(threads)), ["main", *(f"thread {number}" for number in range(1, len(threads)))])
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the first picture was opened")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, COLOURS, ncols=4, loc="upper right", bbox_to_anchor=(1, 1.25), frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(OUT, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
