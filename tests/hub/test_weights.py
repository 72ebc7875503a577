"""Compact files: what was saved comes back bit for bit, and what does not fit changes nothing."""

import copy
import json
import sys

import pytest
import timm
import torch
from compare import layers, same
from forked import run
from safetensors import safe_open
from safetensors.torch import save_file

from timm_masterkeys import (
    CheckpointError,
    ConversionError,
    KeyBank,
    convert_to_masterkeys,
    fuse_masterkeys,
    get_bank,
    load_compact,
    save_compact,
)

ARCH = "test_convnext3"  # depthwise kernels 7x7, 5x5, 5x5 and 3x3
LAYER = "stages.1.blocks.0.conv_dw"


@pytest.fixture(scope="module")
def converted():
    """Two banks, one and two keys per kernel, every ``trainable`` in one model; values as if it had been trained."""
    torch.manual_seed(1)
    model = timm.create_model(ARCH).eval()
    convert_to_masterkeys(model, include="stages.0.*", inplace=True)
    convert_to_masterkeys(model, include="stages.1.*", trainable="none", inplace=True)
    bank = KeyBank("mine", torch.randn(5, 5, 5), source="a search", licence="mit")
    convert_to_masterkeys(model, bank, keys_per_kernel=2, trainable="affine", inplace=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def file(converted, tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "masterkeys.safetensors"
    save_compact(converted, path)
    return path


def alike(a, b):
    """Equal bit for bit in everything, down to what is a parameter."""
    same(a, b)
    same(dict(a.named_parameters()), dict(b.named_parameters()))
    for name, layer in layers(a).items():
        other = b.get_submodule(name)
        assert (layer.trainable, layer.keys_per_kernel) == (other.trainable, other.keys_per_kernel)
        assert layer.bank.digest == other.bank.digest and layer.same_padding == other.same_padding
        for about in ("name", "source", "licence"):
            assert getattr(layer.bank, about) == getattr(other.bank, about)


def test_round_trip(converted, file):
    model = fuse_masterkeys(converted)
    load_compact(model, file)
    alike(model, converted)
    assert [layer.trainable for layer in layers(model).values()] == ["shift", "none", "affine", "affine"]
    assert [layer.bank.name for layer in layers(model).values()] == ["babaiee2025", "babaiee2025", "mine", "mine"]
    assert not model.training


def test_names_that_features_only_would_make_equal(tmp_path):
    parts = {"body": torch.nn.ModuleDict({"a": torch.nn.Conv2d(4, 4, 3, groups=4)})}
    converted = convert_to_masterkeys(torch.nn.ModuleDict({**parts, "a": torch.nn.Conv2d(4, 4, 3, groups=4)}))
    save_compact(converted, tmp_path / "masterkeys.safetensors")
    model = fuse_masterkeys(converted)
    load_compact(model, tmp_path / "masterkeys.safetensors")
    alike(model, converted)


@pytest.mark.parametrize("trainable", ["none", "affine"])
def test_trainable_can_be_chosen(converted, file, trainable):
    model = fuse_masterkeys(converted)
    with pytest.raises(ConversionError, match="trainable is 'all'"):
        load_compact(model, file, "all")
    assert not layers(model)
    load_compact(model, file, trainable)
    assert {layer.trainable for layer in layers(model).values()} == {trainable}
    same(model, converted)


def test_what_the_file_holds(converted, file, tmp_path):
    with safe_open(file, framework="pt") as opened:
        about, names = json.loads(opened.metadata()["timm_masterkeys"]), set(opened.keys())
    assert about["format_version"] == 1
    bank = get_bank().digest
    assert about["layers"][LAYER] == {"bank": bank, "keys_per_kernel": 1, "trainable": "none", "sigmas": False}
    digests = {layer.bank.digest for layer in layers(converted).values()}
    assert about["banks"].keys() == digests and len(digests) == 2
    entries = {f"{n}.{e}" for n in layers(converted) for e in ("keys", "key_index", "scale", "shift", "r2")}
    assert names == entries | {f"banks.{digest}" for digest in digests}  # the dense rest is elsewhere
    before = copy.deepcopy(converted)
    save_compact(converted, tmp_path / "again.safetensors")
    alike(converted, before)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("dtype", "r"), [(torch.bfloat16, 4), (torch.float16, 1), (torch.float64, 8)])
def test_another_dtype(tmp_path, dtype, r):
    """Saved in it, or loaded in it: the dense weights were rounded on their way, and still go with the file."""
    dense, path = timm.create_model("test_efficientnet"), tmp_path / "c.safetensors"
    model = convert_to_masterkeys(copy.deepcopy(dense).to(dtype), keys_per_kernel=r)
    save_compact(model, path)
    again = fuse_masterkeys(model)
    load_compact(again, path)
    alike(again, model)
    model = convert_to_masterkeys(dense, keys_per_kernel=r)
    save_compact(model, path)
    other = fuse_masterkeys(model).to(dtype)
    load_compact(other, path)
    for name, layer in layers(other).items():
        source = model.get_submodule(name)
        assert layer.keys.dtype == layer.scale.dtype == layer.weight.dtype == dtype
        assert torch.equal(layer.keys, source.bank.keys_for((3, 3)).to(dtype))
        assert torch.equal(layer.key_index, source.key_index)
        assert torch.equal(layer.scale, source.scale.to(dtype)) and torch.equal(layer.shift, source.shift.to(dtype))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")  # torch's, as for stock
def test_meta_device(converted, file):
    model = timm.create_model(ARCH, device="meta")
    load_compact(model, file)
    with pytest.raises(CheckpointError, match="no values"):
        save_compact(model, file)
    model = model.to_empty(device="cpu")
    model.load_state_dict(converted.state_dict())
    same(model, converted)


@pytest.mark.parametrize("arch", ["test_mambaout", pytest.param("fastvit_t8", marks=pytest.mark.slow)])
def test_features_only_of_other_families(tmp_path, arch):
    model = convert_to_masterkeys(timm.create_model(arch), keys_per_kernel=2)
    save_compact(model, tmp_path / "c.safetensors")
    overlay = {"state_dict": fuse_masterkeys(model).state_dict()}
    for feature_cls in (None, "getter"):
        kwargs = {"features_only": True, "feature_cls": feature_cls}
        features = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=dict(overlay), **kwargs)
        expected = convert_to_masterkeys(features, keys_per_kernel=2)
        load_compact(features, tmp_path / "c.safetensors")
        assert layers(features).keys() == layers(expected).keys() and layers(features)


