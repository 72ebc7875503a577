"""Two processes with two seeds, as timm's train.py has them: what random initialisation gives is one network."""

import socket

import pytest
import torch
from forked import Python

import timm_masterkeys as mk

RANK = """
import datetime, sys, timm, torch, torch.distributed as dist
import timm_masterkeys as mk
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

def differing(model, of_keys=False):
    states = [None, None]
    dist.all_gather_object(states, dict(model.state_dict()))
    names = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    return {name for name in names if "conv_dw" in name and not name.endswith("bias")} if of_keys else names

torch.manual_seed(rank)
for settings in sys.argv[3:]:
    arguments = eval(settings)
    model = mk.initialize_masterkeys(timm.create_model("test_convnext", num_classes=4), **arguments)
    layers = [m for m in model.modules() if isinstance(m, mk.MasterKeyConv2d)]
    assert layers and all(layer.random_kernels().all() for layer in layers)
    assert differing(model) and not differing(model, of_keys=True), settings  # the dense layers await DDP
    ema = ModelEmaV3(model, decay=0.9)  # before DDP, as train.py has it
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        parallel(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
        ema.update(model)
    assert not differing(model), settings
    for name, value in ema.module.state_dict().items():
        if name.endswith("key_index"):
            assert torch.equal(value, value.round()) and torch.equal(value, model.state_dict()[name]), name

named = timm.create_model("test_convnext.mk8", num_classes=4)
assert not differing(named, of_keys=True)
with torch.device("meta"):
    mk.initialize_masterkeys(timm.create_model("test_convnext"))
lone = mk.MasterKeyConv2d(8, 8, 7) if rank == 0 else None  # waits for nobody
dist.barrier()
print("all equal")
dist.destroy_process_group()
"""

SETTINGS = [
    {},
    {"trainable": "none"},
    {"trainable": "affine", "keys_per_kernel": 2},
    {"trainable": "sigmas", "bank": "scale-space-b"},
]


@pytest.mark.slow
def test_ranks_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Python("-c", RANK, rank, port, *map(repr, SETTINGS)) for rank in range(2)]
    written = [rank.communicate(timeout=200) for rank in ranks]
    for rank, (out, err) in zip(ranks, written, strict=True):
        assert rank.returncode == 0 and "all equal" in out, err[-4000:]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_single_process_sends_nothing(settings, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_: pytest.fail("sent"))
    mk.initialize_masterkeys(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 7, groups=8)), **settings)
