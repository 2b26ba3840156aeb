"""Who owns the models that are to stay: a registry with strong references, keyed by files and options.

ComfyUI's list of loaded models holds weak references, and its node caches are dropped by a button, by another workflow,
by an LRU limit or by RAM pressure. A model that is to survive all of these needs an owner of its own: the registry.
Ownership goes by module identity, never by a mark on a patcher: clones of a patcher do not copy marks.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import psutil

from ..memory.process import shared
from ..memory.reading import size_text
from . import prompt, versions

log = logging.getLogger("steadyvsr.patches")

# Plain strings: the pack can be imported twice, and members of two copies of an enumeration are not identical.
EJECTABLE, KEPT, PINNED = "no", "keep", "pin"
POLICIES = (EJECTABLE, KEPT, PINNED)
"""From the weakest to the strongest, as the `keep_loaded` widgets spell them."""

RAM_SHARE = 0.5
"""Of the machine's RAM, for all kept models together, unless `Registry.ram_budget_bytes` is set."""

AVAILABLE_SHARE = 0.1
"""Of the machine's RAM: kept models yield when less than this is available."""


@dataclass(frozen=True)
class FileIdentity:
    """A file as it is now; another file under the same name is not equal to it."""

    path: str
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """Raises: OSError where the file cannot be read."""
        real = os.path.realpath(path)
        stat = os.stat(real)
        return cls(real, stat.st_mtime_ns, stat.st_size)


