"""The command ``timm-masterkeys``: what it prints, what it writes, and how it fails."""

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import _registry

import timm_masterkeys as mk
from timm_masterkeys.cli import main
from timm_masterkeys.cli.command_line import COMMANDS
from timm_masterkeys.cli.options import DEFAULT_BANK, TRAINABLE
from timm_masterkeys.conversion.record import read_record
from timm_masterkeys.keys import banks
from timm_masterkeys.layers import Trainable

ARCH = "test_convnext3"  # depthwise kernels 7x7, 5x5, 5x5 and 3x3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of a model with 10 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(timm.create_model(ARCH, num_classes=10).state_dict(), path)
    return path


@pytest.fixture
def model(checkpoint):
    return timm.create_model(ARCH, num_classes=10, checkpoint_path=str(checkpoint))


@pytest.fixture
def run(capsys):
    """Runs the command in this process -> (exit code, stdout, stderr)."""

    def run(*args):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit:  # argparse
            code = exit.code
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def weights(checkpoint):
    return ("--checkpoint", checkpoint, "--num-classes", "10")


# --- list


def test_list(run):
    code, out, err = run("list")
    assert code == 0 and err == ""
    assert sorted(out.split()) == sorted(f"{arch}.mk8" for arch in mk.list_architectures())
    assert run("list", "convnext_at*") == (0, "convnext_atto.mk8\nconvnext_atto_ols.mk8\nconvnext_atto_rms.mk8\n", "")


def test_list_pretrained(run):
    assert run("list", "convnext_atto*", "--pretrained")[1].split() == [
        "convnext_atto.mk8",
        "convnext_atto.mk8_d2_in1k",
        "convnext_atto_ols.mk8",
        "convnext_atto_ols.mk8_a2_in1k",
    ]  # convnext_atto_rms has no weights
    for name in run("list", "--pretrained")[1].split():
        assert timm.is_model_pretrained(name)


def test_list_nothing(run):
    code, out, err = run("list", "resnet1*")
    assert (code, out) == (1, "") and "551 architectures" in err and "'resnet1*'" in err


# --- inspect


def test_inspect_without_weights(run):
    code, out, err = run("inspect", ARCH)
    assert code == 0 and err == ""
    assert out.startswith(f"{mk.plan_conversion(timm.create_model(ARCH))}\n") and "4 of 8 convolutions" in out
    assert "--pretrained or --checkpoint FILE" in out.splitlines()[-1]
    layers = json.loads(run("inspect", ARCH, "--json")[1])["layers"]
    assert sum(not layer["reason"] for layer in layers) == 4


def test_inspect_checkpoint(run, weights, model):
    code, out, err = run("inspect", ARCH, *weights)
    assert code == 0 and err == ""
    report = mk.conversion_report(mk.convert_to_masterkeys(model), model)
    assert out == f"{str(mk.plan_conversion(model)).splitlines()[-1]}\n\n{report}\n"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--bank", "random8:3"], {"bank": "random8:3"}),
        (["--keys-per-kernel", "3"], {"keys_per_kernel": 3}),
        (["--include", "stages.0.*"], {"include": "stages.0.*"}),
        (["--include", "stages.0.*", "--include", "stages.2.*"], {"include": ["stages.0.*", "stages.2.*"]}),
        (["--exclude", "stages.0.*", "--exclude", "stages.3.*"], {"exclude": ["stages.0.*", "stages.3.*"]}),
    ],
)
def test_inspect_settings_and_json(run, weights, model, options, settings):
    code, out, err = run("inspect", ARCH, *weights, "--json", *options)
    assert code == 0 and err == ""
    report = mk.conversion_report(mk.convert_to_masterkeys(model, **settings), model)
    assert json.loads(out) == json.loads(report.to_json())  # nothing else on stdout
    plan = {k: v for k, v in settings.items() if k != "keys_per_kernel"}
    last = str(mk.plan_conversion(model, **plan)).splitlines()[-1]
    assert run("inspect", ARCH, *weights, *options)[1] == f"{last}\n\n{report}\n"


