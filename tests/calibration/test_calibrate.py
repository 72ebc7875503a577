"""Calibration: what was damaged is found again, on unseen images; nothing frozen touched; whole or not at all."""

import copy
import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
import skimage.data
import timm
import torch
import torchvision
from lite0 import lite0
from PIL import Image
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.blocks import BlockwiseNetwork, find_blocks
from timm_masterkeys.calibration.least_squares import RIDGES, Gram, choose_keys, fit_ridge
from timm_masterkeys.conversion.record import CalibrationRecord, read_record

FAMILIES = {  # with the pointwise layer that ends a block
    "test_efficientnet": ("conv_pw", "conv_pwl"),
    "test_convnext": ("fc2",),
    "test_convnext2": ("fc2",),
    "inception_next_atto": ("fc2",),
    "starnet_s1": ("conv",),
    "mobilenetv4_conv_small_035": ("conv_pwl", "conv"),
    "fastvit_t8": ("fc2", "conv"),
    "edgenext_xx_small": ("fc2",),
}


SMALL = {  # where timm lets one choose
    "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "starnet_s1": {"depths": (1, 1, 1, 1)},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
    "edgenext_xx_small": {"depths": (2, 2, 2, 2)},
}


def pair(name, keys_per_kernel=1):
    """A model with random weights whose kernels are all keys, and the dense network that equals it."""
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=20, **SMALL.get(name, {})).eval()
    for module in stock.modules():
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.constant_(module.gamma, 0.5)  # LayerScale, nearly off before training
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        stock.train()(torch.randn(8, 3, 64, 64))  # statistics as after training
    stock.eval()
    model = mk.convert_to_masterkeys(stock, keys_per_kernel=keys_per_kernel)
    return model, mk.fuse_masterkeys(model)


def converted(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, mk.MasterKeyConv2d)}


@torch.no_grad()
def error(model, dense, x):
    return float((model(x) - dense(x)).square().mean() / dense(x).var())


def same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.fixture(scope="module")
def photographs():
    """Crops of photographs at 96 px, normalised for EfficientNet-Lite0."""
    pictures = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.astronaut()]
    generator = np.random.default_rng(0)
    crops = []
    for picture, _ in itertools.product(pictures, range(15)):
        y, x = (int(generator.integers(0, size - 192)) for size in picture.shape[:2])
        crops.append(np.asarray(Image.fromarray(picture[y : y + 192, x : x + 192]).resize((96, 96))))
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x[torch.from_numpy(generator.permutation(len(x)))]


@pytest.mark.parametrize("name", FAMILIES)
def test_absorption_finds_damaged_pointwise_layers_again(name):
    """Block by block the last pointwise layer, and those outside of blocks, through norms, LayerScales and skips."""
    model, dense = pair(name)
    blocks, _ = find_blocks(model, torch.randn(2, 3, 64, 64))
    ends = [block.pointwise for block in blocks if block.converted]
    assert all(end.rpartition(".")[2] in FAMILIES[name] for end in ends if end) and sum(map(bool, ends)) >= 2
    for end in filter(None, ends):
        weight = model.get_submodule(end).weight.detach()
        nn.init.normal_(weight, std=float(weight.std()))
    seen, unseen = torch.randn(60, 3, 64, 64), torch.randn(20, 3, 64, 64)
    before, start = copy.deepcopy(model.state_dict()), error(model, dense, unseen)
    report = mk.calibrate_masterkeys(model, dense, seen, stages=["absorption"])
    (stage,) = report.stages
    assert error(model, dense, unseen) < 0.35 * start
    assert stage.after < 0.5 * stage.before and report.record.held_out < 20 < report.record.images == 60
    touched = {f"{layer}.{entry}" for layer in stage.changed for entry in ("weight", "bias")}
    for entry, value in model.state_dict().items():
        if entry not in touched and "running_mean" not in entry:
            assert torch.equal(value, before[entry]), entry


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("keys_per_kernel", [1, 2])
def test_projection_finds_the_keys_again(name, keys_per_kernel):
    model, dense = pair(name, keys_per_kernel)
    x, generator = torch.randn(30, 3, 64, 64), torch.Generator().manual_seed(0)
    expected = copy.deepcopy(model)
    for layer in converted(model).values():
        layer.key_index.copy_(torch.randint(0, 8, layer.key_index.shape, generator=generator))
        layer.scale.normal_()
        layer.shift.data.normal_()
    start = error(model, dense, x)
    report = mk.calibrate_masterkeys(model, dense, x, stages=["projection"])
    assert error(model, dense, x) < (0.001 if keys_per_kernel == 1 else 0.1) * start
    assert set(report.stages[0].changed) == set(converted(model))
    for name, layer in converted(model).items():
        if keys_per_kernel == 1:  # with more, the greedy choice need not be theirs
            torch.testing.assert_close(layer.weight, expected.get_submodule(name).weight, rtol=0.02, atol=2e-3)
            assert layer.r2.min() > 0.99


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_kernels_of_all_keys_stay_where_least_squares_lose_them(name):
    """Eight keys of nine taps cancel each other; what was exact stays exact."""
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=1).eval()
    model, x = mk.convert_to_masterkeys(dense, keys_per_kernel=8), torch.randn(60, 3, 64, 64)
    start = error(model, dense, x)
    report = mk.calibrate_masterkeys(model, dense, x, stages="projection")
    assert error(model, dense, x) <= start + 1e-6 and report.stages[0].after <= report.stages[0].before + 1e-6


