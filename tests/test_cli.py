"""The command ``timm-masterkeys``: what it prints, what it writes, and how it fails."""

import io
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
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
def weights(checkpoint):
    return ("--checkpoint", checkpoint, "--num-classes", "10")


@pytest.fixture
def folder(model, tmp_path):
    """A converted folder, from other settings than the default ones."""
    converted = mk.convert_to_masterkeys(model, "scale-space-b", keys_per_kernel=2, exclude="stages.0.*")
    return mk.save_pretrained(converted, tmp_path / "folder", license="mit")


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
def succeeds(run):
    """Runs the command, which warns of nothing -> stdout."""

    def succeeds(*args):
        code, out, err = run(*args)
        assert (code, err) == (0, "")
        return out

    return succeeds


@pytest.fixture
def fails(run):
    """Runs the command, which prints one line that contains all of some words."""

    def fails(*args, says=()):
        code, out, err = run(*args)
        assert (code, out) == (1, "")
        assert err.startswith("timm-masterkeys: error: ") and err.count("\n") == 1
        for words in (says,) if isinstance(says, str) else says:
            assert words in err

    return fails


def saved(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- list


def test_list(succeeds, fails):
    assert sorted(succeeds("list").split()) == sorted(f"{arch}.mk8" for arch in mk.list_architectures())
    assert succeeds("list", "convnext_at*").split() == [f"convnext_atto{end}.mk8" for end in ("", "_ols", "_rms")]
    fails("list", "resnet1*", says=("551 architectures", "'resnet1*'"))


def test_list_pretrained(succeeds):
    names = succeeds("list", "convnext_atto*", "--pretrained").split()  # convnext_atto_rms has no weights
    assert names == [f"convnext_atto{end}" for end in (".mk8", ".mk8_d2_in1k", "_ols.mk8", "_ols.mk8_a2_in1k")]
    assert all(map(timm.is_model_pretrained, succeeds("list", "--pretrained").split()))


# --- inspect


def test_inspect_without_weights(succeeds):
    out = succeeds("inspect", ARCH)
    assert out.startswith(f"{mk.plan_conversion(timm.create_model(ARCH))}\n") and "4 of 8 convolutions" in out
    assert "--pretrained or --checkpoint FILE" in out.splitlines()[-1]
    layers = json.loads(succeeds("inspect", ARCH, "--json"))["layers"]
    assert sum(not layer["reason"] for layer in layers) == 4
    out = succeeds("inspect", "test_resnet")
    assert "not depthwise" in out and "\n0 of 15 convolutions" in out and "nothing to convert" in out.splitlines()[-1]


def test_inspect_weights(succeeds, weights, model):
    patterns = {"include": ["stages.0.*", "stages.[12].*"], "exclude": ["stages.2.*"], "bank": "random8:3"}
    options = "--include stages.0.* --include stages.[12].* --exclude stages.2.* --bank random8:3 --keys-per-kernel 3"
    report = mk.conversion_report(mk.convert_to_masterkeys(model, keys_per_kernel=3, **patterns), model)
    out = succeeds("inspect", ARCH, *weights, "--json", *options.split())
    assert json.loads(out) == json.loads(report.to_json())  # nothing else on stdout
    plan = mk.plan_conversion(model, **patterns)
    assert succeeds("inspect", ARCH, *weights, *options.split()) == f"{str(plan).splitlines()[-1]}\n\n{report}\n"


def test_inspect_a_converted_folder(succeeds, fails, folder, tmp_path, monkeypatch):
    report = mk.conversion_report(saved(folder))
    assert succeeds("inspect", folder) == succeeds("inspect", folder, "--pretrained") == f"{report}\n"
    assert json.loads(succeeds("inspect", folder, "--json")) == json.loads(report.to_json())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fails("convert", folder, "--output", tmp_path / "out", says=f"'{folder}' is converted already")
    fails("inspect", folder, "--bank", "random8:0", says="is converted already: --bank")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    folder.rename(tmp_path / ARCH)
    monkeypatch.chdir(tmp_path)
    assert "weights are random" in succeeds("inspect", ARCH)  # timm's name, not the folder
    assert succeeds("inspect", f"./{ARCH}") == f"{report}\n"


def test_mk8_names_stand_for_their_stock_weights(run, weights, model, monkeypatch):
    options = ["--bank", "random8:3", "--keys-per-kernel", "2", "--include", "stages.1.*"]
    tag = timm.get_pretrained_cfg(ARCH).tag
    names = f"{ARCH}.mk8", f"{ARCH}.mk8_{tag}"
    for name in names:
        assert run("inspect", name) == run("inspect", ARCH)
        assert run("inspect", name, *weights, *options) == run("inspect", ARCH, *weights, *options)
    calls = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: calls.append((name, pretrained)) or model)
    assert [run("inspect", name, "--pretrained")[0] for name in names] == [0, 0]
    assert calls == [(ARCH, True), (f"{ARCH}.{tag}", True)]


