"""MasterKeyConv2d against nn.Conv2d, timm's Conv2dSame and autograd."""

import copy
import inspect
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame
from timm.optim import param_groups_weight_decay
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.func import functional_call
from torch.nn.utils import prune

from timm_masterkeys import (
    BankError,
    CheckpointError,
    ConversionError,
    KeyBank,
    MasterKeyConv2d,
    ProjectionError,
    ScaledKeyConv2d,
    fuse_masterkeys,
    get_bank,
    project_kernels,
)
from timm_masterkeys.hub.files import save_compact
from timm_masterkeys.layers import obstacle

BANK = get_bank("babaiee2025")
COMPACT = {"keys", "key_index", "scale", "shift", "r2"}

# name -> (class, channel multiplier, arguments of the convolution)
GEOMETRY = {
    "3x3": (nn.Conv2d, 1, {"kernel_size": 3, "padding": 1}),
    "5x5 stride 2": (nn.Conv2d, 1, {"kernel_size": 5, "padding": 2, "stride": 2}),
    "7x7 unpadded": (nn.Conv2d, 1, {"kernel_size": 7}),
    "9x9": (nn.Conv2d, 1, {"kernel_size": 9, "padding": 4}),
    "11x11": (nn.Conv2d, 1, {"kernel_size": 11, "padding": 5}),
    "13x13": (nn.Conv2d, 1, {"kernel_size": 13, "padding": 6}),
    "1x7": (nn.Conv2d, 1, {"kernel_size": (1, 7), "padding": (0, 3)}),
    "7x1": (nn.Conv2d, 1, {"kernel_size": (7, 1), "padding": (3, 0), "stride": (2, 1)}),
    "1x11": (nn.Conv2d, 1, {"kernel_size": (1, 11), "padding": (0, 5)}),
    "2x2": (nn.Conv2d, 1, {"kernel_size": 2, "stride": 2}),
    "4x4": (nn.Conv2d, 1, {"kernel_size": 4, "padding": (1, 2)}),
    "dilated": (nn.Conv2d, 1, {"kernel_size": 5, "dilation": 2, "padding": 4}),
    "dilated, stride 2": (nn.Conv2d, 1, {"kernel_size": 3, "dilation": 2, "padding": 2, "stride": 2}),
    "multiplier 2": (nn.Conv2d, 2, {"kernel_size": 7, "padding": 3}),
    "multiplier 2, stride 2": (nn.Conv2d, 2, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "same": (nn.Conv2d, 1, {"kernel_size": 7, "padding": "same"}),
    "same, even": (nn.Conv2d, 1, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, 1, {"kernel_size": 5, "padding": "valid", "stride": 2}),
    "reflect": (nn.Conv2d, 1, {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"}),
    "circular": (nn.Conv2d, 1, {"kernel_size": 5, "padding": (2, 1), "padding_mode": "circular"}),
    "circular same": (nn.Conv2d, 1, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "Conv2dSame": (Conv2dSame, 1, {"kernel_size": 3, "stride": 2}),
    "Conv2dSame 5x5 dilated": (Conv2dSame, 1, {"kernel_size": 5, "dilation": 2}),
    "Conv2dSame multiplier 2": (Conv2dSame, 2, {"kernel_size": 5, "stride": (2, 1)}),
    "Conv2dSame 2x2": (Conv2dSame, 1, {"kernel_size": 2}),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRY)


def make_conv(geometry, channels=8, bias=True, dtype=None):
    cls, multiplier, kwargs = GEOMETRY[geometry]
    return cls(channels, channels * multiplier, groups=channels, bias=bias, dtype=dtype, **kwargs)


def dense(layer, conv):
    """The oracle: the original class of convolution with the composed kernels."""
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(layer.weight.detach())
    return conv


def formula(layer, scale, shift):
    """The kernels, written down independently of the layer."""
    scale = scale.view(layer.out_channels, layer.keys_per_kernel, 1, 1)
    kernels = (scale * layer.keys[layer.key_rows()]).sum(1) + shift.view(-1, 1, 1)
    return kernels.unsqueeze(1)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(state, other):
    return state.keys() == other.keys() and all(
        state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]) for name in state
    )


def assert_fitted(layer, projection):
    assert torch.equal(layer.key_rows(), projection.key_index)
    assert torch.equal(layer.scale, projection.scale.flatten())
    assert torch.equal(layer.shift, projection.shift)
    assert torch.equal(layer.r2, projection.r2) and layer.r2.dtype == torch.float32


def kind_and_bank(trainable):
    return (ScaledKeyConv2d, "scale-space-b") if trainable == "scales" else (MasterKeyConv2d, BANK)


TRAINED = {"none": set(), "shift": {"shift"}, "affine": {"scale", "shift"}}
trainables = pytest.mark.parametrize("trainable", TRAINED)


@pytest.mark.parametrize(
    ("geometry", "keys_per_kernel", "bias"),
    [case for i, name in enumerate(GEOMETRY) for case in ((name, 1, True), (name, (2, 8)[i % 2], i % 2 == 0))],
)
def test_forward_and_fuse_are_the_dense_convolution(geometry, keys_per_kernel, bias):
    conv = make_conv(geometry, bias=bias)
    stock = conv.weight.detach().clone()
    layer = MasterKeyConv2d.from_conv(conv, keys_per_kernel=keys_per_kernel)
    assert torch.equal(conv.weight, stock)
    assert layer.keys_per_kernel == min(keys_per_kernel, len(BANK.keys_for(conv.kernel_size)))
    rounding = 4e-7 * float(layer.scale.detach().abs().max())  # eight 3x3 keys need scales of a thousand
    torch.testing.assert_close(layer.weight, formula(layer, layer.scale, layer.shift), rtol=1e-6, atol=rounding)

    fused = layer.fuse()
    assert type(fused) is type(conv)
    assert torch.equal(fused.weight, layer.weight)
    assert fused.bias is layer.bias is conv.bias
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(fused, name) == getattr(conv, name), name
    assert repr(fused) == repr(conv)
    expected = dense(layer, conv)
    for shape in ((2, layer.in_channels, 13, 13), (layer.in_channels, 14, 17), (2, layer.in_channels, 15, 16)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), expected(x)) and torch.equal(fused(x), expected(x))
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), expected(x))


