"""Planning, conversion and fusion of whole models: what is converted, what survives, what is refused."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from compare import layers, same, snapshot, unchanged
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import timm_masterkeys as mk

INPLACE = pytest.mark.parametrize("inplace", [True, False])


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.pw = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.pw(self.norm(self.dw(x)).relu())


class Net(nn.Module):
    """A stem, two blocks and a strided SAME depthwise layer."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.down = Conv2dSame(channels, 2 * channels, 3, stride=2, groups=channels, bias=False)
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x):
        return self.head(self.down(self.blocks(self.stem(x))).mean((2, 3)))


NET_LAYERS = ["blocks.0.dw", "blocks.1.dw", "down"]


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def converted(net):
    return mk.convert_to_masterkeys(net)


def conv(kind=nn.Conv2d, kernel_size=3, out=8, **attributes):
    """A depthwise convolution of eight channels."""
    module = kind(8, out, kernel_size, groups=8)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_plan_gives_a_reason_for_every_convolution():
    first, ignored = conv(kernel_size=(1, 7)), lambda self, x, *_: x
    kinds = {
        "stem": (nn.Conv2d(3, 8, 3), "not depthwise (groups 1)"),
        "grouped": (nn.Conv2d(8, 8, 3, groups=2), "not depthwise (groups 2)"),
        "pointwise": (nn.Conv2d(8, 8, 1), "not depthwise (groups 1)"),
        "lazy": (nn.LazyConv2d(8, 3, groups=8), "lazy, it has no kernels yet: run the model once first"),
        "gain": (conv(kernel_size=1), "1x1 kernel has no spatial structure"),
        "single": (nn.Conv2d(1, 4, 3), "not depthwise (groups 1)"),
        "same": (conv(Conv2dSame, 2, 16), ""),
        "conv1d": (conv(nn.Conv1d), "not a Conv2d"),
        "conv3d": (conv(nn.Conv3d), "not a Conv2d"),
        "transposed": (conv(nn.ConvTranspose2d), "not a Conv2d"),
        "subclass": (conv(type("Renamed", (nn.Conv2d,), {})), ""),
        "odd": (conv(type("Odd", (nn.Conv2d,), {"forward": ignored})), "Odd has a forward of its own"),
        "odder": (conv(type("Odder", (Conv2dSame,), {"_conv_forward": ignored})), "Odder has a forward of its own"),
        "replaced": (conv(forward=lambda x: x), "its forward is replaced"),
        "named": (conv(scale=2.0), "its attribute 'scale' has the name of one that the layer needs"),
        "parametrized": (weight_norm(conv()), "its weight is computed (a parametrization)"),
        "dw": (first, "shares its weight with tied"),
        "tied": (conv(kernel_size=(1, 7), weight=first.weight), "shares its weight with dw"),
        "done": (mk.MasterKeyConv2d(8, 8, 3, bank="random8:1"), "converted already (bank random8:1)"),
    }
    model = nn.Module()
    for name, (module, _) in kinds.items():
        model.add_module(name, module)
    plan = mk.plan_conversion(model)
    assert {layer.name: layer.reason for layer in plan.layers} == {name: reason for name, (_, reason) in kinds.items()}
    assert sorted([*plan.converted, *plan.skipped], key=plan.layers.index) == list(plan.layers)
    same = next(layer for layer in plan.layers if layer.name == "same")
    assert (same.kind, same.kernel_size, same.in_channels, same.out_channels) == ("Conv2dSame", (2, 2), 8, 16)


