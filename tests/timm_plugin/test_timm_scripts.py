"""Timm's own train.py, validate.py, benchmark.py, inference.py and onnx_export.py, unmodified, on ``.mk8`` models.

Marked ``scripts``: the scripts are not on PyPI. ``TIMM_SCRIPTS=checkout pytest -m scripts`` points at a checkout. Where
there is a GPU they run on it, and are marked ``cuda`` as well.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from compare import same
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_masterkeys as mk
from timm_masterkeys.zoo.evaluate import find_labelled_images, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.scripts,
    pytest.mark.skipif("TIMM_SCRIPTS" not in os.environ, reason="TIMM_SCRIPTS names no checkout of timm"),
    *([pytest.mark.cuda] if DEVICE == "cuda" else []),
]

MODEL = "test_convnext"  # of timm's tiny architectures, one with 7x7 depthwise layers
SMALL = "--input-size 3 64 64 --num-classes 2 -b 4".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of 8 and 4 images."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 128, (64, 64, 3)) + 127 * (label == "light")
                Image.fromarray(image.astype(np.uint8)).save(root / split / label / f"{split}_{label}_{i}.png")
    return root


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense checkpoint, as timm would have made it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "model.safetensors"
    model = timm.create_model(MODEL, num_classes=2)
    save_file(model.state_dict(), path)
    config = {"architecture": MODEL, "num_classes": 2, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    path.with_name("config.json").write_text(json.dumps(config))  # so that it can teach, as local-dir:
    return path


def run(script, *args, cwd, plugin=True):
    """Runs a script through the launcher, or as it is; fails unless it ends well. Its output."""
    copy = shutil.copy(Path(os.environ["TIMM_SCRIPTS"]) / script, cwd)  # beside itself it would find another timm
    command = [sys.executable, *(["-m", "timm_masterkeys.launch"] if plugin else []), str(copy), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def train(data, folder, *args, model=f"{MODEL}.mk8", epochs=1):
    """Trains by ``--device-modules``; the last checkpoint's state dict."""
    plugin = ["--device-modules", "timm_masterkeys", "--data-dir", data]
    settings = ["--device", DEVICE, "--epochs", epochs, "--warmup-epochs", 0, "--workers", 1]
    output = ["--output", folder, "--experiment", "run", "--opt", "adamw", "--lr", "1e-3"]
    text = run("train.py", *plugin, *settings, *output, "--model", model, *SMALL, *args, cwd=folder, plugin=False)
    assert "nan" not in text.lower().replace("nanmean", "")
    return torch.load(folder / "run" / "last.pth.tar", weights_only=False)


def frozen(state, model):
    """What must not have changed."""
    return {n: v for n, v in state.items() if n in dict(model.named_buffers()) and "conv_dw" in n and "r2" not in n}


