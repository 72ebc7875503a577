"""The small-data experiment runs, is resumed, and compares what it says."""

import json
import sys

import numpy as np
import pytest
import torch
from intervals import interval
from PIL import Image
from small_data import ARMS, Data, arm_model, main, network, tables  # from examples/
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
        "transfer-dense": {"bias"},
        "scales": {"log_sigma", "shift", "bias"},
    }
    assert all(names == expected.get(arm, {"shift", "bias"}) for names in trains)
    banks = {layer.bank.name for layer in layers if isinstance(layer, mk.MasterKeyConv2d)}
    names = {"dense": set(), "random": set(), "transfer-dense": set(), "random8": {"random8:1"}}
    assert banks == names.get(arm, {"scale-space-b"} if arm.startswith("scale") else {"babaiee2025"})
    again = arm_model(arm, 10, True, 1, source)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, depthwise(again), strict=True))
    if arm.startswith("transfer"):
        kept = depthwise(source if arm == "transfer-dense" else mk.convert_to_masterkeys(source))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, kept, strict=True))
        assert not torch.equal(model.head.fc.weight, source.head.fc.weight)


def test_every_seed_draws_a_subset_and_is_tuned_on_other_images(folder):
    data = Data(str(folder), 8)
    first, rest = data.subset(200, 1)
    assert len(first[1]) == 200 and len(rest[1]) == 64
    assert torch.equal(data.subset(100, 1)[0][0], first[0][:100])  # a larger subset holds the smaller
    assert not torch.equal(data.subset(200, 2)[0][0], first[0])
    seen = {image.numpy().tobytes() for image in first[0]}
    assert not any(image.numpy().tobytes() in seen for image in rest[0])


def test_arms_are_compared_in_pairs():
    """Student's t by hand: 1, 2 and 3 above are 2 +- 4.30 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == "+2.0 ± 2.5" and interval([1.0, 1.1, 1.2]) == "+1.1 ± 0.2 *"
    assert interval([]) == "" and interval([1.0]) == "+1.0"
    about = {"data": "d", "px": 8, "network": "small", "images": 9, "passes": 9, "lr": 1, "weight_decay": 0.05}
    about |= {"seconds": 1.0, "parameters": 1000}
    kept = [
        about | {"arm": arm, "seed": seed, "accuracy": 10.0 * seed + above, "curve": [[3, 1.0]]}
        for arm, above in (("dense", 0.0), ("none", 1.0))
        for seed in (0, 1, 2)
    ]
    dense, keys = tables(kept)[-2:]
    assert dense == "| dense | 15.0 ± 7.1 |  | 1 | 0.05 | 2 | 1.00 | 1,000 |"
    assert keys.startswith("| none | 16.0 ± 7.1 | +1.0 ± 0.0 * |")  # the seeds differ, the pairs do not


@pytest.mark.small_data
def test_quick_run_is_resumed_and_prints_the_same(folder, tmp_path, monkeypatch, capsys):
    results, plot = tmp_path / "runs.jsonl", tmp_path / "curves.png"
    args = ["small_data.py", str(folder), "--quick", "--source", str(folder)]
    monkeypatch.setattr(sys, "argv", [*args, "--results", str(results), "--plot", str(plot)])
    main()
    first = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")]
    assert rows == ["arm", *ARMS] * 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    runs = results.read_text().splitlines()
    assert len(runs) == 2 * len(ARMS) * (4 + 2)  # sizes, arms, rates and decays tried, seeds
    results.write_text("\n".join(runs[:-1])[:-9])  # killed while it wrote: the last two are run again, and are the same
    main()
    assert [json.loads(line)["accuracy"] for line in results.read_text().splitlines()] == [
        json.loads(line)["accuracy"] for line in runs
    ]
    accuracies = [
        [line.split("|")[2:4] for line in text.splitlines() if line.startswith("| ")]
        for text in (first, capsys.readouterr().out)
    ]
    assert accuracies[0] == accuracies[1]


def test_transfer_needs_other_images(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_data.py", str(folder), "--arms", "transfer"])
    with pytest.raises(SystemExit):
        main()
    assert "transfer needs --source FOLDER" in capsys.readouterr().err
