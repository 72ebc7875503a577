"""The fewest keys that reach an agreement: against all there are, on images that chose and calibrated nothing."""

import copy
import itertools

import pytest
import torch
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration import agreement as module
from timm_masterkeys.calibration.agreement import order_steps
from timm_masterkeys.calibration.images import split_for_choice
from timm_masterkeys.conversion.record import read_record

BANK = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(5))


def tiny(*keys_per_kernel, bank=BANK, outputs=10):
    """A network whose layers' kernels are so many keys of the bank each, exactly."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 12, 3, stride=2)]
    for _ in keys_per_kernel:
        layers += [nn.Conv2d(12, 12, 5, padding=2, groups=12), nn.ReLU(), nn.Conv2d(12, 12, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, outputs)).eval()
    for index, count in enumerate(keys_per_kernel):
        mk.convert_to_masterkeys(model, bank, include=str(1 + 3 * index), keys_per_kernel=count, inplace=True)
    for layer in model:
        if isinstance(layer, mk.MasterKeyConv2d):
            layer.scale.view(12, -1).normal_(std=0.4)
            layer.shift.data.zero_()
    with torch.no_grad():  # every class is the highest for some images
        out = model(torch.randn(64, 3, 16, 16))
        model[-1].weight.mul_(3 / out.std(0).unsqueeze(1))
        model[-1].bias.copy_((model[-1].bias - out.mean(0)) * 3 / out.std(0))
    return mk.fuse_masterkeys(model)


def keys_of(model):
    return {n: m.keys_per_kernel for n, m in model.named_modules() if isinstance(m, mk.MasterKeyConv2d)}


@torch.no_grad()
def agreement(model, dense, x):
    return float((model(x).argmax(1) == dense(x).argmax(1)).double().mean())


@pytest.fixture(scope="module")
def images():
    return torch.randn(160, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_each_prefix_is_the_best_that_so_many_keys_can_buy():
    """Among all choices, where each key gains less than the one before it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        kernels = dict(zip("abc", torch.randint(1, 9, (3,), generator=generator).tolist(), strict=True))
        falls = torch.rand(3, 3, generator=generator).double().sort(1, descending=True).values
        divergences = {}
        for name, fall in zip("abc", falls, strict=True):
            left = [float(fall[i:] @ torch.tensor([1.0, 2.0, 4.0]).double()[i:]) for i in range(4)]
            divergences[name] = {count: value * kernels[name] for count, value in zip((1, 2, 4, 8), left, strict=True)}

        def price(counts, kernels=kernels, divergences=divergences):
            left = sum(divergences[name][count] for name, count in counts.items())
            return sum(kernels[name] * count for name, count in counts.items()), left

        every = [price(dict(zip("abc", c, strict=True))) for c in itertools.product((1, 2, 4, 8), repeat=3)]
        steps = order_steps(kernels, divergences)
        assert len(steps) == 9
        for taken in range(10):
            keys, left = price({**dict.fromkeys("abc", 1), **dict(steps[:taken])})
            assert left <= min(other for spent, other in every if spent <= keys) + 1e-9


def test_a_step_that_pays_only_as_a_whole_is_taken_as_a_whole():
    steps = order_steps({"a": 1, "b": 1}, {"a": {1: 1.0, 2: 1.0, 4: 0.0}, "b": {1: 0.2, 2: 0.0, 4: 0.0}})
    assert steps[:2] == [("a", 4), ("b", 2)]
    assert order_steps({"a": 3}, {"a": {1: 0.5}}) == []


@pytest.mark.parametrize(
    "needed, choices",
    [
        ((2, 1), (1, 2)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [((1, 2, 2), (1, 2)), ((4, 1), (1, 2, 4))]),
    ],
)
def test_as_few_as_any_choice_of_keys_needs(images, needed, choices):
    """Of all networks that could have been chosen."""
    bank = BANK[: max(choices)]
    dense = tiny(*needed, bank=bank)
    fitted, held_out = split_for_choice(images, dense)
    reached = []
    for counts in itertools.product(choices, repeat=len(needed)):
        model = copy.deepcopy(dense)
        for index, count in enumerate(counts):
            mk.convert_to_masterkeys(model, bank, include=str(1 + 3 * index), keys_per_kernel=count, inplace=True)
        mk.calibrate_masterkeys(model, dense, fitted)
        if agreement(model, dense, held_out) >= 0.97:
            reached.append((12 * sum(counts), counts))
    model, budget = mk.convert_to_agreement(dense, 0.97, images, bank=bank)
    assert budget.chosen.keys == min(reached)[0]
    assert tuple(keys_of(model).values()) == needed == min(reached)[1]