def test_plan_is_a_dry_run_and_a_table(net):
    with unchanged(net):
        plan = mk.plan_conversion(net, include=["*.dw", "do*"], exclude="blocks.1*")
    lines = str(plan).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert len(lines) == 1 + 6 + 1 and rows["blocks.1.dw"].endswith("stays dense: excluded by 'blocks.1*'")
    assert rows["down"].split() == ["down", "Conv2dSame", "3x3", "8", "->", "16", "convert"]
    assert lines[-1] == "2 of 6 convolutions to convert, 24 kernels"
    reasons = {layer.name: layer.reason for layer in mk.plan_conversion(net, include="*.dw").layers}
    assert (reasons["down"], reasons["blocks.0.dw"]) == ("not included", "")
    assert "0 of 0 convolutions" in str(mk.plan_conversion(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("patterns", "converted"),
    [
        ({"include": "blocks.*"}, ["blocks.0.dw", "blocks.1.dw"]),
        ({"include": ["down", "blocks.0.*"]}, ["blocks.0.dw", "down"]),
        ({"exclude": ("*.dw",)}, ["down"]),
        ({"include": "blocks.*", "exclude": "blocks.[1-9].*"}, ["blocks.0.dw"]),
        ({"include": [], "exclude": None}, NET_LAYERS),
    ],
)
def test_patterns(net, patterns, converted):
    assert [layer.name for layer in mk.plan_conversion(net, **patterns).converted] == converted
    for call in (mk.convert_to_masterkeys, mk.initialize_masterkeys):
        assert list(layers(call(net, **patterns))) == converted


@pytest.mark.parametrize(  # depthwise convolutions with more than one tap, counted by hand in timm 1.0.31
    ("name", "count"),
    [
        ("mobilenetv3_small_050", 11),
        ("convnext_atto", 12),
        pytest.param("inception_next_atto", 36, marks=pytest.mark.slow),
        pytest.param("fastvit_t8", 28, marks=pytest.mark.slow),
        pytest.param("repvit_m0_9", 26, marks=pytest.mark.slow),
    ],
)
def test_timm_models_convert_and_fuse(name, count):
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are worth folding
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    before, plan = snapshot(model), mk.plan_conversion(model)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    expected = [n for n, m in convs.items() if m.groups == m.in_channels > 1 and m.weight[0].numel() > 1]
    assert [layer.name for layer in plan.layers] == list(convs)
    assert [layer.name for layer in plan.converted] == expected and len(expected) == count
    converted = mk.convert_to_masterkeys(model)
    same(model, before)
    assert list(layers(converted)) == expected
    for layer_name, layer in layers(converted).items():
        assert torch.equal(layer.key_rows(), mk.project_kernels(model.get_submodule(layer_name).weight).key_index)
    others = {k: v for k, v in converted.state_dict().items() if k in before}
    same(others, {k: before[k] for k in others})

    fused, x = mk.fuse_masterkeys(converted), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fused(x), converted(x)) and not torch.equal(model(x), converted(x))
    assert list(fused.state_dict()) == list(before)
    assert {n: type(m) for n, m in fused.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    loaded = mk.initialize_masterkeys(model)
    loaded.load_state_dict(before)  # the stock weights
    same(loaded, converted)


def test_a_copy_is_converted_and_fused(net):
    with unchanged(net):
        converted = mk.convert_to_masterkeys(net)
    pointers, others = ({t.data_ptr() for t in model.state_dict().values()} for model in (net, converted))
    assert converted is not net and not pointers & others
    with unchanged(converted):
        assert mk.fuse_masterkeys(converted) is not converted


@INPLACE
def test_nothing_to_fuse(net, inplace):
    with unchanged(net), pytest.raises(mk.ConversionError, match="Net holds no MasterKeyConv2d"):
        mk.fuse_masterkeys(net, inplace=inplace)


def test_inplace(net):
    state, types = snapshot(net), {name: type(m) for name, m in net.named_modules()}
    kept = {name: module for name, module in net.named_modules() if name not in NET_LAYERS}
    expected = mk.convert_to_masterkeys(net)
    assert mk.convert_to_masterkeys(net, inplace=True) is net
    assert list(layers(net)) == NET_LAYERS
    assert {name: module for name, module in net.named_modules() if name not in NET_LAYERS} == kept
    same(net, expected)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items() if name in state)
    expected = mk.fuse_masterkeys(net)
    assert mk.fuse_masterkeys(net, inplace=True) is net
    same(net, expected)
    assert list(net.state_dict()) == list(state)
    assert {name: type(m) for name, m in net.named_modules()} == types


def test_a_second_call_for_other_layers(net):
    model = mk.convert_to_masterkeys(net, include="blocks.*")
    first = layers(model)
    mk.convert_to_masterkeys(model, "random8:0", keys_per_kernel=2, trainable="none", inplace=True)
    found = layers(model)
    assert list(found) == NET_LAYERS and all(found[name] is layer for name, layer in first.items())
    assert found["down"].bank.name == "random8:0" and not list(found["down"].named_parameters())
    message = r"2 converted already \(bank babaiee2025\).*convert the dense model"
    with unchanged(model), pytest.raises(mk.ConversionError, match=message):
        mk.convert_to_masterkeys(model, inplace=True)
    assert not layers(mk.fuse_masterkeys(model))


