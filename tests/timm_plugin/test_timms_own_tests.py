"""Timm's own model tests, from its sdist on PyPI, with ``.mk8`` names in place of stock ones.

Marked ``timm_tests``: it downloads 3 MB and takes some minutes. A small pytest plugin, given to a process of its own,
changes what timm's tests import: which names they run over, or what a name of their own builds.
"""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from xml.etree import ElementTree

import pytest
import timm

import timm_masterkeys as mk

pytestmark = pytest.mark.timm_tests

# One of each family that has small members: 3x3 to 7x7, strips, SAME padding, re-parameterised, attention beside it.
NAMES = """
convnext_atto convnextv2_atto edgenext_xx_small efficientvit_b0 fastvit_t8 ghostnet_050 inception_next_atto
mobilenetv3_small_050 mobileone_s0 repvit_m0_9 starnet_s1 tf_efficientnet_lite0
""".split()
FUNCTIONS = """
forward backward default_cfgs forward_torchscript forward_features forward_intermediates
forward_intermediates_features forward_fx backward_fx forward_fx_torchscript
""".split()

# Tests over timm's list of names: forward, backward, cfg, features, fx, torchscript, pruning.
OVER_NAMES = f"""
import timm, timm_masterkeys

stock = timm.list_models

def list_models(*args, pretrained=False, include_tags=None, **kwargs):
    '''The same filters, on our names; none with weights: there may be no network.'''
    return [] if pretrained else [f"{{name}}.mk8" for name in stock(*args, **kwargs) if name in {NAMES}]

timm.list_models, timm.list_pretrained = list_models, lambda *args, **kwargs: []

def pytest_collection_modifyitems(config, items):
    chosen = [i for i in items if ".mk8" in str(getattr(i, "callspec", None) and i.callspec.params.get("model_name"))]
    items[:] = chosen
"""

# Tests with names of their own: the converted model in place of every stock one that has depthwise convolutions.
OWN_NAMES = """
import timm, timm_masterkeys

stock, converted = timm.create_model, set(timm_masterkeys.list_architectures())

def create_model(name, *args, **kwargs):
    return stock(f"{name}.mk8" if name in converted else name, *args, **kwargs)

timm.create_model = create_model
timm.list_models = timm.list_pretrained = lambda *args, **kwargs: []

def pytest_collection_modifyitems(config, items):
    items[:] = [i for i in items if hasattr(i, "callspec") and i.callspec.params.get("model_name") in converted]
"""

# What cannot hold for a converted model: the tests that fail, and what they fail with; anything else is a finding.
EXCEPTIONS = {
    # efficientvim's fuse() assigns a weight (torch's fuse_conv_bn_eval), which is computed; fuse_masterkeys first.
    "test_mobile_model_fusion_features[efficientvim_m1-": "it cannot be a parameter",
    "test_mobile_model_fusion_features[efficientvim_m1_dist-": "it cannot be a parameter",
    # to_empty() leaves layers without values, of which iformer's init_weights() knows nothing: it writes to the weight.
    # Load a state dict, or call reset_parameters() of the layers first.
    "test_model_init_weights_after_to_empty[iformer_t-": "A MasterKeyConv2d has no values",
    # Of a model cast to bfloat16 all floats are to be bfloat16, but key indices keep their digits.
    "test_relpos_family_set_input_size[test_maxvit-": "key_index\nassert torch.float32 == torch.bfloat16",
    "test_relpos_family_set_input_size[test_coatnet-": "key_index\nassert torch.float32 == torch.bfloat16",
    "test_relpos_family_set_input_size[efficientvit_m0-": "key_index\nassert torch.float32 == torch.bfloat16",
}


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """The ``tests`` folder of the sdist of the timm that is installed."""
    folder = tmp_path_factory.mktemp("sdist")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
    subprocess.run([*pip, "--dest", str(folder), f"timm=={timm.__version__}"], check=True, timeout=600)
    (sdist,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(sdist) as archive:  # the tests alone: what they import is the timm that is installed
        members = [member for member in archive.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        archive.extractall(folder, members, filter="data")
    return next(folder.glob("timm-*/tests"))


def run(tests, tmp_path, plugin):
    """Runs tests/test_models.py with the plugin -> ids and messages by outcome, and what was printed."""
    (tmp_path / "mk8_names.py").write_text(plugin)
    env = {name: value for name, value in os.environ.items() if name != "GITHUB_ACTIONS"}  # there timm leaves tests out
    path = os.pathsep.join(filter(None, [str(tmp_path), env.get("PYTHONPATH")]))
    options = ["-p", "mk8_names", "-p", "no:cacheprovider", "-q", "-W", "ignore", f"--junitxml={tmp_path / 'out.xml'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests / "test_models.py")],
        env={**env, "PYTHONPATH": path},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert (tmp_path / "out.xml").is_file(), done.stdout + done.stderr
    outcomes = {"passed": {}, "failure": {}, "error": {}, "skipped": {}}
    for case in ElementTree.parse(tmp_path / "out.xml").iter("testcase"):
        tag, message = next(((c.tag, c.get("message")) for c in case if c.tag in outcomes), ("passed", ""))
        outcomes[tag][case.get("name")] = message
    return outcomes, done.stdout[-20_000:]


def test_over_timms_list_of_names(tests, tmp_path):
    assert set(NAMES) <= set(mk.list_architectures())
    outcomes, printed = run(tests, tmp_path, OVER_NAMES)
    assert not outcomes["failure"] and not outcomes["error"] and not outcomes["skipped"], printed
    ran = Counter(name.partition(".mk8")[0].rpartition("-")[2] for name in outcomes["passed"] if "[1-" in name)
    assert set(ran) == set(NAMES) and min(ran.values()) >= 7, ran
    functions = {name.partition("[")[0] for name in outcomes["passed"]}
    assert functions >= {f"test_model_{name}" for name in FUNCTIONS}


def test_with_names_of_their_own(tests, tmp_path):
    outcomes, printed = run(tests, tmp_path, OWN_NAMES)
    failed, expected = outcomes["failure"] | outcomes["error"], set()
    for start, message in EXCEPTIONS.items():
        names = {name for name, text in failed.items() if name.startswith(start) and message in text}
        assert names, (start, message)  # one that holds by now is to be taken from the list
        expected |= names
    assert failed.keys() == expected, printed
    assert len(outcomes["passed"]) > 50 and not outcomes["skipped"], printed
