"""Whole networks on a GPU: compiled, captured, in mixed precision, saved; no waits, calibration, discovery.

What should be the same on CPU and GPU is in the other files, which run there with ``-m cuda`` as well.
"""

import copy

import pytest
import timm
import torch
from compare import all_equal, assert_near, same
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch._dynamo.utils import counters

import timm_masterkeys as mk
from timm_masterkeys.layers import gpu_operators
from timm_masterkeys.study.discovery import collect_kernels, discover_bank

pytestmark = pytest.mark.cuda
MODEL = "test_convnext"
forms = pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])


@pytest.fixture(params=["1", "0"], ids=["kernel", "plain"])
def kernel(request, monkeypatch, cuda):
    if request.param == "1" and cuda == "cpu":
        pytest.skip("Triton's interpreter takes minutes for a network")
    monkeypatch.setattr(gpu_operators, "TRITON", request.param)


def build(device, trainable="affine", form=torch.channels_last):
    torch.manual_seed(0)
    dense = timm.create_model(MODEL, num_classes=4)
    for module in dense.modules():
        if isinstance(getattr(module, "gamma", None), torch.nn.Parameter):
            torch.nn.init.constant_(module.gamma, 0.5)  # LayerScale, nearly off before training
    return mk.convert_to_masterkeys(dense, trainable=trainable).to(device, memory_format=form).train()


def batch(device, form=torch.channels_last):
    return torch.randn(4, 3, 64, 64, device=device).to(memory_format=form)


def gradients(f, model, x):
    return torch.autograd.grad(f(x).square().sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@forms
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode, form, kernel, cuda):
    """One graph, compiled once, with CUDA graphs as well."""
    model = build(cuda, "shift", form)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(4):  # CUDA graphs: a warm-up, a recording, replays
        x = batch(cuda, form)
        torch.compiler.cudagraph_mark_step_begin()
        assert_near([g.clone() for g in gradients(compiled, model, x)], gradients(model, model, x))
    assert counters["stats"]["unique_graphs"] == 1
    assert mode == "default" or cuda == "cpu" or not counters["inductor"]["cudagraph_skips"]
    torch.compiler.reset()


def test_a_training_step_never_waits_for_the_device(kernel, cuda):
    model, x = build(cuda), batch(cuda)
    y = torch.randint(4, (4,), device=cuda)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, foreach=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(cuda, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    step()  # the optimiser's state, the kernel's compilation
    if cuda == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step()
    finally:
        if cuda == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_float16_with_a_grad_scaler_and_averages(kernel, cuda):
    """A step whose gradients overflow is left out; the next ones train shift and scale, averaged beside the model."""
    model = build(cuda)
    ema, start = ModelEmaV3(model, decay=0.5), copy.deepcopy(model.state_dict())
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    scaler = torch.amp.GradScaler(cuda, init_scale=2.0**40)
    scales = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(cuda, torch.float16 if cuda == "cuda" else torch.bfloat16):
            loss = model(batch(cuda)).float().square().mean()
        scaler.scale(loss).backward()
        if cuda == "cpu" and not scales:  # bfloat16 overflows later
            model.head.fc.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            assert all(torch.equal(v, start[n]) for n, v in model.state_dict().items() if "conv_dw" in n)
        if len(scales) > 3 and scales[-1] == scales[-2]:
            break
    ema.update(model)
    assert scales[0] < 2.0**40 and scales[-1] == scales[-2]
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        if name.endswith(("conv_dw.scale", "conv_dw.shift")):
            assert not torch.equal(value, start[name])
            torch.testing.assert_close(ema.module.state_dict()[name], (value + start[name]) / 2)
        elif name.endswith(("conv_dw.keys", "conv_dw.key_index")):
            assert torch.equal(value, start[name]) and torch.equal(ema.module.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning")
@forms
def test_deterministic_algorithms(form, kernel, cuda, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        model, x = build(cuda, form=form), batch(cuda, form)
        assert all_equal(gradients(model, model, x), gradients(model, model, x))
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_on_one_device_loaded_on_the_other(cuda, tmp_path):
    model, x = build(cuda).eval(), batch("cpu")
    mk.save_pretrained(model, tmp_path / "gpu", license="apache-2.0")
    mk.save_compact(model, tmp_path / "compact.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = timm.create_model(f"local-dir:{tmp_path / 'gpu'}", pretrained=True)
    other = mk.initialize_masterkeys(timm.create_model(MODEL, num_classes=4), trainable="affine")
    other.load_state_dict(torch.load(tmp_path / "model.pt", map_location="cpu", weights_only=True))
    loaded = mk.fuse_masterkeys(model)
    mk.load_compact(loaded, tmp_path / "compact.safetensors")
    for network in (again, other, loaded):
        same(copy.deepcopy(network).cpu(), copy.deepcopy(model).cpu())
    with torch.no_grad():
        expected = model(x.to(cuda)).cpu()
        for network in (again, other, loaded.cpu(), mk.fuse_masterkeys(model).cpu()):
            torch.testing.assert_close(network.eval()(x), expected, rtol=1e-3, atol=1e-4)


def test_calibration(cuda):
    """On the GPU as on the CPU, within rounding."""
    reports = []
    for device in ("cpu", cuda):
        torch.manual_seed(0)
        dense = timm.create_model("test_efficientnet", num_classes=5).eval().to(device)
        model = mk.convert_to_masterkeys(dense, keys_per_kernel=2)
        x = torch.randn(40, 3, 32, 32).to(device)
        reports.append(mk.calibrate_masterkeys(model, dense, x, metric="regression"))
        assert {t.device.type for t in model.state_dict().values()} == {device}
        assert all(p.isfinite().all() for p in model.parameters())
    first, second = reports
    assert [stage.changed for stage in first.stages] == [stage.changed for stage in second.stages]
    assert second.after["relative error"] == pytest.approx(first.after["relative error"], rel=0.05)
    assert second.after["relative error"] < second.before["relative error"]


def test_discovery(cuda):
    torch.manual_seed(0)
    dense = timm.create_model(MODEL, num_classes=4)
    there = copy.deepcopy(dense).to(cuda)
    kernels, moved = (collect_kernels({"a": network}) for network in (dense, there))
    assert torch.equal(kernels.values, moved.values)
    one, other = (discover_bank(kernels, keys=3, method="lines", device=d).bank for d in ("cpu", cuda))
    torch.testing.assert_close(torch.tensor(other.keys), torch.tensor(one.keys), rtol=0, atol=1e-5)
    first, second = (discover_bank(kernels, keys=3, device=cuda).bank.keys for _ in "ab")
    assert (first == second).all()
    one, other = (str(mk.conversion_report(mk.convert_to_masterkeys(d), d)) for d in (dense, there))
    assert one == other
