"""The page on fine-tuning: its commands, as they stand there but for the names, on a Hub on loopback.

What timm's scripts do in it is marked ``scripts``; without them a checkpoint such as train.py saves takes their place.
"""

import csv
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save
from timm.data import create_transform, resolve_data_config

from timm_masterkeys.zoo.evaluate import find_labelled_images, measure

pytestmark = pytest.mark.filterwarnings(  # timm leaves the images it reads open
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

PAGE = Path(__file__).parent.parent / "examples" / "how-to" / "finetune.md"
HERE = {"convnext_atto": "test_convnext", "d2_in1k": "r160_in1k", "my-team": "alice", "102": "3"}
HERE |= {"--epochs 20": "--epochs 3", "train.py": "train.py -b 4 --workers 1 --device cpu", "--lr 5e-4": "--lr 5e-3"}
HERE |= {"validate.py": "validate.py -b 4 --workers 1 --device cpu"}
CLASSES = ["dark", "grey", "light"]  # validation has no dark ones: without the class map its labels are one lower
LOADED = """
import sys, timm, torch, timm_masterkeys
from timm_masterkeys.zoo.evaluate import find_labelled_images, measure
model = timm.create_model(sys.argv[1], pretrained=True)
print(measure([model], find_labelled_images("flowers", "flowers/classes.txt"), workers=0)[0].top1)
print(model(torch.ones(1, 3, 160, 160)).flatten().tolist(), model.pretrained_cfg["label_names"])
"""


@pytest.fixture
def folder(tmp_path):
    """Where the commands run: with ``flowers``, and a ``python`` that is this one."""
    random = np.random.default_rng(0)
    for split, label in itertools.product(("train", "validation"), CLASSES):
        if (split, label) != ("validation", "dark"):
            (tmp_path / "flowers" / split / label).mkdir(parents=True)
            for i in range(8 if split == "train" else 4):
                image = random.integers(0, 86, (64, 64, 3)) + 85 * CLASSES.index(label)
                Image.fromarray(image.astype(np.uint8)).save(tmp_path / "flowers" / split / label / f"{i}.png")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.fixture
def hub():
    """A Hub with weights that stand for timm's."""
    with HubServer() as server:
        for name in ("test_convnext", "test_efficientnet"):
            weights = save(timm.create_model(name).state_dict())
            server.add_repo(f"timm/{name}.r160_in1k", {"model.safetensors": weights})
        yield server
        assert not server.leaks


@pytest.fixture
def start(hub, folder):
    """Starts a command of the shell, where it finds this Python and the Hub."""
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    given = {"cwd": folder, "env": hub.env(folder / "home", hub.token("alice"), **own), "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    return lambda command: subprocess.Popen(["bash", "-ec", command], **given, **pipes)


@pytest.fixture
def shell(start):
    """Runs a command; what it prints."""

    def run(command):
        process = start(command)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, err[-4000:]
        return out + err

    return run


def commands():
    """The page's commands to prepare and train, to publish, to name and to validate."""
    text = PAGE.read_text(encoding="utf-8").partition("## The short way")[2].partition("\n## ")[0]
    for there, here in HERE.items():
        text = text.replace(there, here)
    train, publish, validate = re.findall(r"^```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prepare, train = train.split("\n", 1)
    name, validate = validate.split("\n", 1)
    return prepare, train, f"python - <<'END'\n{publish}\nEND", name, validate


@pytest.mark.slow
def test_published_and_loaded_by_name(hub, folder, shell):
    """Whoever points a name at what was published has the same network: accuracy, outputs and names of classes."""
    prepare, _, publish, name, _ = commands()
    shell(prepare)
    model = timm.create_model("test_convnext.mk8", num_classes=3).eval()
    transform = create_transform(**resolve_data_config(model=model))
    with torch.no_grad():  # the nearest of the classes' means: a classifier that knows them apart
        images = [transform(Image.open(path)) for path in sorted((folder / "flowers" / "train").glob("*/*"))]
        seen = model.forward_head(model.forward_features(torch.stack(images)), pre_logits=True)
        seen = seen.view(len(CLASSES), -1, seen.shape[1]).mean(1)
        model.get_classifier().weight.copy_(2 * seen)
        model.get_classifier().bias.copy_(-seen.square().sum(1))
        outputs = model(torch.ones(1, 3, 160, 160)).flatten().tolist()
    (folder / "runs" / "flowers").mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, folder / "runs" / "flowers" / "model_best.pth.tar")
    labels = find_labelled_images(folder / "flowers", folder / "flowers" / "classes.txt")
    assert measure([model], labels, workers=0)[0].top1 == 100
    shell(publish)
    assert len(hub.repos["alice/test_convnext.mk8_flowers"].branches["main"]) == 2
    printed = shell(f"{name}\npython - test_convnext.mk8_flowers <<'END'\n{LOADED}\nEND").splitlines()
    assert printed == ["100.0", f"{outputs} {CLASSES}"]


# --- With timm's scripts


@pytest.fixture
def scripts(folder):
    """Puts train.py and validate.py where the commands run."""
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip("TIMM_SCRIPTS names no checkout of timm")
    for script in ("train.py", "validate.py"):
        shutil.copy(Path(os.environ["TIMM_SCRIPTS"]) / script, folder)  # beside itself it would find another timm


@pytest.mark.scripts
def test_the_whole_way(scripts, shell):
    """Trained by train.py, published, and measured by validate.py under its name, with the very same accuracy."""
    prepare, train, publish, name, validate = commands()
    shell(prepare)
    trained = re.findall(r"\*\*\* Best metric: ([\d.]+)", shell(train))[-1]
    shell(publish)
    validated = re.findall(r'"top1": ([\d.]+)', shell(f"{name}\n{validate}"))[-1]
    assert float(validated) == pytest.approx(float(trained), abs=0.001) and float(trained) > 40


@pytest.mark.scripts
def test_the_example_goes_on_where_it_was(scripts, folder, start, shell):
    """Killed after an epoch and run again: no epoch twice, a table of all arms; then nothing is left to do.

    Each arm has the rate that was best on held-out training images, the distilled one that of its kind.
    """
    example = PAGE.parent.parent / "finetune.py"
    command = (
        f"python {example} flowers --scripts . --model test_efficientnet.r160_in1k --arms dense 1-calibrated-affine-kd"
    )
    command += " --epochs 3 --batch-size 4 --workers 1 --device cpu --tune 1e-4 1e-2 --tune-epochs 1"
    process = start(command)
    while not list(folder.glob("finetune/*/validation/dense*/last.pth.tar")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    printed = shell(command)
    log = next(folder.glob("finetune/*/validation/dense*/train.py.log")).read_text()
    assert "Loaded checkpoint" in log and log.count("Train: 0 [   0/6") == 1
    with (folder / "finetune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tried: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["measured on"] == "held out":
            tried.setdefault(row["arm"], {})[row["lr"]] = float(row["top1"])
    assert {arm: list(rates) for arm, rates in tried.items()} == {
        arm: ["0.0001", "0.01"] for arm in ("dense", "1-calibrated-affine")
    }
    rows = [row for row in rows if row["measured on"] == "validation"]
    arms = ["dense", "1-calibrated-affine-kd"]
    best = {arm: max(rates, key=rates.__getitem__) for arm, rates in tried.items()}
    assert [row["lr"] for row in rows] == [best[arm.removesuffix("-kd")] for arm in arms for _ in range(3)]
    assert [(row["arm"], row["epoch"]) for row in rows] == [(arm, str(i)) for arm in arms for i in (1, 2, 3)]
    for row in rows[2::3]:
        assert float(row["validate.py"]) == pytest.approx(float(row["top1"]), abs=0.001)
        (line,) = re.findall(rf"^\| {row['arm']} \|.*", printed, re.MULTILINE)
        assert f"| {float(row['top1']):.1f} |" in line
    logs = {path: path.stat().st_size for path in folder.glob("finetune/**/*.log")}
    assert shell(command).splitlines()[-3:] == printed.splitlines()[-3:]
    assert {path: path.stat().st_size for path in folder.glob("finetune/**/*.log")} == logs
