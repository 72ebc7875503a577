"""The ``.mk8`` names: timm lists, finds and builds them as its own, and its own stay as they were."""

import argparse
import contextlib
import copy
import functools
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from compare import all_equal, layers, same, values
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import get_notrace_modules
from timm.utils import ParseKwargs
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm_masterkeys as mk
from timm_masterkeys import ConversionError, MasterKeyConv2d
from timm_masterkeys.conversion.plan import flat_name
from timm_masterkeys.conversion.record import Record, Source, keys_digest, read_record
from timm_masterkeys.timm_plugin import compat, published

ARCH = "test_convnext"  # timm's own miniature: 9 7x7 depthwise layers, 0.27 million parameters, stock tag r160_in1k
MK8 = f"{ARCH}.mk8"
OWN = re.compile(r"\.mk8(_|$)")


@pytest.fixture(scope="module")
def weights():
    """A state dict that stands for trained weights: every kernel near a key, so that the fit is not nothing."""
    torch.manual_seed(1)
    model = timm.create_model(ARCH)
    keys = mk.get_bank().keys_for((7, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.weight += keys[torch.randint(len(keys), (len(module.weight), 1))]
    return model.state_dict()


def stock(weights, **kwargs):
    """What stock timm builds from the weights."""
    return timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay_of(weights), **kwargs).eval()


def overlay_of(state_dict, path=None):
    """The weights as a call gives them: as tensors, or in a file of any of the kinds that timm reads."""
    state_dict = {name: value.clone() for name, value in state_dict.items()}
    if path is None:
        return {"state_dict": state_dict}
    if path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:  # one of them as train.py writes it
        torch.save({"epoch": 3, "state_dict": state_dict} if path.suffix == ".tar" else state_dict, path)
    return {"file": str(path)}


REGISTRATION = """
import importlib, logging, sys, warnings
import timm
from timm.models import _registry as registry, get_arch_pretrained_cfgs, get_deprecated_models, get_pretrained_cfg

def snapshot(own=False):
    names = lambda found: [name for name in found if own or ".mk8" not in name]
    archs = timm.list_models()
    modules = [sys.modules["timm.models." + name] for name in timm.list_modules()]
    cfgs = {arch: {n: c for n, c in get_arch_pretrained_cfgs(arch).items() if n in names([n])} for arch in archs}
    return [
        archs, timm.list_modules(), timm.list_models(name_matches_cfg=True), get_deprecated_models(), cfgs,
        names(timm.list_models(include_tags=True)), names(timm.list_models(pretrained=True)),
        {arch: (timm.is_model_pretrained(arch), get_pretrained_cfg(arch)) for arch in archs},
        {m.__name__: repr(getattr(m, "default_cfgs", None)) for m in modules},
    ]

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)  # torch 2.5's own, when Python ends
logging.basicConfig(level=logging.DEBUG)
before, loaded = snapshot(), set(sys.modules)
import timm_masterkeys as mk
assert snapshot() == before
heavy = {"scipy", "matplotlib", "pandas", "sklearn", "timm_masterkeys.layers.gpu_kernels", "timm_masterkeys.study"}
heavy &= set(sys.modules) - loaded
assert not heavy, heavy

everything, entrypoints = snapshot(own=True), dict(registry._model_entrypoints)
mk.register_names()
mk.register_names(["convnext_atto", "no_such_architecture"])
importlib.reload(mk)
importlib.reload(sys.modules["timm_masterkeys.timm_plugin.names"])
assert snapshot(own=True) == everything
assert registry._model_entrypoints == entrypoints

logging.getLogger().setLevel(logging.WARNING)  # and an architecture of one's own
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, in_chans=3, global_pool="avg"):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8
        self.dw = nn.Conv2d(8, 8, 3, groups=8)

@timm.models.register_model
def my_net(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg(Net, "my_net", pretrained, **kwargs)

mk.register_names("my_net")
assert timm.list_models("my_net*", include_tags=True) == ["my_net", "my_net.mk8"]
assert not timm.is_model_pretrained("my_net.mk8")
assert list(timm.models.get_arch_pretrained_cfgs("my_net")) == ["my_net", "my_net.mk8"]
assert type(timm.create_model("my_net.mk8").dw) is mk.MasterKeyConv2d
assert type(timm.create_model("my_net").dw) is nn.Conv2d
"""


@pytest.mark.slow
def test_import_adds_names_and_changes_nothing_else():
    done = subprocess.run([sys.executable, "-c", REGISTRATION], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # not a word, on any level


def test_every_name_is_there():
    everything = timm.list_models(include_tags=True)
    expected = {f"{arch}.mk8": arch for arch in mk.list_architectures()}
    for name in everything:
        arch, _, tag = name.partition(".")
        if tag and not OWN.search(name) and f"{arch}.mk8" in expected:
            expected[f"{arch}.mk8_{tag}"] = name
    assert {name for name in everything if OWN.search(name)} == set(expected)
    assert set(timm.list_models("*.mk8*", include_tags=True)) == set(expected)
    assert not any("." in name for name in timm.list_models()) and timm.is_model("convnext_tiny.mk8_fb_in22k")
    listed = timm.list_models("*.mk8*", pretrained=True)
    assert set(listed) == {own for own, name in expected.items() if timm.is_model_pretrained(name)}
    assert all(timm.is_model_pretrained(own) == (own in listed) for own in expected)
    assert timm.list_models("convnext_tiny.mk8*", pretrained=True)[0] == "convnext_tiny.mk8"
    names = ["convnext_atto.d2_in1k", "convnext_atto.mk8", "convnext_atto.mk8_d2_in1k"]
    assert list(timm.models.get_arch_pretrained_cfgs("convnext_atto")) == names


def test_a_name_of_what_timm_has_no_weights_of():
    assert timm.is_model("ghostnet_050.mk8") and not timm.is_model_pretrained("ghostnet_050.mk8")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("ghostnet_050.mk8", pretrained=True)


@pytest.mark.parametrize("name", ["convnext_tiny.fb_in22k", "ghostnet_050", ARCH])
def test_cfg_is_the_stock_one(name):
    arch, _, tag = name.partition(".")
    own = f"{arch}.mk8_{tag}" if tag else f"{arch}.mk8"
    stock, cfg = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(own)
    assert cfg.tag == own.partition(".")[2] and cfg.architecture == arch
    assert replace(cfg, tag=stock.tag) == stock
    assert timm.models.get_arch_pretrained_cfgs(own)[own] == cfg
    assert timm.get_pretrained_cfg_value(own, "input_size") == stock.input_size


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        *((f"{MK8}{end}", ConversionError, f"expected {MK8} or {MK8}_r160_in1k") for end in ("_nope", "_", "nope")),
        ("convnext_tiny.mk8_in12_k", ConversionError, "expected convnext_tiny.mk8_in12k or "),
        ("resnet18.mk8", ConversionError, "resnet18 has no depthwise convolutions"),
        ("resnet18.mk8_a1_in1k", ConversionError, "resnet18 has no depthwise"),
        ("resnetv2_50x1_bitm.mk8", ConversionError, "has no depthwise"),  # a deprecated name
        (f"{ARCH}.mk9", RuntimeError, f"Invalid pretrained tag (mk9) for {ARCH}."),  # these are timm's
        ("convnext_tni.mk8", RuntimeError, "Unknown model (convnext_tni)"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.filterwarnings("ignore:Mapping deprecated model name:UserWarning")
def test_names_that_there_are_not(name, error, message, pretrained):
    with pytest.raises(error, match=re.escape(message)):
        timm.create_model(name, pretrained=pretrained)
    assert name not in timm.list_models("*", include_tags=True)


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name:UserWarning")
def test_deprecated_names_are_never_silently_dense():
    model = timm.create_model("mnasnet_b1.mk8", device="meta")
    assert len(layers(model)) == 17 and model.pretrained_cfg["tag"] == "mk8"
    assert not layers(timm.create_model("mnasnet_b1", device="meta"))


@pytest.mark.parametrize("depthwise", [False, True])
def test_an_architecture_of_ones_own_that_was_not_registered(monkeypatch, depthwise):
    """One that was there before this package was imported; the error says how to register it, if that is of use."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8 if depthwise else 1))
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "my_own_net", lambda pretrained=False, **kwargs: net)
    mk.register_names()
    expected = r"register_names\('my_own_net'\) adds them" if depthwise else "my_own_net has no depthwise convolutions"
    with pytest.raises(ConversionError, match=expected):
        timm.create_model("my_own_net.mk8")
    assert timm.create_model("my_own_net") is net


@pytest.mark.parametrize("name", [ARCH, f"{ARCH}.r160_in1k"])
def test_stock_creation_is_untouched(name):
    model = timm.create_model(name)
    torch.manual_seed(0)
    function = getattr(timm.models, ARCH)  # timm's own function, around the registry
    same(model, function())
    assert not layers(model) and model.pretrained_cfg == function().pretrained_cfg
    assert model.pretrained_cfg["tag"] == "r160_in1k" and not hasattr(model, "masterkeys")
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    assert timm.models.model_entrypoint(ARCH).__name__ == ARCH


@pytest.mark.parametrize(
    ("name", "setting", "error", "message"),
    [
        (ARCH, "mk_bank", TypeError, "'mk_bank'"),
        (ARCH, "mk_exclude", TypeError, "'mk_exclude'"),
        (MK8, "mk_keys", ConversionError, "no mk_keys; .*mk_keys_per_kernel"),
    ],
)
def test_settings_that_a_name_does_not_have(name, setting, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **{setting: "none"})


def test_scratch_is_random_initialisation_and_seeded(caplog):
    with caplog.at_level(logging.WARNING):
        model, other = timm.create_model(MK8), timm.create_model(MK8)
    assert not caplog.records  # nothing was converted: no fit to tell of
    for name, layer in layers(model).items():
        assert not torch.equal(layer.key_index, other.get_submodule(name).key_index)
    torch.manual_seed(0)
    same(model, mk.initialize_masterkeys(timm.create_model(ARCH)))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")  # torch's, as for stock
def test_meta_device_and_dtype(weights, caplog):
    kwargs = {"pretrained_cfg_overlay": overlay_of(weights), "dtype": torch.bfloat16}
    for pretrained in (False, True):
        model = timm.create_model(MK8, pretrained, device="meta", **kwargs)
        assert all(t.is_meta for t in model.state_dict().values()) and len(layers(model)) == 9
        assert all(layer.shift.dtype == layer.keys.dtype == torch.bfloat16 for layer in layers(model).values())
    assert not caplog.records  # no values, no fit
    with torch.no_grad():
        out = timm.create_model(MK8, **kwargs).eval()(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "name", "kwargs"),
    [
        ("dense.safetensors", MK8, {"num_classes": 0}),
        ("dense.pth", MK8, {"in_chans": 1, "num_classes": 7}),
        (None, f"{ARCH}.mk8_r160_in1k", {}),
    ],
)
def test_pretrained_is_the_stock_model_converted(weights, tmp_path, caplog, kind, name, kwargs):
    overlay = overlay_of(weights, kind and tmp_path / kind)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    torch.manual_seed(0)
    same(model, mk.convert_to_masterkeys(stock(weights, **kwargs)))
    assert model.num_classes == kwargs.get("num_classes", 1000)
    assert "state_dict" not in model.pretrained_cfg and model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == ARCH and f"{ARCH}.{model.pretrained_cfg['tag']}" == name
    assert read_record(model) == Record(
        (mk.MasterKeysConfig(),), Source(), keys_digest(layers(model))
    )  # of unknown source
    if not kwargs:
        assert resolve_model_data_config(model) == resolve_model_data_config(timm.create_model(ARCH))

    (record,) = caplog.records  # one line: what it is, how well it fits, what to do
    total, message = mk.conversion_report(model).total, record.getMessage()
    assert record.levelno == logging.WARNING and "\n" not in message and message.startswith(f"{name}: ")
    assert f"mean R2 {total.mean_r2:.2f}" in message and 0.3 < total.mean_r2 < 0.9
    assert f"{total.channels:,} kernels of 9 layers" in message and "bank babaiee2025" in message
    assert "calibrate_masterkeys(model, dense_model, images)" in message


@pytest.mark.parametrize(
    ("feature_cls", "source", "setting"),
    [
        ("list", "dense", {"mk_include": "stages.1.*"}),
        ("dict", "converted", {}),
        ("hook", "dense", {}),
        ("getter", None, {"mk_include": ["*.blocks.0.conv_dw", "stages.2.blocks.1.*"]}),
        ("fx", "converted", {}),
        ("fx", "dense", {"mk_exclude": ["*.blocks.0.conv_dw", "stages.2.blocks.1.*"]}),
        ("fx", None, {"mk_exclude": "stages.1.*"}),
    ],
)
def test_features_only(weights, feature_cls, source, setting):
    """The same as of the whole model; patterns are of its names."""
    converted = trained(weights)
    overlay = source and overlay_of(weights if source == "dense" else converted.state_dict())
    kwargs = {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 2)}
    create = functools.partial(timm.create_model, MK8, source is not None, pretrained_cfg_overlay=overlay)
    torch.manual_seed(0)
    model = create(**kwargs, **setting).eval()
    for module in model.modules():  # the wrapper, and the model it keeps
        assert "state_dict" not in (getattr(module, "pretrained_cfg", None) or {})
        assert "state_dict" not in (getattr(module, "default_cfg", None) or {})
    assert model.pretrained_cfg["tag"] == "mk8"
    whole = converted if source == "converted" else create(**setting)
    expected_layers = [flat_name(name) for name in layers(whole) if not name.startswith("stages.3")]
    assert [n for n in map(flat_name, layers(model)) if not n.startswith("stages_3")] == expected_layers != []
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        out = values(model(x))
        assert [o.shape for o in out] == [(1, 24, 16, 16), (1, 48, 4, 4)]
        if source:  # else at random
            expected = whole.eval().forward_intermediates(x, indices=(0, 2), intermediates_only=True)
            assert all_equal(out, expected)


def test_patterns_of_stages_that_features_lack(caplog):
    kwargs = {"features_only": True, "out_indices": (0, 1)}
    model = timm.create_model(MK8, mk_exclude=["stages.1.*", "stages.3.*"], **kwargs)
    assert {name.split(".")[0] for name in layers(model)} == {"stages_0"}
    (warning,) = (r.getMessage() for r in caplog.records if "matches none" in r.getMessage())
    assert "'stages.3.*' matches none" in warning and "'stages.1.*'" not in warning
    with pytest.raises(mk.ConversionError, match="nothing to convert"):
        timm.create_model(MK8, mk_include="stages.3.*", **kwargs)


@pytest.mark.parametrize(("arch", "features"), [("test_efficientnet", False), ("starnet_s1", True)])
def test_the_pattern_that_the_error_recommends_works(arch, features, caplog):
    model = timm.create_model(arch, features_only=features)
    with contextlib.nullcontext() if features else pytest.raises(mk.ConversionError) as error:
        mk.plan_conversion(model, include="nothing")
    message = caplog.text if features else str(error.value)
    pattern = re.search(r"a whole stage is '([^']*)'", message)[1]
    found = [layer.name for layer in mk.plan_conversion(model, include=pattern).converted]
    assert 0 < len(found) < len(mk.plan_conversion(model).converted) and found[0] in message


def trained(weights, **settings):
    """A converted model no value of which is what conversion would make of any weights."""
    model = mk.convert_to_masterkeys(stock(weights), **settings)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.key_index.copy_((layer.key_index + 1) % 3)
            layer.scale.add_(0.1 * torch.randn_like(layer.scale))
            layer.shift.add_(0.1 * torch.randn_like(layer.shift))
            layer.r2.fill_(0.5)
    return model


@pytest.mark.parametrize(
    ("kind", "kwargs", "settings"),
    [
        ("file.safetensors", {"num_classes": -1}, {}),  # what train.py's --pretrained-path amounts to: a new head
        ("file.pth", {"in_chans": 1}, {}),
        ("train.pth.tar", {"num_classes": 5}, {}),
        (None, {}, {}),
        (None, {"num_classes": 5}, {"bank": "random8:3"}),
        (None, {}, {"keys_per_kernel": 3, "trainable": "affine"}),
        (None, {"num_classes": 5}, {"exclude": "stages.0.*"}),
        (None, {}, {"bank": "scale-space-b", "trainable": "sigmas"}),
    ],
)
def test_a_converted_checkpoint(weights, tmp_path, caplog, kind, kwargs, settings):
    """It comes back as it is, not its pointwise layers with random kernels projected."""
    model = trained(weights, **settings)
    overlay = overlay_of(model.state_dict(), kind and tmp_path / kind)
    create = functools.partial(timm.create_model, MK8, **{f"mk_{name}": value for name, value in settings.items()})
    if kind:
        same(create(checkpoint_path=overlay["file"]), model)
    if kwargs.get("num_classes") == -1:
        again = create(pretrained=True, pretrained_cfg_overlay={**overlay, **kwargs})
    else:
        again = create(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    loaded, given = again.state_dict(), model.state_dict()
    assert loaded.keys() == given.keys() and not caplog.records
    assert all(torch.equal(loaded[n], given[n]) for n in given if not n.startswith(("head.fc", "stem.0")) or not kwargs)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in again.parameters())
    assert {layer.trainable for layer in layers(again).values()} == {settings.get("trainable", "shift")}


@pytest.mark.parametrize("arch", ["test_mambaout", pytest.param("ghostnet_050", marks=pytest.mark.slow), "fastvit_t8"])
def test_converted_checkpoints_of_other_families(arch):
    given = mk.initialize_masterkeys(timm.create_model(arch), keys_per_kernel=2).state_dict()
    overlay = {**overlay_of(given), "num_classes": -1}
    model = timm.create_model(f"{arch}.mk8", pretrained=True, pretrained_cfg_overlay=overlay)
    loaded, head = model.state_dict(), model.pretrained_cfg["classifier"]
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[name], given[name]) for name in given if not name.startswith(head))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (MK8, {"mk_bank": "random8:1"}, "another bank than 'random8:1'"),
        (MK8, {"mk_keys_per_kernel": 2}, "key_index: got shape"),
        (MK8, {"mk_include": "stages.0.*"}, "other layers than this one would be, as stages.1"),
        (MK8, {"mk_trainable": "sigmas", "mk_bank": "scale-space-b"}, "log_sigma"),
        ("test_efficientnet.mk8", {}, "has no layer stages"),
    ],
)
def test_what_contradicts_a_converted_checkpoint(weights, name, settings, message):
    overlay = overlay_of(trained(weights).state_dict())
    with pytest.raises(mk.CheckpointError, match=message):
        timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay, **settings)


def test_what_stock_timm_saves_of_a_converted_model(weights, tmp_path):
    """Its own ``save_for_hf``: no compact file, the compact entries among the weights."""
    model = timm.create_model(MK8)
    model.load_state_dict(trained(weights).state_dict())
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_cache_dir_reaches_timms_loader(weights, tmp_path):
    torch.save(dict(weights), tmp_path / "dense.pth")
    overlay = {"hf_hub_id": None, "url": (tmp_path / "dense.pth").as_uri()}
    cache = tmp_path / "cache"
    model = timm.create_model(MK8, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(cache))
    assert [path.name for path in cache.iterdir()] == ["dense.pth"]
    same(model, mk.convert_to_masterkeys(stock(weights)))


@pytest.mark.parametrize("kind", ["tag", "object", "dict", "resolved"])
def test_cfg_as_an_argument(weights, kind):
    cfg, overlay = replace(timm.get_pretrained_cfg(MK8), **overlay_of(weights)), overlay_of(weights)
    if kind == "tag":  # as train.py's --pretrained-cfg would
        kwargs = {"model_name": ARCH, "pretrained_cfg": "mk8", "pretrained_cfg_overlay": overlay}
    elif kind == "resolved":  # as validate.py does
        if not hasattr(timm.models, "resolve_model_input_args"):
            pytest.skip("timm 1.0.31 brought it")
        kwargs = {**timm.models.resolve_model_input_args(MK8), "pretrained_cfg_overlay": overlay}
    else:
        kwargs = {"model_name": ARCH, "pretrained_cfg": cfg if kind == "object" else cfg.to_dict()}
    model = timm.create_model(**kwargs, pretrained=True)
    same(model, mk.convert_to_masterkeys(stock(weights)))
    assert model.pretrained_cfg["tag"] == "mk8" and "state_dict" not in model.pretrained_cfg
    assert cfg.state_dict  # the caller's own cfg keeps it


@pytest.mark.parametrize(
    ("arguments", "settings", "pretrained"),
    [
        (["mk_bank=random8:3"], {"bank": "random8:3"}, True),
        (["mk_keys_per_kernel=3", "mk_trainable=affine"], {"keys_per_kernel": 3, "trainable": "affine"}, False),
        (["mk_trainable=none", "mk_include=stages.1.*"], {"trainable": "none", "include": "stages.1.*"}, True),
        (["mk_exclude=['stages.0.*', '*.1.conv_dw']"], {"exclude": ["stages.0.*", "*.1.conv_dw"]}, False),
        (["mk_bank=None"], {}, False),
    ],
)
def test_settings(weights, pretrained, arguments, settings):
    """As train.py's and validate.py's ``--model-kwargs`` understands them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    kwargs = parser.parse_args(["--model-kwargs", *arguments]).model_kwargs
    overlay = overlay_of(weights) if pretrained else None
    model = timm.create_model(MK8, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    torch.manual_seed(0)
    if pretrained:
        expected = mk.convert_to_masterkeys(stock(weights), **settings)
    else:
        expected = mk.initialize_masterkeys(timm.create_model(ARCH), **settings)
    same(model, expected)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]


def test_a_bank_as_an_object():
    bank = mk.KeyBank("mine", torch.randn(3, 5, 5))
    assert {layer.bank for layer in layers(timm.create_model(MK8, mk_bank=bank)).values()} == {bank}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mk_bank": "nope"}, mk.BankError, "Unknown bank 'nope'"),
        ({"mk_include": "blocks.*"}, mk.ConversionError, r"Pattern 'blocks\.\*' matches none"),
    ],
)
def test_settings_that_are_wrong(settings, error, message):
    """All that may be: test_config.py."""
    with pytest.raises(error, match=message):
        timm.create_model(MK8, **settings)


@pytest.fixture
def pointed(monkeypatch):
    """What names were pointed at; forgotten afterwards, by timm too."""
    registry = timm.models._registry
    for name in ("_model_pretrained_cfgs", "_model_with_tags", "_model_has_pretrained"):
        monkeypatch.setattr(registry, name, copy.deepcopy(getattr(registry, name)))
    monkeypatch.setattr(published, "_sources", sources := {})
    published._apply_variable.cache_clear()
    yield sources
    published._apply_variable.cache_clear()


def write_lists(folder, text):
    """A list of names, also at a path with a blank."""
    (folder / "my zoo").mkdir()
    for path in (folder / "names.txt", folder / "my zoo" / "names.txt"):
        path.write_text(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"{MK8}=orgname", f"source 'orgname' for {MK8}, expected 'org/name'"),
        (f"{MK8} = org/name", f"source '' for {MK8}"),
        (f"{MK8}_ours=org/name@", "source 'org/name@'"),
        (f"{MK8}=org/a,test_convnext2.mk8=org/b", "source 'org/a,test_convnext2.mk8=org/b'"),
        ("resnet18.mk8=org/a", "name 'resnet18.mk8'"),
        (f"{MK8}=org/a {{folder}}/none.txt", "none.txt' cannot be read"),
        (f"{MK8}=org/a {{folder}}/names.txt", "source 'nonsense'"),
        ("{folder}/my zoo/names.txt", "source 'nonsense'"),
    ],
)
def test_what_is_wrong_with_the_variable_is_an_error_for_every_name(pointed, tmp_path, monkeypatch, value, message):
    """Each time a name's weights are loaded, and not before; no name is then pointed anywhere."""
    write_lists(tmp_path, f"{MK8}_ours=org/a\n{MK8}=nonsense\n")
    monkeypatch.setenv("TIMM_MASTERKEYS_WEIGHTS", value.format(folder=tmp_path))
    for name in (MK8, MK8, "convnext_atto.mk8"):
        with pytest.raises(mk.ConversionError, match=f"^TIMM_MASTERKEYS_WEIGHTS is .*{re.escape(message)}"):
            timm.create_model(name, pretrained=True)
    assert not pointed and layers(timm.create_model(MK8)) and not layers(timm.create_model(ARCH))


