"""What a MasterKeyConv2d loads and refuses: state dicts, averages, and layers without values."""

import copy
import os
from functools import partial

import numpy as np
import pytest
import timm
import torch
from compare import same, snapshot, unchanged
from layer_cases import BANK, COMPACT, TRAINED, assert_fitted
from safetensors.torch import load_file, save_file
from torch import nn

from timm_masterkeys import CheckpointError, ConversionError, MasterKeyConv2d, fuse_masterkeys, project_kernels
from timm_masterkeys.hub.weights import save_compact


def dense_state(size, groups=8):
    return snapshot(nn.Conv2d(8, 8, size, groups=groups))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("trainable", "dtype"), [("none", torch.bfloat16), ("shift", torch.float32), ("affine", torch.float64)]
)
def test_compact_round_trip(tmp_path, trainable, dtype, assign):
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(6, 12, (1, 7), groups=6, dtype=dtype), BANK, 3, trainable)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = MasterKeyConv2d(6, 12, (1, 7), keys_per_kernel=3, trainable=trainable, dtype=dtype)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
    same(layer, other)
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in layer.named_parameters()]
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("trainable", "keys_per_kernel"), [("none", 1), ("shift", 2), ("affine", 1)])
def test_dense_weight_is_projected(trainable, keys_per_kernel, assign):
    layer = MasterKeyConv2d(8, 8, 7, keys_per_kernel=keys_per_kernel, trainable=trainable)
    state = dense_state(7)
    layer.load_state_dict(state, assign=assign)
    assert list(state) == ["weight", "bias"]
    assert_fitted(layer, project_kernels(state["weight"], BANK, keys_per_kernel))
    assert torch.equal(layer.bias, state["bias"]) and torch.equal(layer.keys, BANK.keys_for((7, 7)))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"bias"} | TRAINED[trainable]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dense_weight_of_another_dtype(dtype):
    """Loading then converting and converting then loading give one layer, also from half precision."""
    state = nn.Conv2d(8, 8, 7, groups=8, dtype=torch.float64).to(dtype).state_dict()
    layer = MasterKeyConv2d(8, 8, 7)
    layer.load_state_dict(state)
    conv = nn.Conv2d(8, 8, 7, groups=8)
    conv.load_state_dict(state)
    expected = MasterKeyConv2d.from_conv(conv)
    assert torch.equal(layer.key_rows(), expected.key_index)
    torch.testing.assert_close(layer.weight, expected.weight, rtol=1e-6, atol=1e-8)
    assert layer.scale.dtype == layer.shift.dtype == layer.keys.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "dense_state"), [(torch.float16, True), (torch.bfloat16, False)])
def test_assign_takes_the_dtype_of_the_checkpoint(dtype, dense_state):
    conv = nn.Conv2d(8, 8, 7, groups=8, dtype=dtype)
    source = MasterKeyConv2d.from_conv(conv)
    layer = MasterKeyConv2d(8, 8, 7)
    layer.load_state_dict(snapshot(conv if dense_state else source), assign=True)
    same(layer, source)
    assert isinstance(layer.shift, nn.Parameter)


def rounded(state, dtype):
    return {name: value.to(dtype) for name, value in state.items()}


def averaged(state):
    """Averaging tools turn everything into float; weights that do not sum to 1 exactly leave 4.9999995 for a 5."""
    return {name: sum(value.float() * 0.1 for _ in range(10)) for name, value in state.items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "digits"),
    [
        (lambda s: rounded(s, torch.float16), 1e-3),
        (lambda s: rounded(s, torch.bfloat16), 1e-2),
        (averaged, 1e-6),
        (lambda s: averaged(rounded(s, torch.bfloat16)), 1e-2),  # as Lightning's average of a network in bfloat16
    ],
)
def test_keys_of_a_changed_checkpoint_are_exact_again(change, digits, assign):
    source = MasterKeyConv2d.from_conv(nn.Conv2d(64, 64, 7, groups=64))
    state = change(source.state_dict())
    assert not torch.equal(state["keys"].float(), source.keys)
    layer = MasterKeyConv2d(64, 64, 7)
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.key_index, source.key_index) and layer.key_index.dtype == torch.float32
    assert torch.equal(layer.keys, source.keys.to(layer.scale.dtype))
    torch.testing.assert_close(layer.weight.float(), source.weight, rtol=digits, atol=digits)


GOOD = partial(MasterKeyConv2d, 8, 8, 7, keys_per_kernel=2)


def good_but(name, place, value):
    state = snapshot(GOOD())
    state[name][place] = value
    return state