@geometries
def test_constructor_is_the_same_layer(geometry):
    cls, multiplier, kwargs = GEOMETRY[geometry]
    padding = {"padding": "same_dynamic"} if cls is Conv2dSame else {}
    layer = MasterKeyConv2d(8, 8 * multiplier, **kwargs, **padding)
    conv = make_conv(geometry)
    conv.bias = layer.bias
    x = torch.randn(2, 8, 15, 14)
    assert torch.equal(layer(x), dense(layer, conv)(x))
    assert repr(layer.fuse()) == repr(conv) and type(layer.fuse()) is cls
    other = MasterKeyConv2d.from_conv(conv)
    shapes = [{k: (v.shape, v.dtype) for k, v in made.state_dict().items()} for made in (layer, other)]
    assert shapes[0] == shapes[1] and repr(layer) == repr(other)


@pytest.mark.parametrize(
    ("dtype", "keys_per_kernel"), [(torch.float32, 3), (torch.float64, 1), (torch.float16, 3), (torch.bfloat16, 1)]
)
def test_from_conv_projects_in_the_dtype_of_the_conv(dtype, keys_per_kernel):
    conv = nn.Conv2d(16, 16, 7, padding=3, groups=16, dtype=dtype)
    layer = MasterKeyConv2d.from_conv(conv, BANK, keys_per_kernel)
    assert_fitted(layer, project_kernels(conv.weight, BANK, keys_per_kernel))
    assert {layer.scale.dtype, layer.shift.dtype, layer.keys.dtype, layer.bias.dtype, layer.weight.dtype} == {dtype}
    x = torch.randn(2, 16, 9, 9, dtype=dtype)
    assert torch.equal(layer(x), dense(layer, conv)(x)) and torch.equal(layer.fuse()(x), layer(x))


def test_any_bank():
    conv = nn.Conv2d(4, 4, 5, groups=4)
    mine = KeyBank("mine", torch.randn(3, 5, 5))
    assert MasterKeyConv2d.from_conv(conv, mine).bank is mine
    assert MasterKeyConv2d.from_conv(conv, torch.randn(2, 5, 5)).bank.name.startswith("custom-")
    assert MasterKeyConv2d(4, 4, 3, bank="random8:1").bank.name == "random8:1"
    layer = MasterKeyConv2d(4, 4, 3, bank=mine, keys_per_kernel=2, trainable="affine")
    assert "bank=mine, keys_per_kernel=2, trainable=affine" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trainable": "all"}, ConversionError, "trainable is 'all', expected one of none, shift, affine"),
        ({"trainable": "scales"}, ConversionError, "no scales to train"),
        ({"keys_per_kernel": 0}, ProjectionError, "keys_per_kernel is 0"),
        ({"keys_per_kernel": 9}, ProjectionError, "expected a whole number from 1 to 8"),
        ({"keys_per_kernel": 1.0}, ProjectionError, "keys_per_kernel is 1.0"),
        ({"bank": "nobody"}, BankError, "Unknown bank 'nobody'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    calls = [lambda **given: MasterKeyConv2d(4, 4, 3, **given)]
    calls += [lambda **given: MasterKeyConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), **given)]
    calls += [MasterKeyConv2d(4, 4, 3).set_trainable] if "trainable" in arguments else []
    for call in calls:
        with pytest.raises(error, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 1}, "groups is 1, expected 4, the in_channels"),
        ({"kernel_size": 1}, "kernel_size is 1x1"),
        ({"kernel_size": (1, 1)}, "fuse_masterkeys"),
        ({"padding": "same_dynamic", "padding_mode": "reflect"}, "expected 'zeros'"),
    ],
)
def test_geometry_that_no_depthwise_layer_has(arguments, message):
    with pytest.raises(ConversionError, match=message):
        MasterKeyConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})


def test_arguments_stand_where_those_of_nn_conv2d_do():
    arguments = (4, 8, 3, 2, 1, 2, 4, False, "circular", "cpu", torch.float64)
    layer, conv = MasterKeyConv2d(*arguments), nn.Conv2d(*arguments)
    assert repr(layer.fuse()) == repr(conv) and layer.bias is None and layer.scale.dtype == torch.float64
    names = list(inspect.signature(nn.Conv2d).parameters)
    assert list(inspect.signature(MasterKeyConv2d).parameters)[: len(names)] == names


