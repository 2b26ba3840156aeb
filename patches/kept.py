"""Who owns the models that are to stay: a registry with strong references, keyed by files and options.

ComfyUI's list of loaded models holds weak references, and its node caches are dropped by a button, by another workflow,
by an LRU limit or by RAM pressure. A model that is to survive all of these needs an owner of its own: the registry.
Ownership goes by module identity, never by a mark on a patcher: clones of a patcher do not copy marks.

Values live and die on ComfyUI's worker thread. A network that dies takes its line out of ComfyUI's list; on another
thread, that happens while the worker walks the list by index, which is the end of the worker. So other threads only
read and set plain values of an entry, such as its policy, and the worker acts on them when it passes a safe point, in
`Registry.settle`.
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

WISHES = 256
"""How many loader nodes' wishes an entry remembers; a LoRA has one for each strength that was tried."""


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


@dataclass(eq=False)
class Entry:
    """A loaded model that the registry knows. Its value and patchers are for ComfyUI's worker thread only.

    Attributes:
        key: see `Key`.
        name: for reports: the file's name.
        policy: no | keep | pin. An entry with "no" is known, not owned: after `settle` its value is held weakly.
        pending: the policy that another thread asks for, until the worker settles it; or None.
        size_bytes: of all its weights.
        loads, hits, yields: times read from disk, handed out without reading, and moved off the device for others.
        last_used: when it was handed out or put on a device, seconds of `time.time`.
        wishes: the policy that a loader node asked for, by the node's definition (see `RunningPrompt`).
    """

    key: Key
    name: str
    policy: str
    size_bytes: int
    patchers_of: Callable[[Any], Sequence[Any]]
    pending: str | None = None
    loads: int = 1
    hits: int = 0
    yields: int = 0
    last_used: float = field(default_factory=time.time)
    wishes: dict[str, str] = field(default_factory=dict)
    _strong: Any = None
    _weak: Any = None

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def owned(self) -> bool:
        return self.policy != EJECTABLE

    @property
    def wanted(self) -> str:
        """The policy that applies as soon as the worker comes to it."""
        return self.pending or self.policy

    @property
    def value(self) -> Any | None:
        """What the loader made: a MODEL patcher, CLIP, VAE, FLASHVSR …; None once one that is not owned has died."""
        return self._strong if self._strong is not None else self._weak() if self._weak is not None else None

    @property
    def patchers(self) -> list[Any]:
        value = self.value
        return [] if value is None else list(self.patchers_of(value))

    def hold(self, value: Any) -> None:
        """Takes or gives up ownership of `value`, as the policy says. What is kept and on its device is listed."""
        self._strong, self._weak = (value, None) if self.owned else (None, _weak_reference(value))
        if self.owned:
            list_again(self.patchers)

    def settle(self) -> bool:
        """As `hold`, of the value that it has, with a policy that was pending; False if the value has died."""
        self.policy, self.pending = self.wanted, None
        value = self.value
        if value is not None and (self.owned or self._strong is not None):
            self.hold(value)
        return value is not None

    def drop(self) -> None:
        """Lets go of its value for good. Others may still read the plain values."""
        self._strong = self._weak = None

    def intact(self) -> bool:
        """Whether its value is alive, and the weights of its networks (a LoRA file has none) still have memory."""
        first = [next(patcher.model.parameters(), None) for patcher in self.patchers]
        alive = all(weight is not None and weight.device.type != "meta" for weight in first)
        return alive and self.value is not None

    def wish(self, running: prompt.RunningPrompt, policy: str) -> None:
        """Remembers what the executing node asks for."""
        self.wishes.pop(running.own_definition, None)
        self.wishes[running.own_definition] = policy
        while len(self.wishes) > WISHES:
            del self.wishes[next(iter(self.wishes))]

    def wishes_in(self, running: prompt.RunningPrompt | None) -> dict[str, str]:
        """By node id: wishes of the loaders in a prompt, also of those that ComfyUI has cached and does not execute."""
        if running is None:
            return {}
        # Nodes that a prompt's nodes expanded into are not in its definition, but their wishes begin with its id.
        prefix = f"{running.id}/"
        expanded = {text[len(prefix) :]: wish for text, wish in self.wishes.items() if text.startswith(prefix)}
        definitions = running.definitions | {running.node: running.own_definition}
        return expanded | {node: self.wishes[text] for node, text in definitions.items() if text in self.wishes}


