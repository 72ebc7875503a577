"""Saved folders: what timm loads from them with this package, and without it."""

import functools
import json
import re
import shutil
import sys
import zipfile

import pytest
import timm
import torch
from compare import all_equal, layers, same
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys import CheckpointError, ConversionError
from timm_masterkeys.errors import in_short
from timm_masterkeys.files import file_sha256
from timm_masterkeys.hub.weights import describe_layers
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


def load(folder, pretrained=True, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **kwargs).eval()


def test_a_tag_that_timm_does_not_know(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["tag"] = "mk8_of_another_timm"
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(load(tmp_path), model)
    assert layers(load(tmp_path, pretrained=False)).keys() == layers(model).keys()


def test_the_model_comes_back_bit_for_bit(model, folder, caplog, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    again = load(folder)
    same(again, model)
    for name, layer in layers(again).items():
        own = model.get_submodule(name)
        assert (layer.bank.name, layer.bank.digest) == ("random8:5", own.bank.digest)
        assert (layer.keys_per_kernel, layer.trainable) == (2, "affine")
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()  # no bank is among them
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert not caplog.records  # it is what was saved: nothing was converted, nothing is to be told
    assert again.pretrained_cfg["tag"] == "mk8" and again.pretrained_cfg["architecture"] == ARCH
    assert again.pretrained_cfg["license"] == "apache-2.0"
    same(model, converted())  # saving changed nothing
    assert layers(model) and not model.training


def test_what_is_saved(model, folder):
    assert {path.name for path in folder.iterdir()} == FILES  # no pickle, no temporary file
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == ARCH and config["num_classes"] == 1000
    assert config["pretrained_cfg"]["tag"] == "mk8"
    assert config["pretrained_cfg"]["hf_hub_filename"] == "model.safetensors"
    assert not any("mk_" in name for name in config["model_args"])  # stock timm would not know them
    about, bank = config["masterkeys"], mk.get_bank("random8:5")
    assert about["format_version"] == 1 and about["kernels"] == 32 + 64 + 96 + 128
    assert about["banks"].keys() == {bank.digest} and about["banks"][bank.digest]["name"] == "random8:5"
    settings = {"bank": bank.digest, "keys_per_kernel": 2, "trainable": "affine", "sigmas": False}
    assert about["layers"] == dict.fromkeys(layers(model), settings)
    assert [mk.MasterKeysConfig.from_dict(c) for c in about["conversions"]] == [
        mk.MasterKeysConfig("random8:5", 2, "affine")
    ]
    assert about["source"]["name"] == f"timm/{ARCH}.r160_in1k" and about["calibration"] is None
    assert about["versions"].keys() == {"timm_masterkeys", "timm", "torch"}
    weights = ("model.safetensors", "masterkeys.safetensors")
    assert about["files"] == {name: file_sha256(folder / name) for name in weights}
    same(load_file(folder / "model.safetensors"), mk.fuse_masterkeys(model))


@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"num_classes": 0, "in_chans": 1}])
def test_other_heads_and_inputs(model, folder, kwargs):
    again = load(folder, **kwargs)
    other = ("head.fc", "stem.0.weight") if "in_chans" in kwargs else ("head.fc",)
    kept = [{n: v for n, v in m.state_dict().items() if not n.startswith(other)} for m in (again, model)]
    same(*kept)
    assert again(torch.randn(1, again.in_chans, 64, 64)).shape == (1, kwargs["num_classes"] or 128)
    assert again.in_chans == kwargs.get("in_chans", 3)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only(model, folder, feature_cls):
    again, x = load(folder, features_only=True, feature_cls=feature_cls, out_indices=(0, 2)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=(0, 2), intermediates_only=True)
        assert 3 <= len(layers(again)) <= 4 and all_equal(again(x), expected)  # without stages that were cut off


def test_trainable_can_be_chosen(model, folder, tmp_path):
    """Sigmas, where the layers have some, whatever bank a call without ``mk_bank`` would take; nothing else."""
    again = load(folder, mk_trainable="none")
    same(again, model)
    assert {layer.trainable for layer in layers(again).values()} == {"none"}
    for settings, message in (
        ({"mk_trainable": "sigmas"}, "has no sigmas"),
        ({"mk_trainable": "all"}, "trainable is 'all'"),
        ({"mk_exclude": "a", "mk_keys_per_kernel": 2}, "^mk_exclude, mk_keys_per_kernel cannot change a saved"),
    ):
        with pytest.raises(ConversionError, match=message):
            load(folder, **settings)
    sigmas = converted(mk_bank="scale-space-b", mk_keys_per_kernel=1, mk_trainable="sigmas")
    mk.save_pretrained(load(mk.save_pretrained(sigmas, tmp_path), mk_trainable="shift"), tmp_path)
    assert {layer.trainable for layer in layers(load(tmp_path)).values()} == {"shift"}
    again = load(tmp_path, mk_trainable="sigmas")
    same(again, sigmas)
    assert {layer.trainable for layer in layers(again).values()} == {"sigmas"}