def spoil(file, path, change):
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["timm_masterkeys"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    change(tensors, about)
    save_file(tensors, path, {"timm_masterkeys": json.dumps(about)})


def mine(about):
    """The digest of the bank "mine"."""
    return next(digest for digest, bank in about["banks"].items() if bank["name"] == "mine")


def settings(**changed):
    return lambda t, a: a["layers"][LAYER].update(changed)


DISAGREES = f"disagrees with the model's weights of {LAYER}"
DAMAGE = {  # what is done to the tensors and to what is said of them
    "newer version": (lambda t, a: a.update(format_version=2), "has format version 2, this one reads up to 1. Upgrade"),
    "no version": (lambda t, a: a.pop("format_version"), "has format version None"),
    "bank altered": (lambda t, a: t[f"banks.{mine(a)}"][0, 0].add_(1), "bank 'mine' does not match its digest"),
    "bank missing": (lambda t, a: t.pop(f"banks.{mine(a)}"), "lacks the keys of bank 'mine'"),
    "keys altered": (lambda t, a: t[f"{LAYER}.keys"].mul_(1.01), "made with another bank than 'babaiee2025'"),
    "scale altered": (lambda t, a: t[f"{LAYER}.scale"][7].mul_(1.001), DISAGREES),
    "shift altered": (lambda t, a: t[f"{LAYER}.shift"][7].add_(1e-3), DISAGREES),
    "scale is NaN": (lambda t, a: t[f"{LAYER}.scale"][7].fill_(torch.nan), f"{LAYER}: scale: holds NaN or Inf; fix"),
    "shift is Inf": (lambda t, a: t[f"{LAYER}.shift"][7].fill_(torch.inf), "shift: holds NaN or Inf; fix"),
    "scale is Boolean": (lambda t, a: t.update({f"{LAYER}.scale": torch.ones(64).bool()}), "is damaged"),
    "no layers": (lambda t, a: a["layers"].clear(), "lists no layer"),
    "layers a list": (lambda t, a: a.update(layers=[1]), "is damaged"),
    "layers missing": (lambda t, a: a.pop("layers"), "is damaged"),
    "banks a text": (lambda t, a: a.update(banks="none"), "is damaged"),
    "bank of nothing": (lambda t, a: a["banks"][mine(a)].clear(), "is damaged"),
    "odd keys per kernel": (settings(keys_per_kernel="1"), "are no settings"),
    "odd trainable": (settings(trainable="all"), "are no settings"),
    "odd bank": (settings(bank="0"), "are no settings"),
    "about empty": (lambda t, a: a.clear(), "has format version None"),
    "another key": (lambda t, a: t[f"{LAYER}.key_index"].add_(1).remainder_(5), DISAGREES),
    "no such key": (lambda t, a: t[f"{LAYER}.key_index"].fill_(8), "key_index: holds 8 to 8"),
    "entry missing": (lambda t, a: t.pop(f"{LAYER}.shift"), f"does not fit. Layer {LAYER}: shift is missing"),
    "another size": (lambda t, a: t.update({f"{LAYER}.scale": torch.ones(3)}), "scale: got shape (3,), expected (64,)"),
    "another layer": (lambda t, a: a["layers"].update(nope=a["layers"][LAYER]), "has no layer nope"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_changes_nothing(converted, file, tmp_path, damage):
    change, message = DAMAGE[damage]
    spoil(file, tmp_path / "spoilt.safetensors", change)
    model = fuse_masterkeys(converted)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(CheckpointError, match=r"spoilt\.safetensors") as error:
        load_compact(model, tmp_path / "spoilt.safetensors")
    assert message in str(error.value)
    same(model, before)
    assert list(model.modules()) == modules and not layers(model)
    load_compact(model, file)  # and the model is not spoilt for a good one
    alike(model, converted)


def test_not_such_a_file(converted, file, tmp_path):
    model = fuse_masterkeys(converted)
    dense, text, cut = (tmp_path / name for name in ("dense.safetensors", "text.safetensors", "cut.safetensors"))
    save_file(model.state_dict(), dense)
    text.write_text("no safetensors")
    cut.write_bytes(file.read_bytes()[:-100])
    cases = [(dense, "is no compact masterkeys file")]
    cases += [(path, "Cannot read") for path in (text, cut, tmp_path, tmp_path / "missing.safetensors")]
    for path, message in cases:
        with pytest.raises(CheckpointError, match=f"{message}.*save_compact|save_compact.*{message}") as error:
            load_compact(model, path)
        assert str(path) in str(error.value)
    for number, metadata in enumerate(["{", "[]", "null", '{"format_version": 1}']):
        save_file({"x": torch.ones(1)}, tmp_path / f"odd{number}", {"timm_masterkeys": metadata})
        with pytest.raises(CheckpointError, match=f"odd{number}'"):
            load_compact(model, tmp_path / f"odd{number}")
    assert not layers(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (ARCH, "not of one conversion"),  # weights of its own
        ("convnext_atto", r"does not fit. Layer stages.0.blocks.0.conv_dw: key_index: got shape"),
        ("test_efficientnet", r"has no layer stages.0.blocks.0.conv_dw, which was converted"),
        (f"{ARCH}.mk8", r"stages\.0\.blocks\.0\.conv_dw is converted already"),
    ],
)
def test_another_model(file, name, message):
    other = timm.create_model(name)
    with pytest.raises(CheckpointError, match=message):
        load_compact(other, file)
    assert bool(layers(other)) == name.endswith("mk8")


def test_a_failed_save_keeps_the_old_file(converted, file, tmp_path, monkeypatch):
    path = tmp_path / "masterkeys.safetensors"
    path.write_bytes(file.read_bytes())

    def full(*args):
        args[1].write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_masterkeys.hub.weights.save_file", full)
    for target, message in ((path, "No space left"), (tmp_path / "missing" / "c.safetensors", "No such file")):
        with pytest.raises(OSError, match=message):
            save_compact(converted, target)
    with pytest.raises(ConversionError, match="holds no MasterKeyConv2d"):
        save_compact(timm.create_model(ARCH), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == file.read_bytes()


DISK = """
import resource, sys
import timm, torch, timm_masterkeys as mk
model, folder = timm.create_model("test_convnext3.mk8"), sys.argv[1]
bank = mk.KeyBank("large", torch.randn(40, 31, 31))
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
for write, *given in ((mk.save_compact, model), (mk.KeyBank.save, bank), (mk.save_pretrained, model)):
    try:
        write(*given, folder + "/out")
        print("no error")
    except OSError as error:
        print(error.errno, error.strerror)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_is_an_oserror(tmp_path):
    """A file that may not grow stands for it: safetensors says so in an exception of its own."""
    done = run("-c", DISK, tmp_path)
    assert done.stdout.splitlines() == ["27 File too large"] * 3, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