@pytest.mark.parametrize("value", ["{pairs}", f"{{folder}}/names.txt {MK8}=org/b", "{folder}/my zoo/names.txt"])
def test_pairs_and_lists_in_the_variable(pointed, tmp_path, monkeypatch, value):
    """Beside pairs; with a blank in its path on its own. What the program says goes before."""
    pairs = [f"{MK8}_ours=org/a@0a1b", f"{MK8}_new=org/c", f"{MK8}_only=org/d"]
    write_lists(tmp_path, "# our zoo\n\n" + "\n  ".join(pairs))
    monkeypatch.setenv("TIMM_MASTERKEYS_WEIGHTS", value.format(pairs=" ".join(pairs), folder=tmp_path))
    mk.use_weights(f"{MK8}_new", "org/own")
    assert timm.create_model(f"{MK8}_only").pretrained_cfg["hf_hub_id"] == "org/d"  # without weights, as to resume
    assert published.published_source("convnext_atto.mk8") is None
    assert pointed.pop(MK8, "org/b") == "org/b"
    assert pointed == {f"{MK8}_ours": "org/a@0a1b", f"{MK8}_new": "org/own", f"{MK8}_only": "org/d"}
    with pytest.raises(ConversionError, match=f"Got {MK8}_neww, expected .*{MK8}_new"):
        timm.create_model(f"{MK8}_neww")


