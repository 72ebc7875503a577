"""The search: what was planted is found; every step against brute force."""

import itertools
import re
import sys

import numpy as np
import pytest
import torch

import timm_masterkeys as mk
from timm_masterkeys.study import discovery
from timm_masterkeys.study.discovery import (
    collect_kernels,
    discover_bank,
    eliminate,
    find_elbow,
    fit_lines,
    match_banks,
)


def planted(count, each=200, noise=0.25, seed=0):
    """Kernels near a few random lines, shifted and scaled: (N, 7, 7), and the lines (count, 49)."""
    generator = torch.Generator().manual_seed(seed)
    lines = torch.randn(count, 49, generator=generator, dtype=torch.float64)
    lines -= lines.mean(1, keepdim=True)
    lines /= lines.norm(dim=1, keepdim=True)
    kernels = lines.repeat(each, 1) + noise / 7 * torch.randn(count * each, 49, generator=generator).double()
    scale, shift = (torch.randn(count * each, 1, generator=generator).double() for _ in "ab")
    return (kernels * scale + shift).unflatten(1, (7, 7)), lines


def found_again(keys, lines):
    return (keys.flatten(1).double() @ lines.T).abs().amax(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": ["x"]}, "no network 'x'"),
        ({"held_out": "other"}, "no network 'other'"),
        ({"held_out": ["a"]}, "0 kernels that are not constant are left"),
        ({"held_out": ["constant"]}, "All kernels of constant are constant: nothing is held out"),
        ({"keys": 50}, "expected 1 to 25"),
        ({"method": "pca"}, "method is 'pca'"),
        ({"device": "mps"}, "device is 'mps'"),
    ],
)
def test_errors(options, message):
    kernels = collect_kernels({"a": torch.randn(40, 7, 7), "constant": torch.ones(40, 7, 7)})
    with pytest.raises(mk.BankError, match=message):
        discover_bank(kernels, **options)


def test_lines_are_found_again():
    kernels, lines = planted(5)
    data = collect_kernels([kernels])
    fitted = fit_lines(data.values, data.weights(), 5)
    assert found_again(fitted, lines).min() > 0.99
    assert torch.equal(fitted, fit_lines(data.values, data.weights(), 5))
    one = fit_lines(data.values, data.weights(), 1)  # a single line is the principal direction
    principal = np.linalg.svd(data.values.numpy(), full_matrices=False)[2][0]
    weights = data.weights()
    best = weights @ (data.values @ torch.from_numpy(principal)).square()
    assert float(weights @ data.fit_keys(one)[0]) == pytest.approx(float(best), abs=1e-6)


def test_elimination_against_brute_force():
    data = collect_kernels([planted(4, each=20)[0]])
    weights = torch.rand(len(data.values), generator=torch.Generator().manual_seed(0)).double()
    weights /= weights.sum()
    candidates = collect_kernels([torch.randn(40, 7, 7)]).values[:9]

    def r2(keys):
        return float(weights @ (data.values @ keys.T).square().amax(1))

    order, curve = eliminate(data.values, weights, candidates)
    left = list(range(9))
    for removed in order[:-1]:
        assert curve[len(left)] == pytest.approx(r2(candidates[left]), abs=1e-12)
        without = {i: r2(candidates[[j for j in left if j != i]]) for i in left}
        assert without[removed] == pytest.approx(max(without.values()), abs=1e-12)
        left.remove(removed)
    assert curve[1] == pytest.approx(r2(candidates[left])) and sorted(order) == list(range(9))


def test_elbow():
    assert find_elbow({1: 0.0, 2: 0.4, 3: 0.8, 4: 0.85, 5: 0.9}) == 3
    assert find_elbow({4: 1.0}) == 4


@pytest.mark.parametrize("method", ["autoencoder", "lines"])
def test_a_planted_bank_is_discovered(method, tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "STEPS", 600)
    monkeypatch.setattr(discovery, "BATCH", 128)
    kernels, lines = planted(4, each=60)
    data = collect_kernels({"one": kernels, "two": planted(4, each=50)[0]})
    found = discover_bank(data, method=method, held_out="two", seed=1)  # not the letters t, w, o
    assert found.elbow == 4
    assert found_again(found.bank.keys_for((7, 7)), lines).min() > 0.97
    assert found.r2["this bank"] > 0.9 > 0.5 > found.r2["published keys"] and found.r2["random keys"] < 0.4
    text = str(found)
    assert "4 keys from 240 kernels; the curve of R2 bends at 4" in text and "200 kernels held out" in text
    cells = [re.split("  +", line) for line in text.splitlines()]
    assert all([name, f"{value:.3f}"] in cells for name, value in found.r2.items())
    assert ["keys", *map(str, range(1, 9))] in cells  # twice as far as the elbow
    assert ["mean R2", *(f"{found.curve[count]:.3f}" for count in range(1, 9))] in cells
    found.bank.save(tmp_path / "mine.safetensors")
    bank = mk.get_bank(tmp_path / "mine.safetensors")
    assert bank.source == (
        f"discovered ({method}, seed 1, all networks count the same) in 240 kernels of one; held out: two"
    )
    assert (bank.name, bank.resize, bank.digest) == ("discovered", "crop", found.bank.digest)
    monkeypatch.setattr(discovery, "STEPS", 20)
    first, again = (discover_bank(data, method=method, keys=3) for _ in range(2))
    assert first.bank.digest == again.bank.digest and first.elbow == again.elbow and len(first.bank) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_search_in_any_mode_of_torch(context, monkeypatch):
    monkeypatch.setattr(discovery, "STEPS", 20)
    kernels = planted(2, each=20)[0]
    expected = discover_bank(collect_kernels([kernels]), keys=2).bank
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    with context():
        assert discover_bank(collect_kernels([kernels]), keys=2).bank == expected


@pytest.mark.parametrize("swap", [False, True])
def test_match_banks_against_every_assignment(swap):
    """Also of banks that have fewer keys at this size than in all: indices are those in the bank."""
    names = ("random8:3", "babaiee2025") if swap else ("babaiee2025", "random8:3")
    pairs = match_banks(*names, (1, 7))
    first, second = map(mk.get_bank, names)
    keys, others = (bank.keys_for((1, 7)).flatten(1).double() for bank in (first, second))
    table = (keys @ others.T).abs()
    rows = (table.T if swap else table).tolist()
    few, many = len(rows), len(rows[0])
    assert few < many == 8
    best = max(
        sum(row[column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(many), few)
    )
    assert sum(pair[2] for pair in pairs) == pytest.approx(best) and len(pairs) == few
    assert [pair[2] for pair in pairs] == sorted((pair[2] for pair in pairs), reverse=True)
    for i, j, correlation in pairs:
        place = first.kept((1, 7)).index(i), second.kept((1, 7)).index(j)
        assert correlation == pytest.approx(float(table[place]))


def test_match_banks_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install scipy"):
        match_banks("babaiee2025", "random8:3")
