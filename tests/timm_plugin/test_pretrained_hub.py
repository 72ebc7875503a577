"""Calibrated names with weights from a Hub on loopback: once online, then from the cache, offline, after a kill."""

import pytest
import timm
import torch
from forked import Python
from hub_server import HubServer
from safetensors.torch import save
from torch import nn

pytestmark = pytest.mark.slow

CODE = """
import sys, timm, timm_masterkeys
timm_masterkeys.calibration.images.COUNT = 15
model = timm.create_model("test_efficientnet.mk8", pretrained=True, **eval(sys.argv[1]))
print(sum(float(value.double().sum()) for value in model.state_dict().values()).hex())
"""


@pytest.fixture(scope="module")
def hub():
    torch.manual_seed(1)
    model = timm.create_model("test_efficientnet")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    with HubServer() as server:
        server.add_repo("timm/test_efficientnet.r160_in1k", {"model.safetensors": save(model.state_dict())})
        yield server


@pytest.fixture
def env(hub, tmp_path):
    return hub.env(tmp_path / "home", TIMM_MASTERKEYS_CALIBRATE="builtin")


def run(env, **arguments):
    process = Python("-c", CODE, repr(arguments), env=env)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out, error


def test_calibrated_online_then_loaded_without_a_request(hub, env):
    first, log = run(env)
    assert "calibrating with photographs that ship" in log and "calibrated on 30 images" in log
    before = hub.count()
    again, log = run(env)
    assert (again, log) == (first, "") and hub.count() == before
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    assert run(offline)[0] == first
    out, log = run(offline, num_classes=5, in_chans=1, mk_trainable="affine")
    assert out and "calibrat" not in log


def test_killed_half_way_and_again(env, tmp_path):
    process = Python("-c", CODE, "{}", env=env)
    for line in process.stderr:
        if "calibrating" in line:
            break
    process.kill()
    process.communicate()
    cache = tmp_path / "home" / "assets" / "timm_masterkeys"
    assert not [path for path in cache.glob("[!.]*") if path.is_dir()]
    first, log = run(env)
    assert "calibrated on" in log
    assert run(env) == (first, "")
    assert not list(cache.glob(".*/"))
