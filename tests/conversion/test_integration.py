"""What people do with timm models, done with converted ones: by default each thing with two of eight networks."""

import copy
import io
import os
import pickle
import subprocess
import sys

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from compare import assert_near, layers
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.utils import reparameterize_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import timm_masterkeys as mk

NETWORKS = {  # the smallest that have what is named, where timm lets one choose
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "test_efficientnet": {"pad_type": "same"},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},  # re-parameterises itself
    "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},  # strips
    "edgenext_xx_small": {"depths": (2, 2, 2, 2)},  # attention beside convolutions
}
SECONDS = ("compile", "export", "trace", "script", "onnx")  # what takes some for each network


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f"{name}.mk8", num_classes=7, **NETWORKS.get(name, {}), **kwargs)


def images(model, count=2):
    """Noise, where the model is."""
    return torch.randn(count, 3, 64, 64).to(next(model.parameters()).device)


def shifts(model):
    return [layer.shift for layer in layers(model).values()]


@torch.no_grad()
def assert_same(a, b, x, tolerance=1e-4):
    torch.testing.assert_close(a(x), b(x), rtol=tolerance, atol=tolerance)


def do_copies(model):
    state, x = safetensors.torch.load(safetensors.torch.save(model.state_dict())), images(model)
    other = copy.deepcopy(model)
    for layer in layers(other).values():
        layer.reset_parameters()
    other.load_state_dict(state)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert_same(same, model, x, 0)
    assert_same(copy.deepcopy(model).to(memory_format=torch.channels_last), model, x)


def do_compile(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x, parameters = images(model), [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        gradients = torch.autograd.grad(compiled(x).square().sum(), parameters)
    assert counter.frame_count == 1
    assert_near(gradients, torch.autograd.grad(model(x).square().sum(), parameters))
    torch._dynamo.reset()


def do_onnx(model):
    file, x = io.BytesIO(), images(model)
    with torch.no_grad():
        torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue())
        out = torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0])
        torch.testing.assert_close(out, model(x).cpu(), rtol=1e-3, atol=1e-4)


def do_grad_checkpointing(model):
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):  # forward runs twice: statistics would be updated twice
            module.eval()
    x, gradients = images(model), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)  # drop path
        gradients.append(torch.autograd.grad(model(x).square().sum(), shifts(model)))
    assert_near(gradients[1], gradients[0], tiny=1e-8)


def do_sync_batchnorm(model):
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    assert len(layers(converted)) == len(layers(model))
    assert_same(converted, model, images(model))


def do_split_batchnorm(model):
    split = convert_splitbn_model(copy.deepcopy(model), 2).train()
    split(images(model, 4)).sum().backward()
    assert all(shift.grad is not None for shift in shifts(split))


def do_half(model):
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            out = half(images(model).to(dtype))
        assert out.dtype == dtype and out.isfinite().all()
        assert all(layer.key_index.dtype == torch.float32 for layer in layers(half).values())


def do_features_only(model):
    features = build(model.pretrained_cfg["architecture"], features_only=True).eval()
    out = features(images(features))
    assert layers(features) and [f.shape[1] for f in out] == features.feature_info.channels()
    final, intermediates = model.forward_intermediates(images(model))
    assert final.isfinite().all() and intermediates


def do_reparameterize(model):
    dense = reparameterize_model(model)
    assert not layers(dense) and layers(model)
    assert_same(dense, model, images(model), 1e-3)


def do_count_flops(model):
    counts = []
    for counted in (model, mk.fuse_masterkeys(model)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            counted(images(model))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


DONE = {name.removeprefix("do_"): function for name, function in list(globals().items()) if name.startswith("do_")}
MADE = {  # what is made of a model, with the same outputs
    "export": lambda model: torch.export.export(model, (images(model),)).module(),
    "trace": torch.no_grad()(lambda model: torch.jit.trace(model, images(model))),
    "script": torch.jit.script,
}


def pairs():
    """All of them; but for two networks a thing (one, if it takes seconds), they are marked ``sweep``."""
    for i, what in enumerate((*DONE, *MADE)):
        for j, name in enumerate(NETWORKS):
            chosen = (i - j) % 8 == 0 or ((i - j) % 8 == 3 and what not in SECONDS)
            slow = [pytest.mark.slow] if what == "compile" else []
            yield pytest.param(name, what, marks=slow if chosen else [pytest.mark.sweep])


@pytest.mark.filterwarnings("ignore")  # of torch.jit and the exporters: deprecations, constants while tracing
@pytest.mark.parametrize(("name", "what"), list(pairs()))
def test(name, what, device):
    model = build(name).eval().to(device)
    if what in MADE:
        assert_same(MADE[what](model), model, images(model))
    else:
        DONE[what](model)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5's newer exporter fails on the stock model as well")
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_the_newer_exporter():
    model, file = build("test_efficientnet").eval(), io.BytesIO()
    x = images(model)
    with torch.no_grad():
        torch.onnx.export(model, (x,), input_names=["x"], dynamo=True, verbose=False).save(file)
        out = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-3, atol=1e-4)


DISTRIBUTED = """
import os, sys, time, timm, torch, torch.distributed as dist
import timm_masterkeys as mk
from pathlib import Path
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

device = sys.argv[1]
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank = dist.get_rank()

def make():
    torch.manual_seed(0)  # as train.py does, with the rank added only after the model is made
    return timm.create_model("test_convnext.mk8", num_classes=4).to(device)

def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 64, 64).to(device)).square().mean().backward()
        optimizer.step()

model = make()
train(torch.nn.parallel.DistributedDataParallel(model))
for name, value in model.state_dict().items():
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    assert all(torch.equal(value, other) for other in values), name

if hasattr(fsdp, "fully_shard"):  # public from torch 2.6
    sharded = make()
    for block in [m for m in sharded.modules() if type(m).__name__ == "ConvNeXtBlock"]:
        fsdp.fully_shard(block)
    fsdp.fully_shard(sharded)
    train(sharded)
    for name, value in sharded.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)
print("all equal", flush=True)
# Whoever leaves first would take the other's connections down; and gloo's threads may ask for a lock of an interpreter
# that is being torn down, and abort the process. So they wait for each other without it, and leave at once.
Path(f"{__file__}.{rank}").touch()
while not all(Path(f"{__file__}.{other}").exists() for other in range(dist.get_world_size())):
    time.sleep(0.05)
os._exit(0)
"""


@pytest.mark.slow
def test_ddp_and_fsdp2(tmp_path, device):
    """On two processes, or one a GPU. Also ``torchrun -m timm_masterkeys.launch``."""
    count = 2 if device == "cpu" else torch.cuda.device_count()
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*torchrun, "-m", "timm_masterkeys.launch", str(tmp_path / "script.py"), device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("all equal") == count
