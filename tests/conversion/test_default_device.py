"""With another default device or dtype everything gives the same; "meta" shows every tensor made there."""

import contextlib
import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_masterkeys as mk
from timm_masterkeys.conversion.operator_report import _chance
from timm_masterkeys.keys.operators import _tables
from timm_masterkeys.study import discovery
from timm_masterkeys.study.discovery import collect_kernels, discover_bank


@contextlib.contextmanager
def default(kind):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(kind if isinstance(kind, torch.dtype) else before)
        with torch.device("cpu" if isinstance(kind, torch.dtype) else kind):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16, pytest.param("cuda", marks=pytest.mark.cuda)])
def both(request):
    """A function: what some work gives as usual and with tensors made otherwise unless told how."""
    other = request.getfixturevalue("cuda") if request.param == "cuda" else request.param

    def run(work):
        results = []
        for context in (contextlib.nullcontext(), default(other)):
            _chance.cache_clear()
            _tables.cache_clear()
            torch.manual_seed(0)
            with context:
                results.append(work())
        return results

    return run


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=5).eval()


@pytest.mark.parametrize(("bank", "r"), [("babaiee2025", 8), ("scale-space-b", 2), ("random8:0", 1), ("keys", 2)])
def test_projection(bank, r, both):
    weight, keys = torch.randn(20, 1, 5, 5), torch.randn(20, 5, 5)
    one, other = both(lambda: vars(mk.project_kernels(weight, keys if bank == "keys" else bank, r)))
    assert equal(one, other)


@pytest.mark.parametrize("trainable", ["none", "affine", "sigmas"])
def test_layers(dense, trainable, both):
    bank, x = "scale-space-b" if trainable == "sigmas" else "babaiee2025", torch.randn(2, 3, 32, 32)

    def work():
        model = mk.convert_to_masterkeys(dense, bank, trainable=trainable)
        scratch = mk.initialize_masterkeys(dense, bank, trainable=trainable)
        model(x).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        again, drawn = copy.deepcopy(scratch), copy.deepcopy(scratch.state_dict())
        again.load_state_dict(dense.state_dict())
        assert {p.device.type for p in [*model.parameters(), *scratch.buffers()]} == {"cpu"}
        states = [m.state_dict() for m in (model, again, mk.fuse_masterkeys(again))]
        return [*states, drawn, grads], str(mk.conversion_report(model, dense))

    (one, report), (other, text) = both(work)
    assert all(map(equal, one, other)) and report == text


def test_calibration(dense, both, tmp_path):
    """By every stage, with images of a folder; with a tensor: tests/calibration."""
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")

    def work():
        model = mk.convert_to_masterkeys(dense, keys_per_kernel=2)
        return model.state_dict(), mk.calibrate_masterkeys(model, dense, tmp_path, max_images=11).after

    (one, after), (other, again) = both(work)
    assert equal(one, other) and after == again


def test_a_save(dense, both, tmp_path):
    """Of a float32 model on the CPU, in whatever torch makes new tensors."""
    model = mk.convert_to_masterkeys(dense)
    folders = iter((tmp_path / "one", tmp_path / "other"))
    one, other = both(lambda: mk.save_pretrained(model, next(folders)))
    for name in ("model.safetensors", "masterkeys.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_kernels_for_a_search(dense, both, monkeypatch):
    monkeypatch.setattr(discovery, "STEPS", 20)
    data = np.random.default_rng(0).standard_normal((9, 3, 3))
    one, other = both(lambda: collect_kernels({"a": dense, "b": data}, 3))
    assert torch.equal(one.values, other.values) and torch.equal(one.network, other.network)
    for method in ("lines", "autoencoder"):
        found, again = both(partial(discover_bank, one, held_out="b", method=method, keys=2))
        assert found.bank == again.bank and found.r2 == again.r2 and found.held_out == 9
    assert all(map(torch.equal, *both(lambda: (*one.fit("babaiee2025"), one.weights(), one.weights(False)))))
