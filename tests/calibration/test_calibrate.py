"""Calibration: damaged layers are found again, on unseen images; nothing frozen is touched; all of it or nothing."""

import copy
import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from lite0 import lite0
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration import metrics
from timm_masterkeys.calibration.block_runner import BlockRunner
from timm_masterkeys.calibration.blocks import find_blocks
from timm_masterkeys.calibration.least_squares import RIDGES, Gram, choose_keys, fit_ridge
from timm_masterkeys.conversion.record import CalibrationRecord, read_record

FAMILIES = {  # with the pointwise layers that end a block
    "test_efficientnet": ("conv_pw", "conv_pwl"),
    "test_convnext": ("fc2",),
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


@functools.lru_cache
def made_pair(name, keys_per_kernel, classes):
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=classes, **SMALL.get(name, {})).eval()
    for module in dense.modules():
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.constant_(module.gamma, 0.5)  # LayerScale, nearly off before training
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        dense.train()(torch.randn(8, 3, 64, 64))  # statistics as after training
    model = mk.convert_to_masterkeys(dense.eval(), keys_per_kernel=keys_per_kernel)
    return model, mk.fuse_masterkeys(model)


def pair(name="test_efficientnet", keys_per_kernel=1, classes=20, scale=1.0):
    """A model with random weights whose kernels are all keys, then scaled; and the dense network, unscaled."""
    model, dense = copy.deepcopy(made_pair(name, keys_per_kernel, classes))
    for layer in converted(model).values():
        layer.scale.mul_(scale)
    return model, dense


def converted(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, mk.MasterKeyConv2d)}


@torch.no_grad()
def error(model, dense, x):
    return float((model(x) - dense(x)).square().mean() / dense(x).var())


def same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        spatial, pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.inner = nn.Sequential(spatial, nn.ReLU(inplace=True), pointwise)

    def forward(self, x):
        return self.inner(x)


class Crossing(nn.Module):
    """A connection past a block: the output of the block before is not all that goes on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        a = self.stem(x)
        b = self.blocks[0](a)
        c = self.blocks[1](b)
        return self.blocks[2](c + a).mean((2, 3))


class Dark(Crossing):
    """The connection is zero where the image is."""

    def __init__(self):
        super().__init__()
        self.stem.bias = None


class Uncalled(Crossing):
    """Calls the layers by keyword, and no block."""

    def forward(self, x):
        x = self.stem(input=x)
        for block in self.blocks:
            for layer in block.inner:
                x = layer(input=x)
        return x.mean((2, 3))


class Folding(Crossing):
    """Folds positions into the batch, so that the first dimension is not that of the images."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        folded = self.fc(x.flatten(2).transpose(1, 2).reshape(4 * len(x), -1, 8))
        x = folded.reshape(len(x), *x.shape[2:], 8).permute(0, 3, 1, 2)
        return self.blocks[2](self.blocks[1](x)).mean((2, 3))


class Twice(Crossing):
    def forward(self, x):
        a = self.blocks[0](self.stem(x))
        return self.blocks[1](self.blocks[1](a)).mean((2, 3))


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


# --- the stages


@pytest.mark.parametrize(
    "name", [*itertools.islice(FAMILIES, 2), *(pytest.param(n, marks=pytest.mark.slow) for n in list(FAMILIES)[2:])]
)
def test_absorption_finds_damaged_pointwise_layers_again(name):
    """Block by block the last pointwise layer, and those outside of blocks, through norms, LayerScales and skips."""
    model, dense = pair(name)
    blocks, _ = find_blocks(model, torch.randn(2, 3, 64, 64))
    ends = [block.pointwise for block in blocks if block.converted and block.pointwise]
    assert all(end.rpartition(".")[2] in FAMILIES[name] for end in ends) and len(ends) >= 2
    for end in ends:
        weight = model.get_submodule(end).weight.detach()
        nn.init.normal_(weight, std=float(weight.std()))
    seen, unseen = torch.randn(60, 3, 64, 64), torch.randn(20, 3, 64, 64)
    before, start = copy.deepcopy(model.state_dict()), error(model, dense, unseen)
    report = mk.calibrate_masterkeys(model, dense, seen, stages=["pointwise"])
    (stage,) = report.stages
    assert error(model, dense, unseen) < 0.35 * start
    assert report.record.held_out < 20 < report.record.images == 60
    touched = {f"{layer}.{entry}" for layer in stage.changed for entry in ("weight", "bias")}
    for entry, value in model.state_dict().items():
        if entry not in touched and "running_mean" not in entry:
            assert torch.equal(value, before[entry]), entry


