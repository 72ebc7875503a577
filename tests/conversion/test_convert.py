"""Planning, conversion and fusion of whole models: what is converted, what survives, what is refused."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from compare import layers, same
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from timm_masterkeys import (
    BankError,
    CheckpointError,
    ConversionError,
    MasterKeyConv2d,
    ProjectionError,
    convert_to_masterkeys,
    fuse_masterkeys,
    initialize_masterkeys,
    plan_conversion,
    project_kernels,
)

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


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def fingerprint(model):
    """Every module and tensor by identity, and every value."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
    hooks = [len(module._load_state_dict_pre_hooks) for module in model.modules()]
    return modules, tensors, hooks, {name: value.tolist() for name, value in model.state_dict().items()}


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
        "done": (MasterKeyConv2d(8, 8, 3, bank="random8:1"), "converted already (bank random8:1)"),
    }
    model = nn.Module()
    for name, (module, _) in kinds.items():
        model.add_module(name, module)
    plan = plan_conversion(model)
    assert {layer.name: layer.reason for layer in plan.layers} == {name: reason for name, (_, reason) in kinds.items()}
    assert sorted([*plan.converted, *plan.skipped], key=plan.layers.index) == list(plan.layers)
    same = next(layer for layer in plan.layers if layer.name == "same")
    assert (same.kind, same.kernel_size, same.in_channels, same.out_channels) == ("Conv2dSame", (2, 2), 8, 16)


def test_plan_is_a_dry_run_and_a_table():
    model = Net()
    before = fingerprint(model)
    plan = plan_conversion(model, include=["*.dw", "do*"], exclude="blocks.1*")
    assert fingerprint(model) == before
    assert [layer.name for layer in plan.converted] == ["blocks.0.dw", "down"]
    assert {layer.name: layer.reason for layer in plan.skipped}["stem"] == "not depthwise (groups 1)"
    lines = str(plan).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert len(lines) == 1 + 6 + 1 and rows["blocks.1.dw"].endswith("stays dense: excluded by 'blocks.1*'")
    assert rows["down"].split() == ["down", "Conv2dSame", "3x3", "8", "->", "16", "convert"]
    assert lines[-1] == "2 of 6 convolutions to convert, 24 kernels"
    reasons = {layer.name: layer.reason for layer in plan_conversion(model, include="*.dw").layers}
    assert (reasons["down"], reasons["blocks.0.dw"]) == ("not included", "")


@pytest.mark.parametrize(
    ("patterns", "converted"),
    [
        ({"include": "blocks.*"}, ["blocks.0.dw", "blocks.1.dw"]),
        ({"include": ["down", "blocks.0.*"]}, ["blocks.0.dw", "down"]),
        ({"exclude": ("*.dw",)}, ["down"]),
        ({"include": "blocks.*", "exclude": "blocks.[1-9].*"}, ["blocks.0.dw"]),
        ({"include": [], "exclude": None}, NET_LAYERS),
        ({"include": "*"}, NET_LAYERS),
    ],
)
def test_patterns(patterns, converted):
    model = Net()
    assert [layer.name for layer in plan_conversion(model, **patterns).converted] == converted
    assert list(layers(convert_to_masterkeys(model, **patterns))) == converted
    assert list(layers(initialize_masterkeys(model, **patterns))) == converted


@pytest.mark.parametrize(  # depthwise convolutions with more than one tap, counted by hand in timm 1.0.31
    ("name", "count"),
    [
        ("mobilenetv3_small_050", 11),
        ("convnext_atto", 12),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [("inception_next_atto", 36), ("fastvit_t8", 28), ("repvit_m0_9", 26)]
        ),
    ],
)
def test_timm_models_convert_and_fuse(name, count):
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are worth folding
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    before = snapshot(model)
    plan = plan_conversion(model)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    expected = [n for n, m in convs.items() if m.groups == m.in_channels > 1 and m.weight[0].numel() > 1]
    assert [layer.name for layer in plan.layers] == list(convs)
    assert [layer.name for layer in plan.converted] == expected and len(expected) == count
    converted = convert_to_masterkeys(model)
    same(model, before)
    assert not layers(model) and list(layers(converted)) == expected
    for layer_name, layer in layers(converted).items():
        assert torch.equal(layer.key_rows(), project_kernels(model.get_submodule(layer_name).weight).key_index)
    others = {k: v for k, v in converted.state_dict().items() if k in before}
    same(others, {k: before[k] for k in others})

    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fused = fuse_masterkeys(converted)
        assert torch.equal(fused(x), converted(x)) and not torch.equal(model(x), converted(x))
    assert list(fused.state_dict()) == list(before)
    assert {n: type(m) for n, m in fused.named_modules()} == {n: type(m) for n, m in model.named_modules()}

    loaded = initialize_masterkeys(model)
    loaded.load_state_dict(before)  # the stock weights
    same(loaded, converted)


