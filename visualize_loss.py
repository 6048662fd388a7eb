"""Draw the loss curve of a run, or of several in one figure: loss, perplexity and caption scores by epoch.

Reads runs/<name>/loss_log.txt, also while the run is still training.
"""

from cli import Parser, UserError, run_script

import argparse
import io
import itertools
import math
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils import find_run, write_atomically

LOG = "loss_log.txt"
COLUMNS = ("epoch", "train_loss", "val_loss", "val_perplexity", "val_bleu4", "val_cider")

Curves = dict[str, list[float]]  # column → one number per epoch

TEXT, LINES = "#3d434a", "#c9cccf"
Line = Literal["-", "--"]
SOLID: Line = "-"
DASHED: Line = "--"
FEW_EPOCHS = 30  # up to this many, each has a dot
COLOURS = ("#2f6db3", "#d1622b", "#3a8f5d", "#8a5aa8", "#b0892c", "#c04a6b", "#4a9aa5", "#6b6f75")


def main() -> None:
    args = parse_args()
    folders = [find_run(LOG, name) for name in args.run or [None]]
    if not args.run:
        print(f"newest run: {folders[0]}")
    runs = {folder: read_log(folder / LOG) for folder in folders}
    out = args.out or (folders[0] / "loss_curve.png" if len(runs) == 1 else Path("loss_curve.png"))
    save(draw(label(runs)), out)
    print(f"wrote {out}")


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Draw the loss curve of a run, or of several to compare them.",
        epilog="Example: python visualize_loss.py --run flickr8k attention",
    )
    parser.add_argument("--run", nargs="+", metavar="NAME", help="names or folders of runs (default: the newest)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="picture to write (default: loss_curve.png, in the run if it is one)"
    )
    return parser.parse_options()


def read_log(path: Path) -> Curves:
    """Return the log's columns; a last line that is only half written is left out.

    Raises UserError when a column is missing, a line is damaged, or no epoch is finished.
    """
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    names = header.split("\t")
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; take a {LOG} as train.py writes it")
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append([float(dict(zip(names, line.split("\t"), strict=True))[name]) for name in COLUMNS])
        except ValueError:
            if number <= len(lines):
                raise UserError(f"{path}, line {number} does not hold one number per column; fix it") from None
    if not rows:
        raise UserError(f"{path} has no finished epoch yet; wait for the first one to end")
    return {name: list(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}


def label(runs: dict[Path, Curves]) -> dict[str, Curves]:
    """Call each run by its folder's name, or, where two have the same, by its path."""
    names = [folder.resolve().name for folder in runs]
    unique = len(set(names)) == len(names)
    return {name if unique else str(folder): runs[folder] for name, folder in zip(names, runs, strict=True)}


def best_epoch(curves: Curves) -> int | None:
    """Return the place of the epoch that training keeps, or None when there is no number.

    It is that of the highest validation CIDEr, and of equals the lowest loss.
    """
    finite = [place for place, cider in enumerate(curves["val_cider"]) if math.isfinite(cider)]
    return max(finite, key=lambda place: (curves["val_cider"][place], -curves["val_loss"][place]), default=None)


def draw(runs: dict[str, Curves]) -> Figure:
    """Return the figure: a colour for each run, a star on its best epoch, its training loss dashed."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    [loss, perplexity], [bleu, cider] = figure.subplots(2, 2)
    legend = []
    for (name, curves), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        plot(loss, curves, "train_loss", colour, DASHED)
        plot(loss, curves, "val_loss", colour)
        plot(perplexity, curves, "val_perplexity", colour)
        plot(bleu, curves, "val_bleu4", colour)
        plot(cider, curves, "val_cider", colour)
        legend.append(Line2D([], [], color=colour, linewidth=3, label=f"{name}{best_score(curves)}"))
        best = best_epoch(curves)
        if best is not None:
            columns = ("val_loss", "val_perplexity", "val_bleu4", "val_cider")
            for axes, column in zip((loss, perplexity, bleu, cider), columns, strict=True):
                value = f"{curves[column][best]:.4g}" if len(runs) == 1 else ""  # several would cover each other
                mark(axes, curves["epoch"][best], curves[column][best], value, colour)

    finish(loss, "Loss per word", {"validation": SOLID, "training": DASHED})
    finish(perplexity, "Validation perplexity")
    finish(bleu, "BLEU-4 of validation captions ×100")
    finish(cider, "CIDEr-D of validation captions ×100")
    look = {"fontsize": 12, "handlelength": 1, "frameon": False, "labelcolor": TEXT}
    figure.legend(handles=legend, loc="outside upper left", ncols=min(3, len(legend)), **look)
    return figure


def plot(axes: Axes, curves: Curves, column: str, colour: str, line: Line = SOLID) -> None:
    marker = "o" if len(curves["epoch"]) <= FEW_EPOCHS else ""
    width, face = (2, colour) if line == SOLID else (1.3, "white")
    axes.plot(
        curves["epoch"],
        curves[column],
        line,
        color=colour,
        linewidth=width,
        marker=marker,
        markersize=4,
        markerfacecolor=face,
    )


def mark(axes: Axes, epoch: float, height: float, value: str, colour: str) -> None:
    axes.plot(epoch, height, "*", color=colour, markersize=16, markeredgecolor="white", zorder=3, clip_on=False)
    axes.annotate(value, (epoch, height), (0, 11), textcoords="offset points", ha="center", color=colour, weight="bold")


def best_score(curves: Curves) -> str:
    best = best_epoch(curves)
    return "" if best is None else f": best epoch {curves['epoch'][best]:.0f}, CIDEr {curves['val_cider'][best]:.1f}"


def finish(axes: Axes, title: str, legend: dict[str, Line] | None = None) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, weight="bold", color=TEXT, pad=10)
    axes.set_xlabel("epoch", color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.03, y=0.13)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # none of them is ever negative
    axes.tick_params(color=LINES, labelcolor=TEXT)
    axes.grid(color=LINES, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(LINES)
    if legend:
        kinds = [Line2D([], [], color=TEXT, linestyle=line, label=label) for label, line in legend.items()]
        axes.legend(handles=kinds, frameon=False, labelcolor=TEXT)


def save(figure: Figure, out: Path) -> None:
    """Write the figure in the format that the file's ending says; raises UserError when there is no such format."""
    kind = out.suffix[1:].lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"no picture format is called '{kind}' ({out}); let --out end in .png, .svg or .pdf")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    write_atomically(out, buffer.getvalue())


if __name__ == "__main__":
    raise SystemExit(run_script(main))