CALLS = pytest.mark.parametrize("call", [mk.convert_to_masterkeys, mk.initialize_masterkeys])


@pytest.mark.parametrize("patterns", [{"include": "stages.*"}, {"exclude": ["down", "stages.*"]}])
@pytest.mark.parametrize("call", [mk.convert_to_masterkeys, mk.initialize_masterkeys, mk.plan_conversion])
def test_a_pattern_that_matches_nothing(call, patterns):
    with pytest.raises(mk.ConversionError, match=r"'stages\.\*' matches none of the 6 .*blocks\.0\.dw"):
        call(Net(), **patterns)


@CALLS
@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8)), {}, "1 not depthwise .*, 1 not a Conv2d"),
        (nn.Linear(3, 3), {}, "its convolutions: none"),
        (Net(), {"exclude": "*"}, "3 excluded by"),
        (Net(), {"include": "stem"}, "3 not included"),
    ],
)
def test_nothing_to_convert(call, model, patterns, message):
    with pytest.raises(mk.ConversionError, match=f"{type(model).__name__} has nothing to convert.*{message}"):
        call(model, **patterns)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"trainable": "all"}, mk.ConversionError),
        ({"keys_per_kernel": 9}, mk.ProjectionError),
        ({"bank": "no"}, mk.BankError),
    ],
)
@CALLS
def test_bad_arguments_change_nothing(net, call, arguments, error):
    with unchanged(net), pytest.raises(error):
        call(net, inplace=True, **arguments)


@pytest.mark.parametrize(("value", "inplace"), [(torch.nan, True), (torch.inf, False)])
def test_a_failure_in_the_last_layer_leaves_the_model_as_it_was(net, value, inplace):
    with torch.no_grad():
        net.down.weight[9, 0, 1, 1] = value
    with unchanged(net), pytest.raises(mk.ProjectionError, match=r"^down: Channel 9 of the weight holds NaN or Inf"):
        mk.convert_to_masterkeys(net, inplace=inplace)
    mk.convert_to_masterkeys(net, exclude="down", inplace=inplace)


@INPLACE
def test_hooks_survive_and_can_be_removed(net, inplace):
    conv, calls, x = net.blocks[0].dw, [], torch.randn(1, 3, 9, 9)
    registers = conv.register_forward_pre_hook, conv.register_forward_hook, conv.register_full_backward_hook
    handles = [register(lambda module, *_: calls.append(type(module))) for register in registers]
    converted = mk.convert_to_masterkeys(net, inplace=inplace)
    converted(x).sum().backward()
    mk.fuse_masterkeys(converted)(x).sum().backward()
    assert calls == [mk.MasterKeyConv2d] * 3 + [nn.Conv2d] * 3
    for handle in handles:
        handle.remove()
    (converted if inplace else net)(x).sum().backward()  # a deep copy has hooks of its own
    assert len(calls) == 6


def test_modes_and_requires_grad_survive(net):
    for module in (net.blocks[0], net.down):
        module.eval()
    for module in (net.stem, net.blocks[1].dw):
        module.requires_grad_(False)
    modes = {name: module.training for name, module in net.named_modules()}
    grads = {name: p.requires_grad for name, p in net.named_parameters()}
    converted = mk.convert_to_masterkeys(net)
    fused = mk.fuse_masterkeys(converted)
    for model in (converted, fused):
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(p.requires_grad == grads[n.replace(".shift", ".weight")] for n, p in converted.named_parameters())
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == grads


@INPLACE
def test_a_module_used_in_several_places(inplace):
    conv, block = nn.Conv2d(8, 8, 3, padding=1, groups=8), Block(8)
    model = nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU(), conv), "b": nn.ModuleList([block, conv, block])})
    names = list(model.state_dict())
    converted = mk.convert_to_masterkeys(model, inplace=inplace)
    assert list(layers(converted)) == ["a.0", "b.0.dw"]
    fused, x = mk.fuse_masterkeys(converted), torch.randn(1, 8, 9, 9)
    for made, kind in ((converted, mk.MasterKeyConv2d), (fused, nn.Conv2d)):
        assert type(made["a"][0]) is kind and made["a"][0] is made["a"][2] is made["b"][1]
        assert made["b"][0] is made["b"][2]
    assert torch.equal(fused["a"](x), converted["a"](x)) and list(fused.state_dict()) == names
    state = snapshot(converted)
    state["a.2.key_index"] += 99  # seen though a.0 is the same layer
    with pytest.raises(mk.CheckpointError, match=r"a\.2\.key_index"):
        converted.load_state_dict(state)