@pytest.mark.parametrize(("name", "keys_per_kernel"), [("test_efficientnet", 1), ("test_convnext", 2)])
def test_projection_finds_the_keys_again(name, keys_per_kernel):
    model, dense = pair(name, keys_per_kernel)
    x, generator = torch.randn(30, 3, 64, 64), torch.Generator().manual_seed(0)
    expected = copy.deepcopy(model)
    for layer in converted(model).values():
        layer.key_index.copy_(torch.randint(0, 8, layer.key_index.shape, generator=generator))
        layer.scale.normal_()
        layer.shift.data.normal_()
    start = error(model, dense, x)
    report = mk.calibrate_masterkeys(model, dense, x, stages=["kernels"])
    assert error(model, dense, x) < (0.001 if keys_per_kernel == 1 else 0.1) * start
    assert set(report.stages[0].changed) == set(converted(model))
    for name, layer in converted(model).items():
        if keys_per_kernel == 1:  # with more, other keys may be as good
            torch.testing.assert_close(layer.weight, expected.get_submodule(name).weight, rtol=0.02, atol=2e-3)
            assert layer.r2.min() > 0.99


@pytest.mark.parametrize("time_budget", [None, 0])
def test_layers_with_sigmas_are_named_as_left(time_budget):
    """Whether or not there was time, which would not have helped them."""
    dense, x = Crossing().eval(), torch.randn(20, 3, 16, 16)
    model = mk.convert_to_masterkeys(dense, "scale-space-b", include="blocks.0.*", trainable="sigmas")
    mk.convert_to_masterkeys(model, include="blocks.[12].*", inplace=True)
    with_sigmas, *others = converted(model)
    before = copy.deepcopy(model.get_submodule(with_sigmas).state_dict())
    report = mk.calibrate_masterkeys(model, dense, x, stages=["kernels"], time_budget=time_budget)
    (stage,) = report.stages
    assert stage.left.pop(with_sigmas) == "its sigmas are not refitted"
    assert {*stage.left, *stage.changed} == set(others) and report.record.left_out == (0 if time_budget is None else 2)
    assert same(model.get_submodule(with_sigmas).state_dict(), before)


def test_kernels_of_all_keys_stay_where_least_squares_lose_them():
    """Eight keys of nine taps cancel each other; what was exact stays exact."""
    dense = timm.create_model("test_efficientnet", num_classes=1).eval()
    model, x = mk.convert_to_masterkeys(dense, keys_per_kernel=8), torch.randn(60, 3, 64, 64)
    start = error(model, dense, x)
    mk.calibrate_masterkeys(model, dense, x, stages="kernels")
    assert error(model, dense, x) <= start + 1e-6