def test_kernels_that_no_key_fits():
    with pytest.raises(BankError, match="1, 1"):
        MasterKeyConv2d.from_conv(nn.Conv2d(4, 4, 1, groups=4))
    conv = nn.Conv2d(4, 4, 3, groups=4)
    conv.weight.data[2, 0, 1, 1] = torch.inf
    for fit in (True, False):
        with pytest.raises(ProjectionError, match="Channel 2"):
            MasterKeyConv2d.from_conv(conv, fit=fit)


@pytest.mark.parametrize(
    ("trainable", "input_grad", "bias"),
    [
        ("none", True, "trains"),
        ("none", False, "frozen"),
        ("none", False, "trains"),
        ("shift", False, "absent"),
        ("shift", True, "frozen"),
        ("affine", True, "absent"),
        ("affine", False, "trains"),
    ],
)
def test_gradients_with_parts_frozen(trainable, input_grad, bias):
    conv = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=bias != "absent", dtype=torch.float64)
    if bias == "frozen":
        conv.bias.requires_grad_(False)
    layer = MasterKeyConv2d.from_conv(conv, trainable=trainable)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=input_grad)
    out = layer(x)
    trained = TRAINED[trainable] | ({"bias"} if bias == "trains" else set())
    assert out.requires_grad == bool(trained or input_grad)
    if not out.requires_grad:
        return
    out.square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == trained
    assert (x.grad is not None) == input_grad
    scale, shift, y = (t.detach().clone().requires_grad_() for t in (layer.scale, layer.shift, x))
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    functional_call(conv, {"weight": formula(layer, scale, shift), "bias": bias}, (y,)).square().sum().backward()
    for name, leaf in (("scale", scale), ("shift", shift), ("bias", bias)):
        if name in trained:
            torch.testing.assert_close(getattr(layer, name).grad, leaf.grad)
    if input_grad:
        torch.testing.assert_close(x.grad, y.grad)


def test_gradient_accumulates_and_weight_is_differentiable():
    layer = MasterKeyConv2d(4, 4, 3, trainable="affine", dtype=torch.float64)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    layer(x).sum().backward()
    once = layer.shift.grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.shift.grad, 2 * once)
    (grad,) = torch.autograd.grad(layer.weight.square().sum(), layer.shift)  # a penalty on kernels, say
    torch.testing.assert_close(grad, 2 * layer.weight.detach().sum((1, 2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@trainables
def test_parameters_and_buffers(trainable, bias):
    conv = nn.Conv2d(6, 12, 5, groups=6, bias=bias)
    for layer in (
        MasterKeyConv2d(6, 12, 5, bias=bias, keys_per_kernel=2, trainable=trainable),
        MasterKeyConv2d.from_conv(conv, BANK, 2, trainable),
    ):
        parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
        assert set(parameters) == TRAINED[trainable] | ({"bias"} if bias else set())
        assert set(buffers) == COMPACT - TRAINED[trainable]
        assert all(p.ndim == 1 and p.requires_grad for p in parameters.values())
        assert layer.trainable == trainable and layer.key_index.dtype == torch.float32
        shapes = [tuple(getattr(layer, name).shape) for name in ("keys", "key_index", "scale", "shift", "r2")]
        assert shapes == [(8, 5, 5), (12, 2), (24,), (12,), (12,)]
        groups = param_groups_weight_decay(layer, weight_decay=0.05)
        assert sum(len(g["params"]) for g in groups if g["weight_decay"] == 0.05) == 0
    conv.weight.requires_grad_(False)
    frozen = MasterKeyConv2d.from_conv(conv, trainable=trainable)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == ({"bias"} if bias else set())


def test_set_trainable_keeps_values_and_names():
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(6, 6, 5, groups=6), trainable="affine")
    before, x = snapshot(layer), torch.randn(1, 6, 8, 8)
    out = layer(x)
    for trainable in ("none", "shift", "affine", "shift", "none"):
        assert layer.set_trainable(trainable) is None
        assert layer.trainable == trainable
        assert same_state(before, snapshot(layer))
        assert isinstance(layer.scale, nn.Parameter) == (trainable == "affine")
        assert isinstance(layer.shift, nn.Parameter) == (trainable != "none")
        assert torch.equal(layer(x), out)
    layer.set_trainable("shift", requires_grad=False)
    assert isinstance(layer.shift, nn.Parameter)
    assert not layer.shift.requires_grad


THROUGH = {
    "itself": lambda layer: layer,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize(
    ("trainable", "through"),
    [("none", "itself"), ("none", "pickle"), ("shift", "deepcopy"), ("affine", "pickle"), ("scales", "deepcopy")],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_fuse_gives_back_what_was_frozen(trainable, frozen, through):
    conv = nn.Conv2d(6, 6, 5, groups=6).requires_grad_(not frozen)
    kind, bank = kind_and_bank(trainable)
    layer = THROUGH[through](kind.from_conv(conv, bank, trainable=trainable))
    assert layer.fuse().weight.requires_grad == (not frozen)
    assert "frozen" not in vars(layer.fuse()) and layer.fuse().bias.requires_grad == (not frozen)
    if trainable == "none":
        layer.set_trainable("none", requires_grad=frozen)
    else:
        layer.requires_grad_(frozen)  # by hand, after conversion
    assert THROUGH[through](layer).fuse().weight.requires_grad == frozen


def test_fuse_follows_a_change_of_what_trains():
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(6, 6, 5, groups=6).requires_grad_(False), trainable="none")
    layer.set_trainable("affine")
    assert layer.fuse().weight.requires_grad
    layer.scale.requires_grad_(False)
    assert not layer.fuse().weight.requires_grad


@trainables
def test_training_leaves_the_frozen_alone(trainable):
    conv = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    layer = MasterKeyConv2d.from_conv(conv, BANK, 2, trainable)
    before = snapshot(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(2, 6, 8, 8)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"bias"} | TRAINED[trainable]
    assert torch.equal(layer.keys, BANK.keys_for((5, 5)))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("trainable", "dtype"), [("none", torch.bfloat16), ("shift", torch.float32), ("affine", torch.float64)]
)
def test_compact_round_trip(tmp_path, trainable, dtype, assign):
    conv = nn.Conv2d(6, 12, (1, 7), groups=6, dtype=dtype)
    layer = MasterKeyConv2d.from_conv(conv, BANK, 3, trainable)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = MasterKeyConv2d(6, 12, (1, 7), keys_per_kernel=3, trainable=trainable, dtype=dtype)
    result = other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert same_state(layer.state_dict(), other.state_dict())
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in layer.named_parameters()]
    assert all(p.requires_grad for p in other.parameters())
    x = torch.randn(1, 6, 5, 9, dtype=dtype)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("trainable", "keys_per_kernel"), [("none", 1), ("shift", 2), ("affine", 1)])
