"""The layer on a GPU: every geometry, layout and type, with the Triton kernels and without, against autograd."""

import contextlib
import copy

import pytest
import torch
from layer_cases import LAYOUTS, SMALL, make, plain

import timm_masterkeys as mk
from timm_masterkeys.layers import gpu_operators

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["1", "0"], ids=["kernel", "plain"], autouse=True)
def _kernel(request, monkeypatch):
    monkeypatch.setattr(gpu_operators, "TRITON", request.param)


@layouts
@pytest.mark.parametrize(
    ("precision", "trainable", "keys_per_kernel"),
    [
        ("float64", "affine", 2),
        ("float32", "none", 1),
        ("float32", "shift", 1),
        ("bfloat16 autocast", "affine", 2),
        ("float16 autocast", "shift", 1),
    ],
)
@pytest.mark.parametrize("geometry", SMALL)
def test_gradients(geometry, trainable, keys_per_kernel, precision, layout, cuda):
    name, _, autocast = precision.partition(" ")
    dtype = torch.float64 if precision == "float64" else torch.float32
    layer = make(geometry, keys_per_kernel, trainable, channels=4, dtype=dtype).to(cuda)
    x = torch.randn(3, 4, 8, 7, device=cuda, dtype=dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()
    with torch.autocast(cuda, getattr(torch, name)) if autocast else contextlib.nullcontext():
        out, expected = layer(x), plain(layer, x)
    tolerance = {"float64": 1e-10, "float32": 1e-5}.get(precision, 0.03)
    if gpu_operators.TRITON == "0":
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
    weights = torch.randn_like(out)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((out * weights).sum(), inputs)
    exact = copy.deepcopy(layer).double()
    y = x.detach().double().requires_grad_()
    expected = torch.autograd.grad((plain(exact, y) * weights).sum(), [y, *exact.parameters()])
    for tensor, a, b in zip(inputs, got, expected, strict=True):
        assert a.dtype == tensor.dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(b.abs().max()))


@layouts
@pytest.mark.parametrize("trainable", ["shift", "affine"])
@pytest.mark.parametrize("geometry", ["3x3", "3x3 stride 2", "7x7"])
def test_sizes_of_real_networks(geometry, trainable, layout, cuda):
    """Gradients of many blocks' sums in float32, and twice the same bit for bit."""
    batch, channels, side = (2, 2, 9) if cuda == "cpu" else (16, 144, 56)
    layer = make(geometry, 1, trainable, channels=channels, dtype=torch.float32).to(cuda)
    x = torch.randn(batch, channels, side, side, device=cuda).to(memory_format=LAYOUTS[layout])
    parameters = [getattr(layer, name) for name in ("scale", "shift") if trainable == "affine" or name == "shift"]
    weights = torch.randn_like(layer(x))
    got, again = (torch.autograd.grad((layer(x) * weights).sum(), parameters) for _ in "ab")
    exact, y = copy.deepcopy(layer).double(), x.double()
    parameters = [getattr(exact, name) for name in ("scale", "shift") if trainable == "affine" or name == "shift"]
    expected = torch.autograd.grad((plain(exact, y) * weights).sum(), parameters)
    for a, b, c in zip(got, again, expected, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=0, atol=1e-4 * float(c.abs().max()))
        if torch.are_deterministic_algorithms_enabled() or geometry == "7x7":
            assert torch.equal(a, b)


def test_tensors_of_more_than_2_to_the_31_elements(cuda):
    """Images so far apart that offsets between them take 64 bits; the memory between is never touched."""
    if cuda == "cpu":
        pytest.skip("needs 8 GB")
    layer = make("7x7", 1, "affine", dtype=torch.float32).to(cuda)
    apart = torch.empty(2**31 + 2 * 64, device=cuda, dtype=torch.bfloat16).as_strided((2, 2, 8, 8), (2**31, 64, 8, 1))
    x = apart.copy_(torch.randn(2, 2, 8, 8))
    gradients = []
    for images in (x, x.contiguous()):
        with torch.autocast(cuda, torch.bfloat16):
            out = layer(images)
        gradients.append(torch.autograd.grad(out.float().sin().sum(), [layer.scale, layer.shift]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_projection_and_conversion(cuda):
    """On the GPU as on the CPU: the same keys, scales and shifts."""
    conv = torch.nn.Conv2d(32, 32, 7, groups=32, dtype=torch.float64)
    for r in (1, 3):
        one, other = (mk.project_kernels(conv.weight.to(device), "babaiee2025", r) for device in ("cpu", cuda))
        assert other.scale.device.type == cuda and torch.equal(one.key_index, other.key_index.cpu())
        torch.testing.assert_close(other.scale.cpu(), one.scale, rtol=1e-9, atol=1e-9)
    layer = mk.MasterKeyConv2d.from_conv(copy.deepcopy(conv).to(cuda), trainable="affine")
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {cuda}
    moved = mk.MasterKeyConv2d.from_conv(conv, trainable="affine").to(cuda)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(moved.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_a_stream_of_its_own(cuda):
    """Backward runs on the stream of forward; nothing waits for, or races with, the default stream."""
    layer = make("7x7", 1, "affine", channels=8, dtype=torch.float32).to(cuda)
    x = torch.randn(4, 8, 8, 8, device=cuda)
    expected = torch.autograd.grad(plain(layer, x).square().sum(), [layer.scale, layer.shift])
    if cuda == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        context = torch.cuda.stream(stream)
    else:
        context = contextlib.nullcontext()
    with context:
        got = torch.autograd.grad(layer(x).square().sum(), [layer.scale, layer.shift])
    if cuda == "cuda":
        torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
