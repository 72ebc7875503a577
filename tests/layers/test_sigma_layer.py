"""Keys with scales of their own: exact kernels and gradients, the fit, and everything a layer goes through."""

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from compare import layers, snapshot, unchanged
from layer_cases import as_function
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.keys.gaussian_banks import SIGMAS, scale_space_keys
from timm_masterkeys.keys.sigma_fit import fit_sigmas, sigma_kernels

BANK = "scale-space-b"


@pytest.mark.parametrize("method", ["a", "b", "c2", "d2"])
@pytest.mark.parametrize("size", [(7, 7), (3, 3), (4, 6), (1, 7), (13, 13)])
def test_kernels_are_those_of_the_bank_at_its_sigmas(method, size):
    bank = mk.get_bank(f"scale-space-{method}")
    nominal = torch.tensor([float(s) for s in SIGMAS[method].split()], dtype=torch.float64).view(8, 2)
    kept = list(bank.kept(size))
    kernels = sigma_kernels(torch.tensor(kept), nominal[kept].log(), *size)
    torch.testing.assert_close(kernels.float(), bank.keys_for(size), rtol=0, atol=2e-6)


def layer(channels=12):
    return mk.SigmaKeyConv2d(channels, channels, 7, padding=3, bank=BANK, trainable="sigmas")


def test_large_sigmas_against_the_bank_builder(monkeypatch):
    monkeypatch.setitem(SIGMAS, "x", " ".join(["2.5 3.5"] * 8))
    expected = scale_space_keys("x", 61)[:, 27:34, 27:34].reshape(8, 49)
    expected = expected - expected.mean(1, keepdims=True)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    log_sigma = torch.tensor([[2.5, 3.5]], dtype=torch.float64).log().repeat(8, 1)
    kernels = sigma_kernels(torch.arange(8), log_sigma, 7, 7).flatten(1)
    np.testing.assert_allclose(kernels, expected, atol=1e-10)