def test_a_name_pointed_at_published_weights_is_converted(run, folder, monkeypatch):
    name, converted = f"{ARCH}.mk8_ours", saved(folder)
    monkeypatch.setattr("timm_masterkeys.timm_plugin.published._sources", {})
    for register in ("_model_has_pretrained", "_model_pretrained_cfgs", "_model_with_tags"):  # no test after it has it
        monkeypatch.setattr(_registry, register, deepcopy(getattr(_registry, register)))
    mk.use_weights(name, "me/ours@main")
    assert run("inspect", name) == run("inspect", ARCH)  # random weights
    calls = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: calls.append(name) or converted)
    assert run("inspect", name, "--pretrained")[:2] == (0, f"{mk.conversion_report(converted)}\n")
    assert calls == [name]


def test_the_page_of_a_converted_folder(succeeds, fails, folder, tmp_path, monkeypatch):
    """Pictures are a few bytes here: most of the time goes into rendering."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"picture"))
    out = succeeds("inspect", folder, "--html", tmp_path / "page.html")
    assert f"saved to {tmp_path / 'page.html'}" in out and "It lacks what shows the dense kernels" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<img") == 5
    fails("inspect", ARCH, "--html", tmp_path / "no.html", says="Random weights have no fit to draw")
    assert not (tmp_path / "no.html").exists()


@pytest.mark.slow
def test_the_page_of_a_dense_model(succeeds, weights, tmp_path):
    assert "It lacks" not in succeeds("inspect", ARCH, *weights, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("data:image/png;base64,iVBOR") == 6


# --- convert


def test_convert(succeeds, model, tmp_path):
    """From a checkpoint of train.py with averaged weights, not calibrated, into a folder whose parents are missing."""
    other = timm.create_model(ARCH, num_classes=10)
    torch.save({"state_dict": other.state_dict(), "state_dict_ema": model.state_dict()}, tmp_path / "last.pth.tar")
    given = f"--checkpoint {tmp_path / 'last.pth.tar'} --num-classes 10 --output {tmp_path / 'a' / 'out'}"
    options = "--keys-per-kernel 2 --trainable affine --exclude stages.0.* --license mit"
    out = succeeds("convert", ARCH, *given.split(), *options.split())
    expected = mk.convert_to_masterkeys(model, keys_per_kernel=2, trainable="affine", exclude="stages.0.*")
    assert out.startswith(str(mk.conversion_report(expected)))
    folder = tmp_path / "a" / "out"
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in out
    assert out.rstrip().endswith("leave out --calibrate none, or fine-tune before use")
    again = saved(folder)
    assert same(again, expected)
    assert {m.trainable for m in again.modules() if isinstance(m, mk.MasterKeyConv2d)} == {"affine"}
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt*"))
    assert "license: mit" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of twelve pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (48, 48, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


def test_convert_and_calibrate(run, weights, model, pictures, tmp_path):
    options = "--max-images 10 --mean .1 .2 .3 --std .5 .5 .5 --size 32 48 --include stages.[23].*"
    given = ["--calibrate", pictures, *options.split(), "--output", tmp_path / "out"]
    code, out, _ = run("convert", ARCH, *weights, *given)
    assert code == 0 and "fine-tune before use" not in out
    settings = {"max_images": 10, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "size": [32, 48]}
    expected = mk.convert_to_masterkeys(model, include="stages.[23].*")
    report = mk.calibrate_masterkeys(expected, model, pictures, **settings)
    assert report.summary().partition(", ")[0] in out
    again = saved(tmp_path / "out")
    assert same(again, expected) and read_record(again).calibration.images == 10


@pytest.mark.slow
def test_convert_to_an_agreement_with_photographs_that_ship(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_masterkeys.calibration.images.COUNT", 16)
    monkeypatch.delenv("TIMM_MASTERKEYS_CALIBRATE")
    options = ["--size", "32", "--agreement", ".1", "--include", "stages.3.*"]
    code, out, _ = run("convert", ARCH, *weights, *options, "--output", tmp_path / "out")
    assert code == 0 and out.startswith("layer")
    record = read_record(saved(tmp_path / "out"))
    [config] = record.conversions
    assert (config.agreement, config.include) == (0.1, ("stages.3.*",))
    assert record.calibration.origin == "builtin" and record.calibration.after["agreement"] >= 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--keys-per-kernel 9", "keys_per_kernel is 9"),
        ("--agreement .9 --keys-per-kernel 2", "drop keys_per_kernel"),
        ("--agreement .9 --calibrate none", "--agreement is measured with images"),
        ("--size 32 --calibrate none", "are for images"),
        ("--agreement 95", "agreement is 95.0"),
        ("--license apache-2", "apache-2.0"),
        ("--device gpu", "device 'gpu'"),
        ("--calibrate gone", "--calibrate is 'gone'"),
    ],
)
def test_options_of_convert_are_checked_before_the_work(fails, weights, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("timm_masterkeys.cli.load_model.load_model", lambda args: pytest.fail("work was begun"))
    given = ["--calibrate", "builtin", *options.split(), "--output", tmp_path / "out"]
    fails("convert", ARCH, *weights, *given, says=says)
    assert not (tmp_path / "out").exists()


def test_a_dense_folder_of_timms(succeeds, model, tmp_path):
    timm.models.save_for_hf(model, tmp_path / "dense", safe_serialization=True)
    converted = mk.convert_to_masterkeys(model)
    assert succeeds("inspect", tmp_path / "dense").endswith(f"\n{mk.conversion_report(converted, model)}\n")
    succeeds("convert", tmp_path / "dense", "--output", tmp_path / "out")
    assert same(saved(tmp_path / "out"), converted)


def test_a_checkpoint_takes_the_place_of_a_folders_weights(succeeds, fails, model, tmp_path):
    timm.models.save_for_hf(model, tmp_path / "dense", safe_serialization=True)
    other = timm.create_model(ARCH, num_classes=model.num_classes)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    checkpoint = ["--checkpoint", tmp_path / "other.safetensors"]
    succeeds("convert", tmp_path / "dense", *checkpoint, "--output", tmp_path / "out")
    assert same(saved(tmp_path / "out"), mk.convert_to_masterkeys(other))
    fails("inspect", tmp_path / "dense", "--checkpoint", "nope.pth", says="There is no file 'nope.pth'")


# --- discover and compare


@pytest.fixture
def sources(checkpoint, tmp_path):
    np.savez(tmp_path / "other.npz", np.random.default_rng(0).standard_normal((60, 5, 5)))
    return checkpoint, tmp_path / "other.npz"


def test_discover(succeeds, fails, sources, tmp_path):
    args = ["discover", *sources, "--kernel-size", "5", "--keys", "4", "--method", "lines"]
    bank_file = tmp_path / "bank.safetensors"
    out = succeeds(*args, "--hold-out", sources[0].name, "--output", bank_file)
    assert out.startswith("4 keys from 60 kernels") and "published keys" in out
    bank = mk.get_bank(bank_file)
    assert len(bank) == 4 and bank.name == "bank" and "other.npz" in bank.source
    found = json.loads(succeeds(*args, "--output", bank_file, "--json"))
    assert found["bank"]["keys"] == len(found["matches"]) == 4 and found["r2"]["this bank"] > 0
    before = sources[0].read_bytes()
    (tmp_path / "d.safetensors").mkdir()
    fails(*args, "--output", tmp_path / "bank.txt", says="ends in .safetensors")
    fails(*args, "--output", tmp_path / "no" / "bank.safetensors", says="there is no folder")
    fails(*args, "--output", tmp_path / "d.safetensors", says="it is a folder")
    fails(*args, "--output", "/proc/bank.safetensors", says="Cannot write")
    fails(*args, "--output", sources[0], says="is one of the sources")
    assert not (tmp_path / "no").exists() and sources[0].read_bytes() == before


def test_compare(succeeds, fails, sources):
    args = ["compare", *sources, "--bank", "babaiee2025", "--bank", "random8:1"]
    out = succeeds(*args)
    assert "keys of babaiee2025 and of random8:1, matched one to one" in out
    found = json.loads(succeeds(*args, "--json"))
    assert len(found["rows"]) == 8 and len(found["matches"]) == 8
    assert json.loads(succeeds(*args[:3], "--json"))["matches"] == []


# --- cache and publish


def test_cache(succeeds, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path))
    root = tmp_path / "timm_masterkeys"
    assert succeeds("cache") == f"0 in {root}\n"
    (root / "net.mk8-0123").mkdir(parents=True)
    (root / "net.mk8-0123" / "config.json").write_text(json.dumps({"made_by": "timm_masterkeys cache entry"}))
    (root / "net.mk8-0123" / "model.safetensors").write_bytes(b"x" * 2_500_000)
    (root / "somebody's").mkdir()
    assert re.fullmatch(r"net.mk8-0123       2.5 MB  last used 20.*\n1 in .*\n", succeeds("cache"))
    [entry] = json.loads(succeeds("cache", "--json"))["entries"]
    assert entry["path"] == str(root / "net.mk8-0123") and entry["size"] > 2_500_000
    assert json.loads(succeeds("cache", "--clear", "--json")) == {"folder": str(root), "removed": 1}
    assert [path.name for path in root.iterdir() if not path.name.startswith(".")] == ["somebody's"]


def test_a_checkpoint_of_ones_own_is_under_no_known_licence(succeeds, fails, weights, tmp_path):
    succeeds("convert", ARCH, *weights, "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "license" not in config["pretrained_cfg"] and config["masterkeys"]["source"] is None
    assert "Licence: unknown." in (tmp_path / "out" / "README.md").read_text()
    fails("publish", tmp_path / "out", "me/model", "--dry-run", says=("licence", "--license"))


def test_publish_in_json(succeeds, folder, monkeypatch):
    calls, states = [], {"model.safetensors": "new"}
    done = mk.Publication("me/model", "main", None, states, {"model.safetensors": 7}, "mit", True)
    monkeypatch.setattr("timm_masterkeys.hub.publish.push_to_hub", lambda *args, **given: calls.append(given) or done)
    options = ["--dry-run", "--private", "--json", "--revision", "next", "--message", "First"]
    printed = json.loads(succeeds("publish", folder, "me/model", *options))
    assert (printed["repo_id"], printed["sha"], printed["files"]) == ("me/model", None, states)
    [given] = calls
    assert (given["dry_run"], given["private"], given["revision"]) == (True, True, "next")
    assert given["commit_message"] == "First" and "masterkeys" in given["readme"].lower()


# --- Errors


@pytest.mark.parametrize(
    ("command", "says"),
    {
        "inspect nope": "There is no timm model 'nope', and no such file or folder",
        "convert convnext_tni --output out": "Did you mean convnext_tiny",
        "inspect org/name": "There is no folder 'org/name'. If it is on the Hub, its name is 'hf-hub:org",
        f"inspect {ARCH}.r160_in1": f"has no weights 'r160_in1'. Did you mean {ARCH}.r160_in1k",
        f"inspect {ARCH}.mk8_nope": "has no weights 'mk8_nope'",
        "publish resnet18.mk8 me/model": "resnet18 has no depthwise convolutions",
        "inspect ghostnet_050 --pretrained": "No pretrained weights exist for ghostnet_050",
        f"inspect {ARCH} --bank nope": "Unknown bank 'nope'. Known: babaiee2025",
        f"inspect {ARCH} --include blocks.*": "Pattern 'blocks.*' matches none of the 8",
        f"inspect {ARCH} --checkpoint nope.pth": "There is no file 'nope.pth'",
        f"publish {ARCH}.mk8 model": "Got repo_id 'model', expected 'org/name'",
        f"publish {ARCH}.mk8 me/model --create-pr --revision next": "leave revision out",
        f"publish {ARCH}.mk8 me/model --license apache2.0": "Did you mean 'apache-2.0'",
        "publish ./nope me/model": "There is no folder './nope'",
        "compare /nope": "'/nope' is no file",
        f"convert {ARCH} --output out": "no weights to convert. Add --pretrained",
    }.items(),
)
def test_errors_are_one_line(fails, tmp_path, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    fails(*command.split(), says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", b"["),
        ("config.json", {"architecture": 3}),
        ("config.json", {"pretrained_cfg": []}),
        ("config.json", {"masterkeys": "yes"}),
        ("model.safetensors", b"cut"),
        ("masterkeys.safetensors", None),
    ],
)
def test_a_damaged_folder_is_one_line(fails, folder, name, change):
    path = folder / name
    if isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    elif change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    fails("publish", folder, "me/model", says=str(folder))
    fails("inspect", folder, says=str(folder))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".safetensors", b"no checkpoint"), (".pth", b""), (".pth", b"\x80\x02}q\x00."), (".bin", b"PK cut")],
)
def test_an_unreadable_checkpoint(fails, tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    fails("convert", ARCH, "--checkpoint", path, "--output", tmp_path / "out", says=str(path))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit(fails, checkpoint, tmp_path):
    compact, nan = tmp_path / "compact.safetensors", tmp_path / "nan.safetensors"
    model = timm.create_model(ARCH)
    mk.save_compact(mk.convert_to_masterkeys(model), compact)
    with torch.no_grad():
        model.stages[1].blocks[0].conv_dw.weight[3] = torch.nan
    save_file(model.state_dict(), nan)
    fails("convert", checkpoint, "--pretrained", "--output", tmp_path / "out", says="is a file. Name its architecture")
    for path, says in (
        (checkpoint, "size mismatch for head.fc.weight"),  # 10 classes, not 1000
        (compact, "Missing key(s) in state_dict"),
        (nan, "stages.1.blocks.0.conv_dw: "),
        (tmp_path, "There is no file"),
    ):
        fails("convert", ARCH, "--checkpoint", path, "--output", tmp_path / "out", says=says)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    given = ["--checkpoint", tmp_path / "resnet.safetensors", "--output", tmp_path / "out"]
    fails("convert", "test_resnet", *given, says="ResNet has nothing to convert")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_found_out_before_the_work(fails, weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr("timm_masterkeys.cli.load_model.load_model", lambda args: pytest.fail("work was begun"))
    locked = "/proc" if os.geteuid() == 0 else tmp_path / "locked"  # root may write anywhere
    for output in (tmp_path / "file", tmp_path / "file" / "out" / "deep", f"{locked}/none/deep"):
        fails("convert", ARCH, *weights, "--output", output, says=f"Cannot write into '{output}': ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]


def test_verbose_shows_the_traceback(run):
    with pytest.raises(mk.BankError, match="Unknown bank 'nope'"):
        run("inspect", ARCH, "--bank", "nope", "--verbose")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["convert", "", "--output", "x"], "model is empty. Is it a variable that is not set?"),
        (["convert", ARCH, "--calibrate", "", "--output", "x"], "calibrate is empty"),
        (["zoo", "a*", "", "--org", "me", "--evaluate", "x"], "pattern is empty"),
        ([], "the following arguments are required: command"),
        (["inspect", ARCH, "--pretrained", "--checkpoint", "x"], "not allowed with argument --pretrained"),
        (["convert", ARCH, "--trainable", "all", "--output", "x"], "invalid choice: 'all'"),
    ],
)
def test_wrong_usage(run, args, says):
    code, out, err = run(*args)
    assert (code, out) == (2, "") and says in err and err.startswith("usage: timm-masterkeys")


# --- Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(succeeds, command):
    out = succeeds(command, "--help")
    assert out.startswith(f"usage: timm-masterkeys {command}") and f"example: timm-masterkeys {command} " in out
    assert not re.search("repair|taps|drawn|stock|heal", out)  # words that only this project's authors know


def test_help(succeeds):
    out = succeeds("--help")
    examples = [line.split()[1] for line in out.partition("examples:\n")[2].partition("\n\n")[0].splitlines()]
    assert set(examples) < set(COMMANDS) and all(f"  {command}" in out for command in COMMANDS)
    assert len(out.splitlines()) <= 50
    assert succeeds("--version") == f"{mk.__version__}\n"


def test_the_options_know_what_the_package_has():
    """Repeated in the options, as the package's own modules import torch."""
    assert DEFAULT_BANK == banks.DEFAULT_BANK and get_args(Trainable) == TRAINABLE


