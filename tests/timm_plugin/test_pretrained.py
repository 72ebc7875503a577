"""``pretrained=True`` on ``.mk8`` names: calibrated once, then loaded as published weights are."""

import re
import shutil
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from compare import layers, same
from forked import Python
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration import pipeline

ARCH = "test_efficientnet"
NAME = f"{ARCH}.mk8"


@pytest.fixture(scope="module")
def state():
    """Weights whose statistics are worth calibrating."""
    torch.manual_seed(1)
    model = timm.create_model(ARCH)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.state_dict()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    save_file(state, path)
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

    monkeypatch.setattr(pipeline, "calibrate_masterkeys", calibrate)
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


def test_calibrated_once_with_a_warning(file, cache, caplog):
    first = create(file)
    before, after = (record.getMessage() for record in caplog.records)
    assert re.match(rf"{NAME}: calibrating with photographs that ship .*, once; .*mk_calibrate=False", before)
    assert re.match(rf"{NAME}: calibrated with \d+ images: agreement .* divergence", after)
    caplog.clear()
    second = create(file)
    same(first, second)
    assert not caplog.records and len(list(cache.glob("[!.]*"))) == 1
    record = mk.conversion_report(second).calibration
    assert record == mk.conversion_report(first).calibration
    assert (record.images, record.held_out, record.origin) == (30, 15, "builtin")
    assert record.after["agreement"] >= record.before["agreement"]
    plain, x = create(file, mk_calibrate=False), mk.builtin_images(first, 8, seed=5)
    dense = create(file, ARCH).eval()(x)
    error = [(m.eval()(x) - dense).square().mean() for m in (second, plain)]
    assert error[0] < error[1] / 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"features_only": True, "out_indices": (0, 2)},
        {"drop_rate": 0.3, "drop_path_rate": 0.1, "global_pool": "max", "num_classes": 0},
        {"mk_trainable": "affine", "checkpoint_path": "", "scriptable": True, "num_classes": 7},
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
    found = layers(model).values()
    assert found and all(m.trainable == arguments.get("mk_trainable", "shift") for m in found)
    assert not calibrations


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
def test_what_is_not_calibrated(file, tmp_path, calibrations):
    """A converted checkpoint is taken as it is; on the meta device there is nothing to calibrate."""
    model = mk.convert_to_masterkeys(timm.create_model(ARCH))
    save_file(model.state_dict(), tmp_path / "converted.safetensors")
    same(model, create(str(tmp_path / "converted.safetensors")))
    with torch.device("meta"):
        model = create(file)
    assert all(parameter.is_meta for parameter in model.parameters()) and layers(model)
    assert not calibrations


@pytest.mark.slow
def test_as_few_keys_as_an_agreement_needs(file, monkeypatch, caplog):
    monkeypatch.setattr("timm_masterkeys.calibration.images.COUNT", 16)
    found, convert = [], pipeline.convert_by_agreement
    monkeypatch.setattr(pipeline, "convert_by_agreement", lambda *a, **k: found.append(convert(*a, **k)) or found[-1])
    arguments = {"mk_agreement": 0.05, "mk_include": "blocks.3.*"}
    model = create(file, **arguments, mk_trainable="affine", num_classes=7)
    again = create(file, **arguments)
    ((chosen, budget),) = found
    assert budget.target == 0.05 and budget.chosen.score >= 0.05 and budget.summary() in caplog.text
    keys = {name: layer.keys_per_kernel for name, layer in layers(model).items()}
    assert keys == budget.chosen.keys_per_kernel and all(name.startswith("blocks.3.") for name in keys)
    same(again, chosen)
    create(file, mk_agreement=0.06, mk_include="blocks.3.*")
    assert len(found) == 2


@pytest.mark.parametrize("settings", [{"mk_calibrate": False}, {"pretrained": False}])
def test_an_agreement_needs_weights_and_images(file, cache, settings):
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}, "mk_agreement": 0.9, **settings}
    with pytest.raises(mk.MasterKeysError, match="it needs pretrained=True"):
        timm.create_model(NAME, **given)
    assert not list(cache.glob("[!.]*"))