def test_inplace_or_not():
    model = Net()
    before, state = fingerprint(model), snapshot(model)
    out = convert_to_masterkeys(model)
    assert out is not model and fingerprint(model) == before
    assert not {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in out.state_dict().values()}

    kept = {name: module for name, module in model.named_modules() if name not in NET_LAYERS}
    assert convert_to_masterkeys(model, inplace=True) is model
    assert list(layers(model)) == NET_LAYERS
    assert {name: m for name, m in model.named_modules() if name not in NET_LAYERS} == kept
    same(model, out)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)

    converted = fingerprint(model)
    fused = fuse_masterkeys(model)
    assert fused is not model and fingerprint(model) == converted
    assert fuse_masterkeys(model, inplace=True) is model
    same(fused, model)
    assert list(model.state_dict()) == list(state)
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in Net().named_modules()}
    dense = fingerprint(model)
    for inplace in (True, False):
        with pytest.raises(ConversionError, match="Net holds no MasterKeyConv2d"):
            fuse_masterkeys(model, inplace=inplace)
    assert fingerprint(model) == dense


def test_a_second_call_for_other_layers():
    model = convert_to_masterkeys(Net(), include="blocks.*")
    first = layers(model)
    convert_to_masterkeys(model, "random8:0", keys_per_kernel=2, trainable="none", inplace=True)
    found = layers(model)
    assert list(found) == NET_LAYERS and all(found[name] is layer for name, layer in first.items())
    assert found["down"].bank.name == "random8:0" and not list(found["down"].named_parameters())
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=r"2 converted already \(bank babaiee2025\).*convert the dense model"):
        convert_to_masterkeys(model, inplace=True)
    assert fingerprint(model) == before and not layers(fuse_masterkeys(model))
    state = snapshot(model)
    state["blocks.0.dw.key_index"][0] = 99
    with pytest.raises(CheckpointError, match=r"blocks.0.dw.key_index: holds"):
        model.load_state_dict(state)


@pytest.mark.parametrize("call", [convert_to_masterkeys, initialize_masterkeys])
def test_nothing_to_convert(call):
    for patterns in ({"include": "stages.*"}, {"exclude": ["down", "stages.*"]}):
        for function in (call, plan_conversion):
            with pytest.raises(ConversionError, match=r"'stages\.\*' matches none of the 6 .*blocks\.0\.dw"):
                function(Net(), **patterns)
    for model, patterns, message in (
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8)), {}, "1 not depthwise .*, 1 not a Conv2d"),
        (nn.Linear(3, 3), {}, "its convolutions: none"),
        (Net(), {"exclude": "*"}, "3 excluded by"),
        (Net(), {"include": "stem"}, "3 not included"),
    ):
        with pytest.raises(ConversionError, match=f"{type(model).__name__} has nothing to convert.*{message}"):
            call(model, **patterns)
    assert "0 of 0 convolutions" in str(plan_conversion(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"trainable": "all"}, ConversionError), ({"keys_per_kernel": 9}, ProjectionError), ({"bank": "no"}, BankError)],
)
@pytest.mark.parametrize("call", [convert_to_masterkeys, initialize_masterkeys])
def test_bad_arguments_change_nothing(call, arguments, error):
    model = Net()
    before = fingerprint(model)
    with pytest.raises(error):
        call(model, inplace=True, **arguments)
    assert fingerprint(model) == before


@pytest.mark.parametrize(("value", "inplace"), [(torch.nan, True), (torch.inf, False)])
def test_a_failure_in_the_last_layer_leaves_the_model_as_it_was(value, inplace):
    model = Net()
    with torch.no_grad():
        model.down.weight[9, 0, 1, 1] = value
    before, weight = fingerprint(model), model.down.weight
    before[3].pop("down.weight")  # NaN is not equal to itself
    with pytest.raises(ProjectionError, match=r"^down: Channel 9 of the weight holds NaN or Inf"):
        convert_to_masterkeys(model, inplace=inplace)
    after = fingerprint(model)
    after[3].pop("down.weight")
    assert after == before and model.down.weight is weight
    convert_to_masterkeys(model, exclude="down", inplace=inplace)