BAD = {  # state dicts for GOOD with one thing wrong, and the error
    "another bank": (lambda: snapshot(GOOD(bank="random8:0")), "another bank than 'babaiee2025'"),
    "another bank, half": (lambda: snapshot(GOOD(bank="random8:0").bfloat16()), "another bank than 'babaiee2025'"),
    "bank size": (lambda: snapshot(GOOD(bank=BANK.keys[:5])), r"keys: .*\(5, 7, 7\), expected \(8, 7, 7\)"),
    "kernel size": (lambda: snapshot(MasterKeyConv2d(8, 8, 5, keys_per_kernel=2)), r"keys: got shape \(8, 5, 5\)"),
    "channels": (lambda: snapshot(MasterKeyConv2d(9, 9, 7, keys_per_kernel=2)), r"shift: got shape \(9,\)"),
    "keys per kernel": (lambda: snapshot(MasterKeyConv2d(8, 8, 7)), r"key_index: got shape \(8, 1\)"),
    "dense and compact": (
        lambda: snapshot(GOOD()) | dense_state(7),
        "weight: .* with keys, key_index, scale, shift, r2",
    ),
    "incomplete": (lambda: {k: v for k, v in snapshot(GOOD()).items() if k not in ("keys", "r2")}, "without keys, r2"),
    "dense shape": (lambda: dense_state(5), r"weight: got shape \(8, 1, 5, 5\), expected \(8, 1, 7, 7\)"),
    "dense not depthwise": (lambda: dense_state(7, groups=1), r"weight: got shape \(8, 8, 7, 7\)"),
    "dense NaN": (
        lambda: {"weight": torch.ones(8, 1, 7, 7).index_fill_(0, torch.tensor(5), torch.nan)},
        "weight: channel 5 holds NaN or Inf",
    ),
    "no tensor": (lambda: {"weight": np.zeros((8, 1, 7, 7))}, "weight: got a ndarray"),
    "NaN keys": (lambda: good_but("keys", (0, 0, 0), torch.nan), "another bank"),
    "NaN shift": (lambda: good_but("shift", 3, torch.nan), "shift: holds NaN"),
    "index too large": (lambda: good_but("key_index", (3, 1), 8), "key_index: holds .* to 8, the bank has 8 keys"),
    "index negative": (lambda: good_but("key_index", (3, 1), -1), "key_index: holds -1 to"),
    "index averaged": (lambda: good_but("key_index", (3, 1), 2.5), "key_index: holds fractions"),
    "index NaN": (lambda: good_but("key_index", (3, 1), torch.nan), "key_index"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("assign", [False, True])
def test_refused_with_nothing_changed(what, assign):
    layer, (make, message) = GOOD(), BAD[what]
    state = make()
    for strict in (True, False):
        with unchanged(layer), pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=strict, assign=assign)
    problems = layer.check_state_dict({f"a.b.{name}": value for name, value in state.items()}, "a.b.")
    assert problems and all(problem.startswith("a.b.") for problem in problems)


def test_what_can_be_loaded_has_no_problems():
    assert GOOD().check_state_dict(snapshot(GOOD())) == GOOD().check_state_dict({}) == []


def test_missing_and_unexpected_entries():
    layer, zero = MasterKeyConv2d(8, 8, 7), torch.zeros(8)
    before = snapshot(layer)
    result = layer.load_state_dict({"bias": zero, "more": zero}, strict=False)
    assert set(result.missing_keys) == COMPACT and result.unexpected_keys == ["more"]
    same(layer, before | {"bias": zero})
    for state, message in (({"bias": zero}, "Missing key"), (dense_state(7) | {"more": zero}, r"Unexpected key.*more")):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda conv: MasterKeyConv2d(8, 8, 5, device="meta"),
        MasterKeyConv2d.from_conv,
        partial(MasterKeyConv2d.from_conv, fit=False),
    ],
    ids=["constructor", "from_conv", "random"],
)
def test_meta_device(make):
    conv = nn.Conv2d(8, 8, 5, groups=8)
    empty, expected = copy.deepcopy(conv).to("meta"), MasterKeyConv2d.from_conv(conv)
    layer, x = make(empty), torch.empty(1, 8, 9, 9, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values()) and layer.fuse().weight.is_meta
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(x).shape == (1, 8, 5, 5)
    for use in (lambda: layer(torch.randn(1, 8, 9, 9)), lambda: layer.to("cpu")):
        with pytest.raises(CheckpointError, match="no values"):  # not what happens to be in memory
            use()
    for state in (conv.state_dict(), expected.state_dict()):
        layer, assigned = make(empty).to_empty(device="cpu"), make(empty)
        for tensor in layer.state_dict().values():
            tensor.fill_(77)
        layer.load_state_dict(state)
        same(layer, expected)
        assigned.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        same(assigned, expected)
    layer.keys.fill_(77)
    layer.reset_parameters()  # as deferred initialisation does
    assert torch.equal(layer.keys, BANK.keys_for((5, 5)))


