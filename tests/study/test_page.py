"""The HTML report: what it says, and how a browser shows it on a phone."""

import base64
import copy
import re
import shutil
import subprocess

import pytest
import timm
import torch

import timm_masterkeys as mk
from timm_masterkeys.study.page import html_page


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_convnext3")


@pytest.fixture(scope="module")
def model(dense):
    return mk.convert_to_masterkeys(dense, keys_per_kernel=2)


def page_of(model, dense, title="network"):
    """A page with a few bytes in place of each picture: most of the time goes into rendering."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"picture"))
        return html_page(model, dense, mk.conversion_report(model, dense), title)


@pytest.fixture(scope="module")
def page(model, dense):
    return page_of(model, dense, "a <b> network")


@pytest.fixture(scope="module")
def rendered_page(model, dense):
    return html_page(model, dense, mk.conversion_report(model, dense), "network")


def pictures(page):
    """The bytes of each picture of a page that links to nothing else."""
    kinds, data = zip(*(link.split(",", 1) for link in re.findall(r"(?:src|href)='?\"?([^'\">]*)", page)), strict=True)
    assert set(kinds) == {"data:image/png;base64"} and "http" not in page
    return [base64.b64decode(text) for text in data]


def tables(page):
    """The cells of every row of a table, by the first of them."""
    rows = [row.split("</table>")[0] for row in re.split("<tr[^>]*>", page)[1:]]
    cells = ([cell.strip() for cell in re.split("<t[hd]>", row)[1:]] for row in rows)
    return {first: [first, *others] for first, *others in cells}


@pytest.mark.slow
def test_pictures_are_rendered(rendered_page):
    assert [picture[:4] for picture in pictures(rendered_page)] == [b"\x89PNG"] * 6


def test_it_holds_everything_itself(page, model, dense):
    assert pictures(page) == [b"picture"] * 6
    report, rows = mk.conversion_report(model, dense), tables(page)
    for layer in (*report.layers, report.total):
        assert rows[layer.name][4] == f"{layer.mean_r2:.3f}"
        assert [int(cell) for cell in rows[layer.name][9:]] == list(layer.key_histogram)
    for operator in report.operators:
        assert rows[operator.operator][1] == str(operator.kernels)
    control = mk.conversion_report(mk.convert_to_masterkeys(dense, "random8:0", keys_per_kernel=2)).total
    assert f"<li>R² of random keys<b>{control.mean_r2:.3f}</b>" in page  # as many per kernel
    assert "a &lt;b&gt; network" in page and "<b> network" not in page
    assert "converted and not calibrated" in page and f"{report.total.mean_r2:.3f}" in page


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_without_the_dense_model(page, model):
    """What needs its kernels is left out, with a line that says so."""
    short = page_of(model, None)
    assert set(headings(page)) - set(headings(short)) == {"Best, median and worst fits", "Operators"}
    assert "The dense model was not given" in short and "The dense model was not given" not in page
    assert "(control)" not in short and "random keys<b>" not in short
    tables = [re.findall(r"<table>.*?</table>", text, re.DOTALL) for text in (page, short)]
    assert tables[1] == tables[0][1:]  # the layers


def test_random_initialisation_has_no_fit_to_show(dense):
    page = page_of(mk.initialize_masterkeys(copy.deepcopy(dense)), dense)
    assert "kernels have keys of random initialisation" in page
    assert headings(page)[:3] == ["The bank", "The keys as the layers use them", "Keys by depth"]


def test_a_convolution_alone():
    conv = torch.nn.Conv2d(4, 4, 3, groups=4)
    assert "Best, median and worst fits" in headings(page_of(mk.convert_to_masterkeys(conv), conv))


def test_names_that_look_like_patterns():
    dense = torch.nn.ModuleDict({name: torch.nn.Conv2d(4, 4, 3, groups=4) for name in ("conv[0]", "*")})
    assert "R² of random keys" in page_of(mk.convert_to_masterkeys(dense), dense)


def test_every_bank_of_a_model_is_shown(dense):
    model = mk.convert_to_masterkeys(dense, include="stages.0.*")
    model = mk.convert_to_masterkeys(model, "random8:1", inplace=True)
    assert headings(page_of(model, dense))[:2] == ["The bank babaiee2025", "The bank random8:1"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_it_is_readable_in_a_browser(rendered_page, tmp_path, width):
    """Every picture is decoded; nothing is wider than the window but what scrolls in a box: tables, wide pictures.

    At 1,280 px the tables fit; in a narrow window the names of layers stay in sight and leave room for figures.
    """
    measure = """<script>
    const frame = document.querySelector("iframe");
    frame.onload = () => {
      const page = frame.contentDocument, boxes = "h1, h2, p, li, figure, .table, .wide, div:not(.wide) > img";
      const wide = [...page.querySelectorAll(boxes)]
        .filter(e => e.getBoundingClientRect().right > frame.clientWidth).length;
      const seen = [...page.images].filter(i => i.naturalWidth > 100 && i.clientWidth > 100).length;
      const cut = [...page.querySelectorAll(".table")].filter(e => e.scrollWidth > e.clientWidth).length;
      const names = Math.max(...[...page.querySelectorAll("td:first-child")].map(e => e.clientWidth));
      document.title = [page.documentElement.scrollWidth, frame.clientWidth, wide, seen, cut, names].join(" ");
    };
    </script>"""
    document = rendered_page.replace("&", "&amp;").replace('"', "&quot;")
    frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{document}"></iframe>'
    (tmp_path / "test.html").write_text(f"<title>none</title>{frame}{measure}", encoding="utf-8")
    chromium = shutil.which("chromium")
    assert chromium, "Chromium is needed: apt-get install chromium"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'}"
    flags += " --virtual-time-budget=20000 --dump-dom"
    command = [chromium, *flags.split(), (tmp_path / "test.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    scroll, window, wide, seen, cut, names = map(int, re.search(r"<title>([\d ]+)</title>", done.stdout)[1].split())
    assert scroll <= window == width and wide == 0 and seen == 6
    assert (cut == 0) if width == 1280 else names < width / 2
