"""Formats figures for the programs: mean and spread, paired differences with 95 % intervals, rows of tables."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # seeds: t(.975)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences, and half their 95 % interval by Student's t; starred if it excludes 0."""
    if len(differences) not in STUDENT:
        return f"{mean(differences):+.1f}" if differences else ""
    half = STUDENT[len(differences)] * stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.1f} ± {half:.1f}" + (" *" if abs(mean(differences)) > half else "")


def print_row(cells: Sequence[Any]) -> None:
    """Prints a row of a Markdown table, without buffering."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(columns: Sequence[str]) -> None:
    """Prints the head of a Markdown table."""
    print_row(columns)
    print("|---" * len(columns) + "|", flush=True)


def append_row(path: Path, columns: Sequence[str], row: Sequence[Any]) -> None:
    """Adds a row to a CSV file; a new file first gets the names of the columns."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([row] if file.tell() else [columns, row])
