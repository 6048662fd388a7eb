"""Measure what folders of 1,000, 10,000 and 100,000 pictures cost apart from the networks: listing, tables, pages.

`python -m benchmarks.folders` takes some ten minutes on two cores and writes benchmarks/results/folders.json: of each
step the processor time, the memory at its peak beyond what the process had before (on Linux; of the page and of the
whole command, all of it), and the slope from 10,000 to 100,000 pictures, by which time grows as pictures ** slope: 1.0
is linear. With `--draw` it only draws docs/images/folders.png from that. Pictures are links to small JPEGs, captions
are made up: see benchmarks/folder_steps.py. The page needs Chromium and playwright.
"""

from cli import run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.folder_steps import STEPS, Work, write_folders
from benchmarks.memory import ROOT
from benchmarks.recipes import environment
from render.charts import COLOURS, LINES, style_axes
from utils import write_atomically
from visualize_loss import save

OUT = Path(__file__).parent / "results" / "folders.json"
CHART = ROOT / "docs" / "images" / "folders.png"
SIZES = (1_000, 10_000, 100_000)
TURNS, LONG = 3, 5  # the best of three times counts, but none begins after five seconds
GAP = 0.125  # between the names of lines, in powers of ten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="pictures, ascending")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), metavar="STEP")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/folders.json")
    parser.add_argument("--one", nargs=3, metavar=("STEP", "FOLDER", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true", help="draw the chart of what was measured before")
    args = parser.parse_args()
    if args.draw:
        save(draw(json.loads(args.out.read_text())), CHART)
        return
    if args.one:
        step, folder, count = args.one
        print(json.dumps(measure(STEPS[step][1](Path(folder), int(count)))))
        return
    steps: dict[str, list[dict[str, float]]] = {step: [] for step in args.steps}
    for count in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_folders(Path(folder), count)
            for step, found in steps.items():  # each in a process of its own
                command = [sys.executable, "-m", "benchmarks.folders", "--one", step, folder, str(count)]
                printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
                found.append(json.loads(printed.splitlines()[-1]))
                print(f"{step:16} {count:9,} pictures: {found[-1]}", flush=True)
    columns = {step: {"title": STEPS[step][0], **as_columns(found, args.sizes)} for step, found in steps.items()}
    result = {"environment": environment(), "pictures": list(args.sizes), "steps": columns}
    write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {args.out}")


def as_columns(found: list[dict[str, float]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the figures of a step by size, and the slope between the last two sizes."""
    seconds, memory = ([each[name] for each in found] for name in ("seconds", "memory_mb"))
    slope = math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2]) if len(sizes) > 1 else math.nan
    return {"seconds": seconds, "memory_mb": memory, "slope": round(slope, 2)}


def measure(work: Work) -> dict[str, float]:
    """Return the figures of some work in this process; where other processes do it, it returns them itself."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if clear.is_file():
        clear.write_text("5")  # the peak begins anew

    def peak() -> float:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 1000 if clear.is_file() else 0

    before, took, memory = peak(), list[float](), 0.0
    while len(took) < TURNS and sum(took) < LONG:
        began = time.process_time()
        found = work()
        took.append(time.process_time() - began)
        if isinstance(found, dict) and "memory_mb" in found:
            return found
        memory = memory or peak()
    return {"seconds": round(min(took), 4), "memory_mb": round(memory - before, 1)}


def draw(result: dict[str, Any]) -> Figure:
    """Return the chart: a line for each step, named at its end, on logarithmic axes, and dotted what is linear."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes, sizes = figure.subplots(), result["pictures"]
    for factor in range(-3, 2):
        axes.plot(sizes, [10**factor * size / sizes[0] for size in sizes], ":", color=LINES, linewidth=1, zorder=0)
    steps = list(result["steps"].values())
    heights = spread_out([math.log10(each["seconds"][-1]) for each in steps], GAP)
    for number, (found, height) in enumerate(zip(steps, heights, strict=True)):
        colour, line = COLOURS[number % len(COLOURS)], "o-" if number < len(COLOURS) else "s--"
        axes.plot(sizes, found["seconds"], line, color=colour, linewidth=2, markersize=5)
        label = f"{found['title'].replace('`', '')} ({found['slope']:.2f})"
        ends = (sizes[-1], found["seconds"][-1]), (sizes[-1] * 1.35, 10**height)
        axes.annotate(
            label,
            *ends,
            va="center",
            fontsize=9.5,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )
    style_axes(
        axes, "Seconds of processor time; in brackets the slope of the last stretch, dotted a slope of 1", "pictures"
    )
    axes.set(xscale="log", yscale="log", xlim=(sizes[0] * 0.85, sizes[-1] * 1.2), ylim=(0.003, 100))
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    return figure


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Return the heights, those too close to one another moved up until they are `gap` apart."""
    moved, last = dict[int, float](), -math.inf
    for place in sorted(range(len(heights)), key=lambda place: heights[place]):
        moved[place] = last = max(heights[place], last + gap)
    return [moved[place] for place in range(len(heights))]


if __name__ == "__main__":
    raise SystemExit(run_script(main))
