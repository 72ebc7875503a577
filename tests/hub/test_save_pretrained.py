"""Saved folders: what timm loads from them with this package, and without it."""

import copy
import json
import re
import sys
import zipfile

import pytest
import timm
import torch
from forked import run
from huggingface_hub import ModelCard
from lite0 import DATA_CONFIG, lite0
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys import CheckpointError, ConversionError, MasterKeyConv2d
from timm_masterkeys.files import file_sha256
from timm_masterkeys.timm_plugin import compat

ARCH = "test_convnext3"  # depthwise kernels 7x7, 5x5, 5x5 and 3x3
FILES = {"README.md", "config.json", "masterkeys.safetensors", "model.safetensors"}


@pytest.fixture(scope="module", autouse=True)
def stock_weights(tmp_path_factory):
    """Where timm looks for its own weights: here, not on the Hub."""
    path = str(tmp_path_factory.mktemp("stock") / "model.safetensors")
    torch.manual_seed(3)
    save_file(timm.create_model(ARCH).state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        for cfg in compat.cfgs(ARCH).values():
            patch.setattr(cfg, "file", path)
        yield path


def converted(seed=0, **kwargs):
    """A model as after training: no value is what conversion made it."""
    torch.manual_seed(seed)
    settings = {"mk_bank": "random8:5", "mk_keys_per_kernel": 2, "mk_trainable": "affine"}
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True, **{**settings, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return mk.save_pretrained(model, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture(scope="module")
def trained():
    """EfficientNet-Lite0 with its real ImageNet weights, converted."""
    return mk.convert_to_masterkeys(lite0(), keys_per_kernel=3)


@pytest.fixture(scope="module")
def trained_folder(trained, tmp_path_factory):
    return mk.save_pretrained(trained, tmp_path_factory.mktemp("lite0"))


def load(folder, pretrained=True, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **kwargs).eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)}


def same(a, b, besides=()):
    a, b = (
        {name: value for name, value in m.state_dict().items() if not name.startswith(tuple(besides))} for m in (a, b)
    )
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_the_model_comes_back_bit_for_bit(model, folder, caplog):
    again = load(folder)
    same(again, model)
    assert layers(again).keys() == layers(model).keys() and len(layers(again)) == 4
    for name, layer in layers(again).items():
        own = model.get_submodule(name)
        assert (layer.bank.name, layer.bank.digest) == ("random8:5", own.bank.digest)
        assert (layer.keys_per_kernel, layer.trainable) == (2, "affine")
    parameters = dict(again.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()  # the bank is not among them
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert not caplog.records  # it is what was saved: nothing was converted, nothing is to be told
    assert again.pretrained_cfg["tag"] == "mk8" and again.pretrained_cfg["architecture"] == ARCH
    assert again.pretrained_cfg["license"] == "apache-2.0"


def test_saving_changes_nothing(model, folder):
    same(model, converted())
    assert model.pretrained_cfg["tag"] == "mk8" and layers(model) and not model.training


def test_what_is_saved(model, folder):
    assert {path.name for path in folder.iterdir()} == FILES  # no pickle, no temporary file
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == ARCH and config["num_classes"] == 1000
    assert config["pretrained_cfg"]["tag"] == "mk8"
    assert config["pretrained_cfg"]["hf_hub_filename"] == "model.safetensors"
    assert not any("mk_" in name for name in config["model_args"])  # stock timm would not know them
    about = config["masterkeys"]
    bank = mk.get_bank("random8:5")
    assert about["format_version"] == 1 and about["kernels"] == 32 + 64 + 96 + 128
    assert about["banks"].keys() == {bank.digest} and about["banks"][bank.digest]["name"] == "random8:5"
    settings = {"bank": bank.digest, "keys_per_kernel": 2, "trainable": "affine", "sigmas": False}
    assert about["layers"] == dict.fromkeys(layers(model), settings)
    (conversion,) = about["conversions"]
    assert mk.MasterKeysConfig.from_dict(conversion) == mk.MasterKeysConfig("random8:5", 2, "affine")
    assert about["source"]["name"] == f"timm/{ARCH}.r160_in1k" and about["calibration"] is None
    assert about["versions"].keys() == {"timm_masterkeys", "timm", "torch"}
    names = ("model.safetensors", "masterkeys.safetensors")
    assert about["files"] == {name: file_sha256(folder / name) for name in names}
    dense = load_file(folder / "model.safetensors")
    fused = mk.fuse_masterkeys(model).state_dict()
    assert dense.keys() == fused.keys() == timm.create_model(ARCH).state_dict().keys()
    assert all(torch.equal(dense[name], fused[name]) for name in dense)


@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"num_classes": 0}, {"in_chans": 1}])
def test_other_heads_and_inputs(model, folder, kwargs):
    again = load(folder, **kwargs)
    same(again, model, besides=["head.fc" if "num_classes" in kwargs else "stem.0.weight"])
    assert again(torch.randn(1, kwargs.get("in_chans", 3), 64, 64)).shape == (1, kwargs.get("num_classes", 1000) or 128)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only(model, folder, feature_cls):
    again = load(folder, features_only=True, feature_cls=feature_cls, out_indices=(1, 3))
    assert len(layers(again)) == 4
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=(1, 3), intermediates_only=True)
        got = again(x)
    got = list(got.values()) if isinstance(got, dict) else got
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_trainable_can_be_chosen(model, folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    again = load(folder, mk_trainable="none")
    same(again, model)
    assert {layer.trainable for layer in layers(again).values()} == {"none"}


def test_sigmas_of_a_saved_model_can_be_trained(tmp_path):
    """Where the layers have some; whatever bank a call without ``mk_bank`` would take."""
    sigmas = converted(mk_bank="scale-space-b", mk_keys_per_kernel=1, mk_trainable="scales")
    mk.save_pretrained(load(mk.save_pretrained(sigmas, tmp_path), mk_trainable="shift"), tmp_path)
    assert {layer.trainable for layer in layers(load(tmp_path)).values()} == {"shift"}
    again = load(tmp_path, mk_trainable="scales")
    same(again, sigmas)
    assert {layer.trainable for layer in layers(again).values()} == {"scales"}


def test_what_the_saved_layers_cannot_train_is_refused(folder):
    for trainable, message in (("scales", "has no scales"), ("all", "trainable is 'all'")):
        with pytest.raises(ConversionError, match=message):
            load(folder, mk_trainable=trainable)


def test_other_settings_are_refused(folder):
    with pytest.raises(ConversionError, match=r"^mk_exclude, mk_keys_per_kernel cannot change a saved conversion"):
        load(folder, mk_exclude="stages.0.*", mk_keys_per_kernel=2)


def test_without_the_compact_file_the_dense_weights_are_projected(tmp_path, caplog):
    mk.save_pretrained(converted(mk_keys_per_kernel=1), tmp_path)
    (tmp_path / "masterkeys.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing beside '.*', which speaks of it: the exact conversion is lost"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "masterkeys"}))
    caplog.clear()
    again = load(tmp_path, mk_bank="random8:5")
    assert len(layers(again)) == 4 and "mean R2 1.00" in caplog.text
    dense = load_file(tmp_path / "model.safetensors")
    assert all(torch.allclose(layer.weight, dense[f"{n}.weight"], atol=1e-5) for n, layer in layers(again).items())


