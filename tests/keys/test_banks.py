"""Banks: the published digits, the keys at any size against a loop per tap, immutability, files."""

import copy
import dataclasses
import hashlib
import itertools
import os
import pickle
import re
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lite0 import lite0_state_dict
from safetensors import safe_open
from safetensors.numpy import save_file

import timm_masterkeys.keys.banks
from timm_masterkeys import BankError, KeyBank, get_bank, list_banks, project_kernels

LIGHT = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SQUARES = [(n, n) for n in (2, 3, 4, 5, 7, 9, 11, 13, 31)]
STRIPS = [size for n in (2, 3, 4, 5, 7, 9, 11, 13, 31) for size in ((1, n), (n, 1))]
OBLONGS = [(2, 3), (3, 2), (3, 7), (6, 4), (9, 5), (5, 11), (8, 8)]


def random_bank(seed, shape=(8, 7, 7)):
    return KeyBank("random", np.random.default_rng(seed).standard_normal(shape))


def landing(tap, taps, window):
    """Where one tap goes, with weights: counted in whole half taps from the window's first tap."""
    halves = min(max(2 * tap - (taps - 1) + (window - 1), 0), 2 * (window - 1))
    return [(halves // 2, 1.0)] if halves % 2 == 0 else [(halves // 2, 0.5), (halves // 2 + 1, 0.5)]


def unit(key):
    key = key - key.mean()
    return key / np.linalg.norm(key) if np.linalg.norm(key) > 0 else key


def folded(key, size):
    """One key at a size, tap by tap; neither centred nor scaled."""
    out = np.zeros(size)
    for i, j in itertools.product(range(key.shape[0]), range(key.shape[1])):
        for (y, wy), (x, wx) in itertools.product(landing(i, key.shape[0], size[0]), landing(j, key.shape[1], size[1])):
            out[y, x] += wy * wx * key[i, j]
    return out


def resized(bank, key, size):
    """One key at a size: folded or cropped where the window is smaller, its edges' mean level where it is larger."""
    small = (min(size[0], key.shape[0]), min(size[1], key.shape[1]))
    if bank.resize == "fold":
        out = folded(key, small)
    else:
        top, left = (key.shape[0] - small[0]) // 2, (key.shape[1] - small[1]) // 2
        out = np.array([[key[top + i, left + j] for j in range(small[1])] for i in range(small[0])])
    edges = [*out[0], *out[-1]] if size[0] > small[0] else []
    edges += [*out[:, 0], *out[:, -1]] if size[1] > small[1] else []
    return folded(out - np.mean(edges), size) if edges else out


def expected_at(bank, size):
    """The keys a size keeps, and the reasons for the others, from the loop oracle."""
    kept, reasons = {}, {}
    for index, key in enumerate(bank.keys):
        raw = resized(bank, unit(key), size)
        small = unit(raw)
        alike = 0.98 if bank.resize == "fold" else 0.995
        twins = [k for k, other in kept.items() if abs((small * other).sum()) > alike]
        if np.linalg.norm(raw - raw.mean()) < (0.3 if bank.resize == "fold" else 1e-6):
            reasons[index] = "vanishes"
        elif twins and size != bank.keys.shape[1:]:
            reasons[index] = f"repeats key {twins[0]}"
        else:
            kept[index] = small
    return kept, reasons


def check_against_oracle(bank, size):
    kept, reasons = expected_at(bank, size)
    if not kept:
        with pytest.raises(BankError, match=f"no key with a shape at {size[0]}x{size[1]}"):
            bank.keys_for(size)
        return
    keys = bank.keys_for(size)
    assert bank.kept(size) == tuple(kept)
    assert bank.left_out(size) == reasons
    assert keys.shape == (len(kept), *size) and keys.dtype == torch.float32
    np.testing.assert_allclose(keys.numpy(), np.stack(list(kept.values())), atol=2e-7)


def test_published_keys_digit_for_digit():
    data = resources.files("timm_masterkeys").joinpath("keys/data/babaiee2025.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "b48e20624d5089caa7a5bfcacf12d7a43f32aab5571f3a02e6583514c3506fcc"
    bank = get_bank()
    assert bank.keys.shape == (8, 7, 7) and bank.keys.dtype == np.float64
    first = [-0.010366, -0.002871, -0.02576, -0.041307, 0.050752, -0.070076, -0.00566, -0.039747]
    last = [-0.022568, 0.004438, -0.000934, -0.002368, -0.07189, 0.038904, -0.013484, -0.043075]
    assert bank.keys[:, 0, 0].tolist() == first and bank.keys[:, -1, -1].tolist() == last
    assert bank.keys[0, 4, 3] == 0.936427  # row by row: key 1 has its large tap below the centre


def test_published_bank_says_what_it_is():
    bank, digest = get_bank(), "821782a20dfdd1dc0a44b7e2302fc0fba68422e0f9b4296fdbe6562317cd2377"
    assert (bank.name, bank.licence, bank.digest) == ("babaiee2025", "cc-by-4.0", digest)
    assert "arXiv:2509.11711" in bank.source
    assert repr(bank) == "KeyBank('babaiee2025', 8 keys 7x7, digest 821782a20dfd)"
    assert hashlib.sha256(b"(8, 7, 7)" + bank.keys.astype("<f8").tobytes()).hexdigest() == digest


def test_digest_is_of_shape_and_values_alone():
    keys = np.random.default_rng(0).standard_normal((2, 3, 4))
    bank = KeyBank("a", keys)
    assert KeyBank("b", keys, "elsewhere", "mit").digest == bank.digest
    assert KeyBank("a", keys.transpose(0, 2, 1)).digest != bank.digest
    assert KeyBank("a", keys.reshape(2, 4, 3)).digest != bank.digest
    assert KeyBank("a", np.nextafter(keys, 9)).digest != bank.digest


@pytest.mark.parametrize("name", ["babaiee2025", "random8:1", "scale-space-b"])
@pytest.mark.parametrize("size", SQUARES + STRIPS + OBLONGS)
def test_keys_at_a_size_against_a_loop_over_taps(name, size):
    check_against_oracle(get_bank(name), size)


@LIGHT
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)).filter(lambda s: s[1] * s[2] > 1),
    size=st.tuples(st.integers(1, 10), st.integers(1, 10)).filter(lambda s: max(s) > 1),
)
def test_keys_of_any_bank_against_a_loop_over_taps(seed, shape, size):
    check_against_oracle(random_bank(seed, shape), size)


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (1, 7), (4, 4), (2, 6), (5, 2)])
@pytest.mark.parametrize("bank", [get_bank(), random_bank(0), random_bank(1, (4, 8, 8)), random_bank(2, (3, 7, 9))])
def test_same_response_to_an_image_constant_beyond_the_window(bank, size):
    """The smaller key answers an image as the full key answers its replicate padding, up to the key's mean and norm."""
    images = np.random.default_rng(0).standard_normal((20, *size))
    images -= images.mean((1, 2), keepdims=True)  # so that the small key's mean has no say
    rest_h, rest_w = bank.keys.shape[1] - size[0], bank.keys.shape[2] - size[1]
    # Where half a tap is left over the window has two places: the mean of both answers.
    places = list(itertools.product((rest_h // 2, rest_h - rest_h // 2), (rest_w // 2, rest_w - rest_w // 2)))
    padded = [np.pad(images, ((0, 0), (y, rest_h - y), (x, rest_w - x)), mode="edge") for y, x in places]
    kept = list(bank.kept(size))
    full = np.stack([unit(key) for key in bank.keys])[kept]
    whole = np.mean([np.einsum("nhw,khw->nk", image, full) for image in padded], axis=0)
    small = np.einsum("nhw,khw->nk", images, bank.keys_for(size).double().numpy())
    norm = (whole * small).sum(0) / (small**2).sum(0)
    assert (norm > 0.299).all()
    np.testing.assert_allclose(whole, norm * small, atol=1e-6)


def test_random_keys_are_cropped_so_that_they_stay_independent():
    small = np.concatenate([get_bank(f"random8:{seed}").keys_for((3, 3)).numpy() for seed in range(200)])
    spread = small.std(0)
    assert spread.max() / spread.min() < 1.15  # every tap alike; folded, the corners would hold most of the energy


@pytest.mark.parametrize(
    ("size", "left_out"),
    [
        ((3, 3), {}),
        ((31, 31), {}),
        ((1, 7), {2: "repeats key 0", 5: "vanishes", 7: "repeats key 0"}),
        ((3, 1), {4: "vanishes", 6: "repeats key 3", 7: "repeats key 3"}),
    ],
)
def test_what_the_published_bank_leaves_out(size, left_out):
    assert get_bank().left_out(size) == left_out


asks = pytest.mark.parametrize("ask", [KeyBank.keys_for, KeyBank.kept, KeyBank.left_out])


@asks
def test_no_key_with_a_shape(ask):
    bank = KeyBank("flat", np.array([[[1.0, -1.0], [1.0, -1.0]]]))
    with pytest.raises(BankError, match=r"'flat' has no key .* 3x1"):
        ask(bank, (3, 1))


@asks
@pytest.mark.parametrize(
    "size", [(1, 1), (0, 3), (3, 0), (-3, 3), (3,), (3, 3, 3), (), 7, None, "77", (7.0, 7.0), (2.5, 3)], ids=repr
)
def test_bad_size(ask, size):
    with pytest.raises(BankError, match=re.escape(f"kernel size {size}")):
        ask(get_bank(), size)


def test_twins_stay_at_the_banks_own_size():
    key = np.random.default_rng(0).standard_normal((1, 5, 5))
    bank = KeyBank("twins", np.concatenate([key, key, -key]))
    assert bank.kept((5, 5)) == (0, 1, 2)
    assert bank.left_out((5, 5)) == {}
    assert bank.left_out((3, 3)) == {1: "repeats key 0", 2: "repeats key 0"}


@pytest.mark.parametrize("size", [[3, 5], torch.Size((3, 5)), tuple(np.array([3, 5]))], ids=repr)
def test_size_may_be_a_list_or_a_torch_size(size):
    assert torch.equal(get_bank().keys_for(size), get_bank().keys_for((3, 5)))


def test_bank_is_frozen():
    bank = get_bank()
    for field in dataclasses.fields(bank):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(bank, field.name, None)
    with pytest.raises(ValueError, match="read-only"):
        bank.keys[0, 0, 0] = 1


@pytest.mark.parametrize("make", [np.array, torch.from_numpy], ids=["array", "tensor"])
def test_bank_keeps_its_own_copy(make):
    keys = make(np.random.default_rng(0).standard_normal((2, 3, 3)))
    bank = KeyBank("mine", keys)
    before = bank.keys.copy()
    keys[:] = 0  # the array given stays the caller's to write
    assert np.array_equal(bank.keys, before)


def test_keys_for_is_fresh_at_every_call():
    bank = get_bank()
    keys = bank.keys_for((7, 7))
    expected = keys.clone()
    keys.zero_()
    assert torch.equal(bank.keys_for((7, 7)), expected)
    bank.left_out((1, 7)).clear()
    assert bank.left_out((1, 7))


def test_deepcopy_is_the_bank_itself():
    bank = random_bank(0)
    assert copy.deepcopy({"layer": [bank]})["layer"][0] is bank


def saved_and_loaded(bank, path):
    bank.save(path)
    return KeyBank.load(path)


@pytest.mark.parametrize(
    "again",
    [
        lambda bank, path: copy.copy(bank),
        saved_and_loaded,
        *(lambda bank, path, p=p: pickle.loads(pickle.dumps(bank, p)) for p in range(2, 6)),
    ],
    ids=["copy", "file", *(f"pickle {protocol}" for protocol in range(2, 6))],
)
@pytest.mark.parametrize("resize", ["fold", "crop"])
def test_copy_pickle_and_file_round_trip(again, resize, tmp_path):
    bank = KeyBank("mine", np.random.default_rng(0).standard_normal((2, 3, 4)), "my séarch", "mit", resize)
    bank.digest  # noqa: B018  # cached: it must not travel
    back = again(bank, tmp_path / "other.safetensors")
    assert (back.name, back.source, back.licence, back.digest) == ("mine", "my séarch", "mit", bank.digest)
    assert np.array_equal(back.keys, bank.keys) and not back.keys.flags.writeable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_keys_of_any_dtype(dtype):
    keys = (torch.randn(2, 3, 3) * 9).to(dtype).requires_grad_(dtype.is_floating_point)
    bank = KeyBank("mine", keys)
    assert bank.keys.dtype == np.float64 and bank.keys.tolist() == keys.double().tolist()
    assert not bank.keys_for((3, 3)).requires_grad


def keys_but(index, value):
    keys = np.random.default_rng(0).standard_normal((3, 3, 3))
    keys[index] = value
    return keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        *((np.ones(shape), re.escape(f"shape {shape}")) for shape in ((9,), (3, 3), (2, 1, 3, 3), (0, 3, 3))),
        *((keys_but((1, 2, 0), value), "NaN or Inf") for value in (np.nan, -np.inf)),
        *((keys_but(1, value), "key 1 is constant") for value in (0.0, -0.1)),
    ],
)
def test_bad_keys(tmp_path, keys, message):
    path = tmp_path / "mine.safetensors"
    save_file({"keys": keys}, path)
    for name, make in (
        ("mine", lambda: KeyBank("mine", keys)),
        ("mine", lambda: get_bank(path)),
        ("custom", lambda: get_bank(torch.from_numpy(keys))),
    ):
        with pytest.raises(BankError, match=f"'{name}'.*{message}"):
            make()


def test_list_banks():
    assert list_banks()[0] == "babaiee2025" and list_banks()[-1] == "random8:<seed>"
    list_banks().clear()
    assert list_banks()
    for name in list_banks():
        assert get_bank(name.replace("<seed>", "3")).name == name.replace("<seed>", "3")


def test_random_banks():
    before = np.random.get_state()[1].copy()
    bank = get_bank("random8:0")
    assert bank.keys.shape == (8, 7, 7)
    # numpy's frozen stream of seed 0, whatever the version
    np.testing.assert_allclose(bank.keys[0, 0, :3], [1.76405234597, 0.40015720837, 0.97873798411], rtol=1e-11)
    assert len({get_bank(f"random8:{seed}").digest for seed in range(50)}) == 50
    assert "seed 7" in get_bank("random8:7").source
    assert get_bank(f"random8:{2**32 - 1}").keys.shape == (8, 7, 7)
    with pytest.raises(BankError, match=f"random8:{2**32}"):
        get_bank(f"random8:{2**32}")
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    "name",
    ["", "babaiee", "BABAIEE2025", "random8", "random8:", "random8:-1", "random8:x", "scale-space-x", "keys.bin"],
)
def test_unknown_name(name):
    with pytest.raises(BankError, match=f"'{name}'.*{', '.join(list_banks())}"):
        get_bank(name)


