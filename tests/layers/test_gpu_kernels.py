"""GPU kernels against plain PyTorch, without a GPU in Triton's interpreter; where they are used; compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layer_cases import LAYOUTS, SMALL, assert_gradients, assert_vmapped_gradients, make, plain
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from timm_masterkeys.layers import depthwise, gpu_operators

pytest.importorskip("triton")
from timm_masterkeys.layers import gpu_kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FAST = ("2x2", "same, 2x2")  # in the interpreter
CASES = [  # one layout a geometry, in turn, without a GPU
    pytest.param(geometry, layout, marks=[] if geometry in FAST else pytest.mark.slow)
    for i, geometry in enumerate(SMALL)
    for j, layout in enumerate(LAYOUTS)
    if DEVICE == "cuda" or i % len(LAYOUTS) == j
]
either_layout = pytest.mark.parametrize("layout", [pytest.param("NCHW", marks=pytest.mark.slow), "channels_last"])
pytestmark = [pytest.mark.cuda] if DEVICE == "cuda" else []


@pytest.fixture
def kernel_on(monkeypatch):
    monkeypatch.setattr(gpu_operators, "TRITON", "1")


def random(*shape, layout="NCHW", dtype=torch.float64):
    """Of a layout and type, on the device."""
    return torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=LAYOUTS[layout])


def sums(shape, keys, r, stride=(1, 1), padding=(0, 0), dilation=(1, 1), **kind):
    """Arguments of the sums, random, of one input shape."""
    x = random(*shape, **kind)
    out = F.conv2d(x, x.new_zeros(shape[1], 1, *keys.shape[1:]), None, stride, padding, dilation, shape[1])
    index = torch.randint(len(keys), (shape[1], r), device=DEVICE)
    return torch.randn_like(out), x, keys.to(DEVICE), index, stride, padding, dilation


def assert_near(got, expected, tolerance):
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def assert_sums(arguments, tolerance=1e-12):
    """The kernel's sums are the plain ones of the same numbers in float64."""
    got = gpu_kernels.affine_sums(*arguments)
    grad, x, keys, *rest = arguments
    assert got.dtype == torch.promote_types(grad.dtype, torch.float32)
    assert_near(got, gpu_operators.plain_sums(grad.double(), x.double(), keys.double(), *rest), tolerance)


def assert_convolution(x, weight, bias=None, padding=(0, 0), tolerance=1e-12):
    """The kernel's output is the plain one of the same numbers in float64, in the input's type and layout."""
    got = gpu_kernels.depthwise_conv2d(x, weight, bias, (1, 1), padding, (1, 1))
    assert got.dtype == x.dtype and depthwise.layout(got) is depthwise.layout(x)
    exact = x.double(), weight.double(), None if bias is None else bias.double()
    assert_near(got, F.conv2d(*exact, padding=padding, groups=x.shape[1]), tolerance)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(("geometry", "layout"), CASES)
def test_output_and_gradients_of_a_layer(geometry, layout, kernel_on):
    layer = make(geometry, 2, "affine").to(DEVICE)
    x = random(3, 2, 4, 3, layout=layout).requires_grad_()
    assert_gradients(layer, x, 1e-7)
    with torch.no_grad():
        out = layer(x)
    torch.testing.assert_close(out, plain(layer, x))
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize(
    ("dtype", "digits", "layout"),
    [
        (torch.bfloat16, 8e-3, "NCHW"),
        pytest.param(torch.bfloat16, 8e-3, "channels_last", marks=pytest.mark.slow),
        pytest.param(torch.float16, 1e-3, "channels_last", marks=pytest.mark.slow),
        pytest.param(torch.float32, 1e-6, "NCHW", marks=pytest.mark.slow),
    ],
)
def test_half_precision_is_summed_in_float32(dtype, digits, layout):
    arguments = sums((2, 2, 8, 7), torch.randn(8, 2, 3), 1, padding=(1, 1), layout=layout, dtype=dtype)
    assert_sums(arguments, 1e-6)
    weight, bias = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in ((2, 1, 2, 3), (2,)))
    assert_convolution(arguments[1], weight, bias, padding=(1, 1), tolerance=digits)  # the output alone is rounded


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param((2, 1, 33, 65), "NCHW", marks=pytest.mark.slow),
        ((9, 1, 7, 7), "NCHW"),
        pytest.param((1, 33, 34, 9), "channels_last", marks=pytest.mark.slow),
        pytest.param((5, 66, 1, 3), "channels_last", marks=pytest.mark.slow),
    ],
)
def test_shapes_that_no_block_divides(shape, layout):
    keys = torch.randn(3, 1, 2, dtype=torch.float64)
    assert_sums(sums(shape, keys, 0, (2, 1), (0, 1), layout=layout))
    assert_sums(sums(shape, keys, 1, padding=(0, 1), layout=layout))
    assert_convolution(random(*shape, layout=layout), random(shape[1], 1, 1, 2), padding=(0, 1))