def test_a_layer_whose_kernels_no_keys_fit_stays_dense(images):
    dense = tiny(2, 2, 1)
    nn.init.normal_(dense[4].weight, std=0.4)
    model, budget = mk.convert_to_agreement(dense, 0.97, images, bank=BANK)
    assert budget.chosen.keys_per_kernel == {"1": 2, "4": 0, "7": 1} and budget.chosen.keys == 12 * (2 + 25 + 1)
    assert type(model[4]) is nn.Conv2d and torch.equal(model[4].weight, dense[4].weight)
    assert str(budget).splitlines()[2].split() == ["4", "12", "dense"]


def test_report_and_record_are_those_of_the_model(images):
    dense, held_out = tiny(1, 4, 2), images[3::4]
    state = copy.deepcopy(dense.state_dict())
    model, budget = mk.convert_to_agreement(dense, 0.9, images, bank=BANK, trainable="affine")
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert all(m.trainable == "affine" for m in model.modules() if isinstance(m, mk.MasterKeyConv2d))
    assert budget.chosen.keys_per_kernel == keys_of(model) and budget.chosen in budget.tried
    assert budget.chosen.score == budget.chosen.figures["agreement"] == agreement(model, dense, held_out) >= 0.9
    assert budget.record.held_out == 40 and budget.kernels == {"1": 12, "4": 12, "7": 12}
    for one in budget.tried:
        assert one.keys == 12 * sum(count or 25 for count in one.keys_per_kernel.values())
        assert (one.score >= 0.9) == (one.keys >= budget.chosen.keys)
    keys = [one.keys for one in budget.tried]
    assert keys == sorted(set(keys)) and len(keys) >= 2
    lines = str(budget).splitlines()
    table, curve = lines[: lines.index("")], lines[lines.index("") + 1 : -2]
    assert [line.split()[-1] for line in table[1:]] == [str(count) for count in keys_of(model).values()]
    assert len(curve) == 1 + len(keys)
    assert [line.split()[0] for line in curve if line.endswith("chosen")] == [str(budget.chosen.keys)]
    low, high = budget.record.intervals["agreement"]
    assert low < budget.chosen.score <= high
    assert f"agreement {budget.chosen.score:.1%} (95 % interval {low:.1%} to {high:.1%}) with" in lines[-1]
    record = read_record(model).calibration
    assert record.after == budget.chosen.figures and record == budget.record and record.metric == "classification"
    assert (record.images, record.held_out, record.origin) == (160, 40, "tensor")
    start = copy.deepcopy(dense)
    for index, count in enumerate(budget.chosen.keys_per_kernel.values()):
        mk.convert_to_masterkeys(start, BANK, include=str(1 + 3 * index), keys_per_kernel=count, inplace=True)
    assert record.before["agreement"] == agreement(start, dense, held_out)


def test_what_is_held_out_neither_calibrates_nor_chooses(images, monkeypatch):
    dense, seen = tiny(1, 4), []
    calibrate, distances = module.calibrate_masterkeys, module._Search.distances
    monkeypatch.setattr(
        module, "calibrate_masterkeys", lambda m, d, x, **kw: seen.append(x) or calibrate(m, d, x, **kw)
    )
    monkeypatch.setattr(module._Search, "distances", lambda search, x: seen.append(x) or distances(search, x))
    mk.convert_to_agreement(dense, 0.5, images, bank=BANK)
    used = torch.cat(seen).flatten(1).unique(dim=0)
    assert len(seen) >= 2 and len(used) == 120
    assert torch.cdist(used, images[3::4].flatten(1)).min() > 1


def test_an_agreement_out_of_reach_is_an_error_that_names_the_best(images):
    dense = tiny(4, 4)
    with pytest.raises(
        mk.CalibrationError, match=r"No network reaches agreement 100.0% on 40 .* \d+ keys for 24 kernels"
    ):
        mk.convert_to_agreement(dense, 1, images, bank=torch.randn(2, 5, 5))
    assert not keys_of(dense)


@pytest.mark.parametrize("agreement", [0, -0.1, 1.01, 95, float("nan"), "0.9", True, None])
def test_agreements_that_are_none(agreement, images):
    with pytest.raises(mk.ConversionError, match="expected more than 0, at most 1"):
        mk.convert_to_agreement(tiny(1), agreement, images)