def test_dense_weight_is_projected(trainable, keys_per_kernel, assign):
    layer = MasterKeyConv2d(8, 8, 7, keys_per_kernel=keys_per_kernel, trainable=trainable)
    conv = nn.Conv2d(8, 8, 7, groups=8)
    state = snapshot(conv)
    result = layer.load_state_dict(state, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert list(state) == ["weight", "bias"]
    assert_fitted(layer, project_kernels(conv.weight, BANK, keys_per_kernel))
    assert torch.equal(layer.bias, conv.bias) and torch.equal(layer.keys, BANK.keys_for((7, 7)))
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
    assert same_state(layer.state_dict(), source.state_dict())
    assert isinstance(layer.shift, nn.Parameter)
    x = torch.randn(1, 8, 9, 9, dtype=dtype)
    assert torch.equal(layer(x), source(x))


def rounded(state, dtype):
    return {name: value.to(dtype) for name, value in state.items()}


def averaged(state):
    """Averaging tools turn everything into float; weights that do not sum to 1 exactly leave 4.9999995 for a 5."""
    return {name: sum(value.float() * 0.1 for _ in range(10)) for name, value in state.items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "digits"),
    [(lambda s: rounded(s, torch.float16), 1e-3), (lambda s: rounded(s, torch.bfloat16), 1e-2), (averaged, 1e-6)],
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


def good_state():
    return snapshot(MasterKeyConv2d(8, 8, 7, keys_per_kernel=2))


def good_but(name, place, value):
    state = good_state()
    state[name][place] = value
    return state


def dense_state(*arguments, **settings):
    return snapshot(nn.Conv2d(*arguments, **settings))


def random_bank_state():
    return MasterKeyConv2d(8, 8, 7, bank="random8:0", keys_per_kernel=2)


BAD = {  # state dicts for MasterKeyConv2d(8, 8, 7, keys_per_kernel=2) with one thing wrong, and the error
    "another bank": (lambda: snapshot(random_bank_state()), "another bank than 'babaiee2025'"),
    "another bank, half": (lambda: snapshot(random_bank_state().bfloat16()), "another bank than 'babaiee2025'"),
    "bank size": (
        lambda: snapshot(MasterKeyConv2d(8, 8, 7, bank=BANK.keys[:5], keys_per_kernel=2)),
        r"keys: got shape \(5, 7, 7\), expected \(8, 7, 7\)",
    ),
    "kernel size": (lambda: snapshot(MasterKeyConv2d(8, 8, 5, keys_per_kernel=2)), r"keys: got shape \(8, 5, 5\)"),
    "channels": (lambda: snapshot(MasterKeyConv2d(9, 9, 7, keys_per_kernel=2)), r"shift: got shape \(9,\)"),
    "keys per kernel": (lambda: snapshot(MasterKeyConv2d(8, 8, 7)), r"key_index: got shape \(8, 1\)"),
    "dense and compact": (
        lambda: good_state() | dense_state(8, 8, 7, groups=8),
        "weight: given together with keys, key_index, scale, shift, r2",
    ),
    "incomplete": (
        lambda: {k: v for k, v in good_state().items() if k not in ("keys", "r2")},
        "given without keys, r2",
    ),
    "dense shape": (
        lambda: dense_state(8, 8, 5, groups=8),
        r"weight: got shape \(8, 1, 5, 5\), expected \(8, 1, 7, 7\)",
    ),
    "dense not depthwise": (lambda: dense_state(8, 8, 7), r"weight: got shape \(8, 8, 7, 7\)"),
    "dense NaN": (
        lambda: {"weight": torch.ones(8, 1, 7, 7).index_fill_(0, torch.tensor(5), torch.nan)},
        "weight: channel 5 holds NaN or Inf",
    ),
    "no tensor": (lambda: {"weight": np.zeros((8, 1, 7, 7))}, "weight: got a ndarray, expected a tensor"),
    "NaN keys": (lambda: good_but("keys", (0, 0, 0), torch.nan), "another bank"),
    "index too large": (lambda: good_but("key_index", (3, 1), 8), "key_index: holds .* to 8, the bank has 8 keys"),
    "index negative": (lambda: good_but("key_index", (3, 1), -1), "key_index: holds -1 to"),
    "index averaged": (lambda: good_but("key_index", (3, 1), 2.5), "key_index: holds fractions"),
    "index NaN": (lambda: good_but("key_index", (3, 1), torch.nan), "key_index"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("assign", [False, True])
def test_refused_with_nothing_changed(what, assign):
    layer = MasterKeyConv2d(8, 8, 7, keys_per_kernel=2)
    make, message = BAD[what]
    state = make()
    before, tensors = snapshot(layer), {name: id(t) for name, t in layer.state_dict(keep_vars=True).items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=strict, assign=assign)
    assert same_state(layer.state_dict(), before)
    assert {name: id(t) for name, t in layer.state_dict(keep_vars=True).items()} == tensors
    prefixed = {f"a.b.{name}": value for name, value in state.items()}
    problems = layer.check_state_dict(prefixed, "a.b.")
    assert problems and all(problem.startswith("a.b.") for problem in problems)
    assert layer.check_state_dict(before) == layer.check_state_dict({}) == []


def test_missing_and_unexpected_entries():
    layer = MasterKeyConv2d(8, 8, 7)
    before = snapshot(layer)
    result = layer.load_state_dict({"bias": torch.zeros(8), "more": torch.zeros(1)}, strict=False)
    assert set(result.missing_keys) == COMPACT
    assert result.unexpected_keys == ["more"]
    assert same_state(layer.state_dict(), before | {"bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        layer.load_state_dict(snapshot(nn.Conv2d(8, 8, 7, groups=8)) | {"more": torch.zeros(1)})


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_deepcopy_and_pickle(through):
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 7, groups=8), "random8:3", 2, "affine")
    x, copied = torch.randn(1, 8, 9, 9), THROUGH[through](layer)
    assert type(copied) is MasterKeyConv2d and copied.bank.digest == layer.bank.digest
    assert same_state(copied.state_dict(), layer.state_dict()) and torch.equal(copied(x), layer(x))
    assert [n for n, _ in copied.named_parameters()] == [n for n, _ in layer.named_parameters()]
    pointers = {t.data_ptr() for t in layer.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in copied.state_dict().values()}
    with pytest.raises(RuntimeError, match="another bank than 'random8:3'"):
        copied.load_state_dict(good_state())


@pytest.mark.parametrize("casts", [["half"], ["bfloat16"], ["double"], ["bfloat16", "double", "half", "float"]])
def test_casts(casts):
    conv = nn.Conv2d(300, 300, 7, groups=300)
    layer = MasterKeyConv2d.from_conv(conv, torch.randn(300, 7, 7), keys_per_kernel=2)
    before = snapshot(layer)
    for cast in casts:
        assert getattr(layer, cast)() is layer
    dtype = getattr(conv, casts[-1])().weight.dtype
    assert {t.dtype for n, t in layer.state_dict().items() if n not in ("key_index", "r2")} == {dtype}
    assert torch.equal(layer.keys, before["keys"].to(dtype)) and torch.equal(layer.key_index, before["key_index"])
    assert layer.key_index.dtype == torch.float32 and not layer.check_state_dict(layer.state_dict())
    x = torch.randn(1, 300, 9, 9, dtype=dtype)
    assert torch.equal(layer(x), dense(layer, conv)(x))
    layer(x).float().sum().backward()
    assert layer.shift.grad.dtype == dtype


@pytest.mark.parametrize(
    "make",
    [
        lambda: MasterKeyConv2d(8, 8, 5, device="meta"),
        lambda: MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 5, groups=8, device="meta")),
        lambda: MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 5, groups=8, device="meta"), fit=False),
    ],
)
def test_meta_device(make):
    conv = nn.Conv2d(8, 8, 5, groups=8)
    expected, layer, x = MasterKeyConv2d.from_conv(conv), make(), torch.empty(1, 8, 9, 9, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values()) and layer.fuse().weight.is_meta
    assert layer(x).shape == (1, 8, 5, 5)
    with torch.no_grad():
        assert layer(x).shape == (1, 8, 5, 5)
    for use in (lambda: layer(torch.randn(1, 8, 9, 9)), lambda: layer.to("cpu")):
        with pytest.raises(CheckpointError, match="no values"):  # not what happens to be in memory
            use()
    for state in (conv.state_dict(), expected.state_dict()):
        layer = make().to_empty(device="cpu")
        assert torch.equal(layer.keys, BANK.keys_for((5, 5)))
        for tensor in layer.state_dict().values():
            tensor.fill_(77)
        layer.load_state_dict(state)
        assert same_state(layer.state_dict(), expected.state_dict())
        assigned = make()
        assigned.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        assert same_state(assigned.state_dict(), expected.state_dict())
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
    assert same_state(layer.state_dict(), state) and layer.train().fuse().weight.isfinite().all()
    assert layer(torch.randn(1, 8, 9, 9)).isfinite().all()