def test_photographs_of_ones_own(file, tmp_path, calibrations, monkeypatch):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(12):
        Image.effect_noise((40, 40), 10 * i).convert("RGB").save(folder / f"{i}.png")
    own = str(folder)
    create(file, mk_calibrate=own)
    for given, variable, count in ((own, own, 1), (None, own, 1), (None, "none", 1), ("builtin", "none", 2)):
        monkeypatch.setenv("TIMM_MASTERKEYS_CALIBRATE", variable)
        create(file, mk_calibrate=given)
        assert len(calibrations) == count
    Image.effect_noise((40, 40), 5).convert("RGB").save(folder / "new.png")
    create(file, mk_calibrate=own)
    assert len(calibrations) == 3
    with pytest.raises(mk.ConversionError, match="mk_calibrate is 'nowhere', expected a folder"):
        create(file, mk_calibrate="nowhere")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda path: path.write_bytes(b"x")),
        ("model.safetensors", flip),
        ("masterkeys.safetensors", lambda path: path.unlink()),
        ("masterkeys.safetensors", flip),
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_entry_is_made_anew(file, cache, calibrations, caplog, name, damage):
    first = create(file)
    (folder,) = cache.glob("[!.]*")
    damage(folder / name)
    same(first, create(file))
    assert len(calibrations) == 2 and "damaged" in caplog.text


def test_whatever_mode_torch_is_in(file, cache, monkeypatch):
    def calibrate(*args):
        return mk.calibrate_masterkeys(*args, stages="norms")  # the fastest

    monkeypatch.setattr(pipeline, "calibrate_masterkeys", calibrate)
    plain = create(file)
    shutil.rmtree(cache)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        create(file)
    same(plain, create(file))
    shutil.rmtree(cache)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert next(create(file).parameters()).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    same(plain, create(file))


# --- In processes of their own: at once, from a Hub on loopback, offline, after a kill


LOAD = """
import os, sys, timm, timm_masterkeys
timm_masterkeys.calibration.images.COUNT = 15

def load():
    model = timm.create_model("test_efficientnet.mk8", pretrained=True, **eval(sys.argv[1]))
    total = sum(float(value.double().sum()) for value in model.state_dict().values()).hex()
    os.write(1, f"{total} ".encode())  # at once: lines of processes do not mix
"""
AT_ONCE = """
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
    process = Python("-c", LOAD + AT_ONCE, {"pretrained_cfg_overlay": {"file": file}})
    out, log = process.communicate()
    assert process.returncode == 0, log
    assert len(out.split()) == 4 and len(set(out.split())) == 1 and log.count("calibrating") == 1


@pytest.fixture(scope="module")
def hub(state):
    with HubServer() as server:
        server.add_repo(f"timm/{ARCH}.r160_in1k", {"model.safetensors": save(state)})
        yield server


@pytest.fixture
def env(hub, tmp_path):
    own = hub.env(tmp_path / "home", TIMM_MASTERKEYS_CALIBRATE="builtin")
    return {name: value for name, value in own.items() if name != "TIMM_MASTERKEYS_CACHE"}


def load_from_hub(env, **arguments):
    process = Python("-c", f"{LOAD}\nload()", arguments, env=env)
    out, log = process.communicate()
    assert process.returncode == 0, log
    return out, log


@pytest.mark.slow
def test_calibrated_online_then_loaded_without_a_request(hub, env):
    first, log = load_from_hub(env)
    assert "calibrating with photographs that ship" in log and "calibrated with" in log
    before = hub.count()
    assert load_from_hub(env) == (first, "") and hub.count() == before
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    assert load_from_hub(offline)[0] == first
    out, log = load_from_hub(offline, num_classes=5, in_chans=1, mk_trainable="affine")
    assert out and "calibrat" not in log


@pytest.mark.slow
def test_killed_half_way_and_again(env, tmp_path):
    process = Python("-c", f"{LOAD}\nload()", {}, env=env)
    while "calibrating" not in process.stderr.read():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    cache = tmp_path / "home" / "assets" / "timm_masterkeys"
    assert not [path for path in cache.glob("[!.]*") if path.is_dir()]
    first, log = load_from_hub(env)
    assert "calibrated with" in log and load_from_hub(env) == (first, "")
    assert not list(cache.glob(".*/"))
