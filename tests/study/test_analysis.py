"""Networks and banks side by side, against projection."""

import re

import numpy as np
import pytest
import timm
import torch

import timm_masterkeys as mk
from timm_masterkeys.study.analysis import compare_networks


def test_rows_against_projection():
    model = timm.create_model("test_convnext3")
    found = compare_networks({"net": model, "random": torch.randn(50, 5, 5)}, ["babaiee2025", "random8:1"])
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == m.in_channels > 1]
    sizes = sorted({tuple(w.shape[2:]) for w in weights})
    assert [(r.network, r.kernel_size) for r in found.rows[::2]] == [*(("net", s) for s in sizes), ("random", (5, 5))]
    for row in found.rows[:-2]:
        bank = mk.get_bank(row.bank)
        kernels = torch.cat([w.detach() for w in weights if tuple(w.shape[2:]) == row.kernel_size])
        fit = mk.project_kernels(kernels, bank)
        assert row.kernels == len(kernels) and row.left_out == 0
        assert row.mean_r2 == pytest.approx(float(fit.r2.mean()), abs=1e-5)
        assert row.above_50 == pytest.approx(float((fit.r2 > 0.5).float().mean()))
        kept = torch.tensor(bank.kept(row.kernel_size))
        assert row.key_histogram == tuple(torch.bincount(kept[fit.key_index[:, 0]], minlength=8).tolist())
    table = str(found).splitlines()
    for line, row in zip(table[2:], found.rows, strict=False):
        cells = re.split("  +", line)
        size = "x".join(map(str, row.kernel_size))
        assert cells[:4] == [row.network, size, str(row.kernels), row.bank]
        shares = (f"{share:.0%}" for share in (row.above_50, row.above_90))
        assert cells[4:] == [f"{row.mean_r2:.3f}", *shares, " ".join(map(str, row.key_histogram))]
    assert len(table) == 2 + len(found.rows)


def test_errors():
    with pytest.raises(mk.BankError, match="'a' holds no depthwise kernels"):
        compare_networks({"a": torch.nn.Linear(2, 2)})
    with pytest.raises(mk.BankError, match="Two of the banks have one name: mine, mine"):
        compare_networks([torch.randn(40, 7, 7)], [mk.KeyBank("mine", np.random.randn(2, 7, 7)) for _ in range(2)])


def test_constant_kernels_are_shown_not_fitted():
    found = compare_networks({"a": [torch.ones(40, 7, 7), torch.randn(9, 3, 3)], "b": torch.randn(9, 7, 7)})
    row = found.rows[2]
    assert (row.kernel_size, row.kernels, row.left_out) == ((7, 7), 0, 40) and row.mean_r2 != row.mean_r2
    assert "left out: 40 kernels that are constant" in str(found)