def test_a_layer_overwritten_with_garbage_says_so_without_eval():
    layer = MasterKeyConv2d(8, 8, 5)
    for value in layer.state_dict().values():
        value.fill_(1e30)
    with pytest.raises(CheckpointError, match="no values"):
        _ = layer.weight


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("geometry", "keys_per_kernel"),
    [("5x5 stride 2", 1), ("same", 2), ("reflect", 1), ("Conv2dSame", 2), ("multiplier 2", 1)],
)
def test_script_and_trace(geometry, keys_per_kernel):
    layer = MasterKeyConv2d.from_conv(make_conv(geometry), BANK, keys_per_kernel)
    x, y = torch.randn(2, 8, 13, 14), torch.randn(1, 8, 12, 17)
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x), layer(x)) and torch.equal(scripted(y), layer(y))
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


@pytest.mark.parametrize("keys_per_kernel", [1, 2])
def test_reset_parameters(keys_per_kernel):
    layer, twin = (MasterKeyConv2d(512, 512, 7, keys_per_kernel=keys_per_kernel) for _ in range(2))
    assert not torch.equal(layer.key_index, twin.key_index)
    for module in (layer, twin):
        torch.manual_seed(4)
        module.reset_parameters()
    assert same_state(layer.state_dict(), twin.state_dict())
    assert torch.equal(layer.shift, torch.zeros(512)) and layer.random_kernels().all()
    assert all(len(set(row)) == keys_per_kernel for row in layer.key_index.tolist())
    counts = layer.key_rows().flatten().bincount(minlength=8)
    expected = 512 * keys_per_kernel / 8
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert layer.bias.abs().max() <= 1 / 7 and layer.bias.std() > 0.07