def test_gradients():
    log_sigma = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    assert torch.autograd.gradcheck(
        lambda s: sigma_kernels(torch.arange(8), s, 5, 5), (log_sigma.requires_grad_(),), atol=1e-6
    )
    conv, x = layer(channels=4).double(), torch.randn(2, 4, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(as_function(conv), (x, *conv.parameters()), atol=1e-6)


def test_planted_kernels_are_fitted():
    generator = torch.Generator().manual_seed(0)
    sigma = 0.3 + 1.2 * torch.rand(160, 2, generator=generator).double()
    operator = torch.arange(160) % 8
    a, b = torch.randn(2, 160, 1, 1, generator=generator).double()
    keys = sigma_kernels(operator, sigma.log(), 7, 7)
    projection, log_sigma = fit_sigmas((a * keys + b)[:, None], tuple(range(8)))
    assert projection.r2.min() > 0.9998 and torch.equal(projection.key_index[:, 0], operator)
    assert (log_sigma - sigma.log()).abs().median() < 0.01
    torch.testing.assert_close(projection.shift, (a * keys + b).mean((1, 2)))
    torch.testing.assert_close(projection.scale.abs(), a.abs()[:, 0], rtol=0.01, atol=1e-3)


def test_the_fit_is_near_that_of_an_exhaustive_search():
    kernels = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    kernels[5] = 2.5
    projection, log_sigma = fit_sigmas(kernels, (0, 4, 6, 7))
    keys = sigma_kernels(torch.tensor([0, 4, 6, 7])[projection.key_index[:, 0]], log_sigma, 5, 5)
    rebuilt = projection.scale[:, :, None] * keys + projection.shift[:, None, None]
    flat, rest = kernels[:, 0].flatten(1), (kernels[:, 0] - rebuilt).flatten(1)
    r2 = 1 - rest.square().sum(1) / (flat - flat.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(projection.r2[:5].double(), r2[:5], rtol=0, atol=1e-6)
    assert projection.r2[5] == 1 and projection.scale[5] == 0  # a constant kernel
    line = torch.linspace(np.log(0.1), np.log(4), 60, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    unit = nn.functional.normalize(flat - flat.mean(1, keepdim=True))
    for index in range(5):
        best = max(
            float((sigma_kernels(torch.full((len(grid),), o), grid, 5, 5).flatten(1) @ unit[index]).square().max())
            for o in (0, 4, 6, 7)
        )
        assert float(projection.r2[index]) > best - 0.005
    kernels[0, 0, 0, 0] = torch.nan
    with pytest.raises(mk.ProjectionError, match="Channel 0 of the weight holds NaN"):
        fit_sigmas(kernels, (7,))


def test_conversion_fits_better_than_fixed_scales():
    dense = timm.create_model("test_convnext3")
    fixed, learned = (mk.convert_to_masterkeys(dense, BANK, trainable=trains) for trains in ("shift", "sigmas"))
    assert mk.conversion_report(learned).total.mean_r2 > mk.conversion_report(fixed).total.mean_r2


def test_training_changes_only_sigmas_and_shift():
    model = mk.convert_to_masterkeys(timm.create_model("test_convnext3"), BANK, trainable="sigmas")
    conv = model.stages[0].blocks[0].conv_dw
    assert {n for n, _ in conv.named_parameters()} == {"log_sigma", "shift", "bias"}
    before = snapshot(conv)
    optimizer = create_optimizer_v2(model, "adamw", lr=0.05, weight_decay=0.5)
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert not any(p is own for p in decayed for own in conv.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in conv.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"log_sigma", "shift", "bias"} and conv.log_sigma.exp().min() > 0
    assert_equal_outputs(mk.fuse_masterkeys(model), model)


@torch.no_grad()
def assert_equal_outputs(a, b):
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_from_scratch_starts_at_the_banks_sigmas_and_the_stock_norm():
    torch.manual_seed(3)
    model = timm.create_model("test_convnext.mk8", mk_bank=BANK, mk_trainable="sigmas")
    torch.manual_seed(3)
    fixed = timm.create_model("test_convnext.mk8", mk_bank=BANK)
    for learned, own in zip(model.modules(), fixed.modules(), strict=True):
        if isinstance(learned, mk.SigmaKeyConv2d):
            torch.testing.assert_close(learned.weight, own.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda conv: pickle.loads(pickle.dumps(conv)),
        lambda conv: ModelEmaV3(conv).module,
        pytest.param(lambda conv: torch.compile(conv, backend="aot_eager", fullgraph=True), marks=pytest.mark.slow),
        lambda conv: torch.jit.trace(conv, torch.randn(2, 12, 9, 9), check_trace=False),
        lambda conv: torch.export.export(conv, (torch.randn(2, 12, 9, 9),)).module(),
        lambda conv: conv.fuse(),
    ],
    ids=["deepcopy", "pickle", "average", "compile", "trace", "export", "fuse"],
)
@pytest.mark.filterwarnings("ignore")
def test_it_goes_through(through):
    conv, x = layer(), torch.randn(2, 12, 9, 9)
    torch.testing.assert_close(through(conv)(x), conv(x), rtol=1e-5, atol=1e-6)


def test_half_precision():
    conv, x = layer(), torch.randn(2, 12, 9, 9)
    half = copy.deepcopy(conv).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), conv(x), rtol=0.06, atol=0.06)


def test_autocast_does_not_round_the_kernels():
    conv, x = layer(), torch.randn(2, 12, 9, 9)
    weight, expected = conv.compose_weight(), conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        assert torch.equal(conv.compose_weight(), weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)


