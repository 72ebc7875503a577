"""The backward pass without the weight gradient, against autograd through an ordinary convolution."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from layer_cases import LAYOUTS, SMALL, as_function, assert_gradients, assert_vmapped_gradients, gradients, make, plain
from torch.func import functional_call

from timm_masterkeys.layers import MasterKeyConv2d, SigmaKeyConv2d, depthwise

formats = pytest.mark.parametrize("memory_format", LAYOUTS.values(), ids=LAYOUTS)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("geometry", "trainable", "keys_per_kernel"),
    [
        *((geometry, "affine", 1 + i % 2) for i, geometry in enumerate(SMALL)),
        *itertools.product(("3x3", "7x7"), ("shift", "none"), (1,)),
        *[("3x3", "affine", 2), ("7x7", "affine", 1), ("same, 4x4, multiplier 2", "shift", 1)],
    ],
)
def test_gradients_to_second_order(geometry, trainable, keys_per_kernel):
    layer = make(geometry, keys_per_kernel, trainable)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(as_function(layer), inputs)
    # The second order entry by entry in each way of the backward pass, else along random directions.
    entries = keys_per_kernel == 2 and geometry in ("3x3", "7x7")
    assert torch.autograd.gradgradcheck(as_function(layer), inputs, fast_mode=not entries)


def test_scale_near_and_at_zero():
    layer = make("3x3", 2, "affine")
    with torch.no_grad():
        layer.scale[0], layer.scale[1] = 0.0, 1e-12
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(as_function(layer), (x, *layer.parameters()))


@formats
@pytest.mark.parametrize(
    ("geometry", "trainable"),
    [("3x3", "shift"), ("Conv2dSame", "none"), ("7x7", "none"), ("7x7", "affine"), ("dilated, multiplier 2", "shift")],
)
def test_float32_to_rounding(geometry, memory_format, trainable):
    layer = make(geometry, 1, trainable, channels=8, dtype=torch.float32)
    x = torch.randn(4, 8, 15, 14).to(memory_format=memory_format).requires_grad_()
    assert torch.equal(layer(x), plain(layer, x))
    assert layer(x).is_contiguous(memory_format=memory_format)
    assert_gradients(layer, x, 1e-5)
    assert gradients(layer, x)[0][0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("dtype", "trainable"), [(torch.bfloat16, "none"), (torch.bfloat16, "affine"), (torch.float16, "shift")]
)
def test_autocast(dtype, trainable):
    """Half precision forward and input gradient as conv2d's; scale and shift gradients summed in float32."""
    layer = make("3x3", 1, trainable, channels=8, dtype=torch.float32)
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out, expected = layer(x), plain(layer, x)
        assert out.dtype == expected.dtype == dtype
        assert torch.equal(out, expected)
    got = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    exact = torch.autograd.grad(plain(layer, x).square().sum(), [x, *layer.parameters()])
    for parameter, a, b in zip([x, *layer.parameters()], got, exact, strict=True):
        assert a.dtype == parameter.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0.03 * float(b.abs().max()))


@pytest.mark.parametrize("trainable", ["none", "shift", "affine", "sigmas"])
def test_parameters_in_half_precision_and_buffers_not(trainable):
    """As FSDP's mixed precision leaves a layer, for inputs in half precision."""
    kind = SigmaKeyConv2d if trainable == "sigmas" else MasterKeyConv2d
    layer = kind(8, 8, 3, padding=1, bank="scale-space-b", trainable=trainable)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    x = torch.randn(4, 8, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, F.conv2d(x, layer.weight.bfloat16(), layer.bias, padding=1, groups=8))
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in (x, *layer.parameters()))


@pytest.mark.parametrize("geometry", ["reflect", "replicate", "circular"])
def test_other_padding_modes(geometry):
    layer = make(geometry, 1, "affine")
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(as_function(layer), (x, *layer.parameters()))