@INPLACE
def test_a_model_that_is_a_convolution(inplace):
    conv = nn.Conv2d(8, 8, 5, groups=8)
    weight = conv.weight
    layer = mk.convert_to_masterkeys(conv, inplace=inplace)
    assert type(layer) is mk.MasterKeyConv2d and type(conv) is nn.Conv2d
    assert conv.weight is weight and (layer.bias is conv.bias) == inplace
    fused, x = mk.fuse_masterkeys(layer, inplace=inplace), torch.randn(1, 8, 9, 9)
    assert type(fused) is nn.Conv2d and torch.equal(fused(x), layer(x))
    with torch.no_grad():
        conv.weight.fill_(torch.nan)
    with pytest.raises(mk.ProjectionError, match=r"^Conv2d: Channel 0"):
        mk.convert_to_masterkeys(conv)


def test_fx_graph_module():
    model, x = nn.Sequential(Block(8), Block(8)).eval(), torch.randn(1, 8, 9, 9)
    converted = mk.convert_to_masterkeys(torch.fx.symbolic_trace(model))
    assert isinstance(converted, torch.fx.GraphModule) and list(layers(converted)) == ["0.dw", "1.dw"]
    assert torch.equal(converted(x), mk.convert_to_masterkeys(model)(x))
    assert torch.equal(mk.fuse_masterkeys(converted)(x), converted(x))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_still_check_what_they_load(converted, through):
    twin, dense, other = through(converted), Net(), mk.convert_to_masterkeys(Net(), "random8:0")
    with unchanged(twin), pytest.raises(mk.CheckpointError, match="another bank than 'babaiee2025'"):
        twin.load_state_dict(other.state_dict())
    twin.load_state_dict(dense.state_dict())
    same(twin, mk.convert_to_masterkeys(dense))


@INPLACE
def test_a_fused_model_knows_nothing_of_this_package(inplace):
    twice = mk.convert_to_masterkeys(Net(), include="blocks.*")
    mk.convert_to_masterkeys(twice, inplace=True)
    inside = nn.Sequential(nn.Conv2d(3, 8, 3), mk.convert_to_masterkeys(nn.Sequential(conv())))
    for converted in (twice, inside):
        assert b"timm_masterkeys" in pickle.dumps(converted)
        fused = mk.fuse_masterkeys(converted, inplace=inplace)
        assert b"timm_masterkeys" not in pickle.dumps(fused)
    fused.load_state_dict(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(conv())).state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message", "wrapped", "assign"),
    [
        (lambda state: snapshot(mk.convert_to_masterkeys(Net(), "random8:0")), "another bank than", 0, 0),
        (lambda state: snapshot(mk.convert_to_masterkeys(Net(16))), r"key_index: got shape \(16, 1\)", 1, 1),
        (lambda state: snapshot(Net()) | {"down.weight": torch.randn(16, 1, 5, 5)}, r"down\.weight: got shape", 1, 1),
        (lambda state: state | {"down.weight": torch.randn(16, 1, 3, 3)}, r"down\.weight: given together", 0, 0),
        (lambda state: (state.pop("blocks.1.dw.shift"), state)[1], r"blocks\.1\.dw\.keys: given without", 1, 0),
    ],
)
def test_a_bad_checkpoint_changes_no_tensor(converted, spoil, message, wrapped, assign, strict):
    """All that may be wrong with a layer's entries: test_state.py."""
    model, state = converted, spoil(snapshot(converted))
    if wrapped:
        model, state = nn.DataParallel(model), {f"module.{name}": value for name, value in state.items()}
    message = rf"Nothing was loaded.\n(.*\n)*.*{message}"
    with unchanged(model), pytest.raises(mk.CheckpointError, match=message):
        model.load_state_dict(state, strict=strict, assign=bool(assign))


def test_many_problems_are_counted():
    model, other = (
        mk.convert_to_masterkeys(timm.create_model("test_convnext"), b) for b in ("babaiee2025", "random8:0")
    )
    with pytest.raises(mk.CheckpointError, match=r"(.*\n){6}\.\.\. and 4 more$"):
        model.load_state_dict(other.state_dict())


