"""What a calibration needs and what is free; what is freed stays while it is wanted and goes back afterwards."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.memory import free_memory, needed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator with other habits")

SCRIPT = """
import json, resource
import torch
from timm_masterkeys.calibration.memory import freed_memory_kept

def faults(rounds=10):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

result = {"outside": faults(), "start": resident()}
try:
    with freed_memory_kept():
        faults(1)
        result["inside"], result["kept"] = faults(), resident()
        raise InterruptedError
except InterruptedError:
    result["end"] = resident()
result["afterwards"] = faults()
print(json.dumps(result))
"""


def measured(**environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command, env = [sys.executable, "-c", SCRIPT], {**inherited, **environment}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(run.stdout)


@glibc
def test_freed_memory_is_kept_inside_and_given_back_at_the_end():
    found = measured()
    assert found["inside"] < 0.1 * found["outside"]
    assert found["kept"] >= found["start"] + 60 and found["end"] < found["start"] + 20
    assert found["afterwards"] > 0.5 * found["outside"]


@glibc
def test_thresholds_from_the_environment_stay():
    found = measured(MALLOC_MMAP_THRESHOLD_="1000000")
    assert found["inside"] > 0.5 * found["outside"]


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), nn.Conv2d(16, 4, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_what_is_needed_by_hand():
    model, images = net(), torch.zeros(50, 3, 20, 30)
    weights = 3 * 16 + 16 + 16 * 9 + 16 + 16 * 4 + 4
    expected = 50 * 4 * (4 * 16 * 20 * 30 + 3 * 20 * 30) + 4 * 4 * weights
    assert needed_memory(model, images) == needed_memory(model, images) == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_too_little_memory_is_told_before_anything_is_changed(monkeypatch):
    dense, images = net(), torch.randn(40, 3, 20, 30)
    model, needed = mk.convert_to_masterkeys(dense), needed_memory(dense, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("timm_masterkeys.calibration.memory.free_memory", lambda device: needed - 1)
    for call in (
        lambda: mk.calibrate_masterkeys(model, dense, images),
        lambda: mk.convert_to_agreement(dense, 0.1, torch.cat([images] * 2)),
    ):
        with pytest.raises(
            mk.CalibrationError, match=r"about 0\.0 GB.* 0\.0 GB are free\. .*max_images.*mk_calibrate=False"
        ):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr("timm_masterkeys.calibration.memory.free_memory", lambda device: needed)
    mk.calibrate_masterkeys(model, dense, images)


def machine(root, available, groups):
    """Files as of Linux: kB that are available, and by control group its limit, what it has taken and of that files."""
    for path, text in {
        "proc/meminfo": f"MemTotal:  99999 kB\nMemAvailable:    {available} kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        **{f"sys/fs/cgroup/{group}/memory.max": str(limit) for group, (limit, _, _) in groups.items()},
        **{f"sys/fs/cgroup/{group}/memory.current": str(taken) for group, (_, taken, _) in groups.items()},
        **{
            f"sys/fs/cgroup/{group}/memory.stat": f"anon 7\nactive_file {files - 1}\ninactive_file 1\nfile_dirty 9\n"
            for group, (_, _, files) in groups.items()
        },
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize(
    "groups, expected",
    [
        ({}, 500 * 1024),
        ({"a/b": (100_000, 40_000, 30_000)}, 90_000),
        ({"a/b": ("max", 40_000, 30_000)}, 500 * 1024),
        ({"a": (50_000, 40_000, 5_000), "a/b": (100_000, 40_000, 30_000)}, 15_000),
        ({".": (20_000, 10_000, 500), "a/b": ("max", 40_000, 30_000)}, 10_500),
        ({"other": (20_000, 10_000, 500)}, 500 * 1024),
    ],
)
def test_what_is_free(tmp_path, groups, expected):
    machine(tmp_path, 500, groups)
    assert free_memory(torch.device("cpu"), tmp_path) == expected


def test_where_nobody_tells_what_is_free(tmp_path):
    assert free_memory(torch.device("cpu"), tmp_path) == float("inf")
    assert 2**20 < free_memory(torch.device("cpu"))
