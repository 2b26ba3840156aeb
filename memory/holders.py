"""Who keeps a tensor's memory alive: storages that should be gone, and the path from each to a name that people know.

Memory belongs to storages, not to tensors: a view keeps all of it alive. Every storage is watched through torch's own
weak reference, so "alive" is a fact, whether or not a Python object that holds it can be found. The search looks, in
this order, at labelled roots (a patcher's backup, a node cache), modules, frames of stored exceptions, whatever the
garbage collector knows to refer to the tensor, and tensors saved by autograd graphs. It never walks the frames of
running functions.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SECONDS = 5.0
"""How long one search may take by default; a heap of a million objects costs about 0.2 s for each level."""
LEVELS = 12
"""Most references between a tensor and a name."""
WALKED_OBJECTS = 200_000
"""Objects looked at below one labelled root."""
WALKED_IN_FRAMES = 1_000
"""The same below one local of an exception's frame."""
GRAPH_NODES = 20_000
NAMED = 3
"""Of the tensors of a holder, in a line of text; a report has all."""

NEVER_ENTERED = (str, bytes, int, float, type, types.ModuleType)


@dataclass(frozen=True)
class Watched:
    """A storage that is expected to go; `pointer` is its `data_ptr`."""

    pointer: int
    bytes: int
    name: str
    reference: StorageWeakRef

    @property
    def alive(self) -> bool:
        return not self.reference.expired()