def test_statistics_find_the_norms_again_and_change_nothing_else():
    model, dense = pair("test_efficientnet")
    x, before = torch.randn(30, 3, 64, 64), copy.deepcopy(model.state_dict())
    _, norms = find_blocks(model, x[:2])
    for name in converted(model):
        norm = model.get_submodule(norms[name])
        norm.running_mean += 1
        norm.running_var *= 3
    report = mk.calibrate_masterkeys(model, dense, x, stages=["statistics"])
    assert error(model, dense, x) < 1e-8 and report.stages[0].after < 1e-8 < report.stages[0].before
    for entry, value in model.state_dict().items():
        torch.testing.assert_close(value, before[entry], rtol=1e-3, atol=1e-4)
        assert "running" in entry or torch.equal(value, before[entry])
    model, dense = pair("test_convnext")
    for layer in converted(model).values():
        layer.bias.data += 1
    mk.calibrate_masterkeys(model, dense, x, stages=["statistics"])
    assert error(model, dense, x) < 1e-8


class Normed(nn.Module):
    """A depthwise layer and a linear one at every position, each with a norm; ReLU before the first one if ``act``."""

    def __init__(self, norm, act=False):
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.act, self.norm = nn.ReLU(inplace=True) if act else nn.Identity(), norm(8)
        self.fc, self.bn, self.head = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 5)
        for module in (self.norm, self.bn):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.norm(self.act(self.dw(self.stem(x)))).relu()
        x = self.fc(x.flatten(2).transpose(1, 2))
        return self.head(self.bn(x.flatten(0, 1)).view_as(x).relu().mean(1))


NORMS = [
    nn.BatchNorm2d,
    torchvision.ops.FrozenBatchNorm2d,
    timm.layers.BatchNormAct2d,
    timm.layers.FrozenBatchNormAct2d,
]


@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_every_kind(norm):
    stock = Normed(norm).eval()
    model = mk.convert_to_masterkeys(stock)
    dense = mk.fuse_masterkeys(model)
    x, unseen = torch.randn(40, 3, 16, 16), torch.randn(20, 3, 16, 16)
    assert find_blocks(model, x[:2])[1] == {"dw": "norm", "fc": "bn"}
    model.norm.running_mean += 1
    model.norm.running_var *= 3
    report = mk.calibrate_masterkeys(model, dense, x, stages="statistics")
    assert error(model, dense, unseen) < 1e-6 and report.stages[0].changed == ("dw",)
    nn.init.normal_(model.fc.weight)
    model.bn.running_mean += 1
    start = error(model, dense, unseen)
    report = mk.calibrate_masterkeys(model, dense, x, stages="absorption")
    assert error(model, dense, unseen) < 0.01 * start and "fc" in report.stages[0].changed


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_after_something_in_place_is_not_that_of_the_layer(norm):
    model = mk.convert_to_masterkeys(Normed(norm, act=True).eval())
    assert find_blocks(model, torch.randn(2, 3, 16, 16))[1] == {"fc": "bn"}


def test_a_trained_network_on_photographs(photographs):
    dense = lite0()
    model = mk.convert_to_masterkeys(dense).train()
    seen, unseen = photographs[:30], photographs[30:]
    stock, keys = copy.deepcopy(dense.state_dict()), [layer.keys.clone() for layer in converted(model).values()]
    start = error(copy.deepcopy(model).eval(), dense, unseen)
    report = mk.calibrate_masterkeys(model, dense, seen)
    assert model.training and not dense.training and same(dense.state_dict(), stock)
    assert all(map(torch.equal, keys, [layer.keys for layer in converted(model).values()]))
    assert error(model.eval(), dense, unseen) < 0.5 * start
    assert report.after["divergence"] < 0.5 * report.before["divergence"]
    assert [stage.name for stage in report.stages] == ["projection", "statistics", "absorption"]
    assert "30 images" in str(report) and "absorption" in str(report)