def test_statistics_find_the_norms_again_and_change_nothing_else():
    model, dense = pair()
    x, before = torch.randn(30, 3, 64, 64), copy.deepcopy(model.state_dict())
    _, norms = find_blocks(model, x[:2])
    for name in converted(model):
        norm = model.get_submodule(norms[name])
        norm.running_mean += 1
        norm.running_var *= 3
    mk.calibrate_masterkeys(model, dense, x, stages=["norms"])
    assert error(model, dense, x) < 1e-8
    for entry, value in model.state_dict().items():
        torch.testing.assert_close(value, before[entry], rtol=1e-3, atol=1e-4)
        assert "running" in entry or torch.equal(value, before[entry])
    model, dense = pair("test_convnext")  # without BatchNorm the bias gets the mean
    for layer in converted(model).values():
        layer.bias.data += 1
    mk.calibrate_masterkeys(model, dense, x, stages=["norms"])
    assert error(model, dense, x) < 1e-8


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        torchvision.ops.FrozenBatchNorm2d,
        timm.layers.BatchNormAct2d,
        timm.layers.FrozenBatchNormAct2d,
    ],
)
def test_norms_of_every_kind(norm):
    model = mk.convert_to_masterkeys(Normed(norm).eval())
    dense = mk.fuse_masterkeys(model)
    x, unseen = torch.randn(40, 3, 16, 16), torch.randn(20, 3, 16, 16)
    assert find_blocks(model, x[:2])[1] == {"dw": "norm", "fc": "bn"}
    model.norm.running_mean += 1
    model.norm.running_var *= 3
    report = mk.calibrate_masterkeys(model, dense, x, stages="norms")
    assert error(model, dense, unseen) < 1e-6 and report.stages[0].changed == ["dw"]
    nn.init.normal_(model.fc.weight)
    model.bn.running_mean += 1
    start = error(model, dense, unseen)
    report = mk.calibrate_masterkeys(model, dense, x, stages="pointwise")
    assert error(model, dense, unseen) < 0.01 * start and "fc" in report.stages[0].changed
    changed_in_place = mk.convert_to_masterkeys(Normed(norm, act=True).eval())  # so the norm is not that of the layer
    assert find_blocks(changed_in_place, x[:2])[1] == {"fc": "bn"}


def test_a_norm_over_positions_is_not_that_of_the_layer():
    class Tokens(Normed):
        def forward(self, x):
            x = self.fc(self.norm(self.dw(self.stem(x))).relu().flatten(2).transpose(1, 2))
            return self.head(self.bn(x).relu().mean(1))

    for positions in (6, 4):  # a side; fc has as many channels as 4 x 4 positions
        dense, x = Tokens(nn.BatchNorm2d), torch.randn(40, 3, positions, positions)
        dense.bn = nn.BatchNorm1d(positions**2)
        model = mk.convert_to_masterkeys(dense.eval())
        assert find_blocks(model, x[:2])[1] == {"dw": "norm"}
        mk.calibrate_masterkeys(model, dense, x)


@pytest.mark.slow
def test_a_trained_network_on_photographs():
    dense = lite0()
    model = mk.convert_to_masterkeys(dense).train()
    photographs = mk.builtin_images(dense, 60, size=96)
    seen, unseen = photographs[:30], photographs[30:]
    before, keys = copy.deepcopy(dense.state_dict()), [layer.keys.clone() for layer in converted(model).values()]
    start = error(copy.deepcopy(model).eval(), dense, unseen)
    report = mk.calibrate_masterkeys(model, dense, seen)
    assert model.training and not dense.training and same(dense.state_dict(), before)
    assert all(map(torch.equal, keys, [layer.keys for layer in converted(model).values()]))
    assert error(model.eval(), dense, unseen) < 0.7 * start
    assert report.after["divergence"] < 0.5 * report.before["divergence"]


def test_the_same_bit_for_bit_and_from_its_own_result():
    model, dense = pair()
    x = torch.randn(40, 3, 32, 32)
    for layer in converted(model).values():
        layer.scale.mul_(torch.rand(layer.scale.shape) + 0.5)
    keys = [layer.keys.clone() for layer in converted(model).values()]
    again, start = copy.deepcopy(model), error(model, dense, x)
    first, second = (mk.calibrate_masterkeys(m, dense, x) for m in (model, again))
    assert same(model.state_dict(), again.state_dict()) and error(model, dense, x) < 0.02 * start
    assert all(map(torch.equal, keys, [layer.keys for layer in converted(model).values()]))
    assert (first.before, first.after) == (second.before, second.after)
    assert [stage.name for stage in first.stages] == ["kernels", "norms", "pointwise"]
    blocks, norms = find_blocks(again, x[:2])
    for name in [*converted(again), *(block.pointwise for block in blocks)]:
        if name in norms:  # they aim at the dense network's, whatever they are now
            again.get_submodule(norms[name]).running_mean += 0.1
    mk.calibrate_masterkeys(again, dense, x)
    assert error(again, dense, x) < 0.02 * start


# --- least squares


