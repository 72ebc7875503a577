"""One self-contained HTML page about a converted model. Needs matplotlib, as ``plotting``.

Not imported with the package: ``from timm_masterkeys.study.page import html_page``.
"""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from torch import nn

from ..conversion.config import LayerSettings
from ..conversion.convert import apply
from ..conversion.copies import copy_model
from ..conversion.operator_report import OPERATOR_TITLES
from ..conversion.plan import converted_layers
from ..conversion.report import R2_MEANS, ConversionReport, conversion_report
from ..conversion.table import number
from ..conversion.wrapped import unwrapped
from ..keys.banks import get_bank
from .kernels import CONTROL_BANK
from .plotting import plot_bank, plot_coverage, plot_kernels, plot_keys, plot_r2, plot_used_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1a1a1a;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } p, figcaption { max-width: 62rem; }
figure { margin: 1rem 0; } .wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .15rem .45rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.total td { font-weight: 600; border-top: 2px solid #666; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; padding: 0; }
.facts li { list-style: none; background: #f3f3f3; padding: .6rem .8rem; border-radius: .4rem; }
.facts b { display: block; font-size: 1.1rem; } .warning { border-left: 4px solid #D55E00; padding: .2rem .8rem; }
@media (max-width: 48rem) {
  .wide img { max-width: none; width: 44rem; }
  th:first-child, td:first-child { white-space: normal; min-width: 6.5rem; max-width: 6.5rem; }
}
"""

_ONE_SHOT = (
    "<p class=warning>These kernels were converted and not calibrated, and nothing has measured what that does to the "
    "network's accuracy. Calibrate, or fine-tune, before use.</p>"
)
_NO_DENSE = (
    "<p>The dense model was not given. What needs its kernels is left out: the fit by random keys (the control), "
    "single kernels beside their fits, and the operators that they resemble.</p>"
)
_OPERATORS = (
    "<h2>Operators</h2><p>What the dense kernels resemble: Gaussian derivatives fitted by least squares, none where no "
    "fit has an R² above .5; beside it, the share of random kernels of the same sizes that do as well.</p>"
)


def html_page(model: nn.Module, dense: nn.Module | None, report: ConversionReport, title: str) -> str:
    """A page with the pictures and tables of a conversion; it loads nothing from elsewhere.

    Args:
        model: A converted model. Not changed.
        dense: The dense model it was converted from. Not changed. If None, everything that needs its kernels is left
            out, and the page says so.
        report: ``conversion_report(model, dense)``.
        title: The title of the page.

    Raises:
        ConversionError: The model was not converted from this dense model.

    Example:
        >>> page = html_page(model, dense, conversion_report(model, dense), "convnext_tiny")
        >>> Path("report.html").write_text(page, encoding="utf-8")
    """
    model, dense = unwrapped(model), None if dense is None else unwrapped(dense)
    control = None if dense is None else conversion_report(_control(dense, report))
    calibration = report.calibration
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>calibrated {escape(calibration.summary())}</p>" if calibration else _ONE_SHOT,
        _facts(report, control),
        f"<p>{escape(R2_MEANS)}</p>",
        "" if dense else _NO_DENSE,
        *(_figure(*figure) for figure in _figures(model, dense, report, control)),
        *((_OPERATORS, _table(OPERATOR_TITLES, [row.cells() for row in report.operators])) if report.operators else ()),
        "<h2>Layers</h2><p>k1, k2, ... count the kernels that have each key (of several keys, the first).</p>",
        _table(report.titles, [row.cells() for row in report.rows], total=True),
        *(f"<p>{escape(note)}.</p>" for note in report.notes),
    ]
    return (
        f"<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f"<meta name=viewport content='width=device-width, initial-scale=1'>\n<title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _facts(report: ConversionReport, control: ConversionReport | None) -> str:
    facts = {
        "mean R²": number(report.total.mean_r2),
        **({"R² of random keys": number(control.total.mean_r2)} if control else {}),
        "kernels": f"{report.total.channels:,}",
        "layers": f"{len(report.layers)}",
        "bank": report.bank,
        "trainable parameters": f"{report.trainable_before:,} → {report.trainable_after:,}",
    }
    return "<ul class=facts>" + "".join(f"<li>{k}<b>{escape(v)}</b></li>" for k, v in facts.items()) + "</ul>"


def _figures(
    model: nn.Module, dense: nn.Module | None, report: ConversionReport, control: ConversionReport | None
) -> Iterator[tuple[str, "Figure", str]]:
    """The pictures, each with its title and caption."""
    banks = dict.fromkeys(layer.bank for layer in converted_layers(model).values())
    has_fit = not math.isnan(report.total.mean_r2)
    for bank in banks:
        title = "The bank" if len(banks) == 1 else f"The bank {bank.name}"
        yield title, plot_bank(bank), "The keys: red is positive, blue negative, white zero."
    yield (
        "The keys as the layers use them",
        plot_used_keys(model),
        "The keys at each kernel size of this network. Where a key vanishes or repeats another, it is left out.",
    )
    if has_fit:
        reports = {report.bank: report} | ({f"{CONTROL_BANK} (control)": control} if control else {})
        beside = "; as many of eight random keys, at most all of them, are the control" if control else ""
        yield "Coverage", plot_coverage(reports), f"The share of kernels whose fit is above each R²{beside}."
        yield "Fit by depth", plot_r2(report), "Mean, median and worst R² of every layer."
    yield "Keys by depth", plot_keys(report), "The key nearest to each kernel (of several keys, the first)."
    if dense is not None and has_fit:
        yield (
            "Best, median and worst fits",
            plot_kernels(model, dense),
            "Kernels of the dense model above their fits, both less their means; above each pair its R² and "
            "layer:channel.",
        )


def _control(dense: nn.Module, report: ConversionReport) -> nn.Module:
    """The dense model converted with random keys, as many per kernel as the report's layers have, if there are."""
    bank = get_bank(CONTROL_BANK)
    keys = {layer.name: min(layer.keys_per_kernel, len(bank)) for layer in report.layers}
    return apply(copy_model(dense), {name: LayerSettings(bank, count) for name, count in keys.items()})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}" for cell in header)]
    for index, row in enumerate(rows):
        mark = " class=total" if total and index == len(rows) - 1 else ""
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
