"""Where process-wide state lives: one module with a fixed name in `sys.modules`.

ComfyUI imports a pack under the path of its folder, and a second import under another name makes a second copy of every
module. State kept in a module of ours would then exist twice; this one place does not.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

STATE_MODULE = "steadyvsr_state"


def shared(name: str, make: Callable[[], Any]) -> Any:
    """The process-wide object called `name`, made by `make()` the first time that anybody asks."""
    module = sys.modules.get(STATE_MODULE)
    if module is None:
        # setdefault is atomic: of two threads that come first, both get the same module.
        module = sys.modules.setdefault(STATE_MODULE, types.ModuleType(STATE_MODULE))
    lock = vars(module).setdefault("lock", threading.RLock())
    with lock:
        if name not in vars(module):
            setattr(module, name, make())
        return getattr(module, name)