def test_get_bank_from_what_is_at_hand(tmp_path):
    bank, path = random_bank(0, (3, 5, 5)), tmp_path / "mine.safetensors"
    assert get_bank(bank) is bank
    for keys in (bank.keys, torch.from_numpy(bank.keys.copy())):
        assert get_bank(keys) == bank and get_bank(keys).name == f"custom-{bank.digest[:8]}"
    bank.save(path)
    for given_path in (path, str(path)):
        assert get_bank(given_path) == bank and get_bank(given_path).name == "random"


def test_what_a_file_holds(tmp_path):
    bank = KeyBank("mine", np.random.default_rng(0).standard_normal((3, 5, 4)), "my séarch", "mit")
    bank.save(tmp_path / "mine.safetensors")
    with safe_open(tmp_path / "mine.safetensors", framework="np") as file:
        assert list(file.keys()) == ["keys"]
        entries = {"name": "mine", "source": "my séarch", "resize": "fold", "licence": "mit", "digest": bank.digest}
        assert file.metadata() == {"format": "timm_masterkeys.bank.1", **entries}


def test_load_plain_safetensors(tmp_path):
    path = tmp_path / "plain.safetensors"
    keys = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    save_file({"keys": keys, "other": np.zeros(3)}, path)
    bank = KeyBank.load(path)
    assert (bank.name, bank.source, bank.licence) == ("plain", str(path), "")
    assert np.array_equal(bank.keys, keys.astype(np.float64))


