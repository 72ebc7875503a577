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


def section(page, title):
    """The text of a page under a heading."""
    _, found, text = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert found, f"{page} has no section '{title}'"
    return text.partition("\n## ")[0]


def rows(text):
    """The cells of every row of the tables in a text, without bold."""
    lines = [line.replace("**", "") for line in text.splitlines() if line.startswith("|")]
    return [{cell.strip() for cell in line.split("|")} for line in lines]


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
    measured = [row for (_,), group in groups("front_door.csv", "network").items() for row in group]
    for page in (README, MEASURED):
        table = rows(page.read_text(encoding="utf-8"))
        for row in measured:
            figures = [row["top1"], *([row["agreement"], row["sure"]] if row["calibrated with"] else [])]
            seconds = [row["seconds"]] if row["calibrated with"] not in ("", "nothing") else []
            assert any({*figures, *seconds} <= cells for cells in table), (page.name, row)


def test_built_in_photographs_say_what_was_measured():
    table = rows(section(MEASURED, "Built-in photographs"))
    for key, draws in groups("builtin_images.csv", "network", "keys", "setting", "images").items():
        columns = ([float(row[name]) for row in draws] for name in ("top1", "agreement", "kl"))
        top1, agreement, divergence = (written(v, digits) for v, digits in zip(columns, (1, 1, 2), strict=True))
        assert any({key[1], top1, agreement, divergence} <= row for row in table), (key, top1, agreement, divergence)


def test_fidelity_says_what_was_measured():
    table = rows(section(MEASURED, "Fidelity"))
    names = {"none": "none", "all in closed form": "all three"}
    for key, draws in groups("repair_ablation.csv", "network", "bank", "keys", "repair").items():
        top1, agreement, divergence = (mean(float(row[name]) for row in draws) for name in ("top1", "agreement", "kl"))
        if key[3] == "dense":
            assert f"dense\n{top1:.1f} %" in section(MEASURED, "Fidelity")
        else:
            cells = {key[2], names[key[3]], f"{top1:.1f}", f"{agreement:.1f}", f"{divergence:.2f}"}
            assert any(cells <= row for row in table), (key, cells)
    for (_, keys, repair), draws in groups("layernorm.csv", "bank", "keys", "repair").items():
        figures = {
            f"{mean(float(row[c]) for row in draws):.{d}f}" for c, d in (("top1", 1), ("agreement", 1), ("kl", 2))
        }
        assert repair == "dense" or any({keys, names.get(repair, repair), *figures} <= cells for cells in table), repair
    for (_, bank, keys, repair), [row] in groups("fidelity.csv", "network", "bank", "keys", "repair").items():
        if repair != "dense":
            figures = {f"{float(row[name]):.{digits}f}" for name, digits in (("top1", 1), ("agreement", 1), ("kl", 2))}
            kept = {"babaiee2025": keys, "random8:0": f"{keys}, `{bank}` (control)"}.get(bank, f"{keys}, `{bank}`")
            assert any({kept, names.get(repair, repair), *figures} <= cells for cells in table), (bank, keys, repair)


def test_discovered_keys_say_what_was_measured():
    text, repaired = section(MEASURED, "Discovery"), "all in closed form"
    names = {"babaiee2025": "published", "autoencoder.safetensors": "discovered (paper's search)"}
    names["lines.safetensors"] = "discovered (lines)"
    found = groups("discovered.csv", "network", "bank", "keys", "repair")
    for bank, name in names.items():
        columns = (("1", "none", "top1"), *((k, repaired, column) for k in "14" for column in ("top1", "agreement")))
        values = [mean(float(row[c]) for row in found[("proxyless_w025_r112", bank, *key)]) for *key, c in columns]
        assert any({name, *(f"{value:.1f}" for value in values)} <= row for row in rows(text)), (bank, values)
    compact, published = (
        mean(float(row["top1"]) for row in found["lite0", bank, "1", repaired]) for bank in ("compact8", "babaiee2025")
    )
    assert f"{compact:.1f} % (published keys {published:.1f};" in text


def test_the_key_budget_says_what_was_measured():
    table = rows(section(MEASURED, "Key budget"))
    for key, [row] in groups("key_budget.csv", "network", "images", "keys chosen", "keys").items():
        if row["top1"]:  # not one that the search only tried
            cells = {f"{int(row['keys']):,}", row["per kernel"], row["s"], f"{float(row['kl']):.2f}"}
            cells |= {f"{float(row[name]):.1f}" for name in ("agreement held out", "top1", "agreement")}
            assert any(cells <= cell for cell in table), (key, cells)


def test_fine_tuning_says_what_was_measured():
    table = rows(section(MEASURED, "Fine-tuning"))
    found = groups("finetune.csv", "measured on", "arm", "lr", "epoch")
    runs = {
        key[1:]: {row["seed"]: float(row["top1"]) for row in seeds}
        for key, seeds in found.items()
        if "validation" in key
    }
    dense = {epoch: seeds for (arm, _, epoch), seeds in runs.items() if arm == "dense"}
    last = max(dense, key=int)
    for (arm, lr, epoch), seeds in runs.items():
        if epoch in ("1", last):
            cells = {arm, lr, str(len(seeds)), written(list(seeds.values()), 1)}
            if epoch == last and arm != "dense":
                cells.add(interval([top1 - dense[last][seed] for seed, top1 in seeds.items()]))
            assert any(cells <= row for row in table), cells


def test_the_curve_of_distillation_says_what_was_measured():
    table = rows(section(MEASURED, "Fine-tuning"))
    for (split, arm, lr, epochs), group in groups("finetune_curve.csv", "measured on", "arm", "lr", "epochs").items():
        top1 = written([float(row["top1"]) for row in group if row["epoch"] == epochs], 1)
        if split == "validation":
            cells = {arm, epochs, lr, top1} if epochs != "0" else {arm, top1}
            found = (
                f"dense {top1}" in section(MEASURED, "Fine-tuning")
                if arm == "dense"
                else any(cells <= r for r in table)
            )
            assert found, (arm, lr, top1)


def test_small_data_says_what_was_measured():
    table = rows(section(MEASURED, "Small data"))
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
            assert any(cell in row for row in table), (arm, cell)


def test_the_gradient_of_a_shift_says_what_was_measured():
    text, ratios = section(MEASURED, "Training cost"), {True: [], False: []}
    for (*_, kernel, _), layers in groups("shift_gradient.csv", "threads", "network", "kernel", "layout").items():
        sums, whole = (sum(int(row["layers"]) * float(row[way]) for row in layers) for way in ("sums_ms", "whole_ms"))
        ratios[kernel == "3x3"].append(sums / whole)
    for found in ratios.values():
        assert f"{min(found):.2f} to {max(found):.2f}" in " ".join(text.split()), found
    steps = []
    for rows_ in groups("shift_steps.csv", "threads", "px").values():
        ms = {row["variant"]: float(row["ms"]) for row in rows_}
        steps.append(f"{ms['shift'] / ms['none']:.2f}")
    assert sorted(steps) == ["1.08", "1.09", "1.09", "1.11"]
    assert "costs 1.08 times" in text and "1.09 to 1.11 times" in text