def test_a_wrapped_model_loads_compact_and_dense_entries():
    source, model = (nn.DataParallel(mk.convert_to_masterkeys(Net(), keys_per_kernel=2)) for _ in "ab")
    model.load_state_dict(source.state_dict())
    same(model, source)
    dense = nn.DataParallel(Net())
    model.load_state_dict(dense.state_dict())
    same(model.module, mk.convert_to_masterkeys(dense.module, keys_per_kernel=2))


def test_missing_entries(converted):
    state = {name: value for name, value in Net().state_dict().items() if not name.startswith("down.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*down\.key"):
        converted.load_state_dict(state)
    with unchanged(converted.down):
        result = converted.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {f"down.{name}" for name in converted.down.state_dict()}
    assert not result.unexpected_keys
    shift = mk.project_kernels(state["blocks.0.dw.weight"]).shift
    assert torch.equal(converted.blocks[0].dw.shift, shift)


def test_initialize_is_seeded_and_exact():
    dense, models = Net(64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(mk.initialize_masterkeys(dense))
    same(models[0], models[1])
    assert not torch.equal(models[0].down.key_index, models[2].down.key_index)
    for name, layer in layers(models[0]).items():
        conv, projection = dense.get_submodule(name), mk.project_kernels(layer.weight)
        torch.testing.assert_close(projection.r2, torch.ones(layer.out_channels))
        assert torch.equal(projection.key_index, layer.key_rows()) and not layer.shift.any()
        assert conv.bias is layer.bias is None or torch.equal(layer.bias, conv.bias)
    assert torch.equal(models[0].stem.weight, dense.stem.weight)


@pytest.mark.parametrize(("r", "dtype"), [(1, torch.float16), (6, torch.bfloat16), (8, torch.float16)])
def test_fused_before_it_is_cast_a_model_keeps_its_kernels(r, dtype):
    """Eight keys at 3x3 have scales up to a thousand times the kernel, which half precision would round."""
    model = mk.convert_to_masterkeys(Net(), keys_per_kernel=r)
    fused = mk.fuse_masterkeys(model).to(dtype)
    for name, layer in layers(model).items():
        error = (fused.get_submodule(name).weight.float() - layer.weight).abs().amax((1, 2, 3))
        assert (error <= torch.finfo(dtype).eps * layer.weight.abs().amax((1, 2, 3))).all()


class Cache(Net):
    """Keeps what it computed of its parameters, as tiny_vit's attention does in eval mode."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = {"bias": [self.blocks[0].dw.weight.mean() * 2]}
        return super().forward(x) + self.kept["bias"][0]


@INPLACE
def test_networks_that_keep_computed_tensors_are_copied(inplace):
    dense = Cache().eval()
    x = torch.randn(2, 3, 8, 8)
    dense(x)
    kept = dense.kept["bias"][0]
    model = mk.convert_to_masterkeys(dense, inplace=inplace)
    assert dense.kept["bias"][0] is kept and not kept.is_leaf
    if not inplace:
        copied = model.kept["bias"][0]
        assert torch.equal(copied, kept) and copied.is_leaf and copied.data_ptr() != kept.data_ptr()
    assert torch.equal(mk.fuse_masterkeys(model, inplace=inplace)(x), model(x))


def test_a_copied_feature_extractor_stays_in_eval_mode():
    """A deep copy of torchvision's graphs, which timm uses, is in training mode."""
    model = timm.create_model("test_efficientnet.mk8", features_only=True, feature_cls="fx").eval()
    model.graph_module.bn1.train()
    copied, x = mk.fuse_masterkeys(model), torch.randn(2, 3, 32, 32)
    modes = [{name: module.training for name, module in net.named_modules()} for net in (model, copied)]
    assert modes[0] == modes[1]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(copied(x), model(x), strict=True))


def test_what_cannot_be_copied_is_named(net):
    net.blocks[1].lock = threading.Lock()
    message = r"Net cannot be copied: attribute 'lock' of module 'blocks\.1' \(\w+\) is a lock: .*inplace=True"
    with pytest.raises(mk.ConversionError, match=message):
        mk.convert_to_masterkeys(net)
    converted, x = mk.convert_to_masterkeys(net, inplace=True), torch.randn(1, 3, 8, 8)
    with pytest.raises(mk.ConversionError, match=message):
        mk.fuse_masterkeys(converted)
    assert torch.equal(converted(x), mk.fuse_masterkeys(converted, inplace=True)(x))