@pytest.mark.parametrize(("count", "keys_per_kernel"), [(5, 1), (5, 2), (5, 3), (5, 5), (16, 3)])
def test_choose_keys_against_brute_force(count, keys_per_kernel):
    """The best of all sets; of sixteen keys, which have too many, one after the other."""
    generator = np.random.default_rng(0)
    size = count + 2  # ones, the keys, the expected output
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
    features, residual = torch.randn(12, 30), torch.randn(12, 3).abs()
    folds = [Gram.of(features[:6], residual[:6]), Gram.of(features[6:], -10 * residual[6:])]
    assert fit_ridge(folds, torch.ones(3, dtype=torch.float64), True) is None


# --- blocks


def test_a_lone_layer_does_not_make_its_parent_a_block():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.one, self.two = Block(), Block()

        def forward(self, x):
            return self.two(self.one(x + self.position(x))).mean((2, 3))

    blocks, _ = find_blocks(mk.convert_to_masterkeys(Parent()), torch.randn(2, 8, 16, 16))
    assert [block.name for block in blocks] == ["position", "one", "two"]


@pytest.mark.parametrize(
    "make", [Crossing, Dark, Uncalled, Folding, lambda: pair()[1], lambda: pair("edgenext_xx_small")[1]]
)
def test_a_network_run_part_by_part_gives_what_it_gives_in_one_go(make):
    model = mk.convert_to_masterkeys(make().eval())
    batches = list(torch.randn(6, 3, 64, 64).split(3))
    batches[0][0] = 0
    blocks, _ = find_blocks(model, batches[0])
    network = BlockRunner(model, blocks, batches)
    outputs = {block.name: [] for block in blocks}  # in one go
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, output, kept=kept: kept.append(output.clone()))
        for name, kept in outputs.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch.clone())
    for handle in handles:
        handle.remove()
    for index, block in enumerate(blocks):
        network.advance(network.run(index, list(network.arguments(index))))
        torch.testing.assert_close(network._outputs, outputs[block.name])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_why_a_network_is_run_as_a_whole_is_logged(caplog):
    """At debug level: else a defect would only show as a slow calibration."""
    caplog.set_level("DEBUG", "timm_masterkeys.calibration.block_runner")
    dense = Crossing().eval()
    mk.calibrate_masterkeys(mk.convert_to_masterkeys(dense), dense, torch.randn(20, 3, 16, 16))
    first = caplog.records[0]
    assert "as a whole up to blocks.2" in first.message and first.exc_info[0] is AssertionError


def test_blocks_that_fold_positions_into_the_batch():
    dense, x = Folding().eval(), torch.randn(20, 3, 16, 16)
    model = mk.convert_to_masterkeys(dense)
    start = error(model, dense, x)
    report = mk.calibrate_masterkeys(model, dense, x)
    assert error(model, dense, x) < 0.9 * start and "fc" in {*report.stages[2].changed, *report.stages[2].left}


def test_the_figures_of_a_network_that_chooses_by_image():
    """What one image takes does not tell what the others take: the figures are of the network as a whole."""

    class Gated(Crossing):
        def forward(self, x):
            b = self.blocks[0](self.stem(x))
            c = self.blocks[1](b)
            return self.blocks[2](torch.where(b.mean((1, 2, 3), keepdim=True) > self.threshold, 2 * c, c)).mean((2, 3))

    dense, x, held_out = Gated().eval(), torch.randn(40, 3, 16, 16), torch.randn(10, 3, 16, 16)
    with torch.no_grad():
        means = dense.blocks[0](dense.stem(x)).mean((1, 2, 3))
        x, dense.threshold = x[means.argsort()], float(means.min()) + 1e-6  # only the first image does not exceed it
        model = mk.convert_to_masterkeys(dense)
        report = mk.calibrate_masterkeys(model, dense, x, held_out=held_out, stages="norms")
        figures = metrics.classification_figures(model(held_out), dense(held_out))
    assert report.after == pytest.approx(figures, rel=1e-4)


