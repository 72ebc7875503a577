"""Tables as text: the one formatter behind every ``str()`` and every command that prints columns."""

import math
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A header and rows in columns, two spaces apart; no line ends in spaces.

    Args:
        header: The titles.
        rows: Cells, as many in each row as there are titles.
        align: ``"<"`` (left) or ``">"`` (right) for the first columns; by default only the first is left.

    Raises:
        ValueError: A row has more or fewer cells than the header.

    Example:
        >>> print(table(["layer", "R2"], [["stem", "0.912"], ["head", "0.5"]]))
        layer     R2
        stem   0.912
        head     0.5
    """
    lines = [list(header), *map(list, rows)]
    sides = [*(align or "<"), *">" * len(header)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=False)).rstrip()
        for line in lines
    )


def number(value: float, digits: int = 3) -> str:
    """The text of a cell: the value with ``digits`` decimals, or ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def share(value: float) -> str:
    """The text of a cell: a share in whole per cent, or ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{value:.0%}"
