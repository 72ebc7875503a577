"""Keeps freed memory in the process for a while, so that large tensors need not be fetched from the kernel again."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # numbers of glibc's mallopt
LARGEST = 32 << 20  # bytes: where glibc's own, moving mmap threshold ends


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Freed memory stays with the process until the context ends, and all of it then goes back at once.

    By default glibc gives each large tensor back to the kernel as soon as it is freed, and every page of the next one
    is a fault: three quarters of the time of a repair on a CPU. Without glibc, or where the environment sets its
    thresholds, this does nothing. Afterwards the two thresholds are those that glibc comes to by itself once a tensor
    of 32 MB was freed (tensors larger than that go back to the kernel at once), but no longer move.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        chosen = True
    if chosen:
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