VARIANTS = {
    "scratch": [],
    "ema": ["--model-ema", "--model-ema-decay", "0.5"],
    "bf16, channels last": ["--amp", "--amp-dtype", "bfloat16", "--channels-last"],
    "checkpointing": ["--grad-checkpointing"],
    "layer decay": ["--layer-decay", "0.7"],
    "accumulation": ["--grad-accum-steps", "2"],
    "compiled": ["--torchcompile", "aot_eager"],
    "affine": ["--model-kwargs", "mk_trainable=affine"],
    "nothing trains": ["--model-kwargs", "mk_trainable=none"],
    "dense checkpoint": ["--initial-checkpoint", "DENSE"],
    "dense weights": ["--pretrained", "--pretrained-path", "DENSE"],
    "distillation": ["--kd-model-name", "local-dir:TEACHER"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_train(variant, data, dense, tmp_path):
    args = [arg.replace("DENSE", str(dense)).replace("TEACHER", str(dense.parent)) for arg in VARIANTS[variant]]
    saved = train(data, tmp_path, *args)
    state = {name.removeprefix("_orig_mod."): value for name, value in saved["state_dict"].items()}
    trainable = {"affine": "affine", "nothing trains": "none"}.get(variant, "shift")
    torch.manual_seed(42)
    model = timm.create_model(f"{MODEL}.mk8", num_classes=2, mk_trainable=trainable)
    if "dense" in variant:
        timm.models.load_checkpoint(model, str(dense))
    if variant != "scratch" and "dense" not in variant:
        model.load_state_dict(state)
    before = model.state_dict()
    keys = {name for name in state if name.endswith((".keys", ".key_index", ".scale", ".shift"))}
    assert keys == {name for name in before if name.endswith((".keys", ".key_index", ".scale", ".shift"))}
    kept = frozen(state, model)
    same(kept, {name: before[name] for name in kept})
    assert kept
    if "dense" in variant:  # and what trains has moved away from the checkpoint
        assert not any(torch.equal(state[n], before[n]) for n in keys if n.endswith("shift"))
    if variant == "ema":
        same(frozen(saved["state_dict_ema"], model), kept)


def test_resume(data, tmp_path):
    """Goes on where it stopped, same keys. (That the numbers equal an uninterrupted run's: test_training.py.)"""
    first = train(data, tmp_path)
    checkpoint = (tmp_path / "run").rename(tmp_path / "first") / "last.pth.tar"
    resumed = train(data, tmp_path, "--resume", checkpoint, epochs=2)
    assert (first["epoch"], resumed["epoch"]) == (0, 1)
    model = timm.create_model(f"{MODEL}.mk8", num_classes=2)
    assert frozen(first["state_dict"], model)
    same(frozen(resumed["state_dict"], model), frozen(first["state_dict"], model))


def test_averaged_checkpoints_validate_infer_and_export(data, tmp_path):
    """One trained model through all other scripts; dense, converted and re-parameterised agree."""
    train(data, tmp_path, epochs=2)
    args = ("--input", tmp_path / "run", "--filter", "checkpoint*.pth.tar", "--output", "mean.safetensors")
    run("avg_checkpoints.py", *args, "--safetensors", "--no-use-ema", cwd=tmp_path)
    model = timm.create_model(f"{MODEL}.mk8", num_classes=2, checkpoint_path=str(tmp_path / "mean.safetensors"))
    last = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    index = {name: value for name, value in model.state_dict().items() if name.endswith("key_index")}
    assert index and all(torch.equal(value, last[name]) for name, value in index.items())

    converted = ["--model", f"{MODEL}.mk8", "--checkpoint", tmp_path / "mean.safetensors", *SMALL[:6]]
    data_args = ["--data-dir", data, "--device", DEVICE, "-b", 4, "--workers", 1]
    top1 = []
    for extra in ([], ["--reparam"]):
        text = run("validate.py", *converted, *data_args, "--split", "validation", *extra, cwd=tmp_path)
        top1.append(re.findall(r'"top1": ([\d.]+)', text)[-1])
    dense = timm.create_model(MODEL, num_classes=2)
    dense.load_state_dict(mk.fuse_masterkeys(model).state_dict())
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    stock = ["--model", MODEL, "--checkpoint", tmp_path / "dense.safetensors", *SMALL[:6]]
    text = run("validate.py", *stock, *data_args, "--split", "validation", cwd=tmp_path, plugin=False)
    top1.append(re.findall(r'"top1": ([\d.]+)', text)[-1])
    assert len(set(top1)) == 1

    pytest.importorskip("pandas")
    run("inference.py", *converted, *data_args, "--results-dir", tmp_path, cwd=tmp_path)
    assert list(tmp_path.glob("*.csv"))
    bench = ["--model", f"{MODEL}.mk8", "--img-size", 64, "-b", 2, "--device", DEVICE, "--num-bench-iter", 5]
    text = run("benchmark.py", *bench, "--num-warm-iter", 1, cwd=tmp_path)
    assert "infer_samples_per_sec" in text and "train_samples_per_sec" in text

    pytest.importorskip("onnxruntime")
    for extra in ([], ["--reparam"]):
        export = [tmp_path / "model.onnx", "--model", f"{MODEL}.mk8", "--checkpoint", tmp_path / "mean.safetensors"]
        run("onnx_export.py", *export, "--num-classes", 2, "--img-size", 64, *extra, "--check-forward", cwd=tmp_path)


def test_weights_are_read_without_the_plugin(data, tmp_path):
    """What train.py saved, fused and published, is an ordinary dense model to validate.py."""
    train(data, tmp_path)
    model = timm.create_model(f"{MODEL}.mk8", num_classes=2, checkpoint_path=str(tmp_path / "run" / "last.pth.tar"))
    mk.save_pretrained(model, tmp_path / "published", license="apache-2.0")
    assert "stages.0.blocks.0.conv_dw.weight" in load_file(tmp_path / "published" / "model.safetensors")
    args = ["--model", f"local-dir:{tmp_path / 'published'}", "--pretrained", "--data-dir", data, "--device", DEVICE]
    text = run("validate.py", *args, *SMALL[:4], "-b", 4, "--split", "validation", cwd=tmp_path, plugin=False)
    assert '"top1"' in text


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("test_size", [None, (3, 64, 64)])
def test_the_zoo_measures_what_validate_measures(data, dense, tmp_path, test_size):
    """Every column of timm's results file, of a network with a class that has no image; at its test size, if any."""
    (tmp_path / "classes.txt").write_text("bright\ndark\nlight\n")
    torch.manual_seed(1)
    cfg = {"test_input_size": test_size, "test_crop_pct": test_size and 1.0}
    model = timm.create_model(MODEL, num_classes=3, pretrained_cfg_overlay=cfg)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": MODEL, "num_classes": 3, "pretrained_cfg": {**model.pretrained_cfg, "num_classes": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    given = ["--data-dir", data, "--class-map", tmp_path / "classes.txt", "--device", "cpu", "-b", 3, "--workers", 1]
    given += ["--model", f"local-dir:{tmp_path}", "--pretrained", "--results-file", tmp_path / "results.csv"]
    run("validate.py", *given, cwd=tmp_path, plugin=False)
    with open(tmp_path / "results.csv", newline="") as file:
        [expected] = csv.DictReader(file)
    [measured] = measure([model], find_labelled_images(data, tmp_path / "classes.txt"), batch_size=3, workers=0)
    row = {"model": expected["model"], **vars(measured)}
    assert {name: str(row[name]) for name in expected} == expected


def test_train_from_a_calibrated_network(data, dense, tmp_path, monkeypatch):
    """``--pretrained`` alone calibrates, once; the second run starts from the cache."""
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIMM_MASTERKEYS_CALIBRATE", "builtin")
    states = [train(data, tmp_path, "--pretrained", "--pretrained-path", dense)["state_dict"] for _ in range(2)]
    overlay = {"file": str(dense), "num_classes": -1}
    model = timm.create_model(f"{MODEL}.mk8", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2)
    assert len(list((tmp_path / "cache" / "timm_masterkeys").glob("[!.]*"))) == 1
    for state in states:
        same(frozen(state, model), frozen(model.state_dict(), model))
