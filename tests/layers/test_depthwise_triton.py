"""The Triton kernel against plain PyTorch, without a GPU in Triton's interpreter; it is taken where it should be."""

import os

import pytest
import torch
import torch.nn.functional as F
from depthwise_cases import GEOMETRIES, LAYOUTS, as_function, make, plain
from torch._dynamo.testing import CompileCounterWithBackend

from timm_masterkeys.layers import depthwise

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CASES = [  # the interpreter is slow: one layout a geometry, in turn
    (geometry, layout)
    for i, geometry in enumerate(GEOMETRIES)
    for j, layout in enumerate(LAYOUTS)
    if DEVICE == "cuda" or i % len(LAYOUTS) == j
]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
pytestmark = [pytest.mark.cuda] if DEVICE == "cuda" else []


@pytest.fixture
def kernel_on(monkeypatch):
    monkeypatch.setattr(depthwise, "TRITON", "1")


def sums(shape, keys, r, stride=(1, 1), padding=(0, 0), dilation=(1, 1), layout="NCHW", dtype=torch.float64):
    """Arguments of the sums, random, of one input shape."""
    kernel = (shape[1], 1, *keys.shape[1:])
    x = torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=LAYOUTS[layout])
    out = F.conv2d(x, x.new_zeros(kernel), None, stride, padding, dilation, shape[1])
    index = torch.randint(len(keys), (shape[1], r), device=DEVICE)
    return torch.randn_like(out), x, keys.to(DEVICE), index, stride, padding, dilation


def assert_sums(arguments, tolerance=1e-12):
    """The kernel's sums are the plain ones of the same numbers in float64."""
    from timm_masterkeys.layers.depthwise_triton import affine_sums

    got = affine_sums(*arguments)
    grad, x, keys, *rest = arguments
    wanted = depthwise.plain_sums(grad.double(), x.double(), keys.double(), *rest)
    assert got.dtype == torch.promote_types(grad.dtype, torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(("geometry", "layout"), CASES)
def test_gradients_of_a_layer(geometry, layout, kernel_on):
    layer = make(geometry, 2, "affine").to(DEVICE)
    x = torch.randn(3, 2, 4, 3, device=DEVICE, dtype=torch.float64).to(memory_format=LAYOUTS[layout]).requires_grad_()
    inputs, out = [x, *layer.parameters()], layer(x)
    weights = torch.randn_like(out)
    wanted = torch.autograd.grad((plain(layer, x) * weights).sum(), inputs)
    for got, value in zip(torch.autograd.grad((out * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, value)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype, layout):
    assert_sums(sums((2, 3, 8, 7), torch.randn(8, 3, 5), 1, padding=(1, 2), layout=layout, dtype=dtype), 1e-6)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 1, 33, 65), "NCHW"),
        ((9, 1, 7, 7), "NCHW"),
        ((1, 33, 34, 9), "channels_last"),
        ((5, 34, 1, 3), "channels_last"),
    ],
)
def test_shapes_that_no_block_divides(shape, layout):
    assert_sums(sums(shape, torch.randn(3, 1, 2, dtype=torch.float64), 0, (2, 1), (0, 1), layout=layout))


@layouts
def test_a_large_kernel(layout):
    keys = torch.randn(1, 31, 31, dtype=torch.float64)
    assert_sums(sums((1, 2, 4, 5), keys, 0, padding=(15, 15), layout=layout))


@layouts
def test_strides_of_any_kind(layout):
    keys = torch.randn(8, 3, 3, dtype=torch.float64)
    grad, x, *rest = sums((2, 3, 8, 7), keys, 1, padding=(1, 1), layout=layout)
    other = "NCHW" if layout == "channels_last" else "channels_last"
    wide = torch.randn(2, 5, 9, 9, device=DEVICE, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    assert_sums((grad.to(memory_format=LAYOUTS[other]), wide[:, 1:4, :8, 1:8], *rest))
    assert_sums((grad[:, :, :1, :1].expand_as(grad), x, *rest))


def test_offsets_of_64_bits(monkeypatch):
    from timm_masterkeys.layers import depthwise_triton

    monkeypatch.setattr(depthwise_triton, "WIDE", 1)
    assert_sums(sums((2, 3, 4, 3), torch.randn(8, 3, 3, dtype=torch.float64), 1, padding=(1, 1)))


def test_a_batch_of_none(kernel_on):
    layer = make("7x7", 1, "affine", dtype=torch.float32).to(DEVICE)
    layer(torch.randn(0, 2, 9, 9, device=DEVICE)).sum().backward()
    assert not layer.shift.grad.any() and not layer.scale.grad.any()


def test_second_order(kernel_on):
    layer = make("strip", 2, "affine").to(DEVICE)
    x = torch.randn(2, 2, 2, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    inputs, second = [x, *layer.parameters()], []
    for f in (layer, lambda x: plain(layer, x)):
        first = torch.autograd.grad(f(x).sin().sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.sin().sum() for g in first), inputs))
    for got, wanted in zip(*second, strict=True):
        torch.testing.assert_close(got, wanted)


def test_vmap_goes_the_plain_way(kernel_on):
    layer = make("strip", 1, "shift").to(DEVICE)
    f, parameters = as_function(layer), tuple(layer.parameters())
    x = torch.randn(3, 2, 2, 2, 4, dtype=torch.float64, device=DEVICE)
    gradient = torch.func.grad(lambda x, *p: f(x, *p).square().sum(), argnums=2)
    got = torch.func.vmap(gradient, (0, None, None))(x, *parameters)
    wanted = [torch.autograd.grad(plain(layer, one).square().sum(), layer.shift)[0] for one in x]
    torch.testing.assert_close(got, torch.stack(wanted))


def test_compile_in_one_graph(kernel_on):
    layer = make("strip", 1, "affine", dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 2, 3, 4, device=DEVICE, requires_grad=True)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(2):
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])
        wanted = torch.autograd.grad(plain(layer, x).square().sum(), [x, *layer.parameters()])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_the_operator_is_what_it_says():
    grad, x, *rest = sums((2, 3, 4, 3), torch.randn(8, 1, 3, dtype=torch.float64), 1, padding=(0, 1))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(depthwise.affine_sums, (grad.requires_grad_(), x.requires_grad_(), *rest), test_utils=tests)


@pytest.mark.parametrize(("wanted", "taken"), [("", False), ("0", False), ("1", True)])
def test_it_is_taken_where_asked_for(wanted, taken, monkeypatch):
    monkeypatch.setattr(depthwise, "TRITON", wanted)
    layer = make("7x7", 1, "shift", dtype=torch.float32).to(DEVICE)
    with torch.profiler.profile() as profile:
        layer(torch.randn(1, 2, 4, 4, device=DEVICE)).sum().backward()
    assert any(event.key == "timm_masterkeys::affine_sums" for event in profile.key_averages()) == taken
