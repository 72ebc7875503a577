"""MasterKeyConv2d against nn.Conv2d, timm's Conv2dSame and autograd."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from compare import same, snapshot
from layer_cases import (
    BANK,
    COMPACT,
    GEOMETRY,
    TRAINED,
    assert_fitted,
    dense,
    geometries,
    kind_and_bank,
    make_conv,
    plain,
)
from timm.layers import Conv2dSame
from torch import nn

from timm_masterkeys import BankError, ConversionError, KeyBank, MasterKeyConv2d, ProjectionError, project_kernels
from timm_masterkeys.layers import obstacle

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


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
    kernels = (layer.scale.view(layer.out_channels, -1, 1, 1) * layer.keys[layer.key_rows()]).sum(1, keepdim=True)
    torch.testing.assert_close(layer.weight, kernels + layer.shift.view(-1, 1, 1, 1), rtol=1e-6, atol=rounding)

    fused = layer.fuse()
    assert type(fused) is type(conv) and repr(fused) == repr(conv)
    assert torch.equal(fused.weight, layer.weight)
    assert fused.bias is layer.bias is conv.bias
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name), name
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
    layer, conv = MasterKeyConv2d(8, 8 * multiplier, **kwargs, **padding), make_conv(geometry)
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
    mine = KeyBank("mine", torch.randn(3, 5, 5))
    assert MasterKeyConv2d.from_conv(nn.Conv2d(4, 4, 5, groups=4), mine).bank is mine
    layer = MasterKeyConv2d(4, 4, 3, bank=mine, keys_per_kernel=2, trainable="affine")
    assert "bank=mine, keys_per_kernel=2, trainable=affine" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trainable": "all"}, ConversionError, "'all', expected one of none, shift, affine"),
        ({"trainable": "sigmas"}, ConversionError, "no sigmas"),
        ({"keys_per_kernel": 9}, ProjectionError, "from 1 to 8"),
        ({"bank": "nobody"}, BankError, "'nobody'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    calls = [partial(MasterKeyConv2d, 4, 4, 3), partial(MasterKeyConv2d.from_conv, nn.Conv2d(4, 4, 3, groups=4))]
    calls += [MasterKeyConv2d(4, 4, 3).set_trainable] if "trainable" in arguments else []
    for call in calls:
        with pytest.raises(error, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 1}, "groups is 1, expected 4"),
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


@pytest.mark.parametrize("fit", [True, False])
def test_kernels_that_are_not_finite(fit):
    conv = nn.Conv2d(4, 4, 3, groups=4)
    conv.weight.data[2, 0, 1, 1] = torch.inf
    with pytest.raises(ProjectionError, match="Channel 2"):
        MasterKeyConv2d.from_conv(conv, fit=fit)


def test_a_kernel_size_that_no_key_fits():
    with pytest.raises(BankError, match="1, 1"):
        MasterKeyConv2d.from_conv(nn.Conv2d(4, 4, 1, groups=4))


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
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == TRAINED[trainable] | ({"bias"} if bias == "trains" else set())
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=input_grad)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    out, expected = layer(x), plain(layer, x)
    assert out.requires_grad == bool(inputs)
    if inputs:
        gradients = [torch.autograd.grad(result.square().sum(), inputs) for result in (out, expected)]
        torch.testing.assert_close(*gradients)


def test_the_weight_is_differentiable():
    layer = MasterKeyConv2d(4, 4, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad(layer.weight.square().sum(), layer.shift)  # a penalty on kernels, say
    torch.testing.assert_close(grad, 2 * layer.weight.detach().sum((1, 2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trainable", TRAINED)
def test_parameters_and_buffers(trainable, bias):
    conv = nn.Conv2d(6, 12, 5, groups=6, bias=bias)
    for layer in (
        MasterKeyConv2d(6, 12, 5, bias=bias, keys_per_kernel=2, trainable=trainable),
        MasterKeyConv2d.from_conv(conv, BANK, 2, trainable),
    ):
        parameters = dict(layer.named_parameters())
        assert set(parameters) == TRAINED[trainable] | ({"bias"} if bias else set())
        assert set(dict(layer.named_buffers())) == COMPACT - TRAINED[trainable]
        assert all(p.ndim == 1 and p.requires_grad for p in parameters.values())
        assert layer.trainable == trainable and layer.key_index.dtype == torch.float32
        shapes = [tuple(getattr(layer, name).shape) for name in ("keys", "key_index", "scale", "shift", "r2")]
        assert shapes == [(8, 5, 5), (12, 2), (24,), (12,), (12,)]
    conv.weight.requires_grad_(False)
    frozen = MasterKeyConv2d.from_conv(conv, trainable=trainable)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == ({"bias"} if bias else set())


def test_set_trainable_keeps_values_and_names():
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(6, 6, 5, groups=6), trainable="affine")
    before = snapshot(layer)
    for trainable in ("none", "shift", "affine", "shift", "none"):
        layer.set_trainable(trainable)
        assert layer.trainable == trainable
        same(layer, before)
        assert {name for name in ("scale", "shift") if name in layer._parameters} == TRAINED[trainable]
    layer.set_trainable("shift", requires_grad=False)
    assert isinstance(layer.shift, nn.Parameter) and not layer.shift.requires_grad


THROUGH = {
    "itself": lambda layer: layer,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize(
    ("trainable", "through"),
    [("none", "itself"), ("none", "pickle"), ("shift", "deepcopy"), ("affine", "pickle"), ("sigmas", "deepcopy")],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_fuse_gives_back_what_was_frozen(trainable, frozen, through):
    conv = nn.Conv2d(6, 6, 5, groups=6).requires_grad_(not frozen)
    kind, bank = kind_and_bank(trainable)
    layer = THROUGH[through](kind.from_conv(conv, bank, trainable=trainable))
    fused = layer.fuse()
    assert fused.weight.requires_grad == fused.bias.requires_grad == (not frozen) and "frozen" not in vars(fused)
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


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_deepcopy_and_pickle(through):
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 7, groups=8), "random8:3", 2, "affine")
    x, copied = torch.randn(1, 8, 9, 9), THROUGH[through](layer)
    same(copied, layer)
    assert copied.bank == layer.bank and torch.equal(copied(x), layer(x))
    assert [n for n, _ in copied.named_parameters()] == [n for n, _ in layer.named_parameters()]
    pointers = {t.data_ptr() for t in layer.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in copied.state_dict().values()}


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
    same(layer, twin)
    assert not layer.shift.any() and layer.random_kernels().all()
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
    """Hooks too: test_convert.py."""
    conv = nn.Conv2d(4, 4, 3, groups=4).eval()
    conv.note = ["anything"]
    conv.register_buffer("extra", torch.arange(3.0), persistent=False)
    conv.register_parameter("gain", nn.Parameter(torch.ones(1)))
    conv.child = nn.Linear(1, 1)
    layer = MasterKeyConv2d.from_conv(conv)
    fused = layer.fuse()
    for module in (layer, fused):
        assert not module.training and "extra" not in module.state_dict()
        assert all(getattr(module, name) is getattr(conv, name) for name in ("note", "extra", "gain", "child"))
    assert list(conv._parameters) == ["weight", "bias", "gain"]
    assert list(fused.state_dict()) == list(conv.state_dict()) and vars(fused).keys() == vars(conv).keys()


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


@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        (Doubled, {}, "Doubled has a forward of its own"),
        (Standardised, {}, "Standardised has a forward of its own"),
        (nn.Conv2d, {"forward": lambda x: x}, "its forward is replaced"),
        (nn.Conv2d, {"scale": 1}, "its attribute 'scale'"),
        (nn.Conv2d, {"trainable": 1}, "its attribute 'trainable'"),
    ],
)
def test_what_computes_otherwise_or_has_taken_a_name_is_refused(kind, attributes, reason):
    conv = kind(8, 8, 3, groups=8)
    vars(conv).update(attributes)
    assert obstacle(conv).startswith(reason)
    with pytest.raises(ConversionError, match=f"computes as nn.Conv2d does: {reason}"):
        MasterKeyConv2d.from_conv(conv)


def test_what_can_be_replaced():
    assert obstacle(MasterKeyConv2d(8, 8, 3)) and not obstacle(nn.Conv2d(8, 8, 3)) and not obstacle(Conv2dSame(8, 8, 3))


@pytest.mark.parametrize("trainable", ["affine", "sigmas"])
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
    assert layer.random_kernels().all() and not layer.constant_kernels().any() and not layer.shift.any()
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.constant_kernels(), constant)


def test_fuse_leaves_the_layer_alone():
    layer = MasterKeyConv2d(4, 4, 3)
    before, fused = snapshot(layer), layer.fuse()
    with torch.no_grad():
        fused.weight.zero_()
    same(layer, before)
    assert fused.weight.is_leaf and b"timm_masterkeys" not in pickle.dumps(fused)