@dataclass(frozen=True)
class Holder:
    """Something that keeps storages alive: a container, with everything in it.

    Attributes:
        name: the path to it, the best-known name first: "global LEAK in module m". Where it holds one storage, the path
            leads to that: "global LEAK in module m[3]".
        bytes: of the unique storages that it holds.
        tensors: their names, the largest first.
        paths: the whole path to each, in the same order.
    """

    name: str
    bytes: int
    tensors: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, container: str, paths: Mapping[Watched, str]) -> Holder:
        """The holder of the storages to which these paths lead."""
        largest = sorted(paths, key=lambda item: -item.bytes)
        name = container if len(paths) > 1 else paths[largest[0]]
        total = sum(item.bytes for item in largest)
        return cls(name, total, tuple(item.name for item in largest), tuple(paths[item] for item in largest))

    def words(self, width: int) -> str:
        """`global LEAK in module m (123 tensors: 122.weight, 121.weight, 120.weight, …)`

        Args:
            width: of the name at most, in characters; a third of it for the name of each tensor.
        """
        count = len(self.tensors)
        if count < 2:
            return shortened(self.name, width)
        named = [shortened(name, width // 3) for name in self.tensors[:NAMED]]
        return f"{shortened(self.name, width)} ({count} tensors: {', '.join([*named, *['…'][: count > NAMED]])})"


@dataclass(frozen=True)
class Found:
    """What a search gave.

    Attributes:
        holders: largest first.
        alive: bytes of watched storages that are still alive.
        unnamed: part of it for which no holder was found: C++ (autograd, caches, streams) or a running function.
        complete: whether the search ended before its time was up.
        seconds: how long it took.
    """

    holders: tuple[Holder, ...]
    alive: int
    unnamed: int
    complete: bool
    seconds: float


def watch(named_tensors: Iterable[tuple[str, Tensor]]) -> list[Watched]:
    """Weak references to the unique storages of tensors. Nothing is kept alive."""
    watched: dict[int, Watched] = {}
    for name, tensor in named_tensors:
        pointer = storage_of(tensor)
        if pointer is not None and pointer not in watched:
            storage = tensor.untyped_storage()
            watched[pointer] = Watched(pointer, storage.nbytes(), name, StorageWeakRef(storage))
    return list(watched.values())


def storage_of(tensor: Tensor) -> int | None:
    """Address of the tensor's memory; None for tensors that have none (meta, sparse, fake)."""
    if tensor.device.type == "meta":
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def root_bytes(root: Any, device: torch.device, limit: int = WALKED_OBJECTS) -> int:
    """Bytes of the unique storages on `device` that can be reached from a labelled root."""
    sizes = {}
    for tensor in _reachable(_opened(root), limit):
        pointer = storage_of(tensor) if same_device(tensor.device, device) else None
        if pointer is not None:
            sizes[pointer] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def same_device(first: torch.device, second: torch.device) -> bool:
    """Whether two devices are one; without an index any of that type is meant."""
    return first.type == second.type and (None in (first.index, second.index) or first.index == second.index)


def find(
    watched: Iterable[Watched],
    roots: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """Names the holders of watched storages that are still alive.

    Args:
        watched: from `watch`, made while the model was still loaded.
        roots: labelled objects, such as {"backup of the patcher": patcher.backup}; a callable is called for the object.
        seconds: when the time is up, what was found so far is returned.
    """
    started = clock()
    held = {item.pointer: item for item in watched if item.alive}
    if not held:
        return Found((), 0, 0, True, clock() - started)
    search = _Search(held, deadline=started + seconds, clock=clock)
    complete = search.run(roots or {})
    holders = [Holder.of(container, paths) for container, paths in search.by_container.items()]
    holders.sort(key=lambda holder: -holder.bytes)
    alive = sum(item.bytes for item in held.values())
    unnamed = sum(item.bytes for item in held.values() if item.pointer not in search.named)
    return Found(tuple(holders), alive, unnamed, complete, clock() - started)


class _TimeUp(Exception):
    pass


class _Search:
    def __init__(self, held: Mapping[int, Watched], deadline: float, clock: Callable[[], float]) -> None:
        self.held = held
        self.deadline = deadline
        self.clock = clock
        self.by_container: dict[str, dict[Watched, str]] = {}
        """What each holds, with the path there."""
        self.named: set[int] = set()

    def run(self, roots: Mapping[str, Any]) -> bool:
        """Fills `by_container`; False when the time was up first."""
        try:
            self._labelled(roots)
            tensors, modules, errors = self._sorted(gc.get_objects())
            ours = [(item, pointer) for item in tensors if (pointer := storage_of(item)) in self.held]
            self._modules(modules)
            self._exceptions(errors)
            orphans = [item for item, pointer in ours if pointer not in self.named]
            for container, path, item in self._paths_up(orphans):
                self._note(container, storage_of(item), path)
            if self.held.keys() - self.named:
                self._graphs(tensors)
            return True
        except _TimeUp:
            return False

    def _timed(self, items: Iterable[Any]) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index % 1024 == 0 and self.clock() > self.deadline:
                raise _TimeUp
            yield item

    def _sorted(self, objects: list[Any]) -> tuple[list[Tensor], list[nn.Module], list[BaseException]]:
        """Tensors, modules and exceptions among all objects; by type, since there are few types and many objects."""
        found: tuple[list, list, list] = ([], [], [])
        place: dict[type, list | None] = {}
        for item in self._timed(objects):
            kind = type(item)
            if kind not in place:
                bases = zip((Tensor, nn.Module, BaseException), found, strict=True)
                place[kind] = next((into for base, into in bases if issubclass(kind, base)), None)
            if (chosen := place[kind]) is not None:
                chosen.append(item)
        return found

    def _note(self, container: str, pointer: int | None, path: str = "") -> None:
        if pointer is not None and pointer in self.held:
            self.by_container.setdefault(container, {}).setdefault(self.held[pointer], path or container)
            self.named.add(pointer)

    def _labelled(self, roots: Mapping[str, Any]) -> None:
        for label, root in roots.items():
            for tensor in self._timed(_reachable(_opened(root), WALKED_OBJECTS)):
                self._note(label, storage_of(tensor))

    def _modules(self, modules: list[nn.Module]) -> None:
        """Parameters and buffers of modules, under the name of the outermost module."""
        inner = {id(child) for module in modules for child in vars(module).get("_modules", {}).values()}
        for module in self._timed(modules):
            if id(module) in inner:
                continue
            for part in module.modules():
                for tensor in [*vars(part).get("_parameters", {}).values(), *vars(part).get("_buffers", {}).values()]:
                    if tensor is not None:
                        self._note(f"weights of module {type(module).__name__}", storage_of(tensor))

    def _exceptions(self, errors: list[BaseException]) -> None:
        """Locals of finished frames that stored exceptions keep. No other frame is looked at."""
        running = set(map(id, _running_frames()))
        for error in self._timed(errors):
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if id(frame) in running:
                    continue
                for variable, value in list(frame.f_locals.items()):
                    where = f"local {variable} of {frame.f_code.co_name}()"
                    for tensor in _reachable(value, WALKED_IN_FRAMES):
                        self._note(f"traceback of {type(error).__name__}: {where}", storage_of(tensor))

    def _graphs(self, tensors: list[Tensor]) -> None:
        """Tensors whose autograd graph saved a held storage."""
        for tensor in self._timed(tensors):
            if tensor.grad_fn is None:
                continue
            for node, pointer in _saved(tensor.grad_fn):
                if pointer in self.held and pointer not in self.named:
                    unknown = "a running function or C++"
                    container, path, _ = next(self._paths_up([tensor]), (unknown, unknown, tensor))
                    graph = f"autograd graph ({node}) of a tensor of {'×'.join(map(str, tensor.shape))} in "
                    self._note(graph + container, pointer, graph + path)

    def _paths_up(self, tensors: list[Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """The shortest path of references from a name to each tensor, level by level for all tensors at once.

        Yields:
            The container, which is the path without the places of elements; the whole path; the tensor.
        """
        globals_of: dict[int, str] = {}
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType):
                globals_of.setdefault(id(vars(module)), name)
        # object id → (object, steps of the path down from it, the tensor). Objects are kept so that ids stay theirs.
        level: dict[int, list[tuple[Any, tuple[str, ...], Tensor]]] = {}
        for tensor in tensors:
            level.setdefault(id(tensor), []).append((tensor, (), tensor))
        own: set[int] = {id(level), id(tensors), id(self), id(vars(self)), id(self.held)}
        seen = set(level) | own
        done: set[int] = set()
        for _ in range(LEVELS):
            targets = [entries[0][0] for entries in level.values()]
            if not targets or self.clock() > self.deadline:
                break
            referrers = gc.get_referrers(*targets)
            own |= {id(targets), id(referrers), id(level)} | {id(entries) for entries in level.values()}
            own |= {id(entry) for entries in level.values() for entry in entries}
            above: dict[int, list[tuple[Any, tuple[str, ...], Tensor]]] = {}
            for referrer in self._timed(referrers):
                if id(referrer) in own or id(referrer) in seen or isinstance(referrer, types.FrameType):
                    continue
                for target in [child for child in gc.get_referents(referrer) if id(child) in level]:
                    for _, below, tensor in level[id(target)]:
                        if id(tensor) in done:
                            continue
                        if id(referrer) in globals_of:
                            module, name = globals_of[id(referrer)], _key_of(referrer, target)
                            done.add(id(tensor))
                            yield *_path(f"global {name} in module {module}", below), tensor
                        else:
                            way = (_edge(referrer, target), *below)
                            above.setdefault(id(referrer), []).append((referrer, way, tensor))
            seen |= set(above)
            # An attribute of a class ends a path too: going on would lead through every instance.
            for entries in above.values():
                for referrer, way, tensor in entries:
                    if isinstance(referrer, type) and id(tensor) not in done:
                        done.add(id(tensor))
                        yield *_path(f"class {referrer.__qualname__}", way), tensor
            level = {
                key: kept for key, entries in above.items() if (kept := [e for e in entries if id(e[2]) not in done])
            }
            own |= {id(above)}


def _path(head: str, steps: Iterable[str]) -> tuple[str, str]:
    """A path without the places of elements, and the whole path."""
    steps, general = tuple(filter(None, steps)), []
    for step in steps:
        element = not step.startswith(" → ")
        if not (element and general[-1:] == ["[…]"]):
            general.append("[…]" if element else step)
    if general[-1:] == ["[…]"]:
        general.pop()
    return head + "".join(general), head + "".join(steps)


def shortened(text: str, width: int) -> str:
    """Both ends of a text that is longer than that."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - 1) // 2 :]}"


def _opened(root: Any) -> Any:
    """A labelled root, or what it returns if it is a function (modules are callable too: those are not called)."""
    return root() if isinstance(root, types.FunctionType | types.MethodType | functools.partial) else root


def _running_frames() -> Iterator[types.FrameType]:
    """Frames of all threads that have not returned. Reading their locals would keep them alive (Python < 3.13)."""
    for top in sys._current_frames().values():
        yield from (frame for frame, _ in traceback.walk_stack(top))


def _reachable(root: Any, limit: int) -> Iterator[Tensor]:
    """Tensors below an object: through containers, attributes, closures and partials; not through types, modules of
    Python, globals of functions or running frames."""
    queue, seen = deque([root]), {id(root)}
    while queue and limit > 0:
        limit -= 1
        item = queue.popleft()
        if issubclass(type(item), Tensor):
            yield item
            continue
        for child in _children(item):
            if id(child) not in seen and not issubclass(type(child), NEVER_ENTERED):
                seen.add(id(child))
                queue.append(child)


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, types.FrameType | types.CodeType | types.BuiltinFunctionType):
        return ()
    if isinstance(item, types.FunctionType):
        return [*(item.__closure__ or ()), *(item.__defaults__ or ())]
    return gc.get_referents(item)


def _saved(root: Any) -> Iterator[tuple[str, int]]:
    """Names of autograd nodes below `root` with the storages that they saved."""
    queue, seen = deque([root]), {root}
    while queue and len(seen) < GRAPH_NODES:
        node = queue.popleft()
        for name in dir(node):
            if name == "variable" or (name.startswith("_saved_") and not name.endswith("hooks")):
                try:
                    value = getattr(node, name)
                except RuntimeError:  # freed by a backward pass
                    continue
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor) and (pointer := storage_of(tensor)) is not None:
                        yield node.name(), pointer
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)


def _key_of(mapping: Mapping[Any, Any], value: Any) -> Any:
    return next((key for key, item in list(mapping.items()) if item is value), "?")


def _edge(referrer: Any, target: Any) -> str:
    """How `referrer` names `target`: an index, a key, an attribute; empty where the next step says it."""
    if isinstance(referrer, dict):
        key = _key_of(referrer, target)
        return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r:.40}]"
    if isinstance(referrer, list | tuple | deque):
        return f"[{next((i for i, item in enumerate(referrer) if item is target), '?')}]"
    if isinstance(referrer, types.FunctionType):
        return f" → closure of {referrer.__qualname__}"
    if isinstance(referrer, types.GeneratorType):
        return f" → suspended generator {referrer.__qualname__}"
    if isinstance(referrer, functools._lru_cache_wrapper):
        return f" → LRU cache of {getattr(referrer, '__qualname__', 'a function')}"
    if isinstance(referrer, threading.local):
        return " → thread local"
    if issubclass(type(referrer), nn.Module):
        return f" → module {type(referrer).__name__}"
    if hasattr(referrer, "__dict__") and not isinstance(referrer, type):
        key = _key_of(vars(referrer), target)
        return "" if key == "?" else f" → {type(referrer).__name__}.{key}"
    return ""