@either_layout
def test_a_large_kernel(layout):
    keys = torch.randn(1, 31, 31, dtype=torch.float64)
    assert_sums(sums((1, 2, 4, 5), keys, 0, padding=(15, 15), layout=layout))


@either_layout
def test_strides_of_any_kind(layout):
    keys = torch.randn(8, 3, 3, dtype=torch.float64)
    grad, x, *rest = sums((2, 3, 4, 3), keys, 1, padding=(1, 1), layout=layout)
    (other,) = LAYOUTS.keys() - {layout}
    wide = random(2, 5, 5, 5, layout=layout)[:, 1:4, :4, 1:4]
    assert_sums((grad.to(memory_format=LAYOUTS[other]), wide, *rest))
    assert_sums((grad[:, :, :1, :1].expand_as(grad), x, *rest))
    weight = random(3, 3, 3, 3, layout=layout)[:, 1:2]
    assert_convolution(wide, weight, random(6)[::2], padding=(1, 1))


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "WIDE", 1)
    arguments = sums((2, 2, 4, 3), torch.randn(8, 2, 2, dtype=torch.float64), 1, padding=(1, 1))
    assert_sums(arguments)
    assert_convolution(arguments[1], random(2, 1, 2, 2), padding=(1, 1))


def test_a_batch_of_none(kernel_on):
    layer = make("7x7", 1, "affine", dtype=torch.float32).to(DEVICE)
    layer(torch.randn(0, 2, 9, 9, device=DEVICE)).sum().backward()
    assert not layer.shift.grad.any() and not layer.scale.grad.any()


@pytest.mark.slow
def test_second_order(kernel_on):
    layer = make("1x5", 2, "affine").to(DEVICE)
    x = torch.randn(2, 2, 2, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    inputs, second = [x, *layer.parameters()], []
    for f in (layer, lambda x: plain(layer, x)):
        first = torch.autograd.grad(f(x).sin().sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.sin().sum() for g in first), inputs))
    for got, expected in zip(*second, strict=True):
        torch.testing.assert_close(got, expected)


