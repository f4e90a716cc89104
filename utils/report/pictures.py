"""A figure as the bytes of a PNG file, in the colours of a white page and in those of a dark one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.spines import Spine
from matplotlib.text import Text

_INK_ON_DARK = "#e6e8eb"  # as --ink of report.css


@dataclass(frozen=True)
class Picture:
    """A figure, and the same with light ink on a transparent ground for a dark page."""

    name: str  # of its file
    width: int  # in pixels
    light: bytes
    dark: bytes

    def write(self, folder: Path) -> None:
        """Write the figure on white to its file in `folder`."""
        (folder / self.name).write_bytes(self.light)


def picture_of(figure: Figure, name: str, dpi: int) -> Picture:
    """Draw `figure`; afterwards its text, spines and ticks have the colours for a dark page."""
    light = _png(figure, dpi)
    for axes in figure.axes:
        axes.tick_params(colors=_INK_ON_DARK)
    for text in figure.findobj(Text):
        text.set_color(_INK_ON_DARK)
    for spine in figure.findobj(Spine):
        spine.set_edgecolor(_INK_ON_DARK)
    return Picture(name, round(figure.get_figwidth() * dpi), light, _png(figure, dpi, transparent=True))


def _png(figure: Figure, dpi: int, transparent: bool = False) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, transparent=transparent)
    return file.getvalue()