@INPLACE
def test_hooks_survive_and_can_be_removed(inplace):
    model, calls = Net(), []
    conv, x = model.blocks[0].dw, torch.randn(1, 3, 9, 9)
    handles = [
        conv.register_forward_pre_hook(lambda module, *_: calls.append(type(module))),
        conv.register_forward_hook(lambda module, *_: calls.append(type(module))),
        conv.register_full_backward_hook(lambda module, *_: calls.append(type(module))),
    ]
    converted = convert_to_masterkeys(model, inplace=inplace)
    converted(x).sum().backward()
    fuse_masterkeys(converted)(x).sum().backward()
    assert calls == [MasterKeyConv2d] * 3 + [nn.Conv2d] * 3
    for handle in handles:
        handle.remove()
    (converted if inplace else model)(x).sum().backward()  # a deep copy has hooks of its own
    assert len(calls) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modes_requires_grad_and_dtype_survive(dtype):
    model = Net().train().to(dtype)
    for module in (model.blocks[0], model.down):
        module.eval()
    for module in (model.stem, model.blocks[1].dw):
        module.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    converted = convert_to_masterkeys(model)
    assert {name: module.training for name, module in converted.named_modules()} == modes
    assert all(p.requires_grad == grads[n.replace(".shift", ".weight")] for n, p in converted.named_parameters())
    for layer in layers(converted).values():
        assert {layer.keys.dtype, layer.scale.dtype, layer.shift.dtype, layer.weight.dtype} == {dtype}
    fused, x = fuse_masterkeys(converted), torch.randn(1, 3, 8, 8, dtype=dtype)
    assert {name: module.training for name, module in fused.named_modules()} == modes
    assert not fused.stem.weight.requires_grad and not fused.blocks[1].dw.bias.requires_grad
    assert torch.equal(fused.eval()(x), converted.eval()(x))


def test_meta_device_survives():
    with torch.device("meta"):
        converted = convert_to_masterkeys(Net())
    assert all(t.is_meta for t in converted.state_dict().values())
    assert converted(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 5)
    dense = Net()
    expected = convert_to_masterkeys(dense)
    for state in (dense.state_dict(), expected.state_dict()):
        loaded = copy.deepcopy(converted).to_empty(device="cpu")
        loaded.load_state_dict(state)
        same(loaded, expected)
        loaded = copy.deepcopy(converted)
        loaded.load_state_dict(state, assign=True)
        same(loaded, expected)


def test_channels_last_survives():
    layout = torch.channels_last
    converted = convert_to_masterkeys(Net().eval().to(memory_format=layout))
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=layout)
    assert converted.stem.weight.is_contiguous(memory_format=layout)
    assert converted.blocks[0].dw(converted.stem(x)).is_contiguous(memory_format=layout)
    assert torch.equal(fuse_masterkeys(converted)(x), converted(x))


@INPLACE
def test_a_module_used_in_several_places(inplace):
    conv, block = nn.Conv2d(8, 8, 3, padding=1, groups=8), Block(8)
    model = nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU(), conv), "b": nn.ModuleList([block, conv, block])})
    names = list(model.state_dict())
    converted = convert_to_masterkeys(model, inplace=inplace)
    assert list(layers(converted)) == ["a.0", "b.0.dw"]
    fused, x = fuse_masterkeys(converted), torch.randn(1, 8, 9, 9)
    for made, kind in ((converted, MasterKeyConv2d), (fused, nn.Conv2d)):
        assert type(made["a"][0]) is kind and made["a"][0] is made["a"][2] is made["b"][1]
        assert made["b"][0] is made["b"][2]
    assert torch.equal(fused["a"](x), converted["a"](x)) and list(fused.state_dict()) == names

    before, state = snapshot(converted), snapshot(converted)
    state["a.2.key_index"] = state["a.2.key_index"] + 99  # seen though a.0 is the same layer
    with pytest.raises(CheckpointError, match=r"a\.2\.key_index"):
        converted.load_state_dict(state)
    same(converted, before)


