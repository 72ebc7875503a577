"""Memory: how much a calibration needs, how much is free, and a context in which freed memory is kept."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from .block_runner import hooked

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # numbers of glibc's mallopt
LARGEST = 32 << 20  # bytes; glibc raises its own mmap threshold up to this


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keeps freed memory in the process until the context ends, and then gives all of it back.

    By default glibc gives each large tensor back to the operating system as soon as it is freed. Every page of the next
    one is then a fault, which takes three quarters of the time of a calibration on a CPU. Without glibc, or where the
    environment sets its thresholds, this does nothing. Afterwards both thresholds have the values that glibc reaches by
    itself once a tensor of 32 MB was freed (larger tensors go back at once), but stay fixed.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        mallopt = None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    try:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)  # never
        yield
    finally:
        mallopt(MMAP_MAX, 65536)
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        malloc_trim(0)


def check_memory(model: nn.Module, sample: torch.Tensor, count: int) -> None:
    """Raises CalibrationError if a calibration of the model with ``count`` images needs more than the free memory.

    ``sample`` is one or two of the images.
    """
    needed, free = needed_memory(model, sample, count), free_memory(sample.device)
    if needed > free:
        raise CalibrationError(
            f"Calibration with {count} images needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB "
            "are free. Give fewer images (max_images), or convert without calibration (mk_calibrate=False)."
        )


@torch.no_grad()
def needed_memory(model: nn.Module, sample: torch.Tensor, count: int) -> int:
    """About how many bytes a calibration with ``count`` images needs; the same at each call.

    Four times the weights; and for each image its own bytes, and a block's inputs and outputs in both networks, which
    are four times the largest output of any module.
    """
    largest = 0

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.nbytes // len(sample))

    with hooked((module, measure) for module in model.modules()):
        model(sample.clone())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return count * (4 * largest + sample[0].nbytes) + 4 * weights


def free_memory(device: torch.device, root: str | os.PathLike[str] = "/") -> float:
    """Free bytes on a device; infinite where they are not known. ``root`` is the folder of ``proc`` and ``sys``.

    On the CPU the memory that Linux calls available, or what the process's control groups may still take if that is
    less. Cached files of a group count as free, as it gives them back.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    free, groups = float("inf"), Path(root, "sys/fs/cgroup")
    try:
        lines = Path(root, "proc/meminfo").read_text().splitlines()
        free = float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
        entry = next(line for line in Path(root, "proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        entry = "0::/"
    group = groups / entry.strip().removeprefix("0::").strip("/")
    for folder in [group, *group.parents]:
        if groups == folder or groups in folder.parents:
            free = min(free, _left_in(folder))
    return free


def _left_in(group: Path) -> float:
    """The bytes that a control group may still take; infinite without a limit."""
    try:
        limit, taken = float((group / "memory.max").read_text()), float((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        files = sum(float(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
    except (OSError, ValueError):  # "max", or no such group
        return float("inf")
    return limit - taken + files
