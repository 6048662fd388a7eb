"""The reliability diagram of a captioner: of captions with a chance of 70 % to be right, 70 % should be."""

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from render.charts import COLOURS, LINES, TEXT, style_axes


def draw_reliability(datasets: dict[str, dict[str, Any]]) -> bytes:
    """Return a PNG with a line for each dataset, of what `calibrate.judge` returns of it."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color=LINES, linewidth=1.5)
    axes.text(0.1, 0.07, "as it should be", color=TEXT, va="top", rotation=45, rotation_mode="anchor", alpha=0.7)
    for (name, about), colour in zip(datasets.items(), COLOURS, strict=False):
        chances, right = ([each[key] for each in about["bins"]] for key in ("chance", "right"))
        label = f"{name}: {about['captions']:,} captions, area under ROC {about['auc']:.2f}"
        axes.plot(chances, right, "o-", color=colour, linewidth=2, markersize=5, label=label)
    style_axes(axes, "Share of captions that are right", "chance that the captioner gives")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left", frameon=False, labelcolor=TEXT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
