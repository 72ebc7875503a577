"""What many tests do with networks: find the converted layers, compare two networks bit for bit, see that one stays."""

from contextlib import contextmanager

import torch
from torch import nn

from timm_masterkeys import MasterKeyConv2d


def layers(model):
    """The converted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)}


def snapshot(module):
    """A copy of a state dict."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    """Asserts that two networks, or two state dicts, hold the same tensors bit for bit."""
    a, b = (state.state_dict() if isinstance(state, nn.Module) else state for state in (a, b))
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different, different


def _fingerprint(model):
    modules = [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
    hooks = [len(module._load_state_dict_pre_hooks) for module in model.modules()]
    entries = {name: str(value.tolist()) for name, value in model.state_dict().items()}  # as NaN is not equal to itself
    return modules, tensors, hooks, entries


@contextmanager
def unchanged(model):
    """Asserts that what is done with a network leaves every module, tensor and value as it was."""
    before = _fingerprint(model)
    yield
    assert _fingerprint(model) == before


def values(outputs):
    """The tensors of a network's output: a tensor, a list, a tuple or a dict of them."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


def all_equal(a, b):
    """Whether two outputs are the same tensors bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(values(a), values(b), strict=True))


def assert_near(got, expected, tolerance=1e-3, tiny=1e-6):
    """Asserts that gradients are near others, each relative to its largest entry."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + tiny)