def test_initial_kernel_norm_is_the_stock_one():
    conv = nn.Conv2d(2048, 2048, 5, groups=2048)
    stock = (conv.weight - conv.weight.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1).mean()
    norms = MasterKeyConv2d(2048, 2048, 5).weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms.mean(), stock, rtol=0.02, atol=0)
    with torch.no_grad():
        conv.weight.mul_(3)
    norms = MasterKeyConv2d.from_conv(conv, fit=False).weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, (3 * stock).expand(2048))


def test_from_conv_and_fuse_keep_what_belongs_to_the_conv():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    conv.note = ["anything"]
    conv.register_buffer("extra", torch.arange(3.0), persistent=False)
    conv.register_parameter("gain", nn.Parameter(torch.ones(1)))
    conv.child = nn.Linear(1, 1)
    conv.eval()
    calls = []
    handle = conv.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    layer = MasterKeyConv2d.from_conv(conv)
    fused = layer.fuse()
    for module in (layer, fused):
        assert not module.training and "extra" not in module.state_dict()
        assert all(getattr(module, name) is getattr(conv, name) for name in ("note", "extra", "gain", "child"))
    assert list(conv._parameters) == ["weight", "bias", "gain"]
    assert list(fused.state_dict()) == list(conv.state_dict()) and vars(fused).keys() == vars(conv).keys()
    for _ in range(2):
        for module in (layer, fused):
            module(torch.randn(1, 4, 5, 5))
        handle.remove()
    assert calls == [MasterKeyConv2d, nn.Conv2d]


class Depthwise(nn.Conv2d):
    """Changes nothing of how a convolution computes, as EfficientNet's of transformers."""

    def __init__(self, channels, kernel_size, note="", **kwargs):
        super().__init__(channels, channels, kernel_size, groups=channels, **kwargs)
        self.note = note


class DepthwiseSame(Conv2dSame):
    def __init__(self, channels, kernel_size, **kwargs):
        super().__init__(channels, channels, kernel_size, groups=channels, **kwargs)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Depthwise(8, 5, "mine", padding=2, stride=2, padding_mode="reflect"),
        lambda: DepthwiseSame(8, 5, stride=2, bias=False),
    ],
)
def test_a_subclass_that_computes_as_its_base_becomes_a_layer(make):
    conv, x = make().eval(), torch.randn(2, 8, 13, 14)
    layer = MasterKeyConv2d.from_conv(conv)
    expected, fused = dense(layer, conv)(x), layer.fuse()
    for module in (layer, copy.deepcopy(layer), fused):
        assert torch.equal(module(x), expected)
        assert getattr(module, "note", "mine") == "mine" and not module.training
    assert type(fused) is (Conv2dSame if isinstance(conv, Conv2dSame) else nn.Conv2d)
    assert vars(fused).keys() == vars(conv).keys() and list(fused.state_dict()) == list(conv.state_dict())
    twin = MasterKeyConv2d.from_conv(make())
    for state in (layer.state_dict(), conv.state_dict()):
        twin.load_state_dict(state)
        assert torch.equal(pickle.loads(pickle.dumps(twin))(x), expected)


@pytest.mark.parametrize("kind", [Doubled, Standardised])
def test_a_subclass_with_a_forward_of_its_own_is_refused(kind):
    conv = kind(8, 8, 3, groups=8)
    assert obstacle(conv) == f"{kind.__name__} has a forward of its own"
    with pytest.raises(ConversionError, match=r"computes as nn\.Conv2d does"):
        MasterKeyConv2d.from_conv(conv)
    replaced = nn.Conv2d(8, 8, 3, groups=8)
    replaced.forward = lambda x: x
    with pytest.raises(ConversionError, match="its forward is replaced"):
        MasterKeyConv2d.from_conv(replaced)
    assert obstacle(MasterKeyConv2d(8, 8, 3)) and not obstacle(nn.Conv2d(8, 8, 3)) and not obstacle(Conv2dSame(8, 8, 3))


@pytest.mark.parametrize("name", ["scale", "trainable"])
def test_a_name_that_is_taken_is_refused(name):
    conv = nn.Conv2d(8, 8, 3, groups=8)
    setattr(conv, name, 1)
    with pytest.raises(ConversionError, match=f"its attribute '{name}'"):
        MasterKeyConv2d.from_conv(conv)


