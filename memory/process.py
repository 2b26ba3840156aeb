"""Process-wide values, one for each name, however many copies of this package were imported.

ComfyUI imports a pack under the path of its folder, and a second import under another name makes a second copy of every
module. What a module of ours keeps would then exist twice. The values live in a module of their own, which has a fixed
name in `sys.modules`.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

STATE_MODULE = "steadyvsr_state"


def shared(name: str, make: Callable[[], Any]) -> Any:
    """The value called `name`, made by `make()` the first time that anybody asks: `shared("ledger", Ledger)`."""
    # setdefault is atomic: of two threads that come first, both get the same module and the same lock.
    values = vars(sys.modules.setdefault(STATE_MODULE, types.ModuleType(STATE_MODULE)))
    with values.setdefault("lock", threading.RLock()):
        if name not in values:
            values[name] = make()
        return values[name]