@INPLACE
def test_a_model_that_is_a_convolution(inplace):
    conv = nn.Conv2d(8, 8, 5, groups=8)
    weight = conv.weight
    layer = convert_to_masterkeys(conv, inplace=inplace)
    assert type(layer) is MasterKeyConv2d and type(conv) is nn.Conv2d
    assert conv.weight is weight and (layer.bias is conv.bias) == inplace
    fused, x = fuse_masterkeys(layer, inplace=inplace), torch.randn(1, 8, 9, 9)
    assert type(fused) is nn.Conv2d and torch.equal(fused(x), layer(x))
    with torch.no_grad():
        conv.weight.fill_(torch.nan)
    with pytest.raises(ProjectionError, match=r"^Conv2d: Channel 0"):
        convert_to_masterkeys(conv)


def test_fx_graph_module():
    model, x = nn.Sequential(Block(8), Block(8)).eval(), torch.randn(1, 8, 9, 9)
    converted = convert_to_masterkeys(torch.fx.symbolic_trace(model))
    assert isinstance(converted, torch.fx.GraphModule) and list(layers(converted)) == ["0.dw", "1.dw"]
    assert torch.equal(converted(x), convert_to_masterkeys(model)(x))
    assert torch.equal(fuse_masterkeys(converted)(x), converted(x))


@pytest.mark.parametrize("pickled", [False, True])
def test_copies_still_check_what_they_load(pickled):
    model, x = convert_to_masterkeys(Net()).eval(), torch.randn(1, 3, 9, 9)
    twin = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    same(twin, model)
    del model
    before = snapshot(twin)
    with pytest.raises(CheckpointError, match="another bank than 'babaiee2025'"):
        twin.load_state_dict(snapshot(convert_to_masterkeys(Net(), "random8:0")))
    same(twin, before)
    dense = Net()
    twin.load_state_dict(dense.state_dict())
    same(twin, convert_to_masterkeys(dense))


@INPLACE
def test_a_fused_model_knows_nothing_of_this_package(inplace):
    converted = convert_to_masterkeys(timm.create_model("test_convnext"), include="stages.0.*")
    convert_to_masterkeys(converted, inplace=True)
    assert b"timm_masterkeys" in pickle.dumps(converted)
    fused = fuse_masterkeys(converted, inplace=inplace)
    assert b"timm_masterkeys" not in pickle.dumps(fused)
    inner = convert_to_masterkeys(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)))
    outer = nn.Sequential(nn.Conv2d(3, 8, 3), inner)
    assert b"timm_masterkeys" not in pickle.dumps(fuse_masterkeys(outer, inplace=inplace))
    fused.load_state_dict(timm.create_model("test_convnext").state_dict())


def entry(name, index, value):
    """A change of one number of a state dict."""

    def change(state):
        state = snapshot(Net()) if name == "down.weight" else state
        state[name][index] = value
        return state

    return change


BREAKS = [  # what makes a state dict wrong, and the message; wrapped and assign
    (lambda state: snapshot(convert_to_masterkeys(Net(), "random8:0")), "another bank than 'babaiee2025'", 0, 0),
    (entry("down.key_index", 15, 8), r"down\.key_index: holds \d to 8, the bank has 8 keys", 1, 0),
    (entry("down.weight", (3, 0, 0, 0), torch.nan), r"down\.weight: channel 3 holds NaN", 0, 1),
    (
        lambda state: state | {f"down.{k}": v for k, v in MasterKeyConv2d(8, 16, 5, bias=False).state_dict().items()},
        r"down\.keys: got shape \(8, 5, 5\), expected \(8, 3, 3\)",
        0,
        1,
    ),
    (lambda state: snapshot(convert_to_masterkeys(Net(16))), r"key_index: got shape \(16, 1\)", 1, 1),
    (lambda state: state | {"down.weight": torch.randn(16, 1, 3, 3)}, r"down\.weight: given together with keys", 0, 0),
    (lambda state: (state.pop("blocks.1.dw.shift"), state)[1], r"blocks\.1\.dw\.keys: given without shift", 1, 0),
    (lambda state: snapshot(Net()) | {"down.weight": torch.randn(16, 1, 5, 5)}, r"down\.weight: got shape", 1, 1),
]


def prefixed(state):
    return {f"module.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(("spoil", "message", "wrapped", "assign"), BREAKS)
def test_a_bad_checkpoint_changes_no_tensor(spoil, message, wrapped, assign):
    model = convert_to_masterkeys(Net())
    state = spoil(snapshot(convert_to_masterkeys(Net())))
    if wrapped:
        model, state = nn.DataParallel(model), prefixed(state)
    before = fingerprint(model)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=rf"Nothing was loaded.\n(.*\n)*.*{message}"):
            model.load_state_dict(state, strict=strict, assign=bool(assign))
    assert fingerprint(model) == before


