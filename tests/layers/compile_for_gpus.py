"""Compiles the GPU kernels for GPUs that need not be present; prints a JSON line for each, with registers and spills.

    python tests/layers/compile_for_gpus.py

A process of its own: Triton's driver is replaced by one that only names the GPU, and launching by compiling.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from layer_cases import LAYOUTS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from timm_masterkeys.layers import gpu_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CASES = [  # compute capability, type, kernel size, stride, side
    (80, torch.float16, 7, 1, 56),
    (90, torch.bfloat16, 7, 1, 7),
    (90, torch.float32, 5, 2, 28),
]


class Named:
    """A driver that knows only the type of a GPU."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def usage(kernel):
    """Registers per thread of a compiled kernel, and bytes of memory for spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    taken = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": taken["REG"], "spilled": taken["STACK"] + taken["LOCAL"]}


def main():
    launch, about = jit.JITFunction.run, {}

    def compiled(function, *args, grid, warmup, **kwargs):
        kernel = launch(function, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps({"kernel": function.fn.__name__, **about, **usage(kernel)}), flush=True)

    jit.JITFunction.run = compiled
    for capability, dtype, size, stride, side in CASES:
        driver.set_active(Named(capability))
        for layout, form in LAYOUTS.items():
            about.update(capability=capability, dtype=str(dtype), size=size, layout=layout)
            x = torch.empty(8, 96, side, side, dtype=dtype).to(memory_format=form)
            weight, geometry = torch.empty(96, 1, size, size, dtype=dtype), ((stride,) * 2, (size // 2,) * 2, (1, 1))
            out = gpu_kernels.depthwise_conv2d(x, weight, weight[:, 0, 0, 0].contiguous(), *geometry)
            index = torch.zeros(96, 1, dtype=torch.int64)
            gpu_kernels.affine_sums(out, x, torch.empty(8, size, size), index, *geometry)


if __name__ == "__main__":
    main()