@pytest.mark.parametrize("trainable", ["affine", "scales"])
def test_constant_kernels_stay_known(trainable):
    conv = nn.Conv2d(8, 8, 5, groups=8)
    with torch.no_grad():
        conv.weight[2], conv.weight[5] = 0, 0.3
    kind, bank = kind_and_bank(trainable)
    layer, constant = kind.from_conv(conv, bank, trainable=trainable), torch.zeros(8, dtype=torch.bool)
    constant[[2, 5]] = True
    with torch.no_grad():
        layer.scale.add_(0.1)  # as calibration and training do
    averaged = nn.Sequential(copy.deepcopy(layer))
    averaged = torch.optim.swa_utils.AveragedModel(averaged, use_buffers=True)
    for _ in range(9):
        averaged.update_parameters(nn.Sequential(layer))
    twin = kind(8, 8, 5, bank=bank, trainable=trainable)
    assert twin.random_kernels().all() and not twin.constant_kernels().any()
    twin.load_state_dict(layer.state_dict())
    for module in (layer, twin, copy.deepcopy(layer).half().float(), averaged.module[0]):
        assert torch.equal(module.constant_kernels(), constant)
        assert not module.random_kernels().any()
    assert (layer.r2[~constant] > 0).all() and layer.r2.isfinite().all()
    layer.reset_parameters()
    assert layer.random_kernels().all() and not layer.constant_kernels().any()
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.constant_kernels(), constant)


def test_fuse_leaves_the_layer_alone():
    layer = MasterKeyConv2d(4, 4, 3)
    before, fused = snapshot(layer), layer.fuse()
    with torch.no_grad():
        fused.weight.zero_()
    assert type(layer) is MasterKeyConv2d and same_state(layer.state_dict(), before)
    assert fused.weight.is_leaf and b"timm_masterkeys" not in pickle.dumps(fused)


def averages(decay):
    """Ways to average a model's weights, buffers included."""
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    by_hand = torch.optim.swa_utils.get_ema_avg_fn(decay)
    return {
        "swa": lambda m: torch.optim.swa_utils.AveragedModel(m, use_buffers=True),
        "ema": lambda m: torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=ema, use_buffers=True),
        "ema by hand": lambda m: torch.optim.swa_utils.AveragedModel(m, avg_fn=by_hand, use_buffers=True),
        "ModelEma": lambda m: timm.utils.ModelEma(m, decay=decay),
        "ModelEmaV2": lambda m: timm.utils.ModelEmaV2(m, decay=decay),
        "ModelEmaV3": lambda m: timm.utils.ModelEmaV3(m, decay=decay),
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


WRITES = {
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "in place": lambda layer: layer.weight.detach().add_(1),
    "apply": lambda layer: layer.apply(lambda m: nn.init.normal_(m.weight)),
}


@pytest.mark.parametrize("kind", WRITES)
def test_writing_into_the_weight_is_noticed(kind):
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 3, groups=8))
    x, before = torch.randn(1, 8, 5, 5), snapshot(layer)
    WRITES[kind](layer)
    with pytest.warns(UserWarning, match="assign the whole tensor"):
        layer(x)
    layer(x)  # once
    assert same_state(snapshot(layer), before)


def test_reading_the_weight_warns_of_nothing():
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 3, groups=8))
    layer.weight.square().sum().backward()
    copy.deepcopy(layer)(torch.randn(1, 8, 5, 5))
    layer(torch.randn(1, 8, 5, 5))
    assert layer.shift.grad is not None


@pytest.mark.parametrize("trainable", ["none", "shift"])
def test_what_is_made_of_the_weight_is_plain(trainable, tmp_path):
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 3, groups=8), trainable=trainable)
    expected = layer.compose_weight().detach()
    torch.save(layer.weight.detach(), tmp_path / "weight.pt")
    save_file({"weight": layer.weight}, tmp_path / "weight.safetensors")
    parameter, conv = nn.Parameter(layer.weight), nn.Conv2d(8, 8, 3, groups=8)
    for made in (
        layer.weight * 1,
        layer.weight[:],
        layer.weight.data,
        layer.weight.clone(),
        copy.deepcopy(layer.weight.detach()),
        pickle.loads(pickle.dumps(layer.weight.detach())),
        torch.load(tmp_path / "weight.pt", weights_only=True),
        load_file(tmp_path / "weight.safetensors")["weight"],
    ):
        assert type(made) is torch.Tensor and torch.equal(made, expected)
    assert b"timm_masterkeys" not in pickle.dumps(layer.weight.detach())
    assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.requires_grad
    assert not isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, torch.Tensor)
    conv.weight = nn.Parameter(layer.weight.detach())
    conv.weight.data = expected + 1
    assert torch.equal(conv.weight, expected + 1) and torch.equal(layer.weight, expected)
    assert layer.weight.requires_grad == (trainable == "shift")
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected.numpy())


class Reader(nn.Module):
    """Uses the weight beside the layer, as a regulariser does."""

    def __init__(self):
        super().__init__()
        self.conv = MasterKeyConv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(x) + self.conv.weight.square().mean()