def test_many_problems_are_counted():
    model = convert_to_masterkeys(timm.create_model("test_convnext"))
    other = convert_to_masterkeys(timm.create_model("test_convnext"), "random8:0")
    with pytest.raises(CheckpointError, match=r"(.*\n){6}\.\.\. and 4 more$"):
        model.load_state_dict(other.state_dict())


def test_a_wrapped_model_round_trips():
    source, model = (convert_to_masterkeys(Net(), keys_per_kernel=2, trainable="affine") for _ in "ab")
    wrapped, dense = nn.DataParallel(model), Net().state_dict()
    wrapped.load_state_dict(prefixed(source.state_dict()))
    same(model, source)
    wrapped.load_state_dict(prefixed(dense))
    assert torch.equal(model.down.key_rows(), project_kernels(dense["down.weight"], keys_per_kernel=2).key_index)
    assert torch.equal(model.stem.weight, dense["stem.weight"])


def test_missing_entries():
    model = convert_to_masterkeys(Net())
    state = {name: value for name, value in Net().state_dict().items() if not name.startswith("down.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*down\.key"):
        model.load_state_dict(state)
    down = snapshot(model.down)
    result = model.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {f"down.{name}" for name in down} and not result.unexpected_keys
    same(model.down, down)
    assert torch.equal(model.stem.weight, state["stem.weight"])
    assert torch.equal(model.blocks[0].dw.shift, project_kernels(state["blocks.0.dw.weight"]).shift)


def test_initialize_is_seeded_and_exact():
    dense, models = Net(64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(initialize_masterkeys(dense))
    same(models[0], models[1])
    assert not torch.equal(models[0].down.key_index, models[2].down.key_index)
    for name, layer in layers(models[0]).items():
        conv, projection = dense.get_submodule(name), project_kernels(layer.weight)
        torch.testing.assert_close(projection.r2, torch.ones(layer.out_channels))
        assert torch.equal(projection.key_index, layer.key_rows()) and not layer.shift.any()
        norm = (conv.weight - conv.weight.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1).mean()
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), norm.expand(layer.out_channels))
        assert conv.bias is layer.bias is None or torch.equal(layer.bias, conv.bias)
    assert torch.equal(models[0].stem.weight, dense.stem.weight)
    counts = sum(layer.key_rows().flatten().bincount(minlength=8) for layer in layers(models[0]).values())
    assert counts.sum() == 64 + 64 + 128
    assert 10 < counts.min() <= counts.max() < 60  # 32 each, give or take five deviations


@pytest.mark.parametrize(("r", "dtype"), [(1, torch.float16), (6, torch.bfloat16), (8, torch.float16)])
def test_fused_before_it_is_cast_a_model_keeps_its_kernels(r, dtype):
    """Eight keys at 3x3 have scales up to a thousand times the kernel, which half precision would round."""
    model = convert_to_masterkeys(Net(), keys_per_kernel=r)
    fused = fuse_masterkeys(model).to(dtype)
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
    model = convert_to_masterkeys(dense, inplace=inplace)
    assert dense.kept["bias"][0] is kept and not kept.is_leaf
    if not inplace:
        copied = model.kept["bias"][0]
        assert torch.equal(copied, kept) and copied.is_leaf and copied.data_ptr() != kept.data_ptr()
    assert torch.equal(fuse_masterkeys(model, inplace=inplace)(x), model(x))


def test_a_copied_feature_extractor_stays_in_eval_mode():
    """A deep copy of torchvision's graphs, which timm uses, is in training mode."""
    model = timm.create_model("test_efficientnet.mk8", features_only=True, feature_cls="fx").eval()
    model.graph_module.bn1.train()
    copied, x = fuse_masterkeys(model), torch.randn(2, 3, 32, 32)
    modes = [{name: module.training for name, module in net.named_modules()} for net in (model, copied)]
    assert modes[0] == modes[1]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(copied(x), model(x), strict=True))


def test_what_cannot_be_copied_is_named():
    model = Net()
    model.blocks[1].lock = threading.Lock()
    message = r"Net cannot be copied: attribute 'lock' of module 'blocks\.1' \(\w+\) is a lock: .*inplace=True"
    with pytest.raises(ConversionError, match=message):
        convert_to_masterkeys(model)
    converted = convert_to_masterkeys(model, inplace=True)
    with pytest.raises(ConversionError, match=message):
        fuse_masterkeys(converted)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(converted(x), fuse_masterkeys(converted, inplace=True)(x))