def test_inspect_a_model_without_depthwise_convolutions(run):
    code, out, _ = run("inspect", "test_resnet")
    assert code == 0 and "not depthwise" in out and out.splitlines()[-1].startswith("0 of ")


# --- convert


def test_convert(run, weights, model, tmp_path):
    options = ["--keys-per-kernel", "2", "--trainable", "affine", "--exclude", "stages.0.*"]
    code, out, err = run("convert", ARCH, *weights, *options, "--output", tmp_path / "out")
    assert code == 0 and err == ""
    expected = mk.convert_to_masterkeys(model, keys_per_kernel=2, trainable="affine", exclude="stages.0.*")
    assert out.startswith(str(mk.conversion_report(expected)))
    assert f"timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)" in out
    assert out.rstrip().endswith("leave out --calibrate none, or fine-tune before use")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    a, b = again.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {m.trainable for m in again.modules() if isinstance(m, mk.MasterKeyConv2d)} == {"affine"}
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt*"))


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve pictures."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (160, 160, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--max-images", "10", "--size", "96"], {"max_images": 10, "size": 96}),
        (
            ["--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.5", "0.5", "--size", "96", "128", "--device", "cpu"],
            {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "size": [96, 128]},
        ),
    ],
)
def test_convert_and_calibrate(run, weights, model, pictures, tmp_path, options, arguments):
    given = ["--calibrate", pictures, *options, "--output", tmp_path / "out"]
    code, out, _ = run("convert", ARCH, *weights, *given)
    assert code == 0 and "fine-tune before use" not in out
    expected = mk.convert_to_masterkeys(model)
    report = mk.calibrate_masterkeys(expected, model, pictures, **arguments)
    assert report.summary().partition(", ")[0] in out
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    assert read_record(again).calibration.images == arguments.get("max_images", 12)


def test_convert_and_calibrate_with_photographs_that_ship(run, weights, model, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_masterkeys.calibration.images.COUNT", 12)
    monkeypatch.delenv("TIMM_MASTERKEYS_CALIBRATE")
    assert run("convert", ARCH, *weights, "--output", tmp_path / "out")[0] == 0
    record = read_record(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)).calibration
    assert record.origin == "builtin" and record.images < 76


def test_cache(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path))
    root = tmp_path / "timm_masterkeys"
    assert run("cache")[:2] == (0, f"0 in {root}\n")
    (root / "net.mk8-0123").mkdir(parents=True)
    (root / "net.mk8-0123" / "config.json").write_text(json.dumps({"made_by": "timm_masterkeys cache entry"}))
    (root / "net.mk8-0123" / "model.safetensors").write_bytes(b"x" * 2_500_000)
    (root / "somebody's").mkdir()
    code, out, _ = run("cache")
    assert code == 0 and out.startswith("net.mk8-0123       2.5 MB  last used 20")
    [entry] = json.loads(run("cache", "--json")[1])["entries"]
    assert entry["path"] == str(root / "net.mk8-0123") and entry["size"] > 2_500_000
    assert json.loads(run("cache", "--clear", "--json")[1]) == {"folder": str(root), "removed": 1}
    assert [path.name for path in root.iterdir() if not path.name.startswith(".")] == ["somebody's"]