def test_a_model_that_changes_its_images():
    class Changing(Crossing):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    dense, x, held_out = Changing().eval(), torch.randn(40, 3, 16, 16), torch.randn(10, 3, 16, 16)
    model = mk.convert_to_masterkeys(dense)
    report = mk.calibrate_masterkeys(model, dense, x, held_out=held_out)
    with torch.no_grad():
        figures = metrics.classification_figures(model(held_out.clone()), dense(held_out.clone()))
    assert report.after == pytest.approx(figures, rel=1e-4)
    model, budget = mk.convert_to_agreement(dense, 0.1, x)
    with torch.no_grad():
        figures = metrics.classification_figures(model(x[3::4].clone()), dense(x[3::4].clone()))
    assert budget.record.after == pytest.approx(figures, rel=1e-4)


def test_layers_called_by_keyword_from_outside_their_blocks():
    dense, x = Uncalled().eval(), torch.randn(60, 3, 16, 16)
    model = mk.convert_to_masterkeys(dense)
    start = error(model, dense, x)
    report = mk.calibrate_masterkeys(model, dense, x)
    assert error(model, dense, x) < 0.5 * start
    assert len(report.stages[0].changed) == 3 and "blocks.0.inner.2" in report.stages[2].changed
    assert len(mk.convert_to_agreement(dense, 0.1, x)[1].tried) > 1


def test_a_pointwise_layer_whose_weight_is_computed_stays():
    """With its bias: the two are fitted together."""
    head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))
    layers = [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]
    dense = nn.Sequential(*layers).eval()
    model = mk.convert_to_masterkeys(dense)
    report = mk.calibrate_masterkeys(model, dense, torch.randn(40, 8, 16, 16) + torch.randn(40, 8, 1, 1))
    assert not report.stages[2].changed and same(head.state_dict(), model[4].state_dict())


@pytest.mark.parametrize("above", [0.0, 1e9])
def test_a_layer_at_positions_that_the_network_chooses(above):
    class Choosing(Folding):
        def forward(self, x):
            x = self.blocks[1](self.blocks[0](self.stem(x)))
            chosen = x[:, 0] > x[:, 0].mean() + above
            return {"logits": x.mean((2, 3)), "regions": self.fc(x.permute(0, 2, 3, 1)[chosen])}

    dense = Choosing().eval()
    model = mk.convert_to_masterkeys(dense)
    report = mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 16, 16))
    assert "fc" not in report.stages[2].changed and len(report.stages[0].changed) == 2


def test_a_block_that_some_images_do_not_reach():
    class Leaving(Crossing):
        def forward(self, x):
            return self.blocks[0](self.stem(x)).mean((2, 3)) if x.amax() > 9 else super().forward(x)

    dense, x = Leaving().eval(), torch.randn(20, 3, 16, 16)
    model, x[12] = mk.convert_to_masterkeys(dense), 10.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mk.CalibrationError, match=r"Leaving runs blocks\.1\S* on some of the images only"):
        mk.calibrate_masterkeys(model, dense, x)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("in_list", [False, True])
