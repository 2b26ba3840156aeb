"""What the operating system says: of this process, and of the machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import psutil

from .reading import EXACT, WHOLE_DEVICE, Figure, exact

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
MMAP_THRESHOLD_BYTES = 4 << 20
"""As fast as glibc's own choice on 512 × 512 video; with 1 MiB a run took a third more CPU time."""

ARENAS = 2
"""Heaps that threads share. By default, glibc makes up to eight for each core; then every thread of an encoder may get
its own, which stays: a worker's 184 MiB became 210 over fifty clips on a busy machine (benchmarks/night.py)."""


@cache
def _glibc(function: str) -> Callable[..., int] | None:
    """A function of glibc, or None with another C library."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), function)
    except (OSError, AttributeError):  # not Linux, or musl
        return None


def trim() -> bool:
    """Gives freed heap pages back to the system; says whether this C library can.

    Without it glibc may keep all that was freed, and a reading of the process shows a leak where there is none
    (256 × 1 MiB freed: the resident size stays up by 255 MiB until the call).
    """
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)
    return malloc_trim is not None


def fix_heap_growth() -> bool:
    """Fixes the size above which glibc maps a block on its own and gives it back when it is freed, and the number of
    heaps.

    glibc raises that size up to 32 MiB as large blocks are freed; from then on, freed frames stay in a heap that gets
    holes, and resident memory creeps up although nothing leaks. The setting holds for the whole process, so it is for
    a process of our own. Returns whether the C library took it.
    """
    mallopt, settings = _glibc("mallopt"), ((_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES), (_M_ARENA_MAX, ARENAS))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def process_memory(*, trimmed: bool) -> Figure:
    """Bytes that only this process holds (USS), else its resident size, which includes pages of mapped files.

    Args:
        trimmed: call `trim` first. It walks the whole heap: for the ends of phases, not for every step.
    """
    note = "" if trimmed and trim() else "with freed heap pages that the C library keeps"
    process = psutil.Process()
    try:
        return Figure(process.memory_full_info().uss, "USS", EXACT, note)
    except (psutil.AccessDenied, AttributeError, NotImplementedError):
        return Figure(process.memory_info().rss, "RSS", EXACT, f"with shared and mapped pages {note}".rstrip())


def machine_memory() -> tuple[Figure, Figure]:
    """Used and total bytes of the machine's RAM."""
    memory = psutil.virtual_memory()
    return Figure(memory.total - memory.available, "system", WHOLE_DEVICE), exact(memory.total, "system")
