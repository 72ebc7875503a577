"""The HTML report: what it says, and how a browser shows it on a phone."""

import base64
import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import timm
import torch

import timm_masterkeys as mk
from timm_masterkeys.study.page import html_page


class Reader(HTMLParser):
    """Collects links and the cells of tables."""

    def __init__(self):
        super().__init__()
        self.links, self.rows, self.cell = [], [], False

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True
        elif tag not in ("b",):
            self.cell = False

    def handle_endtag(self, tag):
        self.cell = self.cell and tag != "table"

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_convnext3")


def page_of(model, dense, title):
    return html_page(model, dense, mk.conversion_report(model, dense), title)


@pytest.fixture(scope="module")
def page(dense):
    return page_of(mk.convert_to_masterkeys(dense), dense, "a <b> network")


def test_it_holds_everything_itself(page, dense):
    reader = Reader()
    reader.feed(page)
    assert len(reader.links) == 6 and "http" not in page
    for link in reader.links:
        kind, data = link.split(",", 1)
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    report = mk.conversion_report(mk.convert_to_masterkeys(dense), dense)
    rows = {row[0]: row for row in reader.rows}
    for layer in (*report.layers, report.total):
        assert rows[layer.name][4] == f"{layer.mean_r2:.3f}"
        assert [int(cell) for cell in rows[layer.name][9:]] == list(layer.key_histogram)
    for operator in report.operators:
        assert rows[operator.operator][1] == str(operator.kernels)
    assert "a &lt;b&gt; network" in page and "<b> network" not in page
    assert "converted in one shot" in page and f"{report.total.mean_r2:.3f}" in page


def test_the_control_has_as_many_keys_per_kernel(dense):
    control = mk.conversion_report(mk.convert_to_masterkeys(dense, "random8:0", keys_per_kernel=2)).total
    page = page_of(mk.convert_to_masterkeys(dense, keys_per_kernel=2), dense, "two")
    assert f"<li>R² of random keys<b>{control.mean_r2:.3f}</b>" in page


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_without_the_dense_model(page, dense):
    """What needs its kernels is left out, with a line that says so."""
    model = mk.convert_to_masterkeys(dense)
    short = html_page(model, None, mk.conversion_report(model), "a <b> network")
    assert set(headings(page)) - set(headings(short)) == {"Best, median and worst fits", "Operators"}
    assert "The dense model was not given" in short and "The dense model was not given" not in page
    assert "(control)" not in short and "random keys<b>" not in short
    tables = [re.findall(r"<table>.*?</table>", text, re.DOTALL) for text in (page, short)]
    assert tables[1] == tables[0][1:]  # the layers


def test_random_initialisation_has_no_fit_to_show(dense):
    page = page_of(mk.initialize_masterkeys(copy.deepcopy(dense)), dense, "random")
    assert "kernels have keys of random initialisation" in page
    assert headings(page)[:3] == ["The bank", "The keys as the layers use them", "Keys by depth"]


def test_inspect_writes_it(tmp_path, dense, capsys):
    from safetensors.torch import save_file

    from timm_masterkeys.cli import main

    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    args = ["inspect", "test_convnext3", "--checkpoint", str(tmp_path / "w.safetensors")]
    assert main([*args, "--html", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([*args[:2], "--html", str(tmp_path / "no.html")]) == 1 and not (tmp_path / "no.html").exists()
    assert "Random weights have no fit" in capsys.readouterr().err
    assert main(["plot", *args[1:], "--output", str(tmp_path / "pictures")]) == 0
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"bank.png", "coverage.png", "r2.png", "keys.png", "kernels.png", "used_keys.png"}


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_it_is_readable_in_a_browser(page, tmp_path, width):
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
    document = page.replace("&", "&amp;").replace('"', "&quot;")
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