class Registry:
    """All entries of the process.

    ComfyUI's worker alone obtains values. Any thread may read the plain values of `entries` and `owned`, set policies
    and release: the worker does it in `settle`, so that no policy changes while it frees memory.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ram_budget_bytes: int | None = None
        """For all owned entries together; None is half of the machine's RAM."""
        self.least_ram_bytes: int | None = None
        """Below this much available RAM, what can go goes; None is a tenth of the machine's."""
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
        prompt.worker_is_here()
        self.settle()
        running = prompt.running()
        with self.lock:
            entry = self._entries.get(key.slot)
            if entry is not None and (entry.key != key or not entry.intact()):
                reason = "its files changed" if entry.key != key else "its weights are gone"
                if entry.owned:
                    log.info("%s (%s): dropped, %s", entry.name, entry.id, reason)
                self._remove(entry)
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
                entry.wish(running, policy)
            entry.policy, entry.pending = _strongest([policy, *entry.wishes_in(running).values()]), None
            entry.hold(value)
            self._entries[key.slot] = entry
            self._touch(entry)
            self._count()
        self.keep_within_budget()
        return value

    def prompt_begins(self, running: prompt.RunningPrompt) -> None:
        """Reads the wishes of a prompt's loaders before its first node: those that ComfyUI has cached never ask again.

        They can only make a policy stronger: whoever was given a weaker one, in the panel or by RAM relief, is kept
        again where a loader of the prompt asks for that.
        """
        with self.lock:
            for entry in self._entries.values():
                entry.pending = _strongest([entry.wanted, *entry.wishes_in(running).values()])
        self.settle()
        self.keep_within_budget(running)
        self.settle()

    def settle(self) -> None:
        """Takes and gives up values as the policies say, and forgets entries whose value has died.

        Only ComfyUI's worker does that, at a point where it does not walk its list of loaded models: between two
        nodes, in a loader node, or while it is idle. On any other thread nothing happens.
        """
        if not prompt.on_worker():
            return
        with self.lock:
            for entry in list(self._entries.values()):
                if not entry.settle():
                    self._remove(entry)
            self._count()

    def entries(self) -> tuple[Entry, ...]:
        """Every entry, least recently used first."""
        with self.lock:
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
        return next((entry for entry in self.entries() if entry.key == key and entry.value is not None), None)

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
            found = [entry for entry in self._entries.values() if entry.id == id]
            if not found:
                raise KeyError(id)
            self._ask(found[0], policy)
            return found[0]

    def release(self, ids: Iterable[str] | None = None) -> list[Entry]:
        """Gives up ownership of these entries, or of all: from now on ComfyUI may treat them like any other model.

        They leave RAM with the next `settle` if nobody else holds them.
        """
        with self.lock:
            wanted = None if ids is None else set(ids)
            kept = [entry for entry in self._entries.values() if entry.wanted != EJECTABLE]
            given_up = [entry for entry in kept if wanted is None or entry.id in wanted]
            for entry in given_up:
                self._ask(entry, EJECTABLE)
            return given_up

    def kept_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.owned())

    def budget_bytes(self) -> int:
        if self.ram_budget_bytes is not None:
            return self.ram_budget_bytes
        return int(psutil.virtual_memory().total * RAM_SHARE)

    def least_available_bytes(self) -> int:
        return self.least_ram_bytes or int(psutil.virtual_memory().total * AVAILABLE_SHARE)

    def used(self, patchers: Iterable[Any]) -> None:
        """Notes that these patchers are being put on a device."""
        owners = [self.owner_of(patcher) for patcher in patchers]
        with self.lock:
            for entry in owners:
                if entry is not None and entry.key.slot in self._entries:
                    self._touch(entry)

    def keep_within_budget(self, running: prompt.RunningPrompt | None = None) -> list[Entry]:
        """Gives up the least recently used kept entries until the rest fits the RAM budget; returns them.

        Pinned entries stay, and so do those that the running prompt uses.
        """
        budget = self.budget_bytes()
        reason = f"kept models exceed {size_text(budget)} of RAM"
        return self.yield_ram(lambda: self.kept_bytes() > budget, reason, running)

    def yield_ram(
        self, needed: Callable[[], bool], reason: str, running: prompt.RunningPrompt | None = None
    ) -> list[Entry]:
        """Gives up kept entries, least recently used first, for as long as `needed()`; called at a safe point.

        Args:
            running: a prompt whose entries stay; None is the one that executes in this thread, if any.
        """
        given_up: list[Entry] = []
        running = running or prompt.running()
        with self.lock:
            for entry in self.owned(KEPT):
                if not needed():
                    break
                if entry.wishes_in(running):
                    continue
                given_up += self.release([entry.id])
                log.info("%s (%s, %s) released: %s", entry.name, entry.id, size_text(entry.size_bytes), reason)
        self.settle()
        return given_up

    def _ask(self, entry: Entry, policy: str) -> None:
        entry.pending = policy
        if prompt.on_worker():
            entry.policy, entry.pending = policy, None
            self._count()

    def _touch(self, entry: Entry) -> None:
        entry.last_used = time.time()
        self._entries.move_to_end(entry.key.slot)

    def _remove(self, entry: Entry) -> None:
        entry.drop()
        del self._entries[entry.key.slot]
        self._count()

    def _count(self) -> None:
        self._owned = sum(entry.owned for entry in self._entries.values())


def registry() -> Registry:
    """The registry of the process."""
    return shared("retention", Registry)


def _strongest(policies: Iterable[str]) -> str:
    return max(policies, key=POLICIES.index)


def same_model(first: Any, second: Any) -> bool:
    """Whether two patchers patch one model: one module, or its copy on another device."""
    base = versions.base_uuid(first)
    return first.model is second.model or (base is not None and base == versions.base_uuid(second))


def list_again(patchers: Iterable[Any]) -> None:
    """Lists networks that are on their device, but that ComfyUI lost in the middle of a load that failed."""
    here = [loaded for loaded in mm.current_loaded_models if loaded.real_model is not None]
    modules = {id(loaded.real_model()) for loaded in here}
    known = [loaded.model for loaded in here if loaded.model is not None]
    for patcher in patchers:
        lost = id(patcher.model) not in modules and patcher.loaded_size()
        if lost and not any(same_model(patcher, other) for other in known):
            adopt(patcher)


def adopt(patcher: Any) -> None:
    """Puts a resident network into ComfyUI's list."""
    loaded = mm.LoadedModel(patcher)
    loaded.real_model = weakref.ref(patcher.model)
    loaded.model_finalizer = weakref.finalize(patcher.model, mm.cleanup_models)
    loaded.model_finalizer.atexit = False
    mm.current_loaded_models.insert(0, loaded)


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