def test_a_block_that_changes_its_arguments(in_list):
    class Changing(Block):
        def forward(self, *, x):
            return super().forward((x[0] if in_list else x).add_(1))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 1), Changing()

        def forward(self, x):
            x = self.stem(x)
            return self.block(x=[x] if in_list else x)

    model = mk.convert_to_masterkeys(Network())
    blocks, _ = find_blocks(model, torch.randn(2, 3, 16, 16))
    network = BlockRunner(model, blocks, [torch.randn(2, 3, 16, 16)])
    network.advance(network.run(0, list(network.arguments(0))))
    index = [block.name for block in blocks].index("block")
    calls = list(network.arguments(index))
    first, again = (network.run(index, calls)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_is_run_as_it_is():
    dense, x = Crossing().eval(), torch.randn(40, 3, 16, 16)
    dense.blocks[2] = torch.jit.trace(nn.ReLU(), x)
    report = mk.calibrate_masterkeys(mk.convert_to_masterkeys(dense), dense, x)
    assert len(report.stages[0].changed) == 2


def test_layers_it_cannot_place_are_named():
    dense = Twice().eval()
    model = mk.convert_to_masterkeys(dense)
    report = mk.calibrate_masterkeys(model, dense, torch.randn(20, 3, 16, 16))
    assert set(report.stages[0].left) == {"blocks.1.inner.0", "blocks.2.inner.0"}
    assert "more than once" in report.stages[0].left["blocks.1.inner.0"]


def test_a_norm_of_several_layers_stays_as_it_is():
    norm = nn.BatchNorm2d(8)
    convs = [nn.Conv2d(8, 8, size, padding=size // 2, groups=8) for size in (3, 5)]
    dense, x = nn.Sequential(convs[0], norm, convs[1], norm).eval(), torch.randn(20, 8, 8, 8)
    model = mk.convert_to_masterkeys(dense)
    report = mk.calibrate_masterkeys(model, dense, x, metric="features")
    assert same(model[1].state_dict(), norm.state_dict())
    assert report.after["relative error"] < report.before["relative error"]


# --- what a call is given


def test_a_time_budget_leaves_statistics_only():
    model, dense = pair()
    expected, x = copy.deepcopy(model), torch.randn(20, 3, 64, 64)
    report = mk.calibrate_masterkeys(model, dense, x, time_budget=0)
    projection, statistics, absorption = report.stages
    assert not projection.changed and not absorption.changed and statistics.changed
    assert set(projection.left) == set(converted(model)) and "time budget" in absorption.left["classifier"]
    assert report.record.left_out == sum(len(stage.left) for stage in report.stages) > 0
    assert mk.calibrate_masterkeys(expected, dense, x, stages=["norms"]).record.left_out == 0
    assert same(model.state_dict(), expected.state_dict())


def test_held_out_images_choose_nothing():
    """Whatever they show, the model comes out the same; only the figures are others."""
    model, dense = pair(scale=1.5)
    again, x = copy.deepcopy(model), torch.randn(40, 3, 32, 32)
    report = mk.calibrate_masterkeys(model, dense, x, batch_size=8)
    other = x.clone()
    other[32:] = torch.rand(8, 3, 32, 32) * 3  # the fifth batch
    figures = mk.calibrate_masterkeys(again, dense, other, batch_size=8)
    assert same(model.state_dict(), again.state_dict()) and report.record.held_out == figures.record.held_out == 8
    assert report.after != figures.after


def nan_at(x, index=3):
    x = x.clone()
    x[index] = float("nan")
    return x


def quantised(model):
    weight = model.classifier.weight.detach()
    model.classifier.weight = nn.Parameter(weight.as_subclass(type("Int8", (torch.Tensor,), {})))
    return model


def returning_nan(model):
    model.conv_stem.weight.data[0] = float("nan")
    return model


@pytest.mark.parametrize(
    "message, spoil",
    [
        ("5 images", lambda model, dense, x: (model, dense, x[:5])),
        ("hold NaN", lambda model, dense, x: (model, dense, nan_at(x))),
        ("torch.uint8", lambda model, dense, x: (model, dense, x.to(torch.uint8))),
        (r"expected \(N, channels, H, W\)", lambda model, dense, x: (model, dense, x[0])),
        ("0 images", lambda model, dense, x: (model, dense, [])),
        ("cannot work with images of", lambda model, dense, x: (model, dense, torch.cat([x, x[:, :1]], 1))),
        ("of one size", lambda model, dense, x: (model, dense, [x, x[:, :, :32, :32]])),
        ("no converted layer", lambda model, dense, x: (dense, dense, x)),
        ("converted too, as at", lambda model, dense, x: (model, model, x)),
        ("at classifier", lambda model, dense, x: (model, timm.create_model("test_efficientnet", num_classes=3), x)),
        ("share .*deepcopy", lambda m, d, x: (m.load_state_dict(d.state_dict(), assign=True) and m, d, x)),
        ("calibrate in float32", lambda model, dense, x: (model.half(), dense.half(), x)),
        (r"^classifier\.weight is of type Int8.* then quantise", lambda m, dense, x: (quantised(m), dense, x)),
        ("returns NaN", lambda model, dense, x: (model, returning_nan(dense), x)),
    ],
)
def test_bad_models_and_images(message, spoil):
    model, dense, images = spoil(*pair(), torch.randn(20, 3, 64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mk.CalibrationError, match=message):
        mk.calibrate_masterkeys(model, dense, images)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("stages is .*training.*, expected some of kernels", {"stages": ["training"]}),
        ("stages is .*training.*, expected some of kernels", {"stages": "training"}),
        ("max_images", {"max_images": 3}),
        ("metric is 'accuracy'", {"metric": "accuracy"}),
        ("one number for 2 images", {"output": torch.mean}),
        (r"of \(3, 64, 64\) and \(3, 32, 32\), expected one size", {"held_out": torch.zeros(12, 3, 32, 32)}),
    ],
)
def test_bad_arguments(message, arguments):
    with pytest.raises(mk.CalibrationError, match=message):
        mk.calibrate_masterkeys(*pair(), torch.randn(12, 3, 64, 64), **arguments)


def test_lazy_layers_are_named():
    dense = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(mk.CalibrationError, match=r"lazy layers.*Run the dense model once"):
        mk.calibrate_masterkeys(mk.convert_to_masterkeys(dense), dense, torch.randn(12, 3, 8, 8))


def test_it_warns_of_a_dense_model_with_other_weights(caplog):
    dense, other, x = Crossing().eval(), Crossing().eval(), torch.randn(20, 3, 16, 16)
    model = mk.convert_to_masterkeys(dense)
    mk.calibrate_masterkeys(copy.deepcopy(model), other, x)
    assert "Parameters beside the kernels differ from the dense model's" in caplog.text
    caplog.clear()
    mk.calibrate_masterkeys(model, dense, x)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=False))
    mk.calibrate_masterkeys(model, dense, x)  # its own work is no cause
    assert not caplog.text
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # trained since, so any difference may be of that
    mk.calibrate_masterkeys(model, dense, x)
    assert not caplog.text
    model, dense = pair()
    dense.bn1.weight.data.add_(0.1)
    mk.calibrate_masterkeys(model, dense, torch.randn(12, 3, 32, 32))
    assert "differ from the dense model's (1 of them, for example bn1.weight)" in caplog.text
    caplog.clear()
    mk.calibrate_masterkeys(model, dense, torch.randn(12, 3, 32, 32))  # a norm's weight no calibration changes
    assert "differ from the dense model's (1 of them, for example bn1.weight)" in caplog.text