def test_the_same_twice_and_from_its_own_result():
    model, dense = pair("test_efficientnet")
    x = torch.randn(40, 3, 64, 64)
    for layer in converted(model).values():
        layer.scale.mul_(torch.rand(layer.scale.shape) + 0.5)
    again, start = copy.deepcopy(model), error(model, dense, x)
    mk.calibrate_masterkeys(model, dense, x)
    mk.calibrate_masterkeys(again, dense, x)
    assert same(model.state_dict(), again.state_dict()) and error(model, dense, x) < 0.01 * start
    blocks, norms = find_blocks(again, x[:2])
    for name in [*converted(again), *(block.pointwise for block in blocks)]:
        if name in norms:  # they aim at the dense network's, wherever they have come to
            again.get_submodule(norms[name]).running_mean += 0.1
    mk.calibrate_masterkeys(again, dense, x)
    mk.calibrate_masterkeys(again, dense, x)
    assert error(again, dense, x) < 0.01 * start


@pytest.mark.parametrize(("count", "keys_per_kernel"), [(5, 1), (5, 2), (5, 3), (5, 5), (16, 3)])
def test_choose_keys_against_brute_force(count, keys_per_kernel):
    """The best of all sets; of sixteen keys, which have too many, one after the other."""
    generator = np.random.default_rng(0)
    size = count + 2  # ones, the keys, the wanted output
    rows = generator.normal(size=(4, 500, size)) @ generator.normal(size=(4, size, size))
    covariance = torch.from_numpy(np.stack([np.cov(channel.T, bias=True) for channel in rows]))
    keys, scale, shift = choose_keys(covariance, keys_per_kernel)
    for c, channel in enumerate(rows - rows.mean(1, keepdims=True)):

        def fit(chosen, channel=channel):
            solution, (missed,), *_ = np.linalg.lstsq(
                channel[:, [0, *(k + 1 for k in chosen)]], channel[:, -1], rcond=None
            )
            return missed, solution

        if count == 5:
            best = min(itertools.combinations(range(count), keys_per_kernel), key=lambda chosen: fit(chosen)[0])
        else:
            best = ()
            for _ in range(keys_per_kernel):
                best = min(((*best, k) for k in range(count) if k not in best), key=lambda chosen: fit(chosen)[0])
        assert keys[c].tolist() == list(best)
        np.testing.assert_allclose([shift[c], *scale[c]], fit(best)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_by_folds_against_numpy(intercept):
    """The ridge whose refits to all folds but one do best on that one; then all rows."""
    torch.manual_seed(0)
    features = torch.randn(60, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64) + 1
    residual = features @ torch.randn(20, 3, dtype=torch.float64) / 9 + torch.randn(60, 3) + (2.0 if intercept else 0.0)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    folds = [Gram.of(f, r) for f, r in zip(features.split(15), residual.split(15), strict=True)]
    got, bias = fit_ridge(folds, weight, intercept)
    f, r, w = features.numpy(), residual.numpy(), weight.numpy()

    def refit(rows, ridge):
        f0, r0 = (f[rows].mean(0), r[rows].mean(0)) if intercept else (np.zeros(20), np.zeros(3))
        gram = (f[rows] - f0).T @ (f[rows] - f0)
        d = np.linalg.solve(gram + ridge * np.trace(gram) / 20 * np.eye(20), (f[rows] - f0).T @ (r[rows] - r0))
        return d, r0 - f0 @ d

    errors = []
    for ridge in RIDGES:
        errors.append(0.0)
        for fold in np.arange(60).reshape(4, 15):
            d, b = refit(np.setdiff1d(np.arange(60), fold), ridge)
            errors[-1] += float((w * (r[fold] - f[fold] @ d - b) ** 2).sum())
    best = int(np.argmin(errors))
    assert 0 < best < len(RIDGES) - 1
    d, b = refit(np.arange(60), RIDGES[best])
    np.testing.assert_allclose(got.numpy(), d, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), b, atol=1e-8)


def test_ridge_leaves_what_does_not_generalise():
    torch.manual_seed(0)
    features, residual = torch.randn(12, 30), torch.randn(12, 3).abs()
    folds = [Gram.of(features[:6], residual[:6]), Gram.of(features[6:], -10 * residual[6:])]
    assert fit_ridge(folds, torch.ones(3, dtype=torch.float64), True) is None


