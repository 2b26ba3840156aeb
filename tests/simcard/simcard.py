"""Two simulated cards with memory of their own: `torch.device("simcard", 0)` and `("simcard", 1)`.

Importing this compiles `simcard.cpp` once (a C++ compiler and ninja are needed; the result is cached by torch) and
registers the device type. Import it before anything that looks for devices, in a process that needs no other
PrivateUse1 backend.

    import simcard
    simcard.set_up(0, capacity=64 << 20)
    torch.ones(1 << 20, device="simcard:0")
    simcard.statistics(0)["live"]           # 4194304
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.util
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
import torch.utils.cpp_extension as cpp_extension

NAME = "simcard"
LIBRARY = "steadyvsr_simcard"
CARDS = 2
BUILD_SECONDS = 600
SOURCE = Path(__file__).with_name("simcard.cpp")


def _build() -> Any:
    """Compiles the cards, once for each source, torch and environment; later processes load what is there."""
    made_of = f"{SOURCE.read_text()} {torch.__version__} {torch.__file__} {sys.version}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"steadyvsr_simcard_{getpass.getuser()}_{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    complete = folder / "complete"
    if complete.exists():  # torch would ask the compiler and ninja anew, which takes seconds on a busy machine
        spec = importlib.util.spec_from_file_location(LIBRARY, folder / f"{LIBRARY}.so")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    # torch waits for this file without end; a build that was killed leaves it behind.
    lock = folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > BUILD_SECONDS:
        lock.unlink()
    library = cpp_extension.load(
        LIBRARY, [str(SOURCE)], extra_cflags=["-O1", "-w"], build_directory=str(folder), verbose=False
    )
    complete.touch()
    return library


_card = _build()


def index_of(device: torch.device | str | int | None = None) -> int:
    if device is None:
        return _card.current_device()
    return device if isinstance(device, int) else (torch.device(device).index or 0)


def set_up(device: torch.device | str | int, capacity: int, *, context: int = 0, shared_segment: int = 0) -> None:
    """Sets the size of a card.

    Args:
        capacity: bytes that its allocator may reserve, the context included.
        context: bytes that the first allocation takes for good, as a driver's context does.
        shared_segment: 0 gives each block a segment of its own. Above 0, blocks of up to half of it share segments of
            this size, and one live block keeps its whole segment reserved: fragmentation.
    """
    _card.set_up(index_of(device), capacity, context, shared_segment)


def statistics(device: torch.device | str | int | None = None) -> dict[str, int]:
    """Bytes: live, peak, reserved, inactive_split, context, capacity, and copied_in, copied_out since the start: to the
    card and from it, the arguments and results of operators that the CPU computes for it included. Counts:
    allocations, failures.
    """
    return _card.statistics(index_of(device))


def reset_peak(device: torch.device | str | int | None = None) -> None:
    _card.reset_peak(index_of(device))


empty_cache = _card.empty_cache


def _device_module() -> types.ModuleType:
    """What torch expects behind `torch.simcard`."""
    module = types.ModuleType(f"torch.{NAME}")
    members: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: CARDS,
        "current_device": _card.current_device,
        "set_device": lambda device: _card.set_device(index_of(device)),
        "memory_allocated": lambda device=None: statistics(device)["live"],
        "memory_reserved": lambda device=None: statistics(device)["reserved"],
        "max_memory_allocated": lambda device=None: statistics(device)["peak"],
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": empty_cache,
        "synchronize": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "get_rng_state": lambda device=0: torch.zeros(8, dtype=torch.uint8),
        "set_rng_state": lambda state, device=0: None,
    }
    vars(module).update(members)
    return module


if not hasattr(torch, NAME):
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)


class CardProbe:
    """Reads the simulated cards for the pack's ledger and offloads; other devices are read by `inner`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def sample(self, device: Any, *, settled: bool = False) -> Any:
        where = torch.device(device)
        if where.type != NAME:
            return self.inner.sample(device, settled=settled)
        # The pack's own module, under whatever name this process imported it.
        reading = sys.modules[type(self.inner).__module__.rpartition(".")[0] + ".reading"]
        found = statistics(where)
        driver = found["reserved"] + found["context"]
        return reading.Reading(
            f"{NAME}:{index_of(where)}",
            allocated=reading.exact(found["live"], NAME),
            peak=reading.exact(found["peak"], NAME),
            reserved=reading.exact(found["reserved"], NAME),
            inactive_split=reading.exact(found["inactive_split"], NAME),
            process=reading.exact(driver, NAME),
            used=reading.Figure(driver, NAME, reading.WHOLE_DEVICE),
            total=reading.exact(found["capacity"], NAME),
        )

    def reset_peak(self, device: Any) -> None:
        (reset_peak if torch.device(device).type == NAME else self.inner.reset_peak)(device)

    def synchronise(self, device: Any) -> None:
        if torch.device(device).type != NAME:
            self.inner.synchronise(device)