@pytest.mark.parametrize(("trainable", "needed"), [("none", False), ("shift", True)])
def test_the_input_is_kept_only_where_it_is_needed(trainable, needed):
    layer = make("3x3", 1, trainable, channels=8, dtype=torch.float32)
    x, kept = torch.randn(4, 8, 9, 9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert (x.shape in kept) == needed


@formats
@pytest.mark.parametrize(("geometry", "trainable"), [("7x7", "none"), ("1x5", "shift"), ("7x7", "affine")])
def test_the_weight_gradient_of_large_kernels_is_never_computed(geometry, trainable, memory_format):
    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        masks: tuple = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution_backward" in str(func):
                self.masks += (tuple(args[-1]),)
            return func(*args, **(kwargs or {}))

    layer = make(geometry, 1, trainable, channels=64, dtype=torch.float32)
    x = torch.randn(2, 64, 9, 9).to(memory_format=memory_format).requires_grad_()
    for run, computed in ((layer, False), (layer.fuse(), True)):  # the spy sees it where it is
        with Spy() as spy:
            run(x).sum().backward()
        assert any(mask[1] for mask in spy.masks) == computed


@formats
@pytest.mark.parametrize(("trainable", "keys_per_kernel"), [("affine", 1), ("affine", 3)])
@pytest.mark.parametrize("geometry", ["3x3", "3x3 stride 2", "7x7", "dilated, multiplier 2"])
def test_scales_of_many_channels_and_images(geometry, memory_format, trainable, keys_per_kernel, monkeypatch):
    """In parts, by pooling, and all keys of a kernel at once."""
    monkeypatch.setattr(depthwise, "CACHED", 2**15)
    layer = make(geometry, keys_per_kernel, trainable, channels=64)
    x = torch.randn(5, 64, 8, 7, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    assert_gradients(layer, x, 1e-7)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("geometry", "memory_format", "whole_up_to"),
    [
        *((*case, size) for case in zip(SMALL, 5 * list(LAYOUTS.values()), strict=True) for size in (0, 99)),
        *((geometry, torch.contiguous_format, 3) for geometry in ("3x3", "1x5", "7x7")),
    ],
)
def test_either_way_to_the_shifts_gradient_is_exact(geometry, memory_format, whole_up_to, monkeypatch):
    monkeypatch.setattr(depthwise, "CACHED", 2**15)
    monkeypatch.setattr(depthwise, "WHOLE_UP_TO", whole_up_to)
    taken = []
    for way in ("window_sums", "convolution_backward"):
        own = getattr(depthwise, way)
        monkeypatch.setattr(depthwise, way, lambda *args, own=own, way=way: taken.append((way, args[-1])) or own(*args))
    layer = make(geometry, 1, "shift", channels=64)
    x = torch.randn(5, 64, 8, 7, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    assert_gradients(layer, x, 1e-12)
    whole = any(way == "convolution_backward" and mask[1] for way, mask in taken)
    assert whole == (max(layer.kernel_size) <= whole_up_to)
    assert whole != any(way == "window_sums" for way, _ in taken)


def test_writes_of_every_kind_are_seen_in_eval_mode():
    layer, x = make("3x3", 2, "affine", channels=4, dtype=torch.float32).eval(), torch.randn(1, 4, 8, 8)

    def scale_data():
        layer.scale.data = layer.scale.data.clone() + 1

    outputs = []
    with torch.no_grad():
        for write in (
            lambda: None,
            lambda: layer.shift.add_(1),
            scale_data,
            lambda: layer.shift.data.mul_(2),
            lambda: layer.load_state_dict({**layer.state_dict(), "shift": torch.zeros(4)}),
        ):
            write()
            outputs.append(layer(x))
            assert torch.equal(outputs[-1], plain(layer, x))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_threads_that_run_and_switch_modes():
    layer = make("3x3", 1, "shift", channels=4, dtype=torch.float32).eval()
    x = torch.randn(1, 4, 8, 8)
    expected = plain(layer, x)

    def run(_):
        with torch.no_grad():
            return torch.equal(layer(x), expected)

    with ThreadPoolExecutor(4) as pool:
        modes = pool.submit(lambda: [layer.train(i % 2 == 0) for i in range(200)])
        assert all(pool.map(run, range(400)))
        modes.result()


@pytest.mark.parametrize(
    ("geometry", "memory_format"), [("3x3", torch.contiguous_format), ("7x7", torch.channels_last)]
)
def test_a_batch_of_none(geometry, memory_format):
    layer = make(geometry, 1, "affine", channels=64, dtype=torch.float32)
    x = torch.randn(0, 64, 9, 9).to(memory_format=memory_format).requires_grad_()
    layer(x).sum().backward()
    assert not layer.shift.grad.any() and not layer.scale.grad.any()


def test_inference_mode_then_training():
    layer = make("3x3", 1, "shift", channels=4, dtype=torch.float32)
    x = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        first = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
    layer(x).sum().backward()
    assert layer.shift.grad is not None


def test_vmap_and_functional_gradients():
    assert_vmapped_gradients(make("3x3"), torch.randn(3, 2, 2, 7, 6, dtype=torch.float64))


@pytest.mark.parametrize(("geometry", "trainable"), [("3x3", "affine"), ("7x7", "affine"), ("7x7", "shift")])
def test_batched_gradients(geometry, trainable):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` takes them."""
    layer = make(geometry, 1, trainable)
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    inputs, output = (x, *layer.parameters()), layer(x)
    grads = torch.randn(3, *output.shape, dtype=torch.float64)
    got = torch.autograd.grad(output, inputs, grads, is_grads_batched=True)
    each = [torch.autograd.grad(layer(x), inputs, grad) for grad in grads]
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_over_an_ensemble(grad):
    layers = [make("3x3", 2, "shift", dtype=torch.float64) for _ in range(3)]
    for number, layer in enumerate(layers):
        torch.manual_seed(number)
        layer.reset_parameters()
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        got = torch.func.vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([plain(layer, x) for layer in layers]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.func.jvp itself uses torch.jit
@pytest.mark.parametrize(
    ("geometry", "trainable"),
    [("3x3", "none"), ("Conv2dSame", "affine"), ("dilated, multiplier 2", "shift"), ("7x7", "affine")],
)
def test_forward_mode(geometry, trainable):
    layer = make(geometry, 1, trainable)
    f, values = as_function(layer), (torch.randn(2, 2, 9, 8, dtype=torch.float64), *layer.parameters())
    tangents = tuple(torch.randn_like(value) for value in values)
    gradient = torch.func.grad(lambda *v: f(*v).square().mean())
    for function in (f, gradient):  # the second is a product with the Hessian
        _, got = torch.func.jvp(function, values, tangents)
        step = 1e-6
        ahead, behind = (function(*[v + s * t for v, t in zip(values, tangents, strict=True)]) for s in (step, -step))
        torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "channels", "memory_format", "dynamic"),
    [  # the sums of windows are pooled with many channels in channels_last, if there are any to be taken
        ("none", 4, torch.contiguous_format, None),
        ("shift", 4, torch.contiguous_format, None),
        ("shift", 64, torch.channels_last, None),
        ("affine", 64, torch.channels_last, True),
    ],
)
def test_compile_in_one_graph(trainable, channels, memory_format, dynamic):
    layer = make("7x7", 1, trainable, channels=channels, dtype=torch.float32)
    x = torch.randn(2, channels, 9, 9).to(memory_format=memory_format).requires_grad_()
    torch.compiler.reset()  # every case counts against the same limit of recompilations
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        assert_gradients(layer, x, 1e-4, compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
