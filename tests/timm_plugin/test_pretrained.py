"""``pretrained=True`` on ``.mk8`` names: calibrated once, then loaded as published weights are."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from forked import run
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys import MasterKeyConv2d
from timm_masterkeys.timm_plugin import calibrated

ARCH = "test_efficientnet"
NAME = f"{ARCH}.mk8"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(1)
    model = timm.create_model(ARCH)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TIMM_MASTERKEYS_CALIBRATE")
    monkeypatch.setattr("timm_masterkeys.calibration.images.COUNT", 15)
    return tmp_path / "cache" / "timm_masterkeys"


@pytest.fixture
def calibrations(monkeypatch):
    """What was calibrated, by a stand-in that does nothing."""
    done = []

    def calibrate(model, dense, images):
        done.append(images)
        return SimpleNamespace(summary=str)

    monkeypatch.setattr(calibrated, "calibrate_masterkeys", calibrate)
    return done


def create(file, name=NAME, **kwargs):
    overlay = {"file": file, "input_size": (3, 64, 64)}  # so that calibration is fast
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.fixture(scope="module")
def made(file, tmp_path_factory):
    """A cache that holds the calibrated network of the file, and a folder with that network as it is published."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIMM_MASTERKEYS_CACHE", str(folder / "cache"))
        patch.delenv("TIMM_MASTERKEYS_CALIBRATE", raising=False)
        patch.setattr("timm_masterkeys.calibration.images.COUNT", 15)
        return folder / "cache", mk.save_pretrained(create(file), folder / "published")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_calibrated_once_with_a_warning(file, cache, caplog):
    first = create(file)
    before, after = (record.getMessage() for record in caplog.records)
    assert re.match(rf"{NAME}: calibrating with photographs that ship .*, once; .*mk_calibrate=False", before)
    assert re.match(rf"{NAME}: calibrated on 30 images: agreement .* divergence", after)
    caplog.clear()
    second = create(file)
    same(first, second)
    assert not caplog.records
    record = mk.conversion_report(second).calibration
    assert record == mk.conversion_report(first).calibration
    assert (record.images, record.held_out, record.origin) == (30, 15, "builtin")
    assert record.after["agreement"] >= record.before["agreement"]
    plain = create(file, mk_calibrate=False)
    x = mk.builtin_images(first, 8, seed=5)
    dense = create(file, ARCH).eval()(x)
    error = [(m.eval()(x) - dense).square().mean() for m in (second, plain)]
    assert error[0] < error[1] / 2
    assert len(list(cache.glob("[!.]*"))) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 7},
        {"in_chans": 1},
        {"features_only": True, "out_indices": (0, 2)},
        {"drop_rate": 0.3, "drop_path_rate": 0.1, "global_pool": "max", "num_classes": 0},
        {"mk_trainable": "affine", "checkpoint_path": "", "scriptable": True},
        {"mk_trainable": "none", "features_only": True, "in_chans": 4},
    ],
    ids=str,
)
def test_options_are_those_of_published_weights(file, made, cache, calibrations, arguments):
    shutil.copytree(made[0], cache.parent)
    torch.manual_seed(0)
    model = create(file, **arguments)
    torch.manual_seed(0)
    same(model, timm.create_model(f"local-dir:{made[1]}", pretrained=True, **arguments))
    assert not calibrations
    found = [m for m in model.modules() if isinstance(m, MasterKeyConv2d)]
    assert found and all(m.trainable == arguments.get("mk_trainable", "shift") for m in found)


@pytest.mark.slow
def test_as_few_keys_as_an_agreement_needs(file, monkeypatch, caplog):
    monkeypatch.setattr("timm_masterkeys.calibration.images.COUNT", 16)
    found, convert = [], calibrated.convert_to_agreement
    monkeypatch.setattr(calibrated, "convert_to_agreement", lambda *a, **k: found.append(convert(*a, **k)) or found[-1])
    arguments = {"mk_agreement": 0.05, "mk_include": "blocks.3.*"}
    model = create(file, **arguments, mk_trainable="affine", num_classes=7)
    same(create(file, **arguments), create(file, **arguments))
    ((chosen, budget),) = found
    assert budget.target == 0.05 and budget.chosen.score >= 0.05 and budget.summary() in caplog.text
    keys = {n: m.keys_per_kernel for n, m in model.named_modules() if isinstance(m, MasterKeyConv2d)}
    assert keys == budget.chosen.keys_per_kernel and all(name.startswith("blocks.3.") for name in keys)
    assert all(torch.equal(v, chosen.state_dict()[n]) for n, v in create(file, **arguments).state_dict().items())
    create(file, mk_agreement=0.06, mk_include="blocks.3.*")
    assert len(found) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mk_keys_per_kernel": 2}, "drop keys_per_kernel"),
        ({"mk_calibrate": False}, "it needs pretrained=True"),
        ({"pretrained": False}, "it needs pretrained=True"),
        ({"mk_agreement": 95}, "agreement is 95, expected more than 0, at most 1"),
    ],
)
def test_agreements_that_are_refused(file, cache, settings, says):
    with pytest.raises(mk.MasterKeysError, match=says):
        timm.create_model(
            NAME, **{"pretrained": True, "pretrained_cfg_overlay": {"file": file}, "mk_agreement": 0.9, **settings}
        )
    assert not list(cache.glob("[!.]*"))