def test_convert_with_as_few_keys_as_an_agreement_needs(run, weights, model, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_masterkeys.calibration.images.COUNT", 16)
    options = ["--calibrate", "builtin", "--agreement", ".1", "--include", "stages.3.*"]
    code, out, _ = run("convert", ARCH, *weights, *options, "--output", tmp_path / "out")
    assert code == 0 and out.startswith("layer")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    [config] = read_record(again).conversions
    assert (config.agreement, config.include) == (0.1, ("stages.3.*",))
    assert read_record(again).calibration.after["agreement"] >= 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keys-per-kernel", "0"], "keys_per_kernel is 0"),
        (["--keys-per-kernel", "9"], "keys_per_kernel is 9"),
        (["--agreement", ".9", "--keys-per-kernel", "2"], "drop keys_per_kernel"),
        (["--agreement", ".9", "--calibrate", "none"], "--agreement is measured with images"),
        (["--agreement", "95"], "agreement is 95.0"),
        (["--license", "apache-2"], "apache-2.0"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--calibrate", "gone"], "--calibrate is 'gone'"),
    ],
)
def test_options_of_convert_are_checked_before_the_work(run, weights, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("timm_masterkeys.cli.load_model.load_model", lambda args: pytest.fail("work was begun"))
    given = ["--calibrate", "builtin", *options, "--output", tmp_path / "out"]
    code, out, err = run("convert", ARCH, *weights, *given)
    assert (code, out) == (1, "") and says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_licence_that_is_given(run, weights, tmp_path):
    given = [ARCH, *weights, "--output", tmp_path / "out"]
    assert run("convert", *given, "--license", "cc-by-nc-4.0")[0] == 0
    assert "license: cc-by-nc-4.0" in (tmp_path / "out" / "README.md").read_text()


def test_convert_from_a_training_checkpoint(run, model, tmp_path):
    """As train.py writes it, its averaged weights first."""
    other = timm.create_model(ARCH, num_classes=10)
    content = {"epoch": 1, "state_dict": other.state_dict(), "state_dict_ema": model.state_dict()}
    torch.save(content, tmp_path / "last.pth.tar")
    options = ["--checkpoint", tmp_path / "last.pth.tar", "--num-classes", "10", "--output", tmp_path / "out"]
    assert run("convert", ARCH, *options)[0] == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(again.head.fc.weight, model.head.fc.weight)


@pytest.fixture
def folder(run, weights, tmp_path):
    """A converted folder, from other settings than the default ones."""
    options = ["--bank", "scale-space-b", "--keys-per-kernel", "2", "--exclude", "stages.0.*"]
    assert run("convert", ARCH, *weights, *options, "--output", tmp_path / "folder")[0] == 0
    return tmp_path / "folder"


def test_mk8_names_stand_for_their_stock_weights(run, weights, model, tmp_path):
    options = ["--bank", "random8:3", "--keys-per-kernel", "2", "--include", "stages.1.*"]
    tag = timm.get_pretrained_cfg(ARCH).tag
    for name in (f"{ARCH}.mk8", f"{ARCH}.mk8_{tag}"):
        assert run("inspect", name) == run("inspect", ARCH)
        assert run("inspect", name, *weights, *options) == run("inspect", ARCH, *weights, *options)
        assert run("convert", name, *weights, *options, "--output", tmp_path / name)[0] == 0
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).state_dict()
        expected = mk.convert_to_masterkeys(model, "random8:3", keys_per_kernel=2, include="stages.1.*").state_dict()
        assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in again)
    assert run("plot", f"{ARCH}.mk8", *weights, "--output", tmp_path / "pictures")[0] == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **kwargs: asked.append((name, kwargs["pretrained"])) or model)
        for name in (f"{ARCH}.mk8", f"{ARCH}.mk8_{tag}"):
            assert run("inspect", name, "--pretrained")[0] == 0
    assert asked == [(ARCH, True), (f"{ARCH}.{tag}", True)]


def test_a_name_pointed_at_published_weights_is_converted(run, weights, folder, monkeypatch):
    name, converted = f"{ARCH}.mk8_ours", timm.create_model(f"local-dir:{folder}", pretrained=True)
    monkeypatch.setattr("timm_masterkeys.timm_plugin.published._sources", {})
    for register in ("_model_has_pretrained", "_model_pretrained_cfgs", "_model_with_tags"):  # no test after it has it
        monkeypatch.setattr(_registry, register, deepcopy(getattr(_registry, register)))
    mk.use_weights(name, "me/ours@main")
    assert run("inspect", name) == run("inspect", ARCH)  # random weights
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: asked.append(name) or converted)
    assert run("inspect", name, "--pretrained")[:2] == (0, f"{mk.conversion_report(converted)}\n")
    assert asked == [name]


