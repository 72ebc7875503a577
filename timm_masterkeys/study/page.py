"""One self-contained HTML page about a converted model. Needs matplotlib, as ``plotting``.

Not imported with the package: ``from timm_masterkeys.study.page import html_page``.
"""

import base64
import copy
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from torch import nn

from ..keys.banks import get_bank
from ..layers import MasterKeyConv2d
from ..models.report import ConversionReport, LayerReport, conversion_report
from ..models.surgery import convert_to_masterkeys
from ..models.wrapped import unwrapped
from .plotting import plot_bank, plot_coverage, plot_kernels, plot_keys, plot_r2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROL = "random8:0"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1a1a1a;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 1rem 0; } .wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
.wide img { max-width: none; width: max(100%, 36rem); }
figcaption { font-size: .9rem; color: #444; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } tr.total td { font-weight: 600; border-top: 2px solid #666; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; padding: 0; }
.facts li { list-style: none; background: #f3f3f3; padding: .6rem .8rem; border-radius: .4rem; }
.facts b { display: block; font-size: 1.1rem; } .warning { border-left: 4px solid #D55E00; padding: .2rem .8rem; }
"""


def html_page(model: nn.Module, reference: nn.Module, report: ConversionReport, title: str) -> str:
    """A page with the pictures and tables of a conversion; nothing is loaded from elsewhere.

    Args:
        model: A converted model. Not changed.
        reference: The dense model it was made from. Not changed.
        report: ``conversion_report(model, reference)``.
        title: Of the page.

    Returns:
        The page.

    Raises:
        ConversionError: The reference is not the dense model of this one.

    Example:
        >>> page = html_page(model, dense, conversion_report(model, dense), "convnext_tiny")
        >>> Path("report.html").write_text(page, encoding="utf-8")
    """
    model, reference = unwrapped(model), unwrapped(reference)
    total = report.total
    control = conversion_report(_control(reference, report))
    calibrated = f"<p>{escape(report.calibration)}</p>" if report.calibration else ""
    warning = (
        "<p class=warning>These kernels were converted in one shot, and nothing has measured what that does to the "
        "network's accuracy. Calibrate, or fine-tune, before use.</p>"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        calibrated or warning,
        _facts(report, control),
        *(_figure(*figure) for figure in _figures(model, reference, report, control)),
        "<h2>Operators</h2><p>What the dense kernels resemble: Gaussian derivatives fitted by least squares, none "
        "where no fit reaches R² .5; beside them the share of random kernels of the same sizes that do as well.</p>",
        _table(*_operators(report)),
        "<h2>Layers</h2>",
        _table(_HEADER + _keys(total), [_row(layer) for layer in (*report.layers, *report.stages, total)], total=True),
    ]
    notes = [
        (total.constant, "kernels are constant: met exactly, not in the R² above"),
        (total.drawn, "kernels were drawn from the bank, not fitted: they have no R²"),
        (report.dense, "depthwise layers are not converted"),
    ]
    body += [f"<p>{count:,} {text}.</p>" for count, text in notes if count]
    return (
        f"<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f"<meta name=viewport content='width=device-width, initial-scale=1'>\n<title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _facts(report: ConversionReport, control: ConversionReport) -> str:
    facts = {
        "mean R²": f"{report.total.mean_r2:.3f}",
        "R² of random keys": f"{control.total.mean_r2:.3f}",
        "kernels": f"{report.total.channels:,}",
        "layers": f"{len(report.layers)}",
        "bank": report.bank,
        "trainable parameters": f"{report.trainable_before:,} → {report.trainable_after:,}",
    }
    return "<ul class=facts>" + "".join(f"<li>{k}<b>{escape(v)}</b></li>" for k, v in facts.items()) + "</ul>"


def _figures(
    model: nn.Module, reference: nn.Module, report: ConversionReport, control: ConversionReport
) -> Iterator[tuple[str, "Figure", str]]:
    """The pictures, each with its title and what it shows."""
    bank = next(layer.bank for layer in model.modules() if isinstance(layer, MasterKeyConv2d))
    yield "The bank", plot_bank(bank), "The keys, on one scale: red is positive, blue negative, white zero."
    yield (
        "Coverage",
        plot_coverage({report.bank: report, f"{CONTROL} (control)": control}),
        "The share of kernels whose fit is above each R²; as many of eight random filters are the control.",
    )
    yield "Fit by depth", plot_r2(report), "Mean, median and worst R² of every layer."
    yield "Keys by depth", plot_keys(report), "The key nearest to each kernel."
    if not math.isnan(report.total.mean_r2):  # else all kernels were drawn
        yield (
            "Worst and best",
            plot_kernels(model, reference),
            "Kernels of the dense network above their fits, a pair on one scale; below each title, layer:channel.",
        )


def _operators(report: ConversionReport) -> tuple[tuple[str, ...], list[list[str]]]:
    """The header and the rows of the table of operators."""
    header = ("resembles", "kernels", "random kernels", "mean R²", "sigma 10 %", "median", "90 %")
    rows = [
        [row.operator, f"{row.kernels:,}", _share(row.chance)]
        + [_number(value) for value in (row.mean_r2, *row.sigma)]
        + [_share(value) for value in (row.upright, row.half_pixel)]
        for row in report.operators
    ]
    return (*header, "along an axis", "half a tap aside"), rows


def _control(reference: nn.Module, report: ConversionReport) -> nn.Module:
    """The reference converted with random keys, as many per kernel as the report's layers have."""
    model = copy.deepcopy(reference)
    for count in sorted({layer.keys_per_kernel for layer in report.layers}):
        names = [layer.name for layer in report.layers if layer.keys_per_kernel == count]
        most = len(get_bank(CONTROL))
        convert_to_masterkeys(model, CONTROL, include=names, keys_per_kernel=min(count, most), inplace=True)
    return model


_HEADER = ("layer", "kernel", "channels", "keys", "mean R²", "median", "worst", "R² > .5", "R² > .9")


def _keys(total: LayerReport) -> tuple[str, ...]:
    return tuple(f"k{index + 1}" for index in range(len(total.key_histogram)))


def _row(layer: LayerReport) -> list[str]:
    return [
        layer.name,
        "x".join(map(str, layer.kernel_size)) if layer.kernel_size[0] else "",
        f"{layer.channels:,}",
        str(layer.keys_per_kernel or ""),
        *map(_number, (layer.mean_r2, layer.median_r2, layer.worst_r2)),
        *map(_share, (layer.above_50, layer.above_90)),
        *map(str, layer.key_histogram),
    ]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}" for cell in header)]
    for number, row in enumerate(rows):
        mark = " class=total" if total and number == len(rows) - 1 else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}" for cell in row))
    return "<div class=table><table>" + "\n".join(lines) + "</table></div>"


def _figure(title: str, figure: "Figure", caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    wide = " class=wide" if figure.get_figwidth() > 5.5 else ""  # scrolls on a phone
    title = escape(title)
    return (
        f"<h2>{title}</h2><figure><div{wide}><img alt='{title}' src='data:image/png;base64,{data}'></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
