"""How charts look: colours of lines and words, and axes."""

from matplotlib.axes import Axes

TEXT, LINES = "#3d434a", "#c9cccf"
COLOURS = ("#2f6db3", "#d1622b", "#3a8f5d", "#8a5aa8", "#b0892c", "#c04a6b", "#4a9aa5", "#6b6f75")


def style_axes(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, weight="bold", color=TEXT, pad=10)
    axes.set_xlabel(below, color=TEXT)
    axes.tick_params(color=LINES, labelcolor=TEXT)
    axes.grid(color=LINES, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(LINES)
