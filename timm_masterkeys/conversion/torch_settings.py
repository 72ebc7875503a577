"""Work that does not depend on torch's global settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs its body in float32 on the CPU, whatever torch's settings; restores these and the random state."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    full_precision = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.device("cpu"), full_precision:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