def test_a_converted_folder(run, folder, tmp_path, monkeypatch):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    report = mk.conversion_report(model)
    assert run("inspect", folder) == run("inspect", folder, "--pretrained") == (0, f"{report}\n", "")
    assert json.loads(run("inspect", folder, "--json")[1]) == json.loads(report.to_json())
    code, out, err = run("plot", folder, "--output", tmp_path / "pictures")
    assert code == 0 and err == "" and "There is no kernels.png" in out
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"bank", "used_keys", "coverage", "r2", "keys"}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for args, says in (
        (["convert", folder, "--output", tmp_path / "out"], f"'{folder}' is converted already"),
        (["inspect", folder, "--bank", "random8:0"], "is converted already: --bank"),
        (["plot", folder, "--keys-per-kernel", "2", "--output", tmp_path / "out"], "is converted already: --bank"),
    ):
        code, out, err = run(*args)
        assert (code, out) == (1, "") and says in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pictures"]
    folder.rename(tmp_path / ARCH)
    monkeypatch.chdir(tmp_path)
    assert "weights are random" in run("inspect", ARCH)[1]  # timm's name, not the folder
    assert run("inspect", f"./{ARCH}")[1] == f"{report}\n"


def test_the_page_of_a_converted_folder_lacks_what_shows_dense_kernels(run, weights, folder, tmp_path):
    code, out, _ = run("inspect", folder, "--html", tmp_path / "folder.html")
    assert code == 0 and "It lacks what shows the dense kernels" in out
    assert run("inspect", ARCH, *weights, "--html", tmp_path / "dense.html")[0] == 0
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("folder", "dense")]
    assert pages[0].count("<img") < pages[1].count("<img")


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_file_of_kernels(run, checkpoint, model, tmp_path, suffix):
    """Layers have the names they have in the file."""
    file, names = checkpoint, [layer.name for layer in mk.plan_conversion(model).converted]
    if suffix == "npz":
        file = tmp_path / "kernels.npz"
        np.savez(file, **{name: model.get_submodule(name).weight.detach().numpy() for name in names})
    expected = mk.conversion_report(mk.convert_to_masterkeys(model, keys_per_kernel=2))
    found = json.loads(run("inspect", file, "--keys-per-kernel", "2", "--json")[1])
    assert [layer["name"] for layer in found["layers"]] == names
    assert found["total"] == json.loads(expected.to_json())["total"]
    assert run("plot", file, "--include", names[0], "--output", tmp_path / "pictures")[0] == 0
    assert (tmp_path / "pictures" / "kernels.png").is_file()
    code, out, err = run("convert", file, "--pretrained", "--output", tmp_path / "out")
    assert (code, out) == (1, "") and "--checkpoint" in err


def test_a_dense_folder_of_timms(run, model, tmp_path):
    timm.models.save_for_hf(model, tmp_path / "dense", safe_serialization=True)
    plan, report = mk.plan_conversion(model), mk.conversion_report(mk.convert_to_masterkeys(model), model)
    assert run("inspect", tmp_path / "dense")[1] == f"{str(plan).splitlines()[-1]}\n\n{report}\n"
    assert run("convert", tmp_path / "dense", "--output", tmp_path / "out")[0] == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert str(mk.conversion_report(again)) == str(mk.conversion_report(mk.convert_to_masterkeys(model)))


