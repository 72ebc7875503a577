"""Columns of text."""

import math

import pytest

from timm_masterkeys.conversion.table import number, share, table


@pytest.mark.parametrize(
    ("header", "rows", "align", "lines"),
    [
        (
            ("layer", "R2"),
            [("a", "0.91"), ("stem.conv", "1")],
            "",
            ["layer        R2", "a          0.91", "stem.conv     1"],
        ),
        (("n", "why"), [("10", "it is"), ("9", "")], "><", [" n  why", "10  it is", " 9"]),
        (("a", "b"), [], "", ["a  b"]),
    ],
)
def test_table(header, rows, align, lines):
    assert table(header, rows, align).splitlines() == lines


def test_a_row_has_as_many_cells_as_the_header():
    for row in (("a",), ("a", "b", "c")):
        with pytest.raises(ValueError, match="zip"):
            table(("a", "b"), [row])


def test_cells():
    assert [number(0.12345), number(2, 1), number(math.nan)] == ["0.123", "2.0", "-"]
    assert [share(0.256), share(1), share(math.nan)] == ["26%", "100%", "-"]
