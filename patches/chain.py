"""How functions of ComfyUI are wrapped: checked first, put in place, found again in a chain of wrappers, taken away.

ComfyUI's prompt worker has no guard around these functions: an exception of ours would end it for good. So a wrapper
runs the original whatever becomes of our part, and raises what the original raised, or what its hook says it raises. A
function that does not look as our part needs it (renamed, or with other arguments) is left alone, at the cost of one
promise.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm

from ..memory.process import shared

log = logging.getLogger("steadyvsr.patches")

SETTING = "STEADYVSR_PATCHES"
"""Environment variable: `off` leaves ComfyUI as it is."""


@dataclass(frozen=True)
class Hook:
    """One function of ComfyUI and what we add to it.

    Attributes:
        name: in ComfyUI's model management (`free_memory`), of a class of its worker (`PromptQueue.get_flags`), or of
            the worker's module (`execution.execute`).
        body: called with the original, then with what the caller gave.
        promise: what is off without it.
        parameters: names that its first parameters must have, in this order.
        required: False where only some versions have it.
        raises: errors of ours that are meant for the prompt, and reach ComfyUI.
    """

    name: str
    body: Callable[..., Any]
    promise: str
    parameters: tuple[str, ...] = ()
    required: bool = True
    raises: tuple[type[Exception], ...] = ()

    def place(self) -> tuple[Any, str]:
        """What has the function; None without a server, whose worker's module is only looked up."""
        owner, _, attribute = self.name.rpartition(".")
        module = sys.modules.get("execution")
        if not owner:
            return mm, attribute
        return (module if owner == "execution" else getattr(module, owner, None)), attribute

    def function(self) -> Any | None:
        """As it is now, wrapped or not; None where there is no such function."""
        owner, attribute = self.place()
        return getattr(owner, attribute, None)

    def misfit(self) -> str:
        """Why there is nothing that suits `body`, or ""."""
        function = self.function()
        if function is None:
            looked = self.required and ("." not in self.name or "execution" in sys.modules)
            return f"expected a function {self.name}; this ComfyUI has none" if looked else ""
        try:
            found = inspect.signature(function)
        except (TypeError, ValueError):
            return ""  # nothing tells
        parameters = found.parameters.values()
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            return ""  # another pack's, which passes on what it is given
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if tuple(names[: len(self.parameters)]) == self.parameters:
            return ""
        return f"expected {self.name}({', '.join(self.parameters)}, …); got {self.name}{found}"


class _Thread(threading.local):
    depth = 0
    loading = False
    emptying = False


class State:
    """One for the process, whatever copy of this module was imported first.

    Attributes:
        failures: what of ours failed and was logged.
        misfits: by name, why a function was left alone.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        self.failures: set[str] = set()
        self.misfits: dict[str, str] = {}
        self.placed: list[Any] = []


def state() -> State:
    """The state of the process."""
    return shared("wrappers", State)


def attempt(what: str, action: Callable[[], Any], otherwise: Any = None) -> Any:
    """Runs our own part of a wrapper; a failure is logged once with its traceback and changes nothing else."""
    try:
        return action()
    except Exception as error:
        _failed(what, error)
        return otherwise


def _failed(what: str, error: Exception) -> None:
    if what not in state().failures:
        state().failures.add(what)
        log.error("%s failed; ComfyUI continues as it would without SteadyVSR.", what, exc_info=error)


class Original:
    """The function that a wrapper stands before. It remembers what came of its last call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.called = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.called = True
        try:
            self.result = self.function(*arguments, **keywords)
        except BaseException as error:
            self.error = error
            raise
        return self.result


def install(hooks: Iterable[Hook]) -> None:
    """Wraps the functions that are not wrapped yet. One that does not fit is left alone, with one warning."""
    if os.environ.get(SETTING, "").strip().lower() == "off":
        return
    for hook in hooks:
        if is_in_place(hook):
            continue
        why, known = hook.misfit(), state().misfits.pop(hook.name, None)
        if why:
            state().misfits[hook.name] = why
        elif hook.function() is not None:
            _wrap(hook)
        if why and why != known:
            log.warning("%s. ComfyUI stays as it is there, and this is off: %s.", why, hook.promise)


def _wrap(hook: Hook) -> None:
    owner, attribute = hook.place()
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if not wrapper.steadyvsr_armed:  # type: ignore[attr-defined]
            return function(*arguments, **keywords)
        original = Original(function)
        try:
            return hook.body(original, *arguments, **keywords)
        except BaseException as error:
            if original.error is not None:
                if error is original.error:
                    raise
                raise original.error  # noqa: B904  ours came while it passed, and is worth less
            if isinstance(error, hook.raises) or not isinstance(error, Exception):
                raise
            _failed(hook.name, error)
            return original.result if original.called else function(*arguments, **keywords)
        finally:
            original.error = None  # its traceback holds this frame, which holds it

    wrapper.steadyvsr_wrapper = hook.name  # type: ignore[attr-defined]
    wrapper.steadyvsr_armed = True  # type: ignore[attr-defined]
    setattr(owner, attribute, wrapper)
    state().placed.append(wrapper)


def uninstall(hooks: Iterable[Hook]) -> None:
    """Takes wrappers away where they are on top; those that others have wrapped stay and do nothing more."""
    for hook in hooks:
        owner, attribute = hook.place()
        top: Any = hook.function()
        if _ours(top, hook.name):
            setattr(owner, attribute, top.__wrapped__)
    # All of them: others' wrappers need not say what they wrap.
    for wrapper in state().placed:
        wrapper.steadyvsr_armed = False
    state().placed.clear()


def status_of(hook: Hook) -> str:
    """Where our wrapper of a function stands: on top | in chain | replaced | does not fit | missing | off.

    "replaced": it is not in the chain of wrappers, as far as that can be followed. "missing": no such function.
    "off": by the setting.
    """
    function = hook.function()
    if function is None:
        return "missing"
    for position, link in enumerate(_links(function)):
        if _ours(link, hook.name) and link.steadyvsr_armed:
            return "in chain" if position else "on top"
    if os.environ.get(SETTING, "").strip().lower() == "off":
        return "off"
    return "does not fit" if hook.name in state().misfits else "replaced"


def is_in_place(hook: Hook) -> bool:
    """Whether our part of a function is called."""
    return status_of(hook) in ("on top", "in chain")


def _ours(link: Any, name: str) -> bool:
    """By its code: functools.wraps copies our marks to a foreign wrapper around ours."""
    code = getattr(link, "__code__", None)
    return (
        code is not None
        and vars(link).get("steadyvsr_wrapper") == name
        and (code.co_name, code.co_filename) == ("wrapper", __file__)
    )


def _links(function: Any) -> Iterator[Any]:
    """A function and what it wraps, as far as `__wrapped__` says."""
    seen: set[int] = set()
    while callable(function) and hasattr(function, "__dict__") and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)