def test_a_network_without_parameters():
    dense = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, bias=False)).eval()
    model = mk.convert_to_masterkeys(dense, trainable="none")
    assert mk.calibrate_masterkeys(model, dense, torch.randn(10, 3, 8, 8)).stages[0].changed == ["0"]


@pytest.mark.parametrize("second", ["whole", "part"])
def test_a_part_that_was_calibrated_alone_is_known_to_be(caplog, second):
    dense = nn.Sequential(Crossing(), nn.Identity()).eval()
    model, x = mk.convert_to_masterkeys(dense), torch.randn(20, 3, 16, 16)
    mk.calibrate_masterkeys(model[0], dense[0], x)
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


@pytest.mark.parametrize(
    "error, where",
    [
        (KeyboardInterrupt, "metric"),
        (MemoryError, "blockwise.find_blocks"),
        (KeyboardInterrupt, "stages._error_variance"),
        (MemoryError, "stages.fit_ridge"),
        (KeyboardInterrupt, "stages._residual_folds"),
        (MemoryError, "calibrate.output_of"),
        (KeyboardInterrupt, "calibrate.share_intervals"),
        (MemoryError, "calibrate.write_record"),
    ],
)
def test_whatever_fails_both_models_stay_as_they_were(where, error, monkeypatch):
    dense, x = Normed(nn.BatchNorm2d), torch.randn(15, 3, 16, 16)
    model = mk.convert_to_masterkeys(dense)
    mk.calibrate_masterkeys(model, dense, x, stages="norms")
    model.train(), dense.train(), dense.stem.eval(), model.norm.eval()
    before, record = everything(model, dense), read_record(model)
    assert record.calibration

    def failing(*args, **kwargs):
        raise error

    if where != "metric":
        monkeypatch.setattr(f"timm_masterkeys.calibration.{where}", failing)
    with pytest.raises(error):
        mk.calibrate_masterkeys(model, dense, x, metric=failing if where == "metric" else None)
    after = everything(model, dense)
    assert all(same(a, b) if isinstance(a, dict) else a == b for a, b in zip(before, after, strict=True))
    assert read_record(model) == record