def test_photographs_of_ones_own(file, tmp_path, calibrations, monkeypatch):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(12):
        Image.effect_noise((40, 40), 10 * i).convert("RGB").save(folder / f"{i}.png")
    for given, variable, count in (
        (str(folder), None, 1),
        (str(folder), None, 1),
        (None, str(folder), 1),
        (None, "none", 1),
        ("builtin", "none", 2),
    ):
        if variable:
            monkeypatch.setenv("TIMM_MASTERKEYS_CALIBRATE", variable)
        create(file, mk_calibrate=given)
        assert len(calibrations) == count
    Image.effect_noise((40, 40), 5).convert("RGB").save(folder / "new.png")
    create(file, mk_calibrate=str(folder))
    assert len(calibrations) == 3
    with pytest.raises(mk.ConversionError, match="mk_calibrate is 'nowhere', expected a folder"):
        create(file, mk_calibrate="nowhere")


def test_a_damaged_entry_is_made_anew(file, cache, calibrations, caplog):
    first = create(file)
    (folder,) = cache.glob("[!.]*")
    damages = [
        lambda: (folder / "model.safetensors").write_bytes(b"x"),
        lambda: (folder / "masterkeys.safetensors").unlink(),
        lambda: (folder / "config.json").write_text("{"),
        lambda: (folder / "config.json").write_text("{}"),
        lambda: flip(folder / "model.safetensors"),
        lambda: flip(folder / "masterkeys.safetensors"),
    ]
    for number, damage in enumerate(damages, 2):
        damage()
        same(first, create(file))
        assert len(calibrations) == number and "damaged" in caplog.text


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def test_a_converted_checkpoint_is_taken_as_it_is(file, tmp_path, calibrations):
    model = mk.convert_to_masterkeys(timm.create_model(ARCH))
    save_file(model.state_dict(), tmp_path / "converted.safetensors")
    same(model, create(str(tmp_path / "converted.safetensors")))
    assert not calibrations


def test_the_card_tells_what_was_done(made):
    card = (made[1] / "README.md").read_text()
    assert "Calibrated (classification) on 30 images: agreement" in card and "Not calibrated" not in card
    assert json.loads((made[1] / "config.json").read_text())["pretrained_cfg"]["tag"] == "mk8"


PROCESSES = """
import os, sys, timm, timm_masterkeys
timm_masterkeys.calibration.images.COUNT = 15

def load():
    model = timm.create_model("test_efficientnet.mk8", pretrained=True, pretrained_cfg_overlay=dict(file=sys.argv[1]))
    total = sum(float(value.double().sum()) for value in model.state_dict().values()).hex()
    os.write(1, f"{total} ".encode())  # at once: lines of processes do not mix

children = []
for _ in range(4):
    children.append(os.fork())
    if not children[-1]:
        load()
        os._exit(0)
assert not any([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.mark.slow
def test_processes_that_start_at_once_calibrate_once(file):
    done = run("-c", PROCESSES, file)
    assert done.returncode == 0, done.stderr
    outputs = done.stdout.split()
    assert len(outputs) == 4 and len(set(outputs)) == 1
    assert done.stderr.count("calibrating") == 1


def test_whatever_mode_torch_is_in(file, cache):
    plain = create(file, mk_calibrate=True)
    for entry in cache.glob("[!.]*"):
        entry.rename(cache.parent / "plain")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        create(file, mk_calibrate=True)
    same(plain, create(file, mk_calibrate=True))
    (entry,) = cache.glob("[!.]*")
    entry.rename(cache.parent / "inference")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert next(create(file, mk_calibrate=True).parameters()).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    same(plain, create(file, mk_calibrate=True))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
def test_on_the_meta_device_nothing_is_calibrated(file, calibrations):
    with torch.device("meta"):
        model = create(file)
    assert not calibrations and all(parameter.is_meta for parameter in model.parameters())
    assert any(isinstance(module, MasterKeyConv2d) for module in model.modules())