def test_a_list_of_names(pointed, tmp_path):
    """All of its names or none; comments and empty lines are ignored."""
    names = tmp_path / "names.txt"
    names.write_text(f"# our zoo\n\n{MK8}_zoo1=org/a@0a1b\n  {MK8}_zoo2=org/b\n")
    mk.use_weights(names)
    assert pointed == {f"{MK8}_zoo1": "org/a@0a1b", f"{MK8}_zoo2": "org/b"}
    names.write_text(f"{MK8}_zoo3=org/c\n{ARCH}.zoo4=org/d\n")
    with pytest.raises(mk.ConversionError, match="zoo4"):
        mk.use_weights(str(names))
    assert not timm.is_model_pretrained(f"{MK8}_zoo3") and len(pointed) == 2


def test_a_list_that_cannot_be_read(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xff")
    with pytest.raises(mk.ConversionError, match="cannot be read"):
        mk.use_weights(tmp_path / "names.txt")
    with pytest.raises(mk.ConversionError, match=r"name 'nowhere\.txt'.* path of a list"):
        mk.use_weights("nowhere.txt")


def test_fx_keeps_the_layer_whole():
    """In timm's extractor, and torchvision's given timm's leaves; other tracers see through it, outputs are right."""
    model, x, nodes = timm.create_model(MK8).eval(), torch.randn(1, 3, 64, 64), {"stages.2": "out"}
    kept = {"leaf_modules": get_notrace_modules()}
    assert MasterKeyConv2d in kept["leaf_modules"]
    whole = [timm.layers.create_feature_extractor(model, nodes)]
    whole += [create_feature_extractor(model, nodes, tracer_kwargs=kept)]
    for extractor in whole:
        called = [node.target for node in extractor.graph.nodes if node.op == "call_module"]
        assert set(layers(model)) & set(called) == set(layers(extractor)) and len(layers(extractor)) == 7
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = model.stages[:3](model.stem(x))
            for extractor in (*whole, create_feature_extractor(model, nodes)):
                assert torch.allclose(extractor(x)["out"], expected, atol=1e-6)
            assert torch.allclose(torch.fx.symbolic_trace(model)(x), model(x), atol=1e-6)


def test_only_one_module_touches_them():
    private = re.compile(r"timm(\.\w+)*\._[a-z]|from timm\S* import .*\b_[a-z]|\._(model_args|traits)\b")
    for path in Path(mk.__file__).parent.rglob("*.py"):
        found = [line for line in path.read_text().splitlines() if private.search(line)]
        assert path.name == "compat.py" or not found, (path.name, found)


@pytest.mark.parametrize(
    "name", ["_model_entrypoints", "_model_has_pretrained", "_model_pretrained_cfgs", "_model_with_tags"]
)
def test_each_missing_name_is_a_warning(monkeypatch, caplog, name):
    """``unsupported`` fails here when timm moves a name: adapt ``compat.py`` alone, then add to its ``TESTED``."""
    assert not compat.unsupported(), compat.unsupported()
    monkeypatch.delattr(timm.models._registry, name)
    mk.register_names()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert name in warning and f"timm {timm.__version__} moved" in warning
    assert "No .mk8 names; convert_to_masterkeys(model) works all the same" in warning


@pytest.mark.parametrize(("version", "warnings"), [("1.0.29.dev0", 1), ("0.9.16", 1), ("1.0.31", 0), ("1.1.0.dev0", 0)])
def test_a_timm_of_a_checkout_that_is_too_old_is_a_warning(version, warnings, monkeypatch, caplog):
    monkeypatch.setattr(timm, "__version__", version)
    mk.register_names()
    mk.register_names("test_convnext")
    assert len(caplog.records) == warnings
    assert all(version in r.getMessage() and os.path.dirname(timm.__file__) in r.getMessage() for r in caplog.records)