def test_the_images_of_the_report_choose_nothing():
    """Whatever they show, the model comes out the same; only the figures are others."""
    model, dense = pair("test_efficientnet")
    for layer in converted(model).values():
        layer.scale.mul_(1.5)
    again, x = copy.deepcopy(model), torch.randn(40, 3, 64, 64)
    report = mk.calibrate_masterkeys(model, dense, x, batch_size=8)
    other = x.clone()
    other[32:] = torch.rand(8, 3, 64, 64) * 3  # the fifth batch
    figures = mk.calibrate_masterkeys(again, dense, other, batch_size=8)
    assert same(model.state_dict(), again.state_dict()) and report.record.held_out == figures.record.held_out == 8
    assert report.after != figures.after and report.stages[0].before != figures.stages[0].before


def test_blocks_that_fold_positions_into_the_batch():
    dense = timm.create_model("mobilevit_xxs", num_classes=5).eval()
    model, x = mk.convert_to_masterkeys(dense, keys_per_kernel=8), torch.randn(10, 3, 64, 64)
    start = error(model, dense, x)
    mk.calibrate_masterkeys(model, dense, x, stages=["statistics"], batch_size=2)
    assert error(model, dense, x) < start


def test_synchronised_norms():
    model, dense = pair("test_efficientnet")
    model, dense = (timm.layers.convert_sync_batchnorm(network) for network in (model, dense))
    _, norms = find_blocks(model.eval(), torch.randn(2, 3, 64, 64))
    assert set(norms) >= set(converted(model))


def test_a_lone_layer_does_not_make_its_stage_a_block():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.one, self.two = Block(), Block()

        def forward(self, x):
            return self.two(self.one(x + self.position(x))).mean((2, 3))

    blocks, _ = find_blocks(mk.convert_to_masterkeys(Stage()), torch.randn(2, 8, 16, 16))
    assert [block.name for block in blocks] == ["position", "one", "two"]