def test_dense_kernels_are_fitted_and_compact_entries_loaded():
    settings = {"mk_bank": BANK, "mk_trainable": "sigmas", "mk_include": "stages.[01].*"}
    model, other = (timm.create_model("test_convnext.mk8", **settings).eval() for _ in "ab")
    with torch.no_grad():
        for conv in layers(model).values():
            conv.log_sigma.add_(0.3 * torch.randn_like(conv.log_sigma))
    other.load_state_dict(mk.fuse_masterkeys(model).state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0.02, atol=0.02)
    other.load_state_dict(model.state_dict())
    assert_equal_outputs(other, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank": "babaiee2025"}, "'babaiee2025' has no sigmas"),
        ({"bank": mk.KeyBank("scale-space-b", torch.randn(8, 31, 31))}, "has no sigmas"),
        ({"bank": BANK, "keys_per_kernel": 2}, "expected 1 with trainable='sigmas'"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(mk.ConversionError, match=message):
        mk.SigmaKeyConv2d(4, 4, 7, **settings)


@pytest.mark.slow
def test_calibration_leaves_keys_and_scales():
    dense = timm.create_model("test_efficientnet").eval()
    model = mk.convert_to_masterkeys(dense, BANK, trainable="sigmas")
    kept = [conv.log_sigma.clone() for conv in layers(model).values()]
    mk.calibrate_masterkeys(model, dense, torch.randn(40, 3, 64, 64))
    assert all(torch.equal(a, conv.log_sigma) for a, conv in zip(kept, layers(model).values(), strict=True))


@pytest.mark.parametrize(("trains", "others"), [("sigmas", "shift"), ("shift", "sigmas")])
def test_fixed_and_learned_scales_are_not_mixed_up(trains, others):
    model, other = (timm.create_model("test_convnext.mk8", mk_bank=BANK, mk_trainable=t) for t in (trains, others))
    message = r"log_sigma: .*made with trainable='sigmas'.*dense weights"
    with unchanged(other), pytest.raises(mk.CheckpointError, match=message):
        other.load_state_dict(model.state_dict(), strict=False)


def test_meta_kernels_have_shapes():
    with torch.device("meta"):
        model = mk.convert_to_masterkeys(timm.create_model("test_convnext"), BANK, trainable="sigmas")
    assert layers(model) and all(conv.log_sigma.is_meta for conv in layers(model).values())


def test_sigmas_of_any_size_give_kernels():
    log_sigma = torch.tensor([-20.0, 0.0, math.log(9), math.log(10), 5.0, 50.0])[:, None].expand(6, 2)
    for operator in range(8):
        kernels = sigma_kernels(torch.full((6,), operator), log_sigma, 7, 7)
        precise = sigma_kernels(torch.full((6,), operator), log_sigma.double(), 7, 7)
        torch.testing.assert_close(kernels.double(), precise, rtol=0, atol=2e-3)
        assert torch.equal(kernels[3], kernels[4]) and torch.equal(kernels[4], kernels[5])


@pytest.mark.parametrize("mode", ["sigmas", pytest.param("none", marks=pytest.mark.slow)])
def test_saved_with_a_bank_computed_elsewhere(tmp_path, mode):
    own = mk.get_bank(BANK)
    other = mk.KeyBank(BANK, np.nextafter(own.keys, 1), own.source, own.licence, own.resize)
    assert other != own
    settings = {"mk_bank": other, "mk_trainable": "sigmas", "mk_include": "stages.0.*"}
    model = timm.create_model("test_convnext.mk8", **settings)
    for conv in layers(model).values():
        conv.set_trainable(mode)
    again = timm.create_model(f"local-dir:{mk.save_pretrained(model, tmp_path / 'out')}", pretrained=True)
    assert_equal_outputs(again, model)
    for conv in layers(again).values():
        assert conv.trainable == mode and ("log_sigma" in conv._parameters) == (mode == "sigmas")


@pytest.mark.parametrize(
    ("value", "message"), [(torch.full((24,), torch.nan), "holds NaN or Inf"), (np.zeros(24), "got a ndarray")]
)
def test_scales_that_are_no_finite_tensor_are_refused(value, message):
    conv = layer()
    with pytest.raises(RuntimeError, match=f"log_sigma: {message}"):
        conv.load_state_dict({**conv.state_dict(), "log_sigma": value})


def test_the_report_counts_stored_sigmas():
    model = timm.create_model("test_convnext")
    settings = {"bank": BANK, "include": "stages.0.*"}
    fixed, learned = (
        mk.conversion_report(mk.convert_to_masterkeys(model, trainable=t, **settings)) for t in ("shift", "sigmas")
    )
    assert learned.stored_after - fixed.stored_after == 2 * learned.total.channels