def test_discover(run, checkpoint, tmp_path):
    np.savez(tmp_path / "other.npz", np.random.default_rng(0).standard_normal((60, 5, 5)))
    name = Path(checkpoint).name
    args = [checkpoint, tmp_path / "other.npz", "--kernel-size", "5", "--keys", "4", "--method", "lines"]
    code, out, err = run(
        "discover",
        *args,
        "--hold-out",
        name,
        "--output",
        tmp_path / "bank.safetensors",
        "--plot",
        tmp_path / "curve.png",
    )
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert code == 0 and err == "" and out.startswith("4 keys from 60 kernels") and "published keys" in out
    bank = mk.get_bank(tmp_path / "bank.safetensors")
    assert len(bank) == 4 and bank.name == "bank" and "other.npz" in bank.source
    found = json.loads(run("discover", *args, "--output", tmp_path / "bank.safetensors", "--json")[1])
    assert found["bank"]["keys"] == len(found["matches"]) == 4 and found["r2"]["this bank"] > 0
    for changed, says in (
        (["--output", tmp_path / "bank.txt"], "ends in .safetensors"),
        (["--output", tmp_path / "no" / "bank.safetensors"], "there is no folder"),
        (["--output", tmp_path / "b.safetensors", "--plot", tmp_path / "curve.jpg"], "ends in .png"),
    ):
        code, out, err = run("discover", *args, *changed)
        assert (code, out) == (1, "") and says in err
    assert not (tmp_path / "no").exists() and not (tmp_path / "b.safetensors").exists()
    before = Path(checkpoint).read_bytes()
    code, out, err = run("discover", *args, "--output", checkpoint)
    assert code == 1 and "is one of the sources" in err and Path(checkpoint).read_bytes() == before


def test_compare(run, checkpoint, model, tmp_path):
    np.savez(tmp_path / "other.npz", np.random.default_rng(0).standard_normal((60, 5, 5)))
    code, out, err = run("compare", checkpoint, tmp_path / "other.npz", "--bank", "babaiee2025", "--bank", "random8:1")
    assert code == 0 and err == "" and "5x5: the two use the keys of babaiee2025" in out
    assert "keys of babaiee2025 and of random8:1, matched one to one" in out
    found = json.loads(
        run("compare", checkpoint, tmp_path / "other.npz", "--bank", "babaiee2025", "--bank", "random8:1", "--json")[1]
    )
    assert len(found["rows"]) == 8 and len(found["matches"]) == 8
    code, out, err = run("compare", tmp_path / "no.npz")
    assert code == 1 and "Cannot read kernels from" in err


# --- Errors