def test_reading_the_weight_wherever_tensors_are_no_plain_ones():
    model, x = Reader(), torch.randn(1, 8, 5, 5)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(Reader()(x).isfinite().all(), torch.tensor(True))
    assert torch.equal(model(x), expected)
    parameters = dict(model.named_parameters())
    for _ in range(2):  # the second forward pass looks at what the first has read
        gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
        with torch.no_grad():
            both = torch.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(
                {name: torch.stack([value, value]) for name, value in parameters.items()}
            )
    torch.testing.assert_close(both, torch.stack([expected, expected]))
    expected.sum().backward()
    torch.testing.assert_close(gradients["conv.shift"], model.conv.shift.grad)


def test_reading_the_weight_compiles_nothing_anew():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer, x = MasterKeyConv2d(8, 8, 3), torch.randn(1, 8, 5, 5)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(x)
        assert layer.weight.shape == (8, 1, 3, 3)
    assert counter.frame_count == 1


def test_assigning_a_weight_projects_it():
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 7, groups=8), keys_per_kernel=2)
    weight = torch.randn(8, 1, 7, 7)
    layer.weight = weight
    assert_fitted(layer, project_kernels(weight, keys_per_kernel=2))
    assert layer.shift.requires_grad
    state = snapshot(layer)
    for bad in (torch.randn(8, 1, 3, 3), torch.full((8, 1, 7, 7), torch.nan)):
        with pytest.raises(ConversionError, match="weight"):
            layer.weight = bad
    assert same_state(snapshot(layer), state)


@pytest.mark.parametrize(("trainable", "multiplier"), [("none", 2), ("shift", 1), ("affine", 2), ("scales", 1)])
def test_kernels_can_be_left_out_as_torch_pruning_does(trainable, multiplier):
    kind, bank = kind_and_bank(trainable)
    conv = nn.Conv2d(6, 6 * multiplier, 5, groups=6)
    conv.weight.data[2] = 0.5
    conv.weight.data[5] = conv.weight.data[0]
    layer = kind.from_conv(conv, bank, 1 if trainable == "scales" else 2, trainable)
    whole, entries, kept = layer.weight.detach(), snapshot(layer), [0, 2, 5]
    rows = [multiplier * channel + i for channel in kept for i in range(multiplier)]
    layer.in_channels = layer.groups = 3
    layer.out_channels = 3 * multiplier
    layer.weight = nn.Parameter(layer.weight[rows])
    layer.bias = nn.Parameter(layer.bias[rows])
    assert torch.equal(layer.weight, whole[rows]) and torch.equal(layer.fuse().weight, whole[rows])
    for name, value in layer.state_dict().items():
        per = value.unflatten(0, (len(rows), -1)) if name != "keys" else value
        before = entries[name].unflatten(0, (6 * multiplier, -1))[rows] if name != "keys" else entries[name]
        assert torch.equal(per, before), name
    assert layer.trainable == trainable and layer.shift.requires_grad == (trainable != "none")
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    "weight",
    [torch.randn(3, 1, 5, 5), torch.randn(6, 1, 5, 5), torch.randn(3, 1, 3, 3), torch.empty(3, 1, 5, 5).to("meta")],
)
def test_other_kernels_than_its_own_are_no_pruning(weight):
    layer = MasterKeyConv2d(6, 6, 5)
    before = snapshot(layer)
    layer.out_channels = 3
    with pytest.raises(ConversionError, match="fuse_masterkeys"):
        layer.weight = nn.Parameter(weight)
    layer.out_channels = 6
    assert same_state(snapshot(layer), before)


UTILITIES = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: torch.nn.utils.spectral_norm(layer),
    "parametrized weight_norm": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    "parametrized spectral_norm": lambda layer: torch.nn.utils.parametrizations.spectral_norm(layer),
    "fuse_conv_bn_eval": lambda layer: torch.nn.utils.fuse_conv_bn_eval(layer.eval(), nn.BatchNorm2d(8).eval()),
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach())),
    "other data": lambda layer: setattr(layer.weight, "data", torch.zeros(8, 1, 3, 3)),
    "quantisation": lambda layer: torch.ao.quantization.prepare(quantised(layer)),
    "quantisation by FX": lambda layer: prepare_fx(
        nn.Sequential(layer).eval(), torch.ao.quantization.get_default_qconfig_mapping(), (torch.randn(1, 8, 9, 9),)
    ),
}


def quantised(layer):
    model = nn.Sequential(layer).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("utility", list(UTILITIES))
def test_utilities_that_want_a_parameter_name_the_way_out(utility):
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 3, groups=8))
    before = snapshot(layer)
    bare = utility == "weight_norm" and torch.__version__ < "2.6"  # see parameters_without_weight
    with pytest.raises(KeyError if bare else ConversionError, match="weight" if bare else "fuse_masterkeys"):
        UTILITIES[utility](layer)
    assert same_state(snapshot(layer), before) and not layer._forward_pre_hooks
    layer(torch.randn(1, 8, 5, 5))


@geometries
def test_windows_are_what_the_kernel_sees(geometry):
    conv = make_conv(geometry, dtype=torch.float64, bias=False)
    layer = MasterKeyConv2d.from_conv(conv)
    x = torch.randn(2, 8, 15, 17, dtype=torch.float64)
    output = layer(x).flatten(2)
    positions = torch.randperm(output.shape[2])[:20]
    windows = layer.windows(x, positions).repeat_interleave(layer.out_channels // 8, 3)
    got = torch.einsum("npkc,ck->ncp", windows, layer.weight.flatten(1))
    torch.testing.assert_close(got, output[:, :, positions])