class Crossing(nn.Module):
    """A connection past a block: what the block before puts out is not all that goes on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        a = self.stem(x)
        b = self.blocks[0](a)
        c = self.blocks[1](b)
        return self.blocks[2](c + a).mean((2, 3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        spatial, pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.inner = nn.Sequential(spatial, nn.ReLU(inplace=True), pointwise)

    def forward(self, x):
        return self.inner(x)


def test_a_network_run_part_by_part_gives_what_it_gives_in_one_go():
    torch.manual_seed(0)
    for model in (Crossing().eval(), pair("test_efficientnet")[1], pair("edgenext_xx_small")[1]):
        model = mk.convert_to_masterkeys(model)
        batches = list(torch.randn(6, 3, 64, 64).split(3))
        blocks, _ = find_blocks(model, batches[0])
        network = BlockwiseNetwork(model, blocks, batches)
        for index in range(len(blocks)):
            network.outputs = network.run(index, network.enter(index))
        with torch.no_grad():
            expected = torch.cat([model(batch) for batch in batches])
        torch.testing.assert_close(torch.cat(list(network.finish())), expected)
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_it_cannot_place_are_named():
    class Twice(Crossing):
        def forward(self, x):
            a = self.blocks[0](self.stem(x))
            return self.blocks[1](self.blocks[1](a)).mean((2, 3))

    dense = Twice().eval()
    model = mk.convert_to_masterkeys(dense)
    report = mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 16, 16))
    assert set(report.stages[0].left) == {"blocks.1.inner.0", "blocks.2.inner.0"}
    assert "more than once" in report.stages[0].left["blocks.1.inner.0"]


def test_images_as_batches_and_as_a_folder(tmp_path):
    model, dense = pair("test_efficientnet")
    others = [copy.deepcopy(model) for _ in range(2)]
    x = torch.randn(20, 3, 64, 64)
    labelled = [(part, torch.zeros(len(part))) for part in x.split(7)]
    one = mk.calibrate_masterkeys(model, dense, x, stages=["statistics"])
    two = mk.calibrate_masterkeys(others[0], dense, labelled, stages=["statistics"])
    assert one.record.images == two.record.images == 20 and same(model.state_dict(), others[0].state_dict())
    assert mk.calibrate_masterkeys(others[1], dense, labelled, stages=["statistics"], max_images=12).record.images == 12
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (80, 80, 3)).astype(np.uint8)
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / (f"{i}.png" if i % 3 else f"{i % 2}/{i}.jpg"))
    assert mk.calibrate_masterkeys(model, dense, tmp_path, stages=["statistics"]).record.images == 12
    with pytest.raises(mk.CalibrationError, match="no folder"):
        mk.calibrate_masterkeys(model, dense, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(mk.CalibrationError, match="no images"):
        mk.calibrate_masterkeys(model, dense, tmp_path / "empty")


def photograph(path, seed, size=(80, 80, 3)):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)).save(path)


def test_files_that_are_no_images(tmp_path, caplog, monkeypatch):
    model, dense = pair("test_efficientnet")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    for i in range(11):
        photograph(tmp_path / f"{i:02}.png", i)
    good = tmp_path / "00.png"
    for name in (".hidden.png", "._01.png", ".trash/02.png"):  # not looked at, whatever they hold
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "corrupt.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "truncated.png").write_bytes(good.read_bytes()[:500])
    photograph(tmp_path / "large.png", 0, (200, 200, 3))  # PIL warns of it
    photograph(tmp_path / "bomb.png", 0, (300, 300, 3))  # and refuses this
    expected, bad = copy.deepcopy(model), {"empty.png", "corrupt.jpg", "truncated.png", "large.png", "bomb.png"}
    report = mk.calibrate_masterkeys(model, dense, tmp_path, stages=["statistics"])
    warned = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert report.record.images == 11 and len(warned) == 5
    assert all(any(str(tmp_path / name) in message for message in warned) for name in bad)
    for name in bad:
        (tmp_path / name).unlink()
    mk.calibrate_masterkeys(expected, dense, tmp_path, stages=["statistics"])
    assert same(model.state_dict(), expected.state_dict())


def test_others_take_the_places_of_broken_files_and_too_few_are_refused(tmp_path):
    model, dense = pair("test_efficientnet")
    for i in range(13):
        photograph(tmp_path / f"{i:02}.png", i)
    for i in (0, 5):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    assert mk.calibrate_masterkeys(model, dense, tmp_path, stages=["statistics"], max_images=11).record.images == 11
    for i in (1, 7):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mk.CalibrationError, match=r"9 of 13 images in '.*' can be read, expected at least 10"):
        mk.calibrate_masterkeys(model, dense, tmp_path, stages=["statistics"])
    assert same(model.state_dict(), before)


def test_a_folder_for_models_of_one_channel_and_of_four(tmp_path):
    for i in range(10):
        photograph(tmp_path / f"{i}.png", i)
    grey, colour = (
        timm.create_model("test_efficientnet", num_classes=20, in_chans=channels).eval() for channels in (1, 3)
    )
    model = mk.convert_to_masterkeys(grey)
    expected, config = copy.deepcopy(model), timm.data.resolve_model_data_config(colour)
    assert mk.calibrate_masterkeys(model, grey, tmp_path, stages=["statistics"]).record.images == 10
    config |= {"input_size": (1, *config["input_size"][1:]), "mean": (np.mean(config["mean"]),)}
    config |= {"std": (np.mean(config["std"]),)}
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(Image.open(tmp_path / f"{i}.png").convert("L")) for i in range(10)])
    mk.calibrate_masterkeys(expected, grey, images, stages=["statistics"])
    assert same(model.state_dict(), expected.state_dict())
    four = timm.create_model("test_efficientnet", in_chans=4)
    with pytest.raises(mk.CalibrationError, match=r"takes images of 4 channels, a folder gives 3 or 1: give a tensor"):
        mk.calibrate_masterkeys(mk.convert_to_masterkeys(four), four, tmp_path)


def test_over_the_time_budget_only_statistics():
    model, dense = pair("test_efficientnet")
    expected, x = copy.deepcopy(model), torch.randn(20, 3, 64, 64)
    report = mk.calibrate_masterkeys(model, dense, x, time_budget=0)
    mk.calibrate_masterkeys(expected, dense, x, stages=["statistics"])
    assert same(model.state_dict(), expected.state_dict())
    projection, statistics, absorption = report.stages
    assert not projection.changed and not absorption.changed and statistics.changed
    assert set(projection.left) == set(converted(model)) and "time budget" in absorption.left["classifier"]


def bad_images():
    x = torch.randn(20, 3, 64, 64)
    nan = x.clone()
    nan[3] = float("nan")
    return {
        "5 images": x[:5],
        "hold NaN": nan,
        "torch.uint8": x.to(torch.uint8),
        "expected (N, channels, H, W)": x[0],
        "0 images": [],
    }


@pytest.mark.parametrize("message", bad_images())
def test_bad_images(message):
    model, dense = pair("test_efficientnet")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mk.CalibrationError) as caught:
        mk.calibrate_masterkeys(model, dense, bad_images()[message])
    assert message in str(caught.value) and same(model.state_dict(), before)


def test_bad_models():
    model, dense = pair("test_efficientnet")
    x = torch.randn(12, 3, 64, 64)
    with pytest.raises(mk.CalibrationError, match="no converted layer"):
        mk.calibrate_masterkeys(dense, dense, x)
    with pytest.raises(mk.CalibrationError, match="expected the Conv2d that was converted"):
        mk.calibrate_masterkeys(model, model, x)
    with pytest.raises(mk.CalibrationError, match="at classifier"):
        mk.calibrate_masterkeys(model, timm.create_model("test_efficientnet", num_classes=3), x)
    for stages in (["healing"], "healing"):
        with pytest.raises(
            mk.CalibrationError, match=r"stages is .*healing.*, expected some of projection, statistics"
        ):
            mk.calibrate_masterkeys(model, dense, x, stages=stages)
    with pytest.raises(mk.CalibrationError, match="calibrate in float32"):
        mk.calibrate_masterkeys(copy.deepcopy(model).half(), copy.deepcopy(dense).half(), x)
    quantised = copy.deepcopy(model)
    quantised.classifier.weight = nn.Parameter(
        model.classifier.weight.detach().as_subclass(type("Int8", (torch.Tensor,), {}))
    )
    with pytest.raises(
        mk.CalibrationError, match=r"^classifier\.weight is of type Int8.* Calibrate first, then quantise"
    ):
        mk.calibrate_masterkeys(quantised, dense, x)
    with pytest.raises(mk.CalibrationError, match="cannot work with images of"):
        mk.calibrate_masterkeys(model, dense, torch.randn(12, 4, 64, 64))
    with pytest.raises(mk.CalibrationError, match="of one size"):
        mk.calibrate_masterkeys(model, dense, [torch.randn(12, 3, 64, 64), torch.randn(2, 3, 32, 32)])
    with pytest.raises(mk.CalibrationError, match="max_images"):
        mk.calibrate_masterkeys(model, dense, x, max_images=3)
    dense.conv_stem.weight.data[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mk.CalibrationError, match="puts out NaN"):
        mk.calibrate_masterkeys(model, dense, x)
    assert same(model.state_dict(), before)


def test_it_warns_of_a_dense_model_with_other_weights(caplog):
    model, dense = pair("test_efficientnet")
    other = timm.create_model("test_efficientnet", num_classes=20)
    x = torch.randn(12, 3, 64, 64)
    mk.calibrate_masterkeys(model, dense, x)
    mk.calibrate_masterkeys(model, dense, x)  # its own work is no cause
    assert not caplog.text
    mk.calibrate_masterkeys(copy.deepcopy(model), other, x)  # a layer that calibration never changes is
    assert "parameters beside the kernels differ from the dense model's" in caplog.text
    caplog.clear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # trained since: nobody knows what came from where
    mk.calibrate_masterkeys(model, dense, x)
    assert not caplog.text
    model, _ = pair("test_efficientnet")
    mk.calibrate_masterkeys(model, other, x)
    assert "differ from the dense model's" in caplog.text


def test_a_model_of_no_library_is_calibrated_twice_without_a_warning(caplog):
    dense = Crossing().eval()
    model, x = mk.convert_to_masterkeys(dense), torch.randn(20, 3, 16, 16)
    mk.calibrate_masterkeys(model, dense, x)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=False))
    mk.calibrate_masterkeys(copy.deepcopy(model), dense, x)
    assert not caplog.text


@pytest.mark.parametrize("second", ["whole", "part"])
def test_a_part_that_was_calibrated_alone_is_known_to_be(caplog, second):
    dense = nn.Sequential(Crossing(), nn.Identity()).eval()
    model, x = mk.convert_to_masterkeys(dense), torch.randn(20, 3, 16, 16)
    mk.calibrate_masterkeys(model[0], dense[0], x)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=False))
    mk.calibrate_masterkeys(*((model, dense) if second == "whole" else (model[0], dense[0])), x)
    mk.calibrate_masterkeys(model, dense, x)
    assert not caplog.text


def everything(*models):
    """All that a failed calibration has to leave as it was."""
    found = []
    for model in models:
        found.append({name: value.clone() for name, value in model.state_dict().items()})
        for module in model.modules():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            found.append((module.training, hooks, "forward" in module.__dict__))
    return found


def equal(before, after):
    return all(same(a, b) if isinstance(a, dict) else a == b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "where",
    [
        "timm_masterkeys.calibration.calibrate.find_nothing",
        "timm_masterkeys.calibration.blockwise.find_blocks",
        "timm_masterkeys.calibration.blockwise.match",
        "timm_masterkeys.calibration.stages.fit_ridge",
        "timm_masterkeys.calibration.block_pair.BlockPair.error",
        "timm_masterkeys.calibration.blocks.pick_output",
        "timm_masterkeys.calibration.calibrate.share_intervals",
        "timm_masterkeys.calibration.calibrate.write_record",
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_fails_both_models_stay_as_they_were(where, error, monkeypatch):
    model, dense = pair("test_efficientnet")
    x = torch.randn(20, 3, 64, 64)
    for layer in converted(model).values():
        layer.scale.mul_(2)
    mk.calibrate_masterkeys(model, dense, x, stages="statistics")
    model.train(), dense.train(), dense.conv_stem.eval(), model.blocks.eval()
    before, record = everything(model, dense), read_record(model)
    assert record.calibration

    def failing(*args, **kwargs):
        raise error

    def metric(out, expected):
        raise error

    monkeypatch.setattr(where, failing, raising=not where.endswith("nothing"))
    with pytest.raises(error):
        mk.calibrate_masterkeys(model, dense, x, metric=metric if where.endswith("nothing") else None)
    assert equal(before, everything(model, dense)) and read_record(model) == record


def test_the_same_bit_for_bit_however_busy_the_machine():
    model, dense = pair("test_efficientnet")
    for layer in converted(model).values():
        layer.scale.mul_(1.5)
    again, x = copy.deepcopy(model), torch.randn(40, 3, 64, 64)
    first = mk.calibrate_masterkeys(model, dense, x)
    done, rounds = threading.Event(), itertools.count()

    def burn():
        while not done.is_set():
            next(rounds)
            sum(range(1000))

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        second = mk.calibrate_masterkeys(again, dense, x)
    finally:
        done.set()
        thread.join()
    assert next(rounds) > 100 and same(model.state_dict(), again.state_dict())
    assert (first.before, first.after) == (second.before, second.after)
    assert first.record.entries == second.record.entries and [s.before for s in first.stages] == [
        s.before for s in second.stages
    ]


@pytest.mark.parametrize("kind", ["classification", "dense prediction", "regression"])
def test_whatever_the_default_device(kind):
    """As between torch's own with-blocks of a device; nothing of a calibration is made there."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    layers += [] if kind == "dense prediction" else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    dense = nn.Sequential(*layers, *([nn.Linear(4, 1)] if kind == "regression" else [])).eval()
    models, x = [mk.convert_to_masterkeys(dense) for _ in range(2)], torch.randn(40, 3, 12, 12)
    here = mk.calibrate_masterkeys(models[0], dense, x)
    chosen = mk.convert_to_agreement(dense, 0.2, x)[1].chosen
    with torch.device("meta"):
        there = mk.calibrate_masterkeys(models[1], dense, x)
        assert mk.convert_to_agreement(dense, 0.2, x)[1].chosen == chosen
    assert same(models[0].state_dict(), models[1].state_dict()) and here.after == there.after
    assert here.record.metric == kind