def bad(*args, says):
    return pytest.param(args, says, id=" ".join(args))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        bad("inspect", "nope", says="There is no timm model 'nope'"),
        bad("inspect", "convnext_tni", says="Did you mean convnext_tiny"),
        bad("convert", "convnext_tni", "--output", "out", says="Did you mean convnext_tiny"),
        bad("plot", "convnext_tni.mk8", "--output", "out", says="Did you mean convnext_tiny"),
        bad("inspect", "org/name", says="There is no folder 'org/name'. If it is on the Hub, its name is 'hf-hub:org"),
        bad("inspect", f"{ARCH}.r160_in1", says=f"has no weights 'r160_in1'. Did you mean {ARCH}.r160_in1k"),
        bad("inspect", f"{ARCH}.mk8_nope", says="has no weights 'mk8_nope'"),
        bad("publish", "resnet18.mk8", "me/model", says="resnet18 has no depthwise convolutions"),
        bad("inspect", "ghostnet_050", "--pretrained", says="No pretrained weights exist for ghostnet_050"),
        bad("inspect", ARCH, "--bank", "nope", says="Unknown bank 'nope'. Known: babaiee2025"),
        bad("inspect", ARCH, "--bank", "nope.safetensors", says="Cannot read a bank from 'nope.safetensors'"),
        bad("inspect", ARCH, "--include", "blocks.*", says="Pattern 'blocks.*' matches none of the 8"),
        bad("inspect", ARCH, "--checkpoint", "nope.pth", says="There is no file 'nope.pth'"),
        bad("publish", "nope", "me/model", says="There is no timm model 'nope'"),
        bad("publish", "./nope", "me/model", says="There is no folder './nope'"),
        bad("compare", "/nope", says="Cannot read kernels from '/nope': there is no such file."),
        bad("convert", ARCH, "--output", "out", says="no weights to convert. Add --pretrained"),
    ],
)
def test_errors_are_one_line(run, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert (code, out) == (1, "")
    assert err.startswith("timm-masterkeys: error: ") and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_ones_own_is_under_no_known_licence(run, weights, tmp_path):
    code, out, err = run("convert", ARCH, *weights, "--output", tmp_path / "out")
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "license" not in config["pretrained_cfg"] and config["masterkeys"]["source"] is None
    assert "Licence: unknown." in (tmp_path / "out" / "README.md").read_text()
    code, out, err = run("publish", tmp_path / "out", "me/model", "--dry-run")
    assert (code, out) == (1, "") and "licence" in err and "--license" in err


def test_publish_in_json(run, model, tmp_path, monkeypatch):
    folder = mk.save_pretrained(mk.convert_to_masterkeys(model), tmp_path / "out", license="mit")
    asked, states = [], {"model.safetensors": "new"}
    done = mk.Publication("me/model", "main", None, states, {"model.safetensors": 7}, "mit", True)
    monkeypatch.setattr("timm_masterkeys.hub.publish.push_to_hub", lambda *args, **given: asked.append(given) or done)
    options = ["--dry-run", "--private", "--json", "--revision", "next", "--message", "First"]
    code, out, _ = run("publish", folder, "me/model", *options)
    told = json.loads(out)
    assert code == 0 and (told["repo_id"], told["sha"], told["files"]) == ("me/model", None, states)
    [given] = asked
    assert (given["dry_run"], given["private"], given["revision"]) == (True, True, "next")
    assert given["commit_message"] == "First" and "masterkeys" in given["readme"].lower()


def config_as(change):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        config_as(lambda config: []),
        config_as(lambda config: {}),
        config_as(lambda config: {**config, "architecture": 3}),
        config_as(lambda config: {**config, "pretrained_cfg": []}),
        config_as(lambda config: {**config, "masterkeys": "yes"}),
        config_as(lambda config: {**config, "masterkeys": {}}),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"cut"),
        lambda folder: (folder / "masterkeys.safetensors").unlink(),
        lambda folder: (folder / "masterkeys.safetensors").write_bytes(b"cut"),
    ],
)
def test_a_damaged_folder_is_one_line(run, model, tmp_path, spoil):
    folder = mk.save_pretrained(mk.convert_to_masterkeys(model), tmp_path / "out", license="mit")
    spoil(folder)
    for command in (("publish", folder, "me/model"), ("inspect", folder)):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert err.startswith("timm-masterkeys: error: ") and str(folder) in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_an_unreadable_checkpoint(run, tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    code, out, err = run("convert", ARCH, "--checkpoint", path, "--output", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith("timm-masterkeys: error: ") and str(path) in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit(run, checkpoint, tmp_path):
    compact = tmp_path / "compact.safetensors"
    mk.save_compact(mk.convert_to_masterkeys(timm.create_model(ARCH)), compact)
    nan = tmp_path / "nan.safetensors"
    state = timm.create_model(ARCH).state_dict()
    state["stages.1.blocks.0.conv_dw.weight"][3] = torch.nan
    save_file(state, nan)
    for path, says in (
        (checkpoint, "size mismatch for head.fc.weight"),  # 10 classes, not 1000
        (compact, "Missing key(s) in state_dict"),
        (nan, "stages.1.blocks.0.conv_dw: "),
        (tmp_path, "There is no file"),
    ):
        code, out, err = run("convert", ARCH, "--checkpoint", path, "--output", tmp_path / "out")
        assert (code, out) == (1, "") and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_nothing_to_convert(run, tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    code, out, err = run(
        "convert", "test_resnet", "--checkpoint", tmp_path / "resnet.safetensors", "--output", tmp_path
    )
    assert (code, out) == (1, "") and "ResNet has nothing to convert" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["convert", "plot"])
def test_an_output_that_cannot_be_written_is_found_out_before_the_work(run, weights, tmp_path, monkeypatch, command):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr("timm_masterkeys.cli.load_model.load_model", lambda args: pytest.fail("work was begun"))
    locked = "/proc" if os.geteuid() == 0 else tmp_path / "locked"  # root may write anywhere
    for output in (tmp_path / "file", tmp_path / "file" / "out" / "deep", f"{locked}/none/deep"):
        code, out, err = run(command, ARCH, *weights, "--output", output)
        assert (code, out) == (1, "") and f"Cannot write into '{output}': " in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]


def test_missing_parents_of_an_output_are_made(run, weights, tmp_path):
    assert run("convert", ARCH, *weights, "--output", tmp_path / "a" / "b")[0] == 0
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_verbose_shows_the_traceback(run):
    with pytest.raises(mk.BankError, match="Unknown bank 'nope'"):
        run("inspect", ARCH, "--bank", "nope", "--verbose")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["convert", "", "--output", "x"], "model is empty. Is it a variable that is not set?"),
        (["convert", ARCH, "--calibrate", "", "--output", "x"], "calibrate is empty"),
        (["zoo", "a*", "", "--org", "me", "--evaluate", "x"], "pattern is empty"),
        (["inspect", ARCH, "--include", ""], "include is empty"),
        ([], "the following arguments are required: command"),
        (["train"], "invalid choice: 'train'"),
        (["inspect"], "the following arguments are required: model"),
        (["inspect", ARCH, "--pretrained", "--checkpoint", "x"], "not allowed with argument --pretrained"),
        (["inspect", ARCH, "--keys-per-kernel", "many"], "invalid int value: 'many'"),
        (["convert", ARCH, "--pretrained"], "the following arguments are required: --output"),
        (["convert", ARCH, "--trainable", "all", "--output", "x"], "invalid choice: 'all'"),
    ],
)
def test_wrong_usage(run, args, says):
    code, out, err = run(*args)
    assert (code, out) == (2, "") and says in err and err.startswith("usage: timm-masterkeys")