def test_without_the_compact_file_the_dense_weights_are_projected(tmp_path, caplog):
    mk.save_pretrained(converted(mk_keys_per_kernel=1), tmp_path)
    (tmp_path / "masterkeys.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing in '.*', though config.json there lists it"):
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


@pytest.mark.parametrize(
    "kwargs",
    [{"num_classes": 7, "in_chans": 1}, {"num_classes": 0}, {"global_pool": "max"}, {"dtype": torch.bfloat16}, None],
    ids=str,
)
def test_models_of_other_shapes(tmp_path, kwargs):
    """And one from scratch, which inherits no licence."""
    model = timm.create_model(f"{ARCH}.mk8").eval() if kwargs is None else converted(**kwargs)
    dtype = next(model.parameters()).dtype
    again = load(mk.save_pretrained(model, tmp_path), dtype=dtype)
    same(again, model)
    assert (again.num_classes, again.in_chans) == (model.num_classes, model.in_chans)
    x = torch.randn(1, again.in_chans, 64, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert len(layers(load(tmp_path))) == 4  # and where it is loaded as float32
    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    if kwargs is None:
        assert "license" not in again.pretrained_cfg and config["masterkeys"]["source"] is None
        assert config["masterkeys"]["mean_r2"] is None
        assert "its own random initialisation" in (tmp_path / "README.md").read_text()


def test_a_bank_of_ones_own_travels_with_the_model(tmp_path):
    own, path = mk.KeyBank("mine", torch.randn(3, 5, 5), source="my search", licence="mit"), tmp_path / "b.safetensors"
    own.save(path)
    model = converted(mk_bank=path)
    mk.save_pretrained(model, tmp_path / "out")
    path.unlink()
    again = load(tmp_path / "out")
    same(again, model)
    for layer in layers(again).values():
        bank = layer.bank
        assert (bank.digest, bank.name, bank.source, bank.licence) == (own.digest, "mine", "my search", "mit")


def test_a_model_converted_from_a_stock_name(tmp_path):
    stock, labels = timm.create_model(ARCH, pretrained=True, num_classes=10), [str(i) for i in range(10)]
    model = mk.convert_to_masterkeys(stock, exclude="stages.0.*")
    saved = mk.save_pretrained(model, tmp_path, config={"label_names": labels}, tags="birds", datasets="imagenet-1k")
    again, data = load(saved), ModelCard.load(tmp_path / "README.md").data
    same(again, model)
    assert len(layers(again)) == 3 and type(again.stages[0].blocks[0].conv_dw) is nn.Conv2d
    assert json.dumps(resolve_model_data_config(again)) == json.dumps(resolve_model_data_config(stock))
    assert again.pretrained_cfg["tag"] == "mk8"  # whose weights these are, nobody told
    assert model.pretrained_cfg["tag"] == "r160_in1k" and again.pretrained_cfg["label_names"] == labels
    assert data.tags == ["image-classification", "timm", "master-key-filters", "birds"]
    assert data.datasets == ["imagenet-1k"]


def test_wrapped_channels_last_and_in_training_mode(model, tmp_path):
    other = converted().train().to(memory_format=torch.channels_last)
    same(load(mk.save_pretrained(ModelEmaV3(nn.DataParallel(other)), tmp_path)), model)
    assert other.training and other.stem[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_saved_again(model, folder, tmp_path):
    """What was loaded is saved as the same files; only the card's examples name the folder."""
    mk.save_pretrained(load(folder), tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_class_names_stay_where_transformers_looks_for_them(model, tmp_path):
    """Those of other classes do not."""
    names = [f"class {i}" for i in range(model.num_classes)]
    config = {"label_names": names, "label_descriptions": dict.fromkeys(names, "a class")}
    mk.save_pretrained(model, tmp_path / "first", config=config)
    mk.save_pretrained(load(tmp_path / "first"), tmp_path / "again")
    first, again = ((tmp_path / name / "config.json").read_text() for name in ("first", "again"))
    assert again == first and json.loads(again)["label_names"] == names
    mk.save_pretrained(load(tmp_path / "first", num_classes=5), tmp_path / "other")
    other = json.loads((tmp_path / "other" / "config.json").read_text())
    assert "label_names" not in {*other, *other["pretrained_cfg"]}


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("function", ["save_for_hf", "write_compact", "make_card", "atomic_path"])
def test_a_failed_save_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch, function):
    copied(folder, tmp_path)
    monkeypatch.setattr(f"timm_masterkeys.hub.save.{function}", full)
    with pytest.raises(OSError, match="No space left on device"):
        mk.save_pretrained(converted(seed=1), tmp_path)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("first", [1, 3])
def test_a_save_that_fails_half_way_never_mixes_two_models(folder, tmp_path, monkeypatch, first):
    """Between two files no file is half written, and a model of both is refused."""
    new, calls, atomic = converted(seed=1), [], mk.files.atomic_path
    path = copied(folder, tmp_path / "out")
    old, whole = contents(folder), contents(mk.save_pretrained(new, tmp_path / "whole"))

    def sometimes(path):
        calls.append(path)
        return atomic(path) if len(calls) <= first else full()

    monkeypatch.setattr("timm_masterkeys.hub.save.atomic_path", sometimes)
    with pytest.raises(OSError, match="No space left on device"):
        mk.save_pretrained(new, path)
    mixed = contents(path)
    assert mixed.keys() == FILES and all(mixed[n] in (old[n], whole[n]) for n in FILES - {"README.md"})
    with pytest.raises(CheckpointError, match="not of one conversion"):
        load(path)
    monkeypatch.undo()
    mk.save_pretrained(new, path)
    same(load(path), new)


def copied(folder, path):
    return shutil.copytree(folder, path, dirs_exist_ok=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("model.safetensors", {"num_classes": 5}), ("masterkeys.safetensors", {"features_only": True})],
)
def test_a_damaged_file_is_refused(folder, tmp_path, name, kwargs):
    """By name, and with the configuration as a dict or an object."""
    path, data = copied(folder, tmp_path / "out"), (folder / name).read_bytes()
    cfg = json.loads((path / "config.json").read_text())["pretrained_cfg"]
    cfg |= {"architecture": ARCH, "file": str(path), "source": "local-dir"}
    calls = [functools.partial(load, path), functools.partial(load, path, **kwargs)]
    calls += [
        functools.partial(timm.create_model, ARCH, pretrained=True, pretrained_cfg=given)
        for given in (cfg, timm.models.PretrainedCfg(**cfg))
    ]
    for damaged in (data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:], data[:-100], data[:10], b"", None):
        (path / name).unlink()
        if damaged is not None:
            (path / name).write_bytes(damaged)
        for call in calls:
            with pytest.raises(CheckpointError, match=re.escape(name)):
                call()
        (path / name).touch()


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
        lambda about: "yes",
    ],
)
def test_an_odd_config_is_refused(folder, tmp_path, change):
    path = copied(folder, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    if change(config["masterkeys"]) == "yes":
        config["masterkeys"] = "yes"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(path)


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


def put(name, value):
    """A change of a model: the entry or the module of this name is this one."""

    def change(model):
        module, _, last = name.rpartition(".")
        if isinstance(value, float):
            getattr(model.get_submodule(module), last).data.view(-1)[0] = value
        else:
            setattr(model.get_submodule(module), last, value)

    return change


def double_relu(model):
    put("stages.0.blocks.0.mlp.act", nn.ReLU())(model.double())


def uncopyable(model):
    model.images = (image for image in ())


def emptied(model):
    model.stages[0].blocks[0].conv_dw.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda _: timm.create_model(ARCH), ConversionError, "ConvNeXt holds no MasterKeyConv2d"),
        (lambda m: nn.Sequential(m.stages), ConversionError, "Sequential is not a whole timm model"),
        (lambda _: timm.create_model(f"{ARCH}.mk8", features_only=True), ConversionError, "ListNet .*no classes"),
        (lambda m: m.to("meta"), ConversionError, "on the meta device"),
        (quantised, ConversionError, r"^head\.fc\.weight is of type Int8Tensor, .* before it is quantised"),
        (packed, ConversionError, r"^head\.fc\._extra_state is of type dict, .* before it is quantised"),
        (put("head.fc", nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 1000))), ConversionError, "not load again"),
        (put("extra", nn.Linear(3, 3)), ConversionError, "does not load again.*as timm.create_model made it"),
        (put("stages.0.blocks.0.mlp.act", nn.ReLU()), ConversionError, "the same weights, but other outputs"),
        (put("head.fc.weight", torch.nan), ConversionError, "^head.fc.weight holds NaN or Inf"),
        (put("stages.0.blocks.0.conv_dw.shift", torch.inf), ConversionError, "shift holds NaN or Inf"),
        (emptied, CheckpointError, "has no values"),
        (uncopyable, ConversionError, "'images' of the model itself .* is a generator"),
        (lambda m: m.head.fc.to("meta") and None, ConversionError, r"head\.fc\.weight has no values"),
        (double_relu, ConversionError, "the same weights, but other outputs"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(folder, tmp_path, change, error, message):
    model = converted()
    model = change(model) or model
    state, old = torch.get_rng_state(), copied(folder, tmp_path / "old")
    for path in (tmp_path / "deep" / "out", old):
        with pytest.raises(error, match=message):
            mk.save_pretrained(model, path)
    assert not (tmp_path / "deep").exists() and contents(old) == contents(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_config_does_not_change_what_the_model_says(model, tmp_path):
    entries = "architecture", "pretrained_cfg", "num_classes", "masterkeys", "model_args"
    for config, message in (
        (dict.fromkeys(entries, "test_efficientnet"), f"config holds {', '.join(entries)}, "),
        ({"mine": object()}, "cannot be written as JSON"),
        ("out/config.json", "config is 'out/config.json', expected a mapping"),
    ):
        with pytest.raises(ConversionError, match=message):
            mk.save_pretrained(model, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


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


def a_head_of_ones_own(path):
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True)
    head = {name: value for name, value in timm.create_model(ARCH).state_dict().items() if name.startswith("head.fc")}
    model.load_state_dict(head, strict=False)
    return model


def calibrated(path):
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True)
    mk.calibrate_masterkeys(model, timm.create_model(ARCH, pretrained=True), torch.rand(10, 3, 32, 32))
    return model


@pytest.mark.parametrize(
    "made",
    [
        lambda path: timm.create_model(f"{ARCH}.mk8_r160_in1k", pretrained=True, num_classes=5),
        a_head_of_ones_own,
        calibrated,
        lambda path: load(mk.save_pretrained(nn.DataParallel(converted()), path.with_name("first"))),
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


def test_a_licence_of_the_call_is_not_inherited(tmp_path):
    overlay = {"license": "mit"}
    model = timm.create_model(f"{ARCH}.mk8", pretrained=True, pretrained_cfg_overlay=overlay)
    assert saved_cfg(model, tmp_path / "out")[1]["license"] == "apache-2.0"


def test_a_conversion_that_was_undone_is_not_recorded(tmp_path):
    model = mk.convert_to_masterkeys(timm.create_model(ARCH), torch.randn(3, 7, 7), include="stages.0.*")
    model = mk.convert_to_masterkeys(model)
    model.stages[0].blocks[0].conv_dw = model.stages[0].blocks[0].conv_dw.fuse()
    same(load(mk.save_pretrained(model, tmp_path / "out", license="mit")), model)


def test_tensors_that_are_not_contiguous(tmp_path):
    model = converted()
    model.head.fc.weight.data = model.head.fc.weight.data.T.contiguous().T
    assert not model.head.fc.weight.is_contiguous()
    same(load(mk.save_pretrained(model, tmp_path / "out")), model)


def test_banks_of_one_name_are_listed_in_one_order():
    banks = [mk.KeyBank("mine", torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(i))) for i in range(6)]
    listed = describe_layers({bank.digest: mk.MasterKeyConv2d(4, 4, 7, bank=bank) for bank in banks})["banks"]
    assert list(listed) == sorted(listed)


def foreign(path):
    torch.manual_seed(7)
    torch.save(timm.create_model(ARCH).state_dict(), path)
    return str(path)


def compact_of_somebody(path):
    torch.save(mk.convert_to_masterkeys(timm.create_model(ARCH)).state_dict(), path)
    return timm.create_model(f"{ARCH}.mk8", checkpoint_path=str(path))


@pytest.mark.parametrize(
    "made",
    [
        lambda path: timm.create_model(f"{ARCH}.mk8", pretrained=True, checkpoint_path=foreign(path)),
        lambda path: timm.create_model(f"{ARCH}.mk8", True, pretrained_cfg_overlay={"file": foreign(path)}),
        lambda path: mk.convert_to_masterkeys(timm.create_model(ARCH, pretrained=True)),
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
def test_a_killed_save_is_removed_what_others_write_is_left_alone(model, tmp_path):
    left = tmp_path / ".saving-abc"
    for folder in (left, tmp_path / "old"):
        folder.mkdir()
    left.with_name(".saving-abc.lock").touch()
    for path in (left / "model.safetensors", tmp_path / "model.safetensors", tmp_path / "notes.txt"):
        path.write_text("here before")
    with mk.hub.save._saving(tmp_path) as other:
        (other / "model.safetensors").write_text("being written")
        mk.save_pretrained(model, tmp_path)
        assert (other / "model.safetensors").read_text() == "being written" and not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt", "old"}
    assert (tmp_path / "notes.txt").read_text() == "here before"
    same(load(tmp_path), model)


def test_an_error_in_short_keeps_its_only_line():
    assert in_short(RuntimeError("Refused.\n\nRequest ID: 1\nhttps://a.b/c")) == "Refused."
    assert in_short(OfflineModeIsEnabled("Cannot reach https://a.b: offline.")) == "Cannot reach https://a.b: offline."