def test_what_a_time_budget_left_out_is_in_the_record():
    model, dense = pair("test_efficientnet")
    x = torch.randn(20, 3, 64, 64)
    report = mk.calibrate_masterkeys(copy.deepcopy(model), dense, x, time_budget=0)
    assert report.record.left_out == sum(len(stage.left) for stage in report.stages) > 0
    assert mk.calibrate_masterkeys(model, dense, x).record.left_out == 0


def test_interrupted_it_leaves_the_model_as_it_was(monkeypatch):
    model, dense = pair("test_efficientnet")
    model.train()
    before, count = copy.deepcopy(model.state_dict()), 0

    def interrupt(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return fit_ridge(*args)

    for layer in converted(model).values():
        layer.scale.mul_(2)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("timm_masterkeys.calibration.stages.fit_ridge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 64, 64))
    assert count == 3 and same(model.state_dict(), before) and model.training
    assert not any(module._forward_hooks for module in model.modules())


def sure_pair(classes=20):
    """With a head that is sure of some images."""
    model, dense = pair("test_efficientnet")
    for network in (model, dense):
        network.classifier.weight.data.mul_(60)
        network.classifier.bias.data.mul_(60)
    for layer in converted(model).values():
        layer.scale.mul_(1.5)
    return model, dense


def test_the_figures_are_those_of_the_held_out_images():
    model, dense = sure_pair()
    start, x = copy.deepcopy(model), torch.randn(40, 3, 64, 64)
    report = mk.calibrate_masterkeys(model, dense, x, batch_size=4)
    held_out = torch.cat([x[16:20], x[36:40]])
    with torch.no_grad():
        for network, figures in ((start, report.before), (model, report.after)):
            out, expected = network(held_out).double(), dense(held_out).double()
            p, top = expected.softmax(1), expected.argmax(1)
            agrees, sure = out.argmax(1) == top, p.amax(1) > 0.5
            assert 0 < sure.sum() == figures["sure images"]
            assert figures["agreement"] == agrees.double().mean()
            assert figures["sure agreement"] == agrees[sure].double().mean()
            divergence = (p * (expected.log_softmax(1) - out.log_softmax(1))).sum(1).mean()
            assert figures["divergence"] == pytest.approx(float(divergence), rel=1e-4, abs=1e-8)
    assert report.record.metric == "classification" and (report.record.images, report.record.held_out) == (40, 8)
    assert read_record(model).calibration == report.record


def test_what_the_dense_network_is_sure_of_comes_first():
    model, dense = sure_pair()
    report = mk.calibrate_masterkeys(model, dense, torch.randn(40, 3, 64, 64))
    line, record = report.summary(), report.record
    first, then = line.index("agreement where the dense network is sure"), line.index("agreement on all")
    assert line.startswith("on 40 images: agreement where") and first < then < line.index("divergence")
    low, high = record.intervals["sure agreement"]
    assert f"({record.after['sure images']:.0f} images, 95 % interval {low:.1%} to {high:.1%})" in line
    low, high = record.intervals["agreement"]
    assert f"95 % interval {low:.1%} to {high:.1%}" in line[then:] and line in str(report)
    many = mk.calibrate_masterkeys(model, dense, torch.randn(250, 3, 32, 32), stages="statistics", batch_size=10)
    assert many.record.held_out == 50 and "agreement" not in many.record.intervals


def test_where_the_dense_network_is_never_sure_nothing_is_said_of_it():
    model, dense = pair("test_efficientnet")
    line = mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 64, 64)).summary()
    assert "sure" not in line and "agreement with the dense network" in line


