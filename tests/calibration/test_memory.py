"""The memory that a calibration needs, and that is free; freed memory stays in between and goes back at the end."""

import ctypes
import json
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.memory import free_memory, freed_memory_kept, needed_memory

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
with freed_memory_kept():
    faults(1)
    result["inside"], result["kept"] = faults(), resident()
result["end"], result["afterwards"] = resident(), faults()
print(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator with other habits")
def test_freed_memory_is_kept_inside_and_given_back_at_the_end(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["inside"] < 0.1 * found["outside"]
    assert found["kept"] >= found["start"] + 60 and found["end"] < found["start"] + 20
    assert found["afterwards"] > 0.5 * found["outside"]


@pytest.mark.parametrize("variable", [None, "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_thresholds_are_set_and_set_back_unless_the_environment_has_them(monkeypatch, variable):
    calls = []

    class Libc:
        def __init__(self, name):
            self.mallopt = lambda number, value: calls.append((number, value))
            self.malloc_trim = lambda pad: calls.append("trim")

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    monkeypatch.setattr("os.environ", {variable: "1"} if variable else {})
    with pytest.raises(InterruptedError), freed_memory_kept():
        inside = list(calls)
        raise InterruptedError
    if variable:
        assert calls == []
    else:
        assert inside == [(-4, 0), (-1, -1)]
        assert calls[2:] == [(-4, 65536), (-3, 32 << 20), (-1, 64 << 20), "trim"]


def net():
    layers = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), nn.Conv2d(16, 4, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_needed_memory_by_hand():
    model, images = net(), torch.zeros(50, 3, 20, 30)
    weights = 3 * 16 + 16 + 16 * 9 + 16 + 16 * 4 + 4
    expected = 50 * 4 * (4 * 16 * 20 * 30 + 3 * 20 * 30) + 4 * 4 * weights
    assert needed_memory(model, images[:2], 50) == needed_memory(model, images[:1], 50) == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_too_little_memory_is_an_error_before_anything_is_changed(monkeypatch):
    dense, images = net(), torch.randn(40, 3, 20, 30)
    model, needed = mk.convert_to_masterkeys(dense), needed_memory(dense, images[:2], len(images))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("timm_masterkeys.calibration.memory.free_memory", lambda device: needed - 1)
    for call in (
        lambda: mk.calibrate_masterkeys(model, dense, images),
        lambda: mk.convert_to_agreement(dense, 0.1, torch.cat([images] * 2)),
    ):
        with pytest.raises(mk.CalibrationError, match=r"0\.0 GB are free\. .*max_images.*mk_calibrate=False"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr("timm_masterkeys.calibration.memory.free_memory", lambda device: needed)
    mk.calibrate_masterkeys(model, dense, images)


def machine(root, available, groups):
    """Files as of Linux: available kB, and by control group its limit, its taken bytes and those of cached files."""
    files = {"proc/meminfo": f"MemTotal:  99999 kB\nMemAvailable:    {available} kB\n", "proc/self/cgroup": "0::/a/b\n"}
    for group, (limit, taken, cached) in groups.items():
        folder = f"sys/fs/cgroup/{group}"
        files |= {f"{folder}/memory.max": str(limit), f"{folder}/memory.current": str(taken)}
        files[f"{folder}/memory.stat"] = f"anon 7\nactive_file {cached - 1}\ninactive_file 1\nfile_dirty 9\n"
    for path, text in files.items():
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
def test_free_memory(tmp_path, groups, expected):
    machine(tmp_path, 500, groups)
    assert free_memory(torch.device("cpu"), tmp_path) == expected


def test_free_memory_that_is_not_known_is_infinite(tmp_path):
    assert free_memory(torch.device("cpu"), tmp_path) == float("inf")
    assert 2**20 < free_memory(torch.device("cpu"))
