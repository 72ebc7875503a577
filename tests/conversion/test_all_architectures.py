"""Every timm architecture: the shipped table is right, and each one with depthwise convolutions converts.

Marked ``sweep``, but for a few small ones. Architectures of up to ``REAL`` parameters are built and run with real
numbers, on small images where they take them; larger ones on the meta device, where shapes are checked, not values.
If the table is out of date the failure names the architectures to add to or remove from data/architectures.txt.
"""

import contextlib
import copy
import logging

import pytest
import timm
import torch
from compare import layers
from torch import nn
from torch.overrides import TorchFunctionMode

import timm_masterkeys as mk

REAL = 40e6
QUICK = ["convnext_atto", "test_resnet"]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def names():
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in timm.list_models()]


class NoInitialisation(TorchFunctionMode):
    """Skips what only sets values: on the meta device there are none, and a third of the time is left."""

    SKIPPED = frozenset(
        getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_")
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in self.SKIPPED else func(*args, **(kwargs or {}))


def build(name, device, tag=""):
    with torch.device(device), NoInitialisation() if device == "meta" else contextlib.nullcontext():
        return timm.create_model(name + tag)


def inputs(model, device):
    """Two small images where the architecture takes any size, else two of the size it wants."""
    cfg = model.pretrained_cfg
    size = cfg["input_size"]
    if not cfg.get("fixed_input_size"):
        smallest = (cfg.get("min_input_size") or (3, 96, 96))[-1]
        size = (size[0], max(96, smallest), max(96, smallest)) if min(size[1:]) > max(96, smallest) else size
    return torch.randn(2, *size, device=device)


def run(model, x):
    """The output, for the few architectures that want another size than a small one at that size."""
    try:
        return model(x)
    except (RuntimeError, AssertionError):
        return model(torch.randn(2, *model.pretrained_cfg["input_size"], device=x.device))


@pytest.mark.filterwarnings("ignore")  # timm's own
@pytest.mark.parametrize("name", names())
def test_architecture(name):
    meta = build(name, "meta")
    depthwise = [m for m in meta.modules() if isinstance(m, nn.Conv2d) and m.in_channels == m.groups > 1]
    assert bool(depthwise) == (name in mk.list_architectures()), f"{name}: data/architectures.txt is out of date"
    if not depthwise:
        with pytest.raises(mk.ConversionError):
            mk.convert_to_masterkeys(meta)
        return

    plan = mk.plan_conversion(meta)
    spatial = [m for m in depthwise if max(m.kernel_size) > 1]
    assert len(plan.converted) == len(spatial), [layer for layer in plan.skipped if "groups" not in layer.reason]
    if not spatial:  # only 1x1 depthwise: nothing a key could stand for
        return

    device = "cpu" if sum(p.numel() for p in meta.parameters()) <= REAL else "meta"
    assert timm.is_model(f"{name}.mk8") and timm.get_pretrained_cfg(f"{name}.mk8").tag == "mk8"
    assert len(layers(build(name, "meta", ".mk8"))) == len(spatial)
    torch.manual_seed(0)
    model = build(name, device)
    model = mk.convert_to_masterkeys(model, inplace=True).eval()
    converted = layers(model).values()
    assert len(converted) == len(spatial)
    x = inputs(model, device)
    with torch.no_grad():
        torch.manual_seed(1)
        out = run(model, x)
        outs = out if isinstance(out, tuple) else (out,)

        fused = mk.fuse_masterkeys(model)
        assert not layers(fused) and fused.state_dict().keys() == meta.state_dict().keys()
        again = copy.deepcopy(model)
        again.load_state_dict(model.state_dict())
        from_dense = copy.deepcopy(model)
        from_dense.load_state_dict(fused.state_dict())  # dense weights are projected, onto the same keys
        for other, tolerance in ((fused, 0.0), (again, 0.0), (from_dense, 1e-3)):
            torch.manual_seed(1)
            got = run(other, x)
            for a, b in zip(got if isinstance(got, tuple) else (got,), outs, strict=True):
                assert a.shape == b.shape
                if device == "cpu":
                    assert torch.isfinite(b).all()
                    assert torch.allclose(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max())))

    model.train()
    out = run(model, x)
    sum(o.float().square().mean() for o in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(layer.shift.grad is not None for layer in converted)
    assert device == "meta" or all(torch.isfinite(layer.shift.grad).all() for layer in converted)