def test_vmap_goes_the_plain_way(kernel_on):
    assert_vmapped_gradients(make("1x5").to(DEVICE), random(3, 2, 2, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(dynamic, kernel_on):
    layer = make("1x5", 1, "affine", dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 2, 3, 4, device=DEVICE, requires_grad=True)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    used = operators(lambda: compiled(x).sum().backward())
    assert used == ({"affine_sums", "depthwise_conv2d"} if hasattr(torch.compiler, "is_exporting") else set())
    for _ in range(2):
        assert_gradients(layer, x, 1e-4, compiled)
    assert counter.frame_count == 1


@either_layout
def test_the_operators_pass_torchs_own_checks(layout, kernel_on):
    assert gpu_operators.gpu_kernels_run(DEVICE)
    grad, x, *rest = sums((2, 3, 4, 3), torch.randn(8, 1, 3, dtype=torch.float64), 1, padding=(0, 1), layout=layout)
    tensors = x.requires_grad_(), random(6, 1, 3, 2).requires_grad_(), random(6).requires_grad_()
    for operator, arguments in (
        (gpu_operators.affine_sums, (grad.requires_grad_(), x, *rest)),
        (gpu_operators.depthwise_conv2d, (*tensors, (2, 1), (1, 1), (1, 2))),
    ):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.slow
def test_the_gradients_of_a_convolution_by_the_operator(kernel_on):
    x, weight, bias = (random(*shape).requires_grad_() for shape in ((1, 1, 3, 2), (2, 1, 2, 1), (2,)))
    run = lambda *tensors: gpu_operators.depthwise_conv2d(*tensors, (2, 1), (1, 1), (1, 2))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


def operators(run):
    """The operators of this package that are called."""
    with torch.profiler.profile() as profile:
        run()
    return {event.key.partition("::")[2] for event in profile.key_averages() if event.key.startswith("timm_masterkeys")}


CONVOLUTION = ("conv", (3, 3), (1, 1), (1, 1), 1, False, torch.float32, 0)


@pytest.mark.parametrize(
    ("setting", "measured", "used"),
    [
        ("", [], set()),
        ("", [CONVOLUTION], {"depthwise_conv2d"}),
        ("", [("sums", *CONVOLUTION[1:])], {"affine_sums"}),
        ("", [(*CONVOLUTION[:6], torch.bfloat16, 0)], set()),
        ("0", [CONVOLUTION], set()),
        ("1", [], {"affine_sums", "depthwise_conv2d"}),
        ("conv", [], {"depthwise_conv2d"}),
        ("sums", [CONVOLUTION], {"affine_sums"}),
    ],
)
def test_they_are_used_where_asked_for_or_measured(setting, measured, used, monkeypatch):
    monkeypatch.setattr(gpu_operators, "TRITON", setting)
    monkeypatch.setattr(gpu_operators, "MEASURED", frozenset(gpu_operators.Case(*case) for case in measured))
    layer = make("3x3", 1, "shift", channels=1, dtype=torch.float32).to(DEVICE)
    x = torch.randn(1, 1, 4, 4, device=DEVICE)
    assert operators(lambda: layer(x).sum().backward()) == used
    with torch.inference_mode():
        assert operators(lambda: layer(x)) == used & {"depthwise_conv2d"}


def test_inference_under_autocast(kernel_on):
    layer = make("3x3", 1, "shift", dtype=torch.float32).to(DEVICE)
    x = torch.randn(1, 2, 4, 4, device=DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        got, expected = layer(x), plain(layer, x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize(("strict", "grad"), [pytest.param(True, False, marks=pytest.mark.slow), (False, True)])
def test_what_is_exported_runs_without_the_package(strict, grad, kernel_on):
    layer = make("1x5", 1, "shift", dtype=torch.float32).to(DEVICE).eval()
    x = torch.randn(1, 2, 4, 4, device=DEVICE)
    layer(x)
    with torch.set_grad_enabled(grad):
        shapes = ({0: torch.export.Dim("n", min=2, max=8)},)
        exported = torch.export.export(layer, (torch.cat([x, x, x]),), dynamic_shapes=shapes, strict=strict)
    assert "timm_masterkeys" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(torch.cat([x, x])), plain(layer, torch.cat([x, x])))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("geometry", "shape", "dtype", "message"),
    [
        ("7x7", (1, 1, 9, 9), torch.float32, "to have 2 channels"),
        ("7x7", (1, 4, 9, 9), torch.float32, "to have 2 channels"),
        ("7x7", (1, 2, 9, 9), torch.bfloat16, "same|type"),
        ("2x2", (1, 2, 1, 9), torch.float32, "Kernel size can't be greater"),
    ],
)
def test_what_pytorch_refuses_is_refused(geometry, shape, dtype, message, grad, kernel_on):
    layer = make(geometry, dtype=torch.float32).to(DEVICE)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=message):
        layer(torch.zeros(shape, device=DEVICE, dtype=dtype))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # forward mode itself uses torch.jit
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(grad, kernel_on):
    layer = make("7x7", 1, "shift").to(DEVICE)
    x, tangent = random(1, 2, 4, 4), random(1, 2, 4, 4)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, plain(layer, tangent) - plain(layer, torch.zeros_like(x)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_input_that_no_output_reads_does_not_count():
    grad, x, *rest = sums((1, 2, 6, 6), torch.randn(8, 2, 2, dtype=torch.float64), 1, (3, 3))
    x[:, :, 5], x[:, :, :, 5] = torch.inf, torch.nan
    got, expected = gpu_kernels.affine_sums(grad, x, *rest), gpu_operators.plain_sums(grad, x, *rest)
    torch.testing.assert_close(got[:, 1:], expected[:, 1:])


@pytest.mark.slow
def test_they_compile_for_several_gpus(tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="a Triton of another vendor")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compile_for_gpus.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {"_convolve", "_window_sums"} and len(rows) == 18
    for row in rows:  # a spilled sum would be read and written at every tap
        assert row["registers"] <= 255 and row["spilled"] <= 64, row