def test_bad_input_is_found_before_the_work(images, monkeypatch):
    monkeypatch.setattr(module._Search, "distances", lambda *args: pytest.fail("work was begun"))
    dense = tiny(1, 2)
    for error, match, arguments in (
        (mk.CalibrationError, "39 images, expected at least 40", {"images": images[:39]}),
        (mk.CalibrationError, "20 images, expected at least 40", {"images": images, "max_images": 15}),
        (mk.CalibrationError, "cannot work with images", {"images": images[:, :2]}),
        (mk.ConversionError, "one key per kernel", {"images": images, "trainable": "sigmas", "bank": "scale-space-a"}),
        (mk.ConversionError, "matches none", {"images": images, "include": "nothing"}),
        (mk.BankError, "nothing", {"images": images, "bank": "nothing"}),
    ):
        with pytest.raises(error, match=match):
            mk.convert_to_agreement(dense, 0.9, **arguments)
    with pytest.raises(mk.CalibrationError, match="converted too, as at"):
        mk.convert_to_agreement(mk.convert_to_masterkeys(dense, BANK, include="1"), 0.9, images, bank=BANK)
    with pytest.raises(mk.ConversionError, match="DataParallel"):
        mk.convert_to_agreement(nn.DataParallel(dense), 0.9, images)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_in_any_mode_of_torch(images, context):
    dense = tiny(1, 2)
    expected = mk.convert_to_agreement(dense, 0.9, images, bank=BANK)[1]
    with context():
        budget = mk.convert_to_agreement(dense, 0.9, images, bank=BANK)[1]
    assert budget.tried == expected.tried and budget.record.after == expected.record.after


def test_one_output_is_judged_as_regression(images):
    """One key per kernel agreed on 100 % of one class, with a relative error above 1."""
    dense = tiny(2, 4, outputs=1)
    model, budget = mk.convert_to_agreement(dense, 0.9, images, bank=BANK)
    with torch.no_grad():
        got, expected = model.eval()(images[3::4]).double(), dense(images[3::4]).double()
    relative = float((got - expected).square().sum() / (expected - expected.mean()).square().sum())
    assert budget.score_name == "R2" and budget.record.metric == "regression"
    assert budget.chosen.score == pytest.approx(1 - relative, abs=1e-6) and budget.chosen.score >= 0.9
    least = min(budget.tried, key=lambda one: one.keys)
    assert least.score < 0.9 and least.keys < budget.chosen.keys
    lines = str(budget).splitlines()
    assert lines[lines.index("") + 1].split("per kernel")[1].split() == ["R2", "relative", "error", "correlation"]
    assert f"give R2 {budget.chosen.score:.1%} with" in budget.summary() and "agreement" not in str(budget)
    assert lines[-2] == "metric: regression"


def test_interrupted_the_dense_network_is_as_it_was(images, monkeypatch):
    dense = tiny(1, 4).train()
    dense[3].eval()
    state, modes = copy.deepcopy(dense.state_dict()), [m.training for m in dense.modules()]

    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    for name in ("order_steps", "calibrate_masterkeys"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, failing)
            mk.convert_to_agreement(dense, 0.9, images, bank=BANK)
    count, pick = itertools.count(), module.output_of
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # while layers are compared, under a hook
        patch.setattr(module, "output_of", lambda *args: failing() if next(count) == 15 else pick(*args))
        mk.convert_to_agreement(dense, 0.9, images, bank=BANK)
    assert [m.training for m in dense.modules()] == modes and not any(m._forward_hooks for m in dense.modules())
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())


def test_a_network_that_was_calibrated_and_fused_by_hand_before(images):
    dense = mk.convert_to_masterkeys(tiny(1, 4), BANK)
    mk.calibrate_masterkeys(dense, mk.fuse_masterkeys(dense), images)
    for index in (1, 4):
        dense[index] = dense[index].fuse()
    model, _ = mk.convert_to_agreement(dense, 0.9, images, bank=BANK)
    record = read_record(model)
    assert record.calibration and record.was_calibrated and not record.converted_since


def test_a_callable_is_the_score(images):
    dense = tiny(1, 4)

    def nearness(out, expected):
        return 1 / (1 + (out - expected).abs().mean())

    model, budget = mk.convert_to_agreement(dense, 0.8, images, bank=BANK, metric=nearness)
    with torch.no_grad():
        got = float(nearness(model(images[3::4]), dense(images[3::4])))
    assert budget.chosen.score == pytest.approx(got, rel=1e-4) and got >= 0.8 and budget.score_name == "nearness"
    assert all((one.score >= 0.8) == (one.keys >= budget.chosen.keys) for one in budget.tried)
    with pytest.raises(mk.CalibrationError, match=r"No network reaches .* 100\.0%"):
        mk.convert_to_agreement(dense, 1.0, images, bank=BANK, metric=lambda out, expected: {"nearness": 0.5})
