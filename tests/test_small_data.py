"""The small-data experiment runs, is resumed, and compares what it says."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import ARMS, arm_model, main, network  # from examples/
from torch import nn

import timm_masterkeys as mk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of four classes of noise, each of a colour of its own."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 80), ("validation", 25)):
        for label in range(4):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3)) + 30 * np.eye(4, 3, dtype=int)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / str(label) / f"{i}.png")
    return root


def depthwise(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_are_what_they_say(arm):
    torch.manual_seed(9)
    source = network(10, small=True)
    model = arm_model(arm, 10, True, 1, source)
    layers = depthwise(model)
    trains = [{n for n, p in layer.named_parameters() if p.requires_grad} for layer in layers]
    expected = {
        "dense": {"weight", "bias"},
        "none": {"bias"},
        "random": {"bias"},
        "scales": {"log_sigma", "shift", "bias"},
    }
    assert all(names == expected.get(arm, {"shift", "bias"}) for names in trains)
    banks = {layer.bank.name for layer in layers if isinstance(layer, mk.MasterKeyConv2d)}
    names = {"dense": set(), "random": set(), "random8": {"random8:1"}}
    assert banks == names.get(arm, {"scale-space-b"} if arm.startswith("scale") else {"babaiee2025"})
    again = arm_model(arm, 10, True, 1, source)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, depthwise(again), strict=True))
    if arm == "transfer":
        kept = depthwise(mk.convert_to_masterkeys(source))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, kept, strict=True))
        assert not torch.equal(model.head.fc.weight, source.head.fc.weight)


@pytest.mark.small_data
def test_quick_run_is_resumed_and_prints_the_same(folder, tmp_path, monkeypatch, capsys):
    results, plot = tmp_path / "runs.jsonl", tmp_path / "curves.png"
    args = ["small_data.py", str(folder), "--quick", "--results", str(results), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", args)
    main()
    first = capsys.readouterr().out
    rows = [line.split("|")[1:3] for line in first.splitlines() if line.startswith("| 1") or line.startswith("| 2")]
    assert [arm.strip() for _, arm in rows] == list(ARMS) * 2 and "order of the arms, best first:" in first
    assert plot.read_bytes().startswith(b"\x89PNG")
    runs = results.read_text().splitlines()
    assert len(runs) == 2 * len(ARMS) * (2 + 2)  # sizes, arms, decays tried and seeds
    results.write_text("\n".join(runs[:-1])[:-9])  # killed while it wrote: the last two are run again, and are the same
    main()
    assert [json.loads(line)["accuracy"] for line in results.read_text().splitlines()] == [
        json.loads(line)["accuracy"] for line in runs
    ]
    strip = [
        [line.split("|")[3] for line in text.splitlines() if line.startswith("| ")]
        for text in (first, capsys.readouterr().out)
    ]
    assert strip[0] == strip[1]


def test_what_cannot_be_run_is_said_at_once(folder, tmp_path, monkeypatch):
    for path, sizes, message in (
        (folder / "train", ["100"], "no folder 'train'"),
        (folder, ["100", "300"], "320 training images"),
        (folder, ["0"], "at least 5"),
    ):
        args = ["small_data.py", str(path), "--small", "--results", str(tmp_path / "no.jsonl"), "--sizes", *sizes]
        monkeypatch.setattr(sys, "argv", args)
        with pytest.raises(SystemExit, match=message):
            main()
    assert not (tmp_path / "no.jsonl").exists()
