"""Calls of ``create_model`` for ``.mk8`` names: what a call gives depends on no other, nor on how it is spelled."""

import copy
import functools
import itertools
import json
import os
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from compare import layers, same
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys import ConversionError
from timm_masterkeys.calibration import agreement, images, pipeline
from timm_masterkeys.conversion.record import read_record
from timm_masterkeys.conversion.torch_settings import undisturbed
from timm_masterkeys.timm_plugin import cache, cache_key, calibrated
from timm_masterkeys.timm_plugin import create as loading

ARCH = "test_convnext3"
NAME = f"{ARCH}.mk8"
SMALL = {"input_size": (3, 48, 48)}  # so that calibration is fast
BANK = torch.arange(98.0).sin().view(2, 7, 7)
PHOTOGRAPHS = lru_cache(images.photographs)


def trained(**kwargs):
    """A state dict as of a trained network: no two values are the same."""
    torch.manual_seed(1)
    model = timm.create_model(ARCH, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model.state_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints by what they are of."""
    folder = tmp_path_factory.mktemp("weights")
    state = trained()
    states = {
        "dense": state,
        "other": {name: value * 1.01 for name, value in state.items()},
        "ten": trained(num_classes=10),
        "grey": trained(in_chans=1),
        "grn": trained(use_grn=True),
        "fives": trained(kernel_sizes=5),
        "offset": trained(num_classes=1001),
    }
    paths = {name: str(folder / f"{name}.safetensors") for name in states}
    for name, path in paths.items():
        save_file(states[name], path)
    paths["pth"] = str(folder / "dense.pth")
    torch.save(state, paths["pth"])
    return paths


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path))
    monkeypatch.delenv("TIMM_MASTERKEYS_CALIBRATE", raising=False)
    monkeypatch.setattr(images, "COUNT", 10)
    monkeypatch.setattr(images, "photographs", PHOTOGRAPHS)
    return tmp_path / "timm_masterkeys"


@pytest.fixture(autouse=True)
def calibrations(monkeypatch):
    """Calibrates by the fastest stage alone; what the dense network of each calibration was."""
    seen = []

    def calibrate(model, dense, *args):
        seen.append(copy.deepcopy(dense))
        return mk.calibrate_masterkeys(model, dense, *args, stages="norms")

    monkeypatch.setattr(pipeline, "calibrate_masterkeys", calibrate)
    return seen


def create(file=None, name=NAME, overlay=None, **kwargs):
    overlay = {**SMALL, **({"file": file} if file else {}), **(overlay or {})}
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def entries(root):
    return [entry.path.name for entry in cache.list_entries(root)]


# --- The rule of the cache: for any two calls A and B, B after A gives what B gives on an empty cache


def calls(files):
    """Calls that differ in what an entry depends on, and in what it must not depend on."""
    dense = files["dense"]
    nested = timm.create_model("test_mambaout").state_dict()  # its filter takes a checkpoint apart
    mambaout = partial(create, name="test_mambaout.mk8")
    cfg = replace(timm.get_pretrained_cfg(NAME), file=dense, **SMALL)
    return {
        "train.py's --pretrained-path": partial(create, dense, overlay={"num_classes": -1}, num_classes=10),
        "plain": partial(create, dense),
        "ten classes": partial(create, dense, num_classes=10),
        "no head": partial(create, dense, num_classes=0),
        "ten of ten": partial(create, files["ten"], overlay={"num_classes": 10}),
        "other weights": partial(create, files["other"]),
        "nested": partial(mambaout, overlay={"state_dict": {"model": nested, "epoch": 3}}),
        "nested, other weights": partial(
            mambaout, overlay={"state_dict": {"model": {n: 2 * v for n, v in nested.items()}, "epoch": 3}}
        ),
        "test size": partial(create, dense, overlay={"test_input_size": (3, 96, 96), "test_crop_pct": 0.7}),
        "crop mode": partial(create, dense, overlay={"crop_mode": "border"}),
        "mean": partial(create, dense, overlay={"mean": (0.1, 0.2, 0.3)}),
        "grey": partial(create, dense, in_chans=1),
        "grey of grey": partial(create, files["grey"], in_chans=1),
        "features": partial(create, dense, features_only=True, out_indices=(0, 2)),
        "features, some": partial(create, dense, features_only=True, mk_include="stages_1.*"),
        "drop path": partial(create, dense, drop_path_rate=0.1),
        "pooling": partial(create, dense, global_pool="max"),
        "relu": partial(create, dense, act_layer="relu"),
        "relu's class": partial(create, dense, act_layer=nn.ReLU),
        "grn": partial(create, files["grn"], use_grn=True),
        "grn, not strict": partial(create, dense, use_grn=True, pretrained_strict=False),
        "fives": partial(create, files["fives"], kernel_sizes=5),
        "offset": partial(create, files["offset"], overlay={"label_offset": 1}),
        "cfg": partial(timm.create_model, ARCH, pretrained=True, pretrained_cfg=cfg),
        "cfg as a dict": partial(timm.create_model, ARCH, pretrained=True, pretrained_cfg=cfg.to_dict()),
        "bank": partial(create, dense, mk_bank="random8:1"),
        "bank as a tensor": partial(create, dense, mk_bank=BANK),
        "a bank's licence": partial(create, dense, mk_bank=mk.KeyBank("mine", BANK, "A", "mit")),
        "another licence": partial(create, dense, mk_bank=mk.KeyBank("mine", BANK, "B", "cc0-1.0")),
        "another tensor": partial(create, dense, mk_bank=torch.arange(98.0).cos().view(2, 7, 7)),
        "two keys": partial(create, dense, mk_keys_per_kernel=2),
        "affine": partial(create, dense, mk_trainable="affine"),
        "sigmas": partial(create, dense, mk_bank="scale-space-b", mk_trainable="sigmas"),
        "excluded": partial(create, dense, mk_exclude="stages.0.*"),
        "not calibrated": partial(create, dense, mk_calibrate=False),
    }


def everything(model):
    """All that a model is, but for the time it was calibrated at: its tensors, and the rest as text."""
    record = read_record(model)
    if record.calibration:
        record = replace(record, calibration=replace(record.calibration, time=""))
    cfgs = [m.pretrained_cfg for m in model.modules() if hasattr(m, "pretrained_cfg")]
    about = {name: (layer.trainable, layer.bank.source, layer.bank.licence) for name, layer in layers(model).items()}
    return model.state_dict(), [record, cfgs, about]


def assert_equal(got, expected, call):
    same(got[0], expected[0])
    assert got[1] == expected[1], call


def test_no_call_changes_what_another_gives(files, tmp_path, monkeypatch, calibrations):
    """In one order of the calls, then in the other, on one cache; and those that found an entry, on an empty one."""
    table, first, found = calls(files), {}, []
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / "shared"))
    for name, call in table.items():
        count = len(calibrations)
        first[name] = everything(call())
        found += [name] * (len(calibrations) == count)
    count = len(calibrations)
    for name, call in reversed(table.items()):
        assert_equal(everything(call()), first[name], name)
    assert len(calibrations) == count + 1  # "grn, not strict" alone is not kept
    for name in ("cfg", "cfg as a dict"):
        assert_equal(first[name], first["plain"], name)
    for name in found:
        monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / name.replace("/", "")))
        assert_equal(everything(table[name]()), first[name], name)
    assert "plain" in found and 15 < count < len(table) - 8


def test_a_file_that_is_rewritten_in_place(files, tmp_path, monkeypatch):
    """Its digest is remembered for as long as it is the same file, even if its time is set back."""
    hashed, hash_file = [], mk.files._hash
    monkeypatch.setattr(mk.files, "_hash", lambda file: hashed.append(file.name) or hash_file(file))
    monkeypatch.setattr(mk.files, "_SETTLED", -1)  # as if it had been there for long
    path = tmp_path / "weights.safetensors"
    path.write_bytes(Path(files["dense"]).read_bytes())
    first, again, before = create(str(path)), create(str(path)), path.stat()
    assert hashed.count(str(path)) == 1
    same(first, again)
    path.write_bytes(Path(files["other"]).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    same(create(str(path)), create(files["other"]))
    monkeypatch.setattr(mk.files, "_SETTLED", 60)
    create(str(path)), create(str(path))
    assert hashed.count(str(path)) == 4


def test_weights_that_change_while_they_are_loaded(files, tmp_path, root, monkeypatch):
    path, build = tmp_path / "weights.safetensors", calibrated._build_dense
    path.write_bytes(Path(files["dense"]).read_bytes())

    def changed_before(*args):
        path.write_bytes(Path(files["other"]).read_bytes())
        return build(*args)

    monkeypatch.setattr(calibrated, "_build_dense", changed_before)
    with pytest.raises(mk.CheckpointError, match="changed while they were loaded"):
        create(str(path))
    assert entries(root) == []
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("module", "step", "time"),
    [
        (loading, "_load", 1),
        (cache, "read_saved", 2),
        (loading, "convert_as_saved", 1),
        (Path, "read_text", 3),  # of config.json, after a check that it is there
        (torch.UntypedStorage, "from_file", 2),  # by safetensors, which had opened the file before
    ],
)
def test_an_entry_that_is_cleared_while_it_is_read_is_made_again(
    files, root, monkeypatch, calibrations, module, step, time
):
    function, expected, times = getattr(module, step), create(files["dense"]), itertools.count(1)

    def cleared_before(*args, **kwargs):
        if next(times) == time:
            assert cache.clear_entries(root) == 1
        return function(*args, **kwargs)

    monkeypatch.setattr(module, step, cleared_before)
    same(create(files["dense"]), expected)
    assert len(calibrations) == 2 and len(entries(root)) == 1


def test_figures_of_an_entry_that_were_altered_are_not_believed(files, root, calibrations):
    create(files["dense"])
    config = root / entries(root)[0] / "config.json"
    about = json.loads(config.read_text())
    about["masterkeys"]["calibration"]["after"]["agreement"] = 1.5
    config.write_text(json.dumps(about))
    assert read_record(create(files["dense"])).calibration.after["agreement"] <= 1 and len(calibrations) == 2


def test_a_tag_is_no_path(files, tmp_path, root):
    create(files["dense"], overlay={"tag": "mk8_a/../../../evil"})
    assert len(entries(root)) == 1 and {path.name for path in tmp_path.iterdir()} == {"timm_masterkeys"}


def test_calibration_has_full_precision_whatever_the_caller_has():
    def precisions():
        return torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with undisturbed():
                assert precisions() == (False, "highest")
            assert precisions() == (True, "medium")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_function_that_has_taken_a_name_of_torchs_is_not_compared():
    @functools.wraps(nn.ReLU, updated=())
    def leaky(*args, **kwargs):
        return nn.LeakyReLU(0.5)

    assert cache_key._as_json(nn.ReLU) == {"name": "torch.nn.modules.activation.ReLU"}
    with pytest.raises(TypeError, match="cannot be compared"):
        cache_key._as_json(leaky)


def test_patterns_in_the_spelling_of_features_choose_keys_by_agreement_too(monkeypatch):
    def searched(model, dense):
        raise InterruptedError(*(layer.name for layer in mk.conversion_report(model).layers))

    monkeypatch.setattr(agreement, "checked_pair", searched)
    config = mk.MasterKeysConfig(include="stages_0*", agreement=0.9)
    with pytest.raises(InterruptedError) as error:
        pipeline.convert_and_calibrate(timm.create_model(ARCH), config, "builtin", flat_names=True)
    assert error.value.args == ("stages.0.blocks.0.conv_dw",)


def test_a_config_without_a_tag_is_timms_own():
    """Timm takes the config in place of the tag in the name, so nobody can see that there was one."""
    model = timm.create_model(NAME, pretrained_cfg=PretrainedCfg(num_classes=10))
    assert not layers(model)
    assert layers(timm.create_model(NAME, pretrained_cfg=PretrainedCfg(num_classes=10, tag="mk8")))


def test_the_first_call_builds_the_network_twice(files, monkeypatch):
    built = []
    init = timm.models.ConvNeXt.__init__
    monkeypatch.setattr(timm.models.ConvNeXt, "__init__", lambda *a, **k: built.append(1) or init(*a, **k))
    create(files["dense"])
    assert len(built) == 2
    create(files["dense"])
    assert len(built) == 3


# --- What is calibrated is the network of the call


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("grey", {"in_chans": 1}),
        ("grn", {"use_grn": True}),
        ("dense", {"act_layer": partial(nn.LeakyReLU, negative_slope=0.1)}),
        ("ten", {"num_classes": 10}),
        ("pth", {}),
    ],
    ids=str,
)
def test_arguments_reach_the_dense_network(files, root, calibrations, file, arguments):
    own = {"num_classes": 10} if file == "ten" else {}
    model = create(files[file], overlay=own, **arguments)
    stock, [dense] = create(files[file], name=ARCH, overlay=own, **arguments).eval(), calibrations
    x = torch.randn(2, stock.in_chans, 48, 48)
    same(dense, stock)
    assert torch.equal(dense.eval()(x), stock(x)) and len(entries(root)) == 1
    fused = mk.fuse_masterkeys(model).eval()
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


def test_arguments_that_cannot_be_compared_are_not_kept(files, root, caplog):
    create(files["dense"], act_layer=type("Act", (nn.ReLU,), {}))
    assert "cannot be compared with those of other calls" in caplog.text and entries(root) == []


def test_a_network_from_outside_timm_is_not_kept(files, root, calibrations, caplog, monkeypatch):
    """Its code may be another in the next process."""

    def own_net(pretrained=False, **kwargs):
        return getattr(timm.models.convnext, ARCH)(pretrained, **kwargs)

    for name in ("_model_entrypoints", "_model_pretrained_cfgs", "_model_with_tags"):
        monkeypatch.setattr(timm.models._registry, name, dict(getattr(timm.models._registry, name)))
    timm.models._registry._model_entrypoints["own_net"] = own_net
    mk.register_names("own_net")
    cfg = {name: getattr(timm.get_pretrained_cfg(ARCH), name) for name in ("num_classes", "first_conv", "classifier")}
    same(*(create(files["dense"], "own_net.mk8", cfg) for _ in range(2)))
    assert len(calibrations) == 2 and entries(root) == [] and "it is not kept in the cache" in caplog.text


def test_an_error_of_a_call_is_not_damage(files, root, caplog):
    create(files["dense"])
    with pytest.raises(TypeError):
        create(files["dense"], no_such_argument=1)
    with pytest.raises(RuntimeError, match="Missing key"):
        create(files["dense"], use_grn=True)
    create(files["dense"], use_grn=True, pretrained_strict=False)
    assert "damaged" not in caplog.text and len(entries(root)) == 1


def test_a_background_class_is_cut_once(files):
    model, again = (create(files["offset"], overlay={"label_offset": 1}) for _ in range(2))
    plain = create(files["offset"], overlay={"label_offset": 1}, mk_calibrate=False)
    assert model.num_classes == len(model.head.fc.weight) == len(plain.head.fc.weight) == 1000
    same(model, again)


# --- Settings that cannot have an effect


def test_a_calibration_without_effect_is_a_warning(files, tmp_path, caplog):
    saved = mk.save_pretrained(create(files["dense"]), tmp_path / "saved")
    converted = {"state_dict": create(files["dense"]).state_dict()}
    for given, call in (
        (True, partial(timm.create_model, NAME)),
        (True, partial(timm.create_model, f"local-dir:{saved}", pretrained=True)),
        (str(tmp_path), partial(create, overlay=converted)),
    ):
        caplog.clear()
        call(mk_calibrate=given)
        assert f"mk_calibrate={given!r} has no effect" in caplog.text
    caplog.clear()
    timm.create_model(NAME, mk_calibrate=False)
    assert not caplog.records


def test_a_stale_variable_matters_where_images_are_needed(files, tmp_path, monkeypatch):
    model = create(files["dense"])
    monkeypatch.setenv("TIMM_MASTERKEYS_CALIBRATE", "/gone")
    saved = mk.save_pretrained(model, tmp_path / "saved")
    same(timm.create_model(f"local-dir:{saved}", pretrained=True), model)
    timm.create_model(NAME)
    create(files["dense"], mk_calibrate=False)
    with pytest.raises(ConversionError, match="TIMM_MASTERKEYS_CALIBRATE is '/gone', expected a folder"):
        create(files["dense"])


def test_a_dense_checkpoint_in_a_converted_model_is_a_warning(files, caplog):
    timm.create_model(NAME, checkpoint_path=files["pth"])
    assert "dense kernels for 4 converted layers" in caplog.text and "That alone costs accuracy" in caplog.text


# --- Claims belong to weights


def claims(model, path):
    """Whether report, config.json and card all claim a calibration."""
    mk.save_pretrained(model, path)
    about = json.loads((path / "config.json").read_text())["masterkeys"]
    claimed = "Calibrated (classification) with" in (path / "README.md").read_text()
    assert claimed == (about["calibration"] is not None) == (mk.conversion_report(model).calibration is not None)
    return claimed


def test_a_calibration_is_claimed_of_the_weights_it_measured(files, tmp_path):
    """More of it in test_record.py."""
    model, saved = create(files["dense"]), f"local-dir:{tmp_path / 'saved'}"
    assert claims(model, tmp_path / "saved")
    assert claims(timm.create_model(saved, pretrained=True), tmp_path / "again")
    assert not claims(timm.create_model(saved, pretrained=True, num_classes=7), tmp_path / "again")
    assert not claims(mk.convert_to_masterkeys(mk.fuse_masterkeys(model)), tmp_path / "again")
    model.load_state_dict(trained())
    assert not claims(model, tmp_path / "again")


def test_a_calibration_is_claimed_of_the_function_it_measured(files, tmp_path):
    """Of the same weights, but with other pooling, activations or preprocessing, nothing was measured."""
    model = create(files["dense"], drop_path_rate=0.1, drop_rate=0.1)
    assert claims(model, tmp_path / "saved")
    assert not claims(create(files["dense"], global_pool="max"), tmp_path / "again")
    for given in ({"act_layer": "relu"}, {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3)}}):
        assert not claims(
            timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, **given), tmp_path / "x"
        )


def test_the_record_says_what_trains(files, tmp_path):
    model = create(files["dense"], mk_trainable="affine")
    assert [config.trainable for config in read_record(model).conversions] == ["affine"]
    mk.save_pretrained(model, tmp_path / "saved", license="mit")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, mk_trainable="none")
    assert [config.trainable for config in read_record(again).conversions] == ["none"]


# --- What a saved model says


def test_two_banks_and_settings_that_differ(tmp_path):
    """What the card says of them: test_card.py."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH)
    mk.convert_to_masterkeys(model, torch.randn(3, 7, 7), include="stages.0.*", inplace=True)
    mk.convert_to_masterkeys(model, torch.randn(3, 5, 5), include="stages.1.*", trainable="none", inplace=True)
    mk.convert_to_masterkeys(model, keys_per_kernel=2, trainable="affine", inplace=True)
    again = timm.create_model(f"local-dir:{mk.save_pretrained(model, tmp_path)}", pretrained=True)
    same(again, model)
    assert [layer.trainable for layer in layers(again).values()] == ["shift", "none", "affine", "affine"]
    assert len({layer.bank.name for layer in layers(again).values()}) == 3
    assert read_record(again).conversions == read_record(model).conversions and len(read_record(model).conversions) == 3


@pytest.mark.parametrize("act", [nn.ReLU, "relu"])
def test_a_model_with_another_activation_is_saved(tmp_path, act):
    model = timm.create_model(NAME, act_layer=act).eval()
    again = timm.create_model(f"local-dir:{mk.save_pretrained(model, tmp_path)}", pretrained=True).eval()
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(again(x), model(x))

    class Act(nn.ReLU):
        pass

    with pytest.raises(ConversionError, match=r"created with act_layer=.*Create it with a name that timm knows"):
        mk.save_pretrained(timm.create_model(NAME, act_layer=Act), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- The cache touches only what is its own


def test_clear_removes_our_entries_alone(files, tmp_path, root, monkeypatch):
    create(files["dense"])
    others = [tmp_path / "llama", root / "mine", root / ".x.y", tmp_path / ".x.y"]
    for folder in others:
        folder.mkdir()
        (folder / "config.json").write_text('{"masterkeys": {}}')
    (tmp_path / ".x.lock").touch()
    (name,) = entries(root)
    with mk.files.locked(root / f".{name}.lock"):  # as of a process that makes it
        assert cache.clear_entries(root) == 0 and entries(root) == [name]
    with monkeypatch.context() as patch:  # a folder that cannot be removed
        patch.setattr(cache.os, "replace", Mock(side_effect=PermissionError))
        assert cache.clear_entries(root) == 0 and entries(root) == [name]
    assert cache.clear_entries(root) == 1 and entries(root) == []
    assert all((folder / "config.json").is_file() for folder in others) and (tmp_path / ".x.lock").exists()
