"""Tables for a terminal, for Markdown and for LaTeX, from the same cells."""

from __future__ import annotations

from collections.abc import Sequence

Cells = tuple[list[str], list[list[str]]]  # a table: its header and its rows

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """A number of operations with three to four digits: 944.9 M."""
    if value is None:
        return "-"
    for factor, unit in _UNITS:
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g}"


def energy(pJ: float) -> str:
    """An energy in the unit that suits it: 4.408 mJ, 12.3 µJ."""
    for factor, unit in ((1e12, "J"), (1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ")):
        if pJ >= factor:
            return f"{pJ / factor:.4g} {unit}"
    return f"{pJ:.4g} pJ"


def ratio(value: float | None, digits: int = 1) -> str:
    """How many times; a dash where there is nothing to divide by."""
    return "-" if value is None else f"{value:.{digits}f} times"


def rate(value: float | None, digits: int) -> str:
    """A firing rate; a dash for a model without spike tensors."""
    return "-" if value is None else f"{value:.{digits}f}"


def terminal(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Aligned columns, the first `left` ones to the left, with a rule below the header."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular for the booktabs package, special characters escaped."""
    escaped = [" & ".join(_escape(cell) for cell in cells) + r" \\" for cells in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    body = [escaped[0], r"\midrule", *escaped[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])


def _escape(cell: str) -> str:
    for character in "&%$#_{}":
        cell = cell.replace(character, "\\" + character)
    return cell.replace("^", r"\^{}")