# --- Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(run, command):
    code, out, err = run(command, "--help")
    assert code == 0 and err == ""
    assert out.startswith(f"usage: timm-masterkeys {command}") and f"example: timm-masterkeys {command} " in out
    assert not re.search("repair|taps|drawn|stock|heal", out)  # words that only this project's authors know


def test_help(run):
    code, out, err = run("--help")
    assert code == 0 and err == ""
    examples = [line.split()[1] for line in out.partition("examples:\n")[2].partition("\n\n")[0].splitlines()]
    assert set(examples) < set(COMMANDS) and all(f"  {command}" in out for command in COMMANDS)
    assert len(out.splitlines()) <= 50
    assert run("--version") == (0, f"{mk.__version__}\n", "")


def test_the_options_know_what_the_package_has():
    """Repeated in the options, as the package's own modules import torch."""
    assert DEFAULT_BANK == banks.DEFAULT_BANK and get_args(Trainable) == TRAINABLE


# --- As it is installed

SCRIPT = "import sys, timm_masterkeys_cli; sys.exit(timm_masterkeys_cli.main())"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["zoo", "--help"], ["--version"], ["convert", "x", "--calibrate", ""]]
)
def test_help_and_wrong_usage_need_no_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode in (0, 2) and "timm_masterkeys" in imported
    assert not imported & {"torch", "timm", "numpy", "huggingface_hub", "safetensors"}


def test_the_script_and_a_reader_that_has_enough():
    """As in ``timm-masterkeys list | head -1``."""
    command = [sys.executable, "-c", SCRIPT, "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(300) == 0


def test_ctrl_c_while_packages_are_imported(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert main(["list"], before_command=interrupt) == 130
    assert capsys.readouterr() == ("", "timm-masterkeys: interrupted\n")
