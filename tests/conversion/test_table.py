"""Columns of text."""

import math

import pytest

from timm_masterkeys.conversion.table import number, share, table


def test_columns_are_aligned_as_asked():
    text = table(("layer", "R2"), [("a", "0.91"), ("stem.conv", "1")])
    assert text.splitlines() == ["layer        R2", "a          0.91", "stem.conv     1"]
    assert table(("n", "why"), [("10", "it is"), ("9", "")], "><").splitlines() == [" n  why", "10  it is", " 9"]
    assert table(("a", "b"), []) == "a  b"
    for row in (("a",), ("a", "b", "c")):
        with pytest.raises(ValueError):
            table(("a", "b"), [row])


def test_cells():
    assert [number(0.12345), number(2, 1), number(math.nan)] == ["0.123", "2.0", "-"]
    assert [share(0.256), share(1), share(math.nan)] == ["26%", "100%", "-"]
