"""The front door: short, its links lead somewhere, its Python compiles, its tables say what the raw files say."""

import ast
import csv
import itertools
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from intervals import interval  # from examples/

ROOT = Path(__file__).parent.parent
README, MEASURED = ROOT / "README.md", ROOT / "examples" / "README.md"
PAGES = [README, MEASURED, *sorted((ROOT / "examples" / "how-to").glob("*.md"))]
RESULTS = ROOT / "examples" / "results"


def section(title):
    """The text under a heading of the measurements."""
    _, found, text = MEASURED.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert found, f"no section '{title}'"
    return text.partition("\n## ")[0]


def rows(text):
    """The cells of every row of the tables in a text, without bold."""
    lines = [line.replace("**", "") for line in text.splitlines() if line.startswith("|")]
    return [{cell.strip() for cell in line.split("|")} for line in lines]


def assert_row(text, *cells):
    """Some row of a text's tables has all of these cells."""
    assert any(set(cells) <= row for row in rows(text)), cells


def anchors(page):
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def groups(name, *columns):
    """The rows of a raw file that have the same values in these columns."""
    with (RESULTS / name).open(newline="") as file:
        found = sorted(csv.DictReader(file), key=lambda row: [row[column] for column in columns])
    return {key: list(group) for key, group in itertools.groupby(found, lambda row: tuple(row[c] for c in columns))}


def written(values, digits):
    """A mean and its spread, as the tables have it."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def figures(found, digits=(1, 1, 2)):
    """The means of accuracy, agreement and divergence of some rows, as the tables have them."""
    columns = zip(("top1", "agreement", "divergence"), digits, strict=True)
    return [f"{mean(float(row[name]) for row in found):.{places}f}" for name, places in columns]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_examples_exist(page):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        ast.parse(block)
    for program in re.findall(r"examples/\w+\.py", text):
        assert (ROOT / program).exists(), program


def test_the_front_door_says_what_was_measured():
    for (_,), group in groups("front_door.csv", "network").items():
        for row in group:
            cells = [row["top1"], *([row["agreement"], row["sure"]] if row["calibrated with"] else [])]
            cells += [row["seconds"]] if row["calibrated with"] not in ("", "nothing") else []
            for page in (README, MEASURED):
                assert_row(page.read_text(encoding="utf-8"), *cells)


def test_built_in_photographs_say_what_was_measured():
    for key, draws in groups("builtin_images.csv", "network", "keys", "setting", "images").items():
        columns = ([float(row[name]) for row in draws] for name in ("top1", "agreement", "divergence"))
        assert_row(section("Built-in photographs"), key[1], *map(written, columns, (1, 1, 2)))


def test_fidelity_says_what_was_measured():
    text = section("Fidelity")
    for (*_, keys, way), draws in groups("compact8.csv", "network", "bank", "keys", "stages").items():
        if way == "dense":
            assert f"dense\n{figures(draws)[0]} %" in text
        else:
            assert_row(text, keys, way, *figures(draws))
    for (_, keys, way), draws in groups("layernorm.csv", "bank", "keys", "stages").items():
        if way != "dense":
            assert_row(text, keys, way, *figures(draws))
    for (_, bank, keys, way), found in groups("fidelity.csv", "network", "bank", "keys", "stages").items():
        if way != "dense":
            kept = {"babaiee2025": keys, "random8:0": f"{keys}, `{bank}` (control)"}.get(bank, f"{keys}, `{bank}`")
            assert_row(text, kept, way, *figures(found))


def test_discovered_keys_say_what_was_measured():
    text, calibrated = section("Discovery"), "all three"
    names = {"babaiee2025": "published", "autoencoder.safetensors": "discovered (paper's search)"}
    names["lines.safetensors"] = "discovered (lines)"
    found = groups("discovered.csv", "network", "bank", "keys", "stages")
    for bank, name in names.items():
        cells = [figures(found["proxyless_w025_r112", bank, "1", "none"])[0]]
        for keys in "14":
            cells += figures(found["proxyless_w025_r112", bank, keys, calibrated])[:2]
        assert_row(text, name, *cells)
    compact, published = (figures(found["lite0", b, "1", calibrated])[0] for b in ("compact8", "babaiee2025"))
    assert f"{compact} % (published keys {published};" in text


def test_the_key_budget_says_what_was_measured():
    for _, [row] in groups("key_budget.csv", "network", "images", "keys chosen", "keys").items():
        if row["top1"]:  # not one that the search only tried
            held_out = f"{float(row['agreement held out']):.1f}"
            cells = (f"{int(row['keys']):,}", row["per kernel"], held_out, *figures([row]))
            assert_row(section("Key budget"), *cells)


def test_fine_tuning_says_what_was_measured():
    found = groups("finetune.csv", "measured on", "arm", "lr", "epoch")
    found = {key[1:]: group for key, group in found.items() if key[0] == "validation"}
    runs = {key: {row["seed"]: float(row["top1"]) for row in group} for key, group in found.items()}
    dense = {epoch: seeds for (arm, _, epoch), seeds in runs.items() if arm == "dense"}
    last = max(dense, key=int)
    for (arm, lr, epoch), seeds in runs.items():
        if epoch in ("1", last):
            cells = [arm, lr, str(len(seeds)), written(list(seeds.values()), 1)]
            if epoch == last and arm != "dense":
                cells.append(interval([top1 - dense[last][seed] for seed, top1 in seeds.items()]))
            assert_row(section("Fine-tuning"), *cells)


def test_the_curve_of_distillation_says_what_was_measured():
    text = section("Fine-tuning")
    for (split, arm, lr, epochs), group in groups("finetune_curve.csv", "measured on", "arm", "lr", "epochs").items():
        top1 = written([float(row["top1"]) for row in group if row["epoch"] == epochs], 1)
        if split == "validation" and arm == "dense":
            assert f"dense {top1}" in text
        elif split == "validation":
            assert_row(text, arm, top1, *((epochs, lr) if epochs != "0" else ()))


def test_small_data_says_what_was_measured():
    found = {}
    for run in map(json.loads, (RESULTS / "small_data.jsonl").read_text().splitlines()):
        if run["seed"]:  # not for tuning
            found.setdefault((run["data"], run["images"]), {}).setdefault(run["arm"], {})[run["seed"]] = run["accuracy"]
    assert len(found) == 4
    for arms in found.values():
        for arm, seeds in arms.items():
            cell = written(list(seeds.values()), 1)
            if arm != "dense":
                cell += f" ({interval([top1 - arms['dense'][seed] for seed, top1 in seeds.items()])})"
            assert_row(section("Small data"), cell)


def test_the_gradient_of_a_shift_says_what_was_measured():
    text, ratios = " ".join(section("Training cost").split()), {True: [], False: []}
    for (*_, kernel, _), layers in groups("shift_gradient.csv", "threads", "network", "kernel", "layout").items():
        sums, whole = (sum(int(row["layers"]) * float(row[way]) for row in layers) for way in ("sums_ms", "whole_ms"))
        ratios[kernel == "3x3"].append(sums / whole)
    for found in ratios.values():
        assert f"{min(found):.2f} to {max(found):.2f}" in text, found
    steps = []
    for group in groups("shift_steps.csv", "threads", "px").values():
        ms = {row["variant"]: float(row["ms"]) for row in group}
        steps.append(f"{ms['shift'] / ms['none']:.2f}")
    assert sorted(steps) == ["1.08", "1.09", "1.09", "1.11"]
    assert "costs 1.08 times" in text and "1.09 to 1.11 times" in text
