"""What is freed stays while it is wanted and goes back afterwards; measured in a process of its own."""

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator with other habits")

SCRIPT = """
import json, resource
import torch
from timm_masterkeys.repair.memory import freed_memory_kept

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


def test_freed_memory_is_kept_inside_and_given_back_at_the_end():
    found = measured()
    assert found["inside"] < 0.1 * found["outside"]
    assert found["kept"] >= found["start"] + 60 and found["end"] < found["start"] + 20
    assert found["afterwards"] > 0.5 * found["outside"]


def test_thresholds_from_the_environment_stay():
    found = measured(MALLOC_MMAP_THRESHOLD_="1000000")
    assert found["inside"] > 0.5 * found["outside"]