@dataclass(frozen=True)
class Key:
    """What makes two loads the same module: the kind of loader, its files, and every option that changes the result."""

    kind: str
    files: tuple[FileIdentity, ...]
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, kind: str, paths: Iterable[str | os.PathLike[str]], options: Mapping[str, object] | None = None) -> Key:
        """Reads the identities of the files.

        Args:
            options: dtype, devices, clip type … . Not `keep_loaded`, LoRAs or node ids: they do not change the module.

        Raises:
            OSError: a file cannot be read.
        """
        spelled = sorted((name, repr(value)) for name, value in (options or {}).items())
        return cls(kind, tuple(FileIdentity.of(path) for path in paths), tuple(spelled))

    @property
    def slot(self) -> tuple:
        """The key without the state of the files: a replaced file takes the slot of its predecessor."""
        return self.kind, tuple(file.path for file in self.files), self.options

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits for reports and routes, from which no path can be read."""
        return hashlib.sha256(repr(self.slot).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Request:
    """What one loader node asked for, in which prompt, and how that defined the node (see `RunningPrompt`)."""

    policy: str
    prompt: str
    definition: str | None


@dataclass(eq=False)
class Entry:
    """A loaded model that the registry knows.

    Attributes:
        key: see `Key`.
        name: for reports: the file's name.
        policy: no | keep | pin. An entry with "no" is known, not owned: its value is held weakly.
        size_bytes: of all its weights.
        loads, hits, yields: times read from disk, handed out without reading, and moved off the device for others.
        last_used: seconds of `time.time`.
        requests: by node id.
    """

    key: Key
    name: str
    policy: str
    size_bytes: int
    patchers_of: Callable[[Any], Sequence[Any]]
    loads: int = 1
    hits: int = 0
    yields: int = 0
    last_used: float = field(default_factory=time.time)
    requests: dict[str, Request] = field(default_factory=dict)
    _strong: Any = None
    _weak: Any = None

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def owned(self) -> bool:
        return self.policy != EJECTABLE

    @property
    def value(self) -> Any | None:
        """What the loader made: a MODEL patcher, CLIP, VAE, FLASHVSR …; None once one that is not owned has died."""
        return self._strong if self._strong is not None else self._weak() if self._weak is not None else None

    @property
    def patchers(self) -> list[Any]:
        value = self.value
        return [] if value is None else list(self.patchers_of(value))

    def hold(self, value: Any, policy: str) -> None:
        """Takes or gives up ownership of `value`."""
        self.policy = policy
        self._strong, self._weak = (value, None) if self.owned else (None, _weak_reference(value))

    def intact(self) -> bool:
        """Whether its value is alive, and the weights of its networks (a LoRA file has none) still have memory."""
        first = [next(patcher.model.parameters(), None) for patcher in self.patchers]
        alive = all(weight is not None and weight.device.type != "meta" for weight in first)
        return alive and self.value is not None

    def requests_in(self, running: prompt.RunningPrompt | None) -> dict[str, Request]:
        """By node id: requests of the loaders in the running prompt, those that ComfyUI has cached included."""
        if running is None:
            return {}
        return {
            node: request
            for node, request in self.requests.items()
            if request.prompt == running.id
            or (request.definition is not None and request.definition == running.definition(node))
        }

    def strongest(self, running: prompt.RunningPrompt | None, newest: str) -> str:
        """The policy that applies: the strongest among the loader nodes of the running prompt."""
        asked = [request.policy for request in self.requests_in(running).values()]
        return max([newest, *asked], key=POLICIES.index)


class Registry:
    """All entries of the process. Safe to read from several threads; ComfyUI's worker alone obtains values."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ram_budget_bytes: int | None = None
        """For all owned entries together; None is half of the machine's RAM."""
        self._entries: OrderedDict[tuple, Entry] = OrderedDict()
        self._owned = 0

    def obtain(
        self,
        key: Key,
        policy: str,
        load: Callable[[], Any],
        patchers_of: Callable[[Any], Sequence[Any]],
        name: str,
        before_load: Callable[[], None] = lambda: None,
        size_of: Callable[[Any], int] | None = None,
    ) -> Any:
        """The model of that key: the one that is there, else a new one from `load()`.

        A predecessor (another state of the same files) and entries beyond the RAM budget are dropped before the files
        are read: two of the size of one may not fit.

        Args:
            policy: of the asking node; the strongest policy among the loader nodes of the running prompt applies.
            load: reads the files; what it raises leaves through here, and nothing is registered.
            patchers_of: the ModelPatchers inside the value.
            name: for reports.
            before_load: called just before files are read, such as an admission check.
            size_of: bytes of the value; None is the sum over its patchers.

        Returns:
            the owner's object: hand out a clone where its type has one.

        Raises:
            ValueError: an unknown policy.
        """
        if policy not in POLICIES:
            raise ValueError(f"keep_loaded: expected {', '.join(POLICIES)}; got {policy!r}.")
        running = prompt.running()
        with self.lock:
            entry = self._entries.get(key.slot)
            if entry is not None and (entry.key != key or not entry.intact()):
                reason = "its files changed" if entry.key != key else "its weights are gone"
                if entry.owned:
                    log.info("%s (%s): dropped, %s", entry.name, entry.id, reason)
                del self._entries[key.slot]
                self._count()
                entry = None
            value = None if entry is None else entry.value
        if entry is None or value is None:
            self.keep_within_budget()
            before_load()
            value = load()
            size = size_of(value) if size_of else sum(patcher.model_size() for patcher in patchers_of(value))
            entry = Entry(key, name, policy, size, patchers_of)
        else:
            entry.hits += 1
        with self.lock:
            if running is not None:
                entry.requests[running.node] = Request(policy, running.id, running.definition(running.node))
            entry.hold(value, entry.strongest(running, policy))
            entry.last_used = time.time()
            self._entries[key.slot] = entry
            self._entries.move_to_end(key.slot)
            self._count()
        self.keep_within_budget()
        return value

    def entries(self) -> tuple[Entry, ...]:
        """Every entry whose value is alive, least recently used first."""
        with self.lock:
            for slot in [slot for slot, entry in self._entries.items() if entry.value is None]:
                del self._entries[slot]
            return tuple(self._entries.values())

    @property
    def keeps_anything(self) -> bool:
        """Whether any entry is owned. It is asked at every step of sampling, so it takes no lock and makes no list."""
        return self._owned > 0

    def owned(self, *policies: str) -> list[Entry]:
        """Entries that are kept (all of them, or those of these policies), least recently used first."""
        return [entry for entry in self.entries() if entry.policy in (policies or (KEPT, PINNED))]

    def find(self, key: Key) -> Entry | None:
        """The entry of that key, if its value is alive."""
        return next((entry for entry in self.entries() if entry.key == key), None)

    def owner_of(self, patcher: Any) -> Entry | None:
        """The entry whose module a patcher patches: that module itself, or a copy of it for another device."""
        entries = self.entries()
        return next((entry for entry in entries if any(same_model(patcher, own) for own in entry.patchers)), None)

    def listed(self, *policies: str) -> list[Any]:
        """ComfyUI's LoadedModels that belong to owned entries (of these policies), in the order of its list."""
        own = [patcher for entry in self.owned(*policies) for patcher in entry.patchers]
        return [
            loaded
            for loaded in list(mm.current_loaded_models)
            if loaded.model is not None and any(same_model(loaded.model, patcher) for patcher in own)
        ]

    def set_policy(self, id: str, policy: str) -> Entry:
        """Changes one entry's policy until a loader node asks again.

        Raises:
            KeyError: no such entry.
            ValueError: an unknown policy.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy: expected {', '.join(POLICIES)}; got {policy!r}.")
        with self.lock:
            found = [entry for entry in self.entries() if entry.id == id]
            if not found:
                raise KeyError(id)
            found[0].hold(found[0].value, policy)
            self._count()
            return found[0]

    def release(self, ids: Iterable[str] | None = None) -> list[Entry]:
        """Gives up ownership of these entries, or of all: from now on ComfyUI may treat them like any other model."""
        with self.lock:
            wanted = None if ids is None else set(ids)
            given_up = [entry for entry in self.owned() if wanted is None or entry.id in wanted]
            for entry in given_up:
                entry.requests.clear()
                entry.hold(entry.value, EJECTABLE)
            self._count()
            return given_up

    def kept_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.owned())

    def budget_bytes(self) -> int:
        if self.ram_budget_bytes is not None:
            return self.ram_budget_bytes
        return int(psutil.virtual_memory().total * RAM_SHARE)

    def least_available_bytes(self) -> int:
        return int(psutil.virtual_memory().total * AVAILABLE_SHARE)

    def keep_within_budget(self) -> list[Entry]:
        """Gives up the least recently used kept entries until the rest fits the RAM budget; returns them.

        Pinned entries stay, and so do those that the running prompt uses.
        """
        budget = self.budget_bytes()
        return self.yield_ram(lambda: self.kept_bytes() > budget, f"kept models exceed {size_text(budget)} of RAM")

    def yield_ram(self, needed: Callable[[], bool], reason: str) -> list[Entry]:
        """Gives up kept entries that nobody uses now, least recently used first, for as long as `needed()`."""
        given_up: list[Entry] = []
        running = prompt.running()
        with self.lock:
            for entry in self.owned(KEPT):
                if not needed():
                    break
                if entry.requests_in(running):
                    continue
                given_up += self.release([entry.id])
                log.info("%s (%s, %s) released: %s", entry.name, entry.id, size_text(entry.size_bytes), reason)
        return given_up

    def _count(self) -> None:
        self._owned = sum(entry.owned for entry in self._entries.values())


def registry() -> Registry:
    """The registry of the process."""
    return shared("retention", Registry)


def same_model(first: Any, second: Any) -> bool:
    """Whether two patchers patch one model: one module, or its copy on another device."""
    base = versions.base_uuid(first)
    return first.model is second.model or (base is not None and base == versions.base_uuid(second))


def _weak_reference(value: Any) -> Callable[[], Any]:
    """A weak reference to a value; to a tuple of values (a checkpoint's parts) by its members."""
    if isinstance(value, tuple):
        return _weak_tuple([None if part is None else _weak_reference(part) for part in value])
    if hasattr(value, "cond_stage_model"):
        return _weak_clip(value)
    return weakref.ref(value)


def _weak_tuple(parts: Sequence[Callable[[], Any] | None]) -> Callable[[], tuple | None]:
    def alive() -> tuple | None:
        found = tuple(part and part() for part in parts)
        return None if any(part and x is None for part, x in zip(parts, found, strict=True)) else found

    return alive


def _weak_clip(clip: Any) -> Callable[[], Any]:
    """A CLIP by its patcher: clones of a CLIP own clones of the patcher, which own it, but not the CLIP itself."""
    patcher = weakref.ref(clip.patcher)
    shell = copy.copy(clip)
    shell.patcher = shell.cond_stage_model = None

    def alive() -> Any:
        found = patcher()
        if found is None:
            return None
        made = copy.copy(shell)
        made.patcher, made.cond_stage_model = found, found.model
        return made

    return alive