def altered(place, cut=False):
    """Writes a bank with one bit of a byte changed, or cut short there."""

    def write(path):
        random_bank(0).save(path)
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data[:place] if cut else data)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(altered(-8), "does not match its digest", id="altered"),
        pytest.param(altered(-200), "does not match its digest", id="altered elsewhere"),
        pytest.param(altered(-9, cut=True), "Expected a safetensors file", id="cut"),
        pytest.param(lambda path: path.write_bytes(b""), "Expected a safetensors file", id="empty"),
        pytest.param(lambda path: path.write_bytes(b"\x80\x02}q\x00." * 9), "Expected a safetensors", id="pickle"),
        pytest.param(lambda path: None, "Expected a safetensors file", id="missing"),
        pytest.param(lambda path: path.mkdir(), "Expected a safetensors file", id="a folder"),
        pytest.param(lambda path: save_file({"weight": np.zeros(3)}, path), r"holds \['weight'\]", id="other tensors"),
        pytest.param(
            lambda path: save_file({"keys": np.zeros((2, 3, 3))}, path, {"format": "timm_masterkeys.bank.2"}),
            r"bank\.2', this version reads .*bank\.1'",
            id="another format",
        ),
    ],
)
def test_bad_files(tmp_path, write, message):
    path = tmp_path / "mine.safetensors"
    write(path)
    with pytest.raises(BankError, match=message) as caught:
        get_bank(path)
    assert str(path) in str(caught.value)


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(OSError):
        random_bank(0).save(tmp_path / "no" / "mine.safetensors")


def test_save_that_fails_half_way(tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    random_bank(0).save(path)

    def full(tensors, tmp, metadata):
        tmp.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timm_masterkeys.keys.banks, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        random_bank(1).save(path)
    assert KeyBank.load(path).digest == random_bank(0).digest
    assert os.listdir(tmp_path) == ["mine.safetensors"]


def test_the_compact_bank_tells_where_it_comes_from_and_meets_kernels_it_has_not_seen():
    bank = get_bank("compact8")
    assert len(bank) == 8 and bank.resize == "crop" and bank.licence == "apache-2.0" and "discovered" in bank.source
    weight = lite0_state_dict()["blocks.6.0.conv_dw.weight"]  # of a network it was not discovered in
    assert project_kernels(weight, bank).r2.mean() > project_kernels(weight, "babaiee2025").r2.mean() + 0.02