@pytest.mark.parametrize("trainable", [None, "shift"])
def test_without_weights_the_settings_are_those_published(model, folder, trainable, caplog):
    """What a resumed run needs: the checkpoint it loads next is of the same bank and number of keys."""
    again = load(folder, pretrained=False, mk_trainable=trainable)
    for name, layer in layers(again).items():
        assert (layer.bank.name, layer.keys_per_kernel, layer.trainable) == ("random8:5", 2, trainable or "affine")
        assert not torch.equal(layer.scale, model.get_submodule(name).scale)
    assert len(layers(again)) == 4 and not caplog.records
    again.load_state_dict(model.state_dict())
    same(again, model)


def test_from_scratch_there_is_no_licence_to_inherit(tmp_path):
    model = timm.create_model(f"{ARCH}.mk8")
    again = load(mk.save_pretrained(model, tmp_path))
    same(again, model)
    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert "license" not in again.pretrained_cfg and config["masterkeys"]["mean_r2"] is None
    assert config["masterkeys"]["source"] is None
    assert "its own random initialisation" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kwargs", [{"num_classes": 7, "in_chans": 1}, {"num_classes": 0}, {"global_pool": "max"}])
def test_models_of_other_shapes(tmp_path, kwargs):
    model = converted(**kwargs)
    again = load(mk.save_pretrained(model, tmp_path))
    same(again, model)
    assert (again.num_classes, again.in_chans) == (kwargs.get("num_classes", 1000), kwargs.get("in_chans", 3))
    x = torch.randn(1, again.in_chans, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_bank_of_ones_own_travels_with_the_model(tmp_path):
    own = mk.KeyBank("mine", torch.randn(3, 5, 5), source="my search", licence="mit")
    own.save(tmp_path / "bank.safetensors")
    model = converted(mk_bank=tmp_path / "bank.safetensors")
    mk.save_pretrained(model, tmp_path / "out")
    (tmp_path / "bank.safetensors").unlink()
    again = load(tmp_path / "out")
    same(again, model)
    loaded = next(iter(layers(again).values())).bank
    assert (loaded.digest, loaded.name, loaded.source, loaded.licence) == (own.digest, "mine", "my search", "mit")


def test_a_model_converted_from_a_stock_name(tmp_path):
    torch.manual_seed(0)
    stock = timm.create_model(ARCH, pretrained=True, num_classes=10)
    model = mk.convert_to_masterkeys(stock, exclude="stages.0.*")
    again = load(mk.save_pretrained(model, tmp_path, config={"label_names": [str(i) for i in range(10)]}))
    same(again, model)
    assert len(layers(again)) == 3 and type(again.stages[0].blocks[0].conv_dw) is nn.Conv2d
    assert again.pretrained_cfg["tag"] == "mk8"  # whose weights these are, nobody told
    assert again.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    assert model.pretrained_cfg["tag"] == "r160_in1k"  # not changed


def test_wrapped_channels_last_and_in_training_mode(model, tmp_path):
    other = converted().train().to(memory_format=torch.channels_last)
    same(load(mk.save_pretrained(ModelEmaV3(nn.DataParallel(other)), tmp_path)), model)
    assert other.training and other.stem[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_bf16(tmp_path):
    model = converted(dtype=torch.bfloat16)
    mk.save_pretrained(model, tmp_path)
    same(load(tmp_path, dtype=torch.bfloat16), model)
    assert len(layers(load(tmp_path))) == 4


def test_saved_again(model, folder, tmp_path):
    """What was loaded is saved as the same files; only the card's examples name the folder."""
    mk.save_pretrained(load(folder), tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_real_weights(trained, trained_folder):
    again = load(trained_folder)
    same(again, trained)
    assert len(layers(again)) == 16 and mk.conversion_report(again).total.mean_r2 > 0.7
    config = resolve_model_data_config(again)
    assert {key: tuple(v) if isinstance(v := config[key], list) else v for key in DATA_CONFIG} == DATA_CONFIG
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again(x), trained(x))


WITHOUT = """
import json, sys
import timm, torch
from safetensors.torch import load_file
for folder, tensors in json.loads(sys.argv[1]):
    given = load_file(tensors)
    for case, kwargs in (
        ("plain", {}),
        ("head", {"num_classes": 0}),
        ("gray", {"in_chans": 1}),
        ("features", {"features_only": True, "feature_cls": "getter"}),
    ):
        model = timm.create_model("local-dir:" + folder, pretrained=True, **kwargs).eval()
        assert type(model).__module__.startswith("timm.models.")
        with torch.no_grad():
            out = model(given["gray x" if case == "gray" else "x"])
        out = out if isinstance(out, list) else [out]
        assert all(torch.equal(o, given[f"{case} {i}"]) for i, o in enumerate(out)), (folder, case)
    timm.create_model("local-dir:" + folder, pretrained=True, num_classes=3)
assert "timm_masterkeys" not in sys.modules
"""


@pytest.mark.slow
def test_stock_timm_loads_the_same_outputs(model, folder, trained, trained_folder, tmp_path):
    cases = []
    for name, own, saved in (("a", model, folder), ("b", trained, trained_folder)):
        x = torch.randn(1, 3, 96, 96)
        given = {"x": x, "gray x": x[:, :1].clone()}
        with torch.no_grad():
            given["plain 0"], given["head 0"] = own(x), own.forward_head(own.forward_features(x), pre_logits=True)
            given["gray 0"] = load(saved, in_chans=1)(given["gray x"])
            features = load(saved, features_only=True, feature_cls="getter")(x)
        given |= {f"features {i}": feature for i, feature in enumerate(features)}
        save_file({key: value.contiguous() for key, value in given.items()}, tmp_path / f"{name}.safetensors")
        cases.append([str(saved), str(tmp_path / f"{name}.safetensors")])
    done = run("-c", WITHOUT, json.dumps(cases))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: timm.create_model(ARCH), "ConvNeXt holds no MasterKeyConv2d"),
        (lambda: nn.Sequential(MasterKeyConv2d(8, 8, 3)), "Sequential is not a whole timm model"),
        (lambda: timm.create_model(f"{ARCH}.mk8", features_only=True), "FeatureListNet is not a whole timm model"),
        (lambda: timm.create_model(f"{ARCH}.mk8", device="meta"), "on the meta device"),
    ],
)
def test_what_cannot_be_saved(tmp_path, given, message):
    with pytest.raises(ConversionError, match=message):
        mk.save_pretrained(given(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_others_stay(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "model.safetensors").write_text("to be replaced")
    mk.save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt", "old"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    same(load(tmp_path), model)


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("function", ["save_for_hf", "save_compact", "make_card", "atomic_path"])
def test_a_failed_save_leaves_the_folder_as_it_was(model, folder, tmp_path, monkeypatch, function):
    copied(folder, tmp_path)
    monkeypatch.setattr(f"timm_masterkeys.hub.save.{function}", full)
    with pytest.raises(OSError, match="No space left on device"):
        mk.save_pretrained(converted(seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: (folder / name).read_bytes() for name in FILES
    }
    same(load(tmp_path), model)


@pytest.mark.parametrize("first", [1, 3])
def test_a_save_that_fails_half_way_never_mixes_two_models(model, folder, tmp_path, monkeypatch, first):
    """Between two files no file is half written, and a model of both is refused."""
    copied(folder, tmp_path)
    new, whole, calls = converted(seed=1), {}, []
    for path in mk.save_pretrained(new, tmp_path / "whole").iterdir():
        whole[path.name] = path.read_bytes()
        path.unlink()
    (tmp_path / "whole").rmdir()
    atomic = mk.files.atomic_path

    def sometimes(path):
        calls.append(path)
        return atomic(path) if len(calls) <= first else full()

    monkeypatch.setattr("timm_masterkeys.hub.save.atomic_path", sometimes)
    with pytest.raises(OSError, match="No space left on device"):
        mk.save_pretrained(new, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES - {"README.md"}:
        assert (tmp_path / name).read_bytes() in (whole[name], (folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="not of one conversion"):
        load(tmp_path)
    monkeypatch.undo()
    mk.save_pretrained(new, tmp_path)
    same(load(tmp_path), new)


def copied(folder, path):
    path.mkdir(exist_ok=True)
    for name in FILES:
        (path / name).write_bytes((folder / name).read_bytes())
    return path


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("model.safetensors", {}),
        ("masterkeys.safetensors", {}),
        ("model.safetensors", {"num_classes": 5}),
        ("masterkeys.safetensors", {"features_only": True}),
    ],
)
def test_a_damaged_file_is_refused(folder, tmp_path, name, kwargs):
    data = (folder / name).read_bytes()
    middle = len(data) - 5000
    for i, damaged in enumerate(
        [data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], data[:-100], data[:10], b"", None]
    ):
        path = copied(folder, tmp_path / str(i))
        (path / name).unlink()
        if damaged is not None:
            (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load(path, **kwargs)
        if not kwargs:
            cfg = json.loads((path / "config.json").read_text())["pretrained_cfg"]
            cfg |= {"architecture": ARCH, "file": str(path), "source": "local-dir"}
            for given in (cfg, timm.models.PretrainedCfg(**cfg)):
                with pytest.raises(CheckpointError, match=re.escape(name)):
                    timm.create_model(ARCH, pretrained=True, pretrained_cfg=given)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("files"),
        lambda about: about.update(files="none"),
        lambda about: about["files"].clear(),
        lambda about: about.pop("format_version"),
        lambda about: about.update(format_version=2),
        lambda about: about.pop("conversions"),
        lambda about: about.update(conversions=[1]),
        lambda about: about["conversions"][0].update(trainable="all"),
        lambda about: about["conversions"][0]["bank"].update(digest="0", name="babaiee2025"),
        lambda about: about.update(source="somebody"),
        lambda about: about.update(calibration={"images": 3}),
    ],
)
def test_an_odd_config_is_refused(folder, tmp_path, change):
    path = copied(folder, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    change(config["masterkeys"])
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(path)
    (path / "config.json").write_text(json.dumps({**config, "masterkeys": "yes"}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(path)


def replaced_head(model):
    model.head.fc = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 1000))


def added_module(model):
    model.extra = nn.Linear(3, 3)


def another_activation(model):
    model.stages[0].blocks[0].mlp.act = nn.ReLU()


def nan(model):
    model.head.fc.weight.data[0, 0] = torch.nan


def nan_kernel(model):
    model.stages[0].blocks[0].conv_dw.shift.data[0] = torch.inf


class Int8Tensor(torch.Tensor):
    """As torchao's: a type of its own, of which most functions are not implemented."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("isfinite", "abs", "equal", "view"):
            raise NotImplementedError(f"Int8Tensor dispatch: {function}")
        return super().__torch_function__(function, types, args, kwargs)


def quantised(model):
    model.head.fc.weight = nn.Parameter(model.head.fc.weight.detach().as_subclass(Int8Tensor))


class Packed(nn.Linear):
    """As torch.ao's: what it keeps is no tensor."""

    def get_extra_state(self):
        return {"packed": 1}


def packed(model):
    model.head.fc.__class__ = Packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantised, r"^head\.fc\.weight is of type Int8Tensor, .* before it is quantised"),
        (packed, r"^head\.fc\._extra_state is of type dict, .* before it is quantised"),
        (replaced_head, "does not load again.*as timm.create_model made it"),
        (added_module, "does not load again.*as timm.create_model made it"),
        (another_activation, "the same weights, but other outputs"),
        (nan, "^head.fc.weight holds NaN or Inf"),
        (nan_kernel, "shift holds NaN or Inf"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(folder, tmp_path, change, message):
    model = converted()
    change(model)
    state = torch.get_rng_state()
    with pytest.raises(ConversionError, match=message):
        mk.save_pretrained(model, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
    path = copied(folder, tmp_path / "old")
    with pytest.raises(ConversionError, match=message):
        mk.save_pretrained(model, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {n: (folder / n).read_bytes() for n in FILES}
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_layer_is_not_saved(tmp_path):
    model = converted()
    model.stages[0].blocks[0].conv_dw.to("meta").to_empty(device="cpu")
    with pytest.raises(CheckpointError, match="has no values"):
        mk.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_does_not_change_what_the_model_says(model, tmp_path):
    entries = "architecture", "pretrained_cfg", "num_classes", "masterkeys", "model_args"
    with pytest.raises(ConversionError, match=f"config holds {', '.join(entries)}, "):
        mk.save_pretrained(model, tmp_path / "out", config=dict.fromkeys(entries, "test_efficientnet"))
    with pytest.raises(ConversionError, match="cannot be written as JSON"):
        mk.save_pretrained(model, tmp_path / "out", config={"mine": object()})
    assert not (tmp_path / "out").exists()


def test_one_tag_is_one_tag(model, tmp_path):
    mk.save_pretrained(model, tmp_path, tags="birds", datasets="imagenet-1k")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.tags == ["image-classification", "timm", "master-key-filters", "birds"]
    assert data.datasets == ["imagenet-1k"]


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    return model


def saved_cfg(model, path, **kwargs):
    """The cfg and the source that are saved; the card says the same of them."""
    mk.save_pretrained(model, path, **kwargs)
    config, card = json.loads((path / "config.json").read_text()), (path / "README.md").read_text()
    source = config["masterkeys"]["source"] or dict.fromkeys(("name", "license", "license_given"))
    assert config["pretrained_cfg"].get("license") == source["license"]
    assert (source["name"] is not None) == ("base_model:" in card)
    assert ("inherited" in card) == (source["license"] is not None and not source["license_given"])
    assert ("given by the author" in card) == bool(source["license_given"])
    return config["pretrained_cfg"], source


def loaded_into_the_optimizers_model(path):
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True)
    model.load_state_dict(train(copy.deepcopy(model)).state_dict())
    return nn.DataParallel(model)


def a_head_of_ones_own(path):
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True)
    head = {name: value for name, value in timm.create_model(ARCH).state_dict().items() if name.startswith("head.fc")}
    model.load_state_dict(head, strict=False)
    return model


def calibrated(path):
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True)
    mk.calibrate_masterkeys(model, timm.create_model(ARCH, pretrained=True), torch.rand(10, 3, 32, 32))
    return model


def a_failed_calibration(path):
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True)
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*args):
            next(iter(layers(model).values())).key_index.add_(1).remainder_(8)
            raise KeyboardInterrupt

        patch.setattr("timm_masterkeys.calibration.calibrate.calibrate_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mk.calibrate_masterkeys(model, timm.create_model(ARCH, pretrained=True), torch.rand(100, 3, 32, 32))
    return model


@pytest.mark.parametrize(
    "made",
    [
        lambda path: timm.create_model(f"{ARCH}.mk8_r160_in1k", pretrained=True, num_classes=5),
        lambda path: ModelEmaV3(converted()),
        loaded_into_the_optimizers_model,
        a_head_of_ones_own,
        calibrated,
        a_failed_calibration,
        lambda path: load(mk.save_pretrained(converted(), path.with_name("first"))),
    ],
)
def test_the_licence_of_weights_that_this_package_loaded_is_inherited(tmp_path, made):
    model = made(tmp_path / "checkpoint.pth")
    cfg, source = saved_cfg(model, tmp_path / "out")
    assert cfg["license"] == "apache-2.0" and source["name"] == f"timm/{ARCH}.r160_in1k"
    assert not source["license_given"]
    with pytest.raises(ConversionError, match=r"are under 'apache-2\.0'"):
        mk.save_pretrained(model, tmp_path / "other", license="mit")
    with pytest.raises(ConversionError, match=f"was converted from 'timm/{ARCH}.r160_in1k'"):
        mk.save_pretrained(model, tmp_path / "other", base_model="me/mine")


def foreign(path):
    torch.manual_seed(7)
    torch.save(timm.create_model(ARCH).state_dict(), path)
    return str(path)


def loaded_before_conversion(path):
    model = timm.create_model(ARCH, pretrained=True)
    model.load_state_dict(torch.load(foreign(path), weights_only=True))
    return mk.convert_to_masterkeys(model)


def compact_of_somebody(path):
    torch.manual_seed(7)
    torch.save(mk.convert_to_masterkeys(timm.create_model(ARCH)).state_dict(), path)
    return timm.create_model(f"{ARCH}.mk8", checkpoint_path=str(path))


@pytest.mark.parametrize(
    "made",
    [
        lambda path: timm.create_model(f"{ARCH}.mk8", pretrained=True, checkpoint_path=foreign(path)),
        lambda path: timm.create_model(
            f"{ARCH}.mk8",
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": torch.load(foreign(path), weights_only=True)},
        ),
        lambda path: mk.convert_to_masterkeys(timm.create_model(ARCH, pretrained=True)),
        loaded_before_conversion,
        compact_of_somebody,
    ],
)
def test_unknown_weights_are_under_the_licence_their_owner_says(tmp_path, made):
    model = made(tmp_path / "mine.pth")
    cfg, source = saved_cfg(model, tmp_path / "out")
    assert "license" not in cfg and cfg["tag"] == "mk8" and ARCH not in str(source)
    cfg, source = saved_cfg(model, tmp_path / "out", license="cc-by-nc-4.0")
    assert cfg["license"] == "cc-by-nc-4.0" and source["license_given"]
    again = load(tmp_path / "out")
    assert saved_cfg(again, tmp_path / "again") == (cfg, source)  # and it stays, published again
    with pytest.raises(ConversionError, match=r"are under 'cc-by-nc-4\.0'"):
        mk.save_pretrained(again, tmp_path / "other", license="mit")
    assert saved_cfg(model, tmp_path / "out", license="mit", base_model="me/mine")[1]["name"] == "me/mine"


def test_a_stock_model_carries_nothing_of_ours(tmp_path):
    """Where this package is not installed, a pickled one loads."""
    torch.save(timm.create_model(ARCH, pretrained=True), tmp_path / "model.pth")
    assert b"timm_masterkeys" not in zipfile.ZipFile(tmp_path / "model.pth").read("model/data.pkl")


def test_a_bom_is_no_part_of_a_readme(model, tmp_path):
    (tmp_path / "README.md").write_bytes("\ufeff---\nmine: 1\n---\n# Größe\r\n".encode())
    for _ in range(2):
        mk.save_pretrained(model, tmp_path)
        text = (tmp_path / "README.md").read_bytes().decode()
        assert text.startswith("---\n") and text.count("# Größe") == text.count("mine: 1") == 1
        assert "\ufeff" not in text and text.count("timm_masterkeys: begin") == 1


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("# Größe".encode("latin-1"), "is not UTF-8"),
        ("# Mine".encode("utf-16-le"), "is not UTF-8"),
        (b"---\na: [1\n---\n# Mine\n", "metadata that cannot be read"),
        (b"---\nmodel-index: 3\n---\n# Mine\n", "metadata that cannot be read"),
        (b"# Mine\n%E\n%B\nmine too\n", "should hold"),
        (b"# Mine\n%E\n", "should hold"),
        (b"%B\n%E\nmine\n%B\n%E\n", "should hold"),
    ],
)
def test_a_readme_that_cannot_be_kept_is_refused(model, tmp_path, readme, message):
    for mark, text in ((b"%B", mk.hub.card._BEGIN), (b"%E", mk.hub.card._END)):
        readme = readme.replace(mark, text.encode())
    (tmp_path / "README.md").write_bytes(readme)
    with pytest.raises(ConversionError, match=message):
        mk.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == readme


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_a_killed_save_is_removed_a_living_one_left_alone(model, tmp_path):
    left = tmp_path / ".saving-abc"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    left.with_name(".saving-abc.lock").touch()
    with mk.hub.save._saving(tmp_path) as other:
        (other / "model.safetensors").write_text("being written")
        mk.save_pretrained(model, tmp_path)
        assert (other / "model.safetensors").read_text() == "being written" and not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == FILES
