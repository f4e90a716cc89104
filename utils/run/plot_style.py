"""How all figures look: colours that stay apart for colour-blind readers and in grey print, and plain axes."""

from __future__ import annotations

from matplotlib.axes import Axes

# Okabe & Ito.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#888888"  # for what is beside the data; visible on white and on dark paper


def plain(axes: Axes) -> None:
    """No frame above and to the right, and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