# --- As it is installed

SCRIPT = "import sys, timm_masterkeys_cli; sys.exit(timm_masterkeys_cli.main())"


@pytest.mark.parametrize("arguments", [["zoo", "--help"], ["convert", "x", "--calibrate", ""]])
def test_help_and_wrong_usage_need_no_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode in (0, 2) and "timm_masterkeys" in imported
    assert not imported & {"torch", "timm", "numpy", "huggingface_hub", "safetensors"}


@pytest.mark.slow
def test_the_script_and_a_reader_that_has_enough():
    """As in ``timm-masterkeys list | head -1``."""
    command = [sys.executable, "-c", SCRIPT, "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(300) == 0


def test_output_that_is_closed(monkeypatch):
    """As in ``timm-masterkeys list >&-``."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list", "convnext_at*"]) == 0


def test_output_that_cannot_show_every_letter(monkeypatch, tmp_path):
    """As with PYTHONIOENCODING=ascii, or where a terminal has an encoding of its own."""
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / "größe"))
    assert main(["cache"]) == 0 and b"gr\\xf6\\xdfe" in stdout.buffer.getvalue()


def test_ctrl_c_while_packages_are_imported(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert main(["list"], before_command=interrupt) == 130
    assert capsys.readouterr() == ("", "timm-masterkeys: interrupted\n")
