"""Draw the loss curve of a run, or of several in one figure: loss, perplexity and caption scores by epoch.

Reads runs/<name>/loss_log.txt, also while the run is still training.
"""

from cli import UserError, answer_early, options, run_script, say

if __name__ == "__main__":
    answer_early(options.visualize_loss)

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from render.charts import COLOURS, TEXT, style_axes
from utils import find_run, write_atomically

PANELS = {
    "val_loss": "Loss per word",
    "val_perplexity": "Validation perplexity",
    "val_bleu4": "BLEU-4 of validation captions ×100",
    "val_cider": "CIDEr-D of validation captions ×100",
}
COLUMNS = ("epoch", "train_loss", *PANELS)

Curves = dict[str, list[float]]  # column → one number per epoch

HIGHEST = 1e15  # that is drawn
MAX_DOTS = 30  # a curve of more epochs has no dots


def main() -> None:
    args = options.visualize_loss()
    if not args.run:
        args.run = [find_run(options.LOSS_LOG).name]
        say(f"newest run: {args.run[0]}")
    folders = {name: find_run(options.LOSS_LOG, name) for name in args.run}
    runs = {name: read_log(folder / options.LOSS_LOG) for name, folder in folders.items()}
    out = args.out or Path(folders[args.run[0]] if len(runs) == 1 else "", "loss_curve.png")
    save(draw(runs), out)
    say(f"wrote {out}")


def read_log(path: Path) -> Curves:
    """Return the columns of a loss log; raises UserError for one that is damaged or in which no epoch is finished."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if not rows:
            raise UserError(f"{path} has no finished epoch yet; wait for the first one to end")
        return {name: [drawable(float(row[name])) for row in rows] for name in COLUMNS}
    except (KeyError, TypeError, ValueError, csv.Error):  # a column, a cell or a number is missing
        raise UserError(
            f"{path} does not hold the columns {', '.join(COLUMNS)}; give one written by train.py"
        ) from None


def drawable(number: float) -> float:
    """Return a number, or NaN, which leaves a gap in its curve, in the place of one that no axis can show."""
    return number if abs(number) <= HIGHEST else math.nan


def best_epoch(curves: Curves) -> int:
    """Return the index of the epoch whose weights training keeps: of the highest CIDEr, then of the lowest loss."""
    scores = [(-math.inf if math.isnan(score) else score) for score in curves["val_cider"]]
    return max(range(len(scores)), key=lambda i: (scores[i], -curves["val_loss"][i]))


def draw(runs: dict[str, Curves]) -> Figure:
    """Return the figure: a colour for each run, a star at its best epoch, its training loss dashed."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for curves, colour in zip(runs.values(), itertools.cycle(COLOURS)):
            epochs, values, best = curves["epoch"], curves[column], best_epoch(curves)
            dots: dict[str, Any] = {"color": colour, "marker": "o" if len(epochs) <= MAX_DOTS else "", "markersize": 4}
            if column == "val_loss":
                axes.plot(epochs, curves["train_loss"], "--", linewidth=1.3, markerfacecolor="white", **dots)
            axes.plot(epochs, values, linewidth=2, **dots)
            if math.isnan(values[best]):
                continue
            star = epochs[best], values[best]
            axes.plot(*star, "*", color=colour, markersize=16, markeredgecolor="white", zorder=3, clip_on=False)
            if len(runs) == 1:  # the numbers of several runs would cover each other
                number = {"color": colour, "weight": "bold", "ha": "center"}
                axes.annotate(f"{values[best]:.4g}", star, (0, 11), textcoords="offset points", **number)
        style_axes(axes, title, "epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.03, y=0.13)
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # no loss or score is negative

    solid, dashed = Line2D([], [], color=TEXT), Line2D([], [], color=TEXT, linestyle="--")
    figure.axes[0].legend([solid, dashed], ["validation", "training"], frameon=False, labelcolor=TEXT)
    names = []
    for (name, curves), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        best = best_epoch(curves)
        # matplotlib sets what is between two $ as a formula, and leaves out what begins with _
        shown = f"{' ' if name.startswith('_') else ''}{name}".replace("$", r"\$")
        label = f"{shown}: best epoch {curves['epoch'][best]:.0f}, CIDEr {curves['val_cider'][best]:.1f}"
        names.append(Line2D([], [], color=colour, linewidth=3, label=label))
    look: dict[str, Any] = {"fontsize": 12, "handlelength": 1, "frameon": False, "labelcolor": TEXT}
    figure.legend(handles=names, loc="outside upper left", ncols=min(3, len(names)), **look)
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write the figure in the format that the file's ending names; raises UserError for an unknown one."""
    kind = out.suffix[1:].lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--out {out}: pictures cannot be written as '{kind}'; use .png, .svg or .pdf")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    write_atomically(out, buffer.getvalue())


if __name__ == "__main__":
    raise SystemExit(run_script(main))