@pytest.mark.parametrize(("how", "memory"), [("to_empty", 1e30), ("to_empty", torch.nan), ("set by name", 0.0)])
def test_a_layer_without_values_says_so_whatever_memory_held(how, memory):
    """As where a loader that sets tensors by name meets a dense checkpoint: it knows no value of the layer."""
    layer = MasterKeyConv2d(8, 8, 5, device="meta")
    state = MasterKeyConv2d(8, 8, 5).state_dict()
    if how == "to_empty":
        layer.to_empty(device="cpu")
        layer.scale.fill_(memory)
    else:
        for name, value in state.items():
            empty = torch.full_like(value, memory)
            setattr(layer, name, nn.Parameter(empty) if name in layer._parameters else empty)
    layer.eval()  # no error yet: the values may still come
    for use in (lambda: layer(torch.randn(1, 8, 9, 9)), lambda: layer.weight, layer.fuse, layer.check_keys):
        with pytest.raises(CheckpointError, match=r"no values.*load_state_dict\(state, assign=True\)"):
            use()
    layer.load_state_dict(state)
    same(layer, state)
    assert layer.train().fuse().weight.isfinite().all()
    assert layer(torch.randn(1, 8, 9, 9)).isfinite().all()


def test_a_layer_overwritten_with_garbage_says_so_without_eval():
    layer = MasterKeyConv2d(8, 8, 5)
    for value in layer.state_dict().values():
        value.fill_(1e30)
    with pytest.raises(CheckpointError, match="no values"):
        _ = layer.weight


def averages(decay):
    """Ways to average a model's weights, buffers included."""
    swa, utils = torch.optim.swa_utils, timm.utils
    average = partial(swa.AveragedModel, use_buffers=True)
    return {
        "swa": average,
        "ema": partial(average, multi_avg_fn=swa.get_ema_multi_avg_fn(decay)),
        "ema by hand": partial(average, avg_fn=swa.get_ema_avg_fn(decay)),
        **{kind.__name__: partial(kind, decay=decay) for kind in (utils.ModelEma, utils.ModelEmaV2, utils.ModelEmaV3)},
    }


@pytest.mark.parametrize("decay", [0.3, 0.9998])
@pytest.mark.parametrize("way", averages(0.5))
def test_averages_keep_the_keys(way, decay):
    source = MasterKeyConv2d.from_conv(nn.Conv2d(64, 64, 7, groups=64), keys_per_kernel=2)
    model = nn.Sequential(source)
    averaged = averages(decay)[way](model)
    for _ in range(60):
        (averaged.update_parameters if hasattr(averaged, "update_parameters") else averaged.update)(model)
    got = getattr(averaged, "ema", None) or averaged.module
    (layer,) = (m for m in got.modules() if isinstance(m, MasterKeyConv2d))
    assert torch.equal(layer.key_rows(), source.key_rows())
    torch.testing.assert_close(layer.compose_weight(), source.compose_weight())
    layer.eval()
    assert torch.equal(layer.keys, source.keys)
    twin = MasterKeyConv2d(64, 64, 7, keys_per_kernel=2)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.key_index, source.key_index)


def test_averages_of_different_keys_are_refused():
    a, b = (nn.Sequential(MasterKeyConv2d(8, 8, 7)) for _ in range(2))
    averaged = torch.optim.swa_utils.AveragedModel(a, use_buffers=True)
    for model in (a, b):
        averaged.update_parameters(model)
    for use in (averaged.eval, lambda: fuse_masterkeys(averaged), lambda: save_compact(averaged, os.devnull)):
        with pytest.raises(ConversionError, match="holds fractions"):
            use()


def test_an_average_of_many_updates_loads_without_eval():
    model = nn.Sequential(MasterKeyConv2d(8, 8, 7))
    averaged = timm.utils.ModelEmaV2(model, decay=0.9999)
    for _ in range(3000):
        averaged.update(model)
    drift = (averaged.module[0].keys - model[0].keys).abs().max()
    assert drift > 2 * torch.finfo(torch.float32).eps
    twin = nn.Sequential(MasterKeyConv2d(8, 8, 7))
    twin.load_state_dict(averaged.module.state_dict())
    assert torch.equal(twin[0].keys, model[0].keys) and torch.equal(twin[0].key_index, model[0].key_index)