def test_whatever_the_default_device():
    """As between torch's own with-blocks of a device; nothing of a calibration is made there."""
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
    dense = nn.Sequential(*layers).eval()
    models, x = [mk.convert_to_masterkeys(dense) for _ in range(2)], torch.randn(40, 3, 12, 12)
    here = mk.calibrate_masterkeys(models[0], dense, x)
    chosen = mk.convert_to_agreement(dense, 0.2, x)[1].chosen
    with torch.device("meta"):
        there = mk.calibrate_masterkeys(models[1], dense, x)
        assert mk.convert_to_agreement(dense, 0.2, x)[1].chosen == chosen
    assert same(models[0].state_dict(), models[1].state_dict()) and here.after == there.after
    assert here.record.metric == "regression"


# --- figures, report and record


@pytest.mark.parametrize("metric", ["classification", "regression"])
def test_the_figures_are_those_of_the_held_out_images(metric):
    model, dense = pair(classes=20 if metric == "classification" else 1, scale=1.5)
    for network in (model, dense):  # so that some images are sure of a class
        network.classifier.weight.data.mul_(60)
        network.classifier.bias.data.mul_(60)
    start, x = copy.deepcopy(model), torch.randn(40, 3, 32, 32)
    report = mk.calibrate_masterkeys(model, dense, x, batch_size=4)
    held_out, measure = torch.cat([x[16:20], x[36:40]]), getattr(metrics, f"{metric}_figures")
    with torch.no_grad():
        for network, figures in ((start, report.before), (model, report.after)):
            assert figures == pytest.approx(measure(network(held_out), dense(held_out)), rel=1e-3, abs=1e-6)
    record, line = report.record, report.summary()
    assert record.metric == metric and (record.images, record.held_out) == (40, 8)
    assert read_record(model).calibration == record and line in str(report) and line.startswith("with 32 images: ")
    if metric == "regression":
        assert report.after["relative error"] < report.before["relative error"] and "agreement" not in line
        assert f"relative error {report.before['relative error']:.3g} -> " in line
        return
    assert record.after["sure images"] > 0
    first, then = line.index("agreement where the dense network is sure"), line.index("agreement on all")
    assert first < then < line.index("divergence")
    low, high = record.intervals["sure agreement"]
    assert f"({record.after['sure images']:.0f} images, 95 % interval {low:.1%} to {high:.1%})" in line
    low, high = record.intervals["agreement"]
    assert f"95 % interval {low:.1%} to {high:.1%}" in line[then:]


def test_images_are_counted_where_outputs_are_rows_of_positions():
    model, dense = pair()
    images = torch.randn(20, 3, 32, 32)
    record = mk.calibrate_masterkeys(model, dense, images, output=lambda out: out.view(-1, 5)).record
    assert (record.images, record.held_out) == (20, 4)


@pytest.mark.parametrize("classes", [1, 20])
def test_a_record_goes_through_json(classes):
    dense = timm.create_model("test_efficientnet", num_classes=classes).eval()
    model, x = mk.convert_to_masterkeys(dense), torch.randn(20, 3, 32, 32)
    report = mk.calibrate_masterkeys(model, dense, x, stages="norms")
    again = CalibrationRecord(**json.loads(json.dumps(dataclasses.asdict(report.record), allow_nan=False)))
    assert again == report.record and again.summary() == report.record.summary()
    if classes > 1:  # the dense network is never sure
        assert "sure" not in report.summary() and "agreement with the dense network" in report.summary()


def test_a_metric_of_ones_own_is_in_report_and_record():
    model, dense = pair()

    def largest_error(out, expected):
        return (out - expected).abs().max()

    x = torch.randn(20, 3, 32, 32)
    report = mk.calibrate_masterkeys(model, dense, x, metric=largest_error, stages="norms")
    assert report.record.metric == "largest_error" and set(report.after) == {"largest_error"}
    assert "metric: largest_error" in str(report).splitlines()
    embedded = mk.calibrate_masterkeys(model, dense, x, metric="embedding", stages="norms")
    assert set(embedded.after) == {"relative error", "correlation"}