@pytest.mark.parametrize("classes", [1, 0, 20])
def test_a_record_goes_through_json(classes):
    dense = timm.create_model("test_efficientnet", num_classes=classes).eval()
    report = mk.calibrate_masterkeys(mk.convert_to_masterkeys(dense), dense, torch.randn(20, 3, 64, 64))
    text = json.dumps(dataclasses.asdict(report.record), allow_nan=False)
    again = CalibrationRecord(**json.loads(text))
    assert again == report.record and again.summary() == report.record.summary()


def test_a_network_of_one_output_is_not_said_to_agree():
    model, dense = pair("test_efficientnet")
    for network in (model, dense):
        network.reset_classifier(1)
    model.classifier.load_state_dict(dense.classifier.state_dict())
    for layer in converted(model).values():
        layer.scale.mul_(1.5)
    start, x = copy.deepcopy(model), torch.randn(40, 3, 64, 64)
    report = mk.calibrate_masterkeys(model, dense, x, batch_size=4)
    held_out = torch.cat([x[16:20], x[36:40]])
    assert report.record.metric == "regression" and "agreement" not in report.summary()
    with torch.no_grad():
        for network, figures in ((start, report.before), (model, report.after)):
            got, expected = (m(held_out).double().numpy()[:, 0] for m in (network, dense))
            relative = ((got - expected) ** 2).mean() / expected.var()
            assert figures["relative error"] == pytest.approx(relative, rel=1e-3)
            assert figures["correlation"] == pytest.approx(np.corrcoef(got, expected)[0, 1], rel=1e-3)
    assert report.after["relative error"] < report.before["relative error"]
    assert f"relative error {report.before['relative error']:.3g} -> " in report.summary()


def test_a_metric_of_ones_own_is_in_report_and_record():
    model, dense = pair("test_efficientnet")

    def largest_error(out, expected):
        return (out - expected).abs().max()

    report = mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 64, 64), metric=largest_error)
    assert report.record.metric == "largest_error" and set(report.after) == {"largest_error"}
    assert "metric: largest_error" in str(report).splitlines()
    with pytest.raises(mk.CalibrationError, match="metric is 'accuracy'"):
        mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 64, 64), metric="accuracy")
    embedded = mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 64, 64), metric="embedding")
    assert set(embedded.after) == {"relative error", "correlation"}


def test_saved_and_loaded_with_its_figures(tmp_path):
    model, dense = pair("test_efficientnet")
    mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 64, 64))
    mk.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(model.state_dict(), again.state_dict())
    assert "Calibrated (classification) on 20 images" in (tmp_path / "README.md").read_text()
    assert "calibrated on 20 images" in str(mk.conversion_report(again))
