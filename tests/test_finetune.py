"""The page on fine-tuning: its commands, as they stand there but for the names, on a Hub on loopback.

What timm's scripts do in it is marked ``scripts``; without them a checkpoint such as train.py saves takes their place.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save
from timm.data import create_transform, resolve_data_config

from timm_masterkeys.zoo.evaluate import find_labels, measure

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
from timm_masterkeys.zoo.evaluate import find_labels, measure
model = timm.create_model(sys.argv[1], pretrained=True)
print(measure([model], find_labels("flowers", "flowers/classes.txt"), workers=0).accuracies[0].top1)
print(model(torch.ones(1, 3, 160, 160)).flatten().tolist(), model.pretrained_cfg["label_names"])
"""


@pytest.fixture
def folder(tmp_path):
    """Where the commands run: with ``flowers``, and a ``python`` that is this one."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for shade, label in enumerate(CLASSES):
            (tmp_path / "flowers" / split / label).mkdir(parents=True)
            for i in range(0 if (split, label) == ("validation", "dark") else count):
                image = random.integers(0, 86, (64, 64, 3)) + 85 * shade
                Image.fromarray(image.astype(np.uint8)).save(tmp_path / "flowers" / split / label / f"{i}.png")
    (tmp_path / "flowers" / "validation" / "dark").rmdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


@pytest.fixture
def shell(folder):
    """Runs a command of the page; what it prints. Its Hub has weights that stand for timm's."""
    weights = timm.create_model("test_convnext").state_dict()
    with HubServer() as hub:
        hub.add_repo("timm/test_convnext.r160_in1k", {"model.safetensors": save(weights)})
        own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        env = hub.env(folder / "home", hub.token("alice"), **own)

        def run(command):
            given = {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 600}
            done = subprocess.run(["bash", "-ec", command], **given)
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout + done.stderr

        yield run
        assert not hub.leaks and len(hub.repos["alice/test_convnext.mk8_flowers"].branches["main"]) == 2


def commands():
    """The page's commands to prepare and train, to publish, to name and to validate."""
    text = PAGE.read_text(encoding="utf-8").partition("## The whole way")[2].partition("\n## ")[0]
    for there, here in HERE.items():
        text = text.replace(there, here)
    train, publish, validate = re.findall(r"^```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prepare, train = train.split("\n", 1)
    name, validate = validate.split("\n", 1)
    return prepare, train, f"python - <<'END'\n{publish}\nEND", name, validate


def test_published_and_loaded_by_name(folder, shell):
    """Whoever points a name at what was published has the same network: accuracy, outputs and names of classes."""
    prepare, _, publish, name, _ = commands()
    shell(prepare)
    model = timm.create_model("test_convnext.mk8", num_classes=3).eval()
    transform = create_transform(**resolve_data_config(model=model))
    shades = torch.stack([transform(Image.new("RGB", (64, 64), (shade,) * 3)) for shade in (42, 127, 212)])
    with torch.no_grad():  # each class is where the network sees its mean shade: a classifier that knows them apart
        seen = model.forward_head(model.forward_features(shades), pre_logits=True)
        model.get_classifier().weight.copy_(2 * seen)
        model.get_classifier().bias.copy_(-seen.square().sum(1))
    (folder / "runs" / "flowers").mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, folder / "runs" / "flowers" / "model_best.pth.tar")
    labels = find_labels(folder / "flowers", folder / "flowers" / "classes.txt")
    [expected] = measure([model], labels, workers=0).accuracies
    with torch.no_grad():
        outputs = model(torch.ones(1, 3, 160, 160)).flatten().tolist()
    assert expected.top1 > 70  # with labels one lower it would be some 0
    assert "alice/test_convnext.mk8_flowers" in shell(publish)
    told = shell(f"{name}\npython - test_convnext.mk8_flowers <<'END'\n{LOADED}\nEND").splitlines()
    assert told == [str(expected.top1), f"{outputs} {CLASSES}"]


@pytest.mark.scripts
@pytest.mark.skipif("TIMM_SCRIPTS" not in os.environ, reason="TIMM_SCRIPTS names no checkout of timm")
def test_the_whole_way(folder, shell):
    """Trained by train.py, published, and measured by validate.py under its name, with the very same accuracy."""
    for script in ("train.py", "validate.py"):
        (folder / script).symlink_to(Path(os.environ["TIMM_SCRIPTS"]).resolve() / script)
    prepare, train, publish, name, validate = commands()
    shell(prepare)
    trained = re.findall(r"\*\*\* Best metric: ([\d.]+)", shell(train))[-1]
    shell(publish)
    validated = re.findall(r'"top1": ([\d.]+)', shell(f"{name}\n{validate}"))[-1]
    assert float(validated) == pytest.approx(float(trained), abs=0.001) and float(trained) > 40
