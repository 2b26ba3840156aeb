"""Random sequences of loads, presses, errors and other packs' patches on the double of ComfyUI, and what must hold.

python tests/patches/free_state_machine.py [EXAMPLES]              1,000 unless said otherwise; about two minutes
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "session")]
importlib.import_module("comfyui_place").prepare("double", TESTS.parents[1])

import free_worlds  # noqa: E402
from free_worlds import ERRORS, FIRST, MIB, Broken, NoProbe, World, hooks, kept, mm, ram  # noqa: E402

SIZES = {"A": 1, "B": 2, "C": 3, "D": 1, "E": 2, "F": 3}
CAPACITY = 8
names = st.sampled_from(sorted(SIZES))
policies = st.sampled_from(kept.POLICIES)
ways = st.sampled_from(["plain", "lora", "cycle"])

BASE = {name: getattr(mm, name) for name in hooks.NAMES}


class PolicyWorld(World):
    """A world whose loaders are given their policy; "unmanaged" is a loader of somebody else's.

    Attributes:
        asked: model → the policy that holds.
        wished: (model, policy) of each loader that has asked since the model was read.
    """

    asked: dict[str, str]
    wished: set[tuple[str, str]]

    def prompt(self, *steps: tuple, **options: Any) -> None:
        """A loader that ComfyUI has cached never asks again: what it asked for holds from the prompt's start."""
        registered = {entry.name for entry in kept.registry().entries()}
        for name, keep, *_ in steps:
            if name in registered and (name, keep) in self.wished:
                self.asked[name] = max(self.asked[name], keep, key=kept.POLICIES.index)
        super().prompt(*steps, **options)

    def load(self, name: str, keep: Any, **options: Any) -> Any:
        if keep == "unmanaged":
            return self.read(name, SIZES[name])
        key = kept.Key.of("model", [self.path(name)])

        def read() -> Any:
            self.wished = {wish for wish in self.wished if wish[0] != name}
            return self.read(name, SIZES[name])

        value = kept.registry().obtain(key, keep, read, lambda patcher: [patcher], name)
        self.asked[name] = keep
        self.wished.add((name, keep))
        return value.clone()


class Calls:
    """Stands in the place of ComfyUI's functions and remembers what came from outside."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.depth = 0
        for name, original in BASE.items():
            setattr(mm, name, self._recorded(name, original))

    def _recorded(self, name: str, original: Any) -> Any:
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            if not self.depth:
                self.seen.append((name, arguments, keywords))
            self.depth += 1
            try:
                return original(*arguments, **keywords)
            finally:
                self.depth -= 1

        return recorded


def owned(loaded: Any, *chosen: str) -> bool:
    return loaded.model is not None and any(
        patcher.model is loaded.model.model for entry in kept.registry().owned(*chosen) for patcher in entry.patchers
    )


def others() -> list[Any]:
    """Entries with a patcher that nobody keeps."""
    return [loaded for loaded in mm.current_loaded_models if loaded.model is not None and not owned(loaded)]


def still_listed(loads: list[Any]) -> list[Any]:
    now = {id(loaded) for loaded in mm.current_loaded_models}
    return [loaded for loaded in loads if id(loaded) in now]


class Freeing(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        for name, original in BASE.items():
            setattr(mm, name, original)
        gc.collect()
        self.world = PolicyWorld(free_worlds.STOCK, CAPACITY)
        self.world.asked, self.world.wished = {}, set()
        self.calls = Calls()
        self.foreign = 0
        hooks.install()

    def kept(self, policy: str) -> set[str]:
        return {name for name, asked in self.world.asked.items() if asked == policy}

    @rule(name=names, policy=policies, how=ways)
    def prompt(self, name, policy, how):
        self.world.prompt((name, policy, how))

    @rule(name=names, how=ways)
    def prompt_of_others(self, name, how):
        self.world.prompt((name, "unmanaged", how))

    @rule(first=names, second=names, policy=policies)
    def two_at_once(self, first, second, policy):
        self.world.prompt((first, policy), (second, "unmanaged"), together=True)

    @rule(unload=st.booleans(), free=st.booleans())
    def press(self, unload, free):
        mm.cleanup_models_gc()
        going = others() if unload or free else []
        protected = [loaded for loaded in mm.current_loaded_models if owned(loaded)]
        self.calls.seen.clear()
        if unload or free:
            mm.unload_all_models()
            assert [name for name, *_ in self.calls.seen] == ["unload_all_models"]
            assert not still_listed(going) and len(still_listed(protected)) == len(protected)
            assert not any(loaded.model and loaded.model.loaded_size() for loaded in going)
        del going, protected
        self.world.tail(unload, free)

    @rule(name=names)
    def out_of_memory(self, name):
        self.world.prompt((name, "unmanaged"), fails=mm.OOM_EXCEPTION("planted"))
        assert all(owned(loaded, kept.PINNED) for loaded in mm.current_loaded_models if loaded.model is not None)

    @rule(name=names)
    def interrupt(self, name):
        self.world.prompt((name, "unmanaged"), fails=mm.InterruptProcessingException())

    @rule(name=names, policy=policies, broken_first=st.booleans())
    def error_in_the_middle_of_a_load(self, name, policy, broken_first):
        pair = [self.world.read("X", 1, module=Broken), self.world.node(name, policy)]
        try:
            mm.load_models_gpu(pair if broken_first else pair[::-1])
        except RuntimeError as error:
            if "planted" not in str(error):
                raise
        else:
            raise AssertionError("the planted error did not come")

    @rule(mib=st.integers(1, 12))
    def pressure(self, mib):
        mm.cleanup_models_gc()
        self.calls.seen.clear()  # it holds patchers, and their reference counts decide the order
        needed = mib * MIB + MIB // 2  # never exactly what is free: there nothing goes, by one byte less something does
        free, stock, ours = mm.get_free_memory(FIRST), [], others()
        for loaded in mm.eviction_order(FIRST, []):
            if free > needed:
                break
            stock.append(loaded)
            free += loaded.model_loaded_memory()
        spared = [loaded for loaded in mm.current_loaded_models if owned(loaded, kept.KEPT)]
        pinned = [loaded for loaded in mm.current_loaded_models if owned(loaded, kept.PINNED)]
        nothing_kept = not kept.registry().keeps_anything
        mm.free_memory(needed, FIRST)
        if nothing_kept:
            assert self.calls.seen == [("free_memory", (needed, FIRST), {})]
        assert not [loaded for loaded in still_listed(ours) if any(loaded is gone for gone in stock)]
        assert len(still_listed(pinned)) == len(pinned)
        if len(still_listed(spared)) < len(spared):
            assert not still_listed(ours), "a kept model went before one that nobody keeps"

    @rule()
    def empty_caches(self):
        self.calls.seen.clear()
        mm.soft_empty_cache()
        assert self.calls.seen == [("soft_empty_cache", (), {})]
        assert not any(loaded.model is None and self._is_kept(loaded) for loaded in mm.current_loaded_models)

    @staticmethod
    def _is_kept(loaded: Any) -> bool:
        module = loaded.real_model()
        return any(p.model is module for entry in kept.registry().owned() for p in entry.patchers)

    @rule()
    def collect(self):
        gc.collect()

    @rule(name=names)
    def file_changes(self, name):
        path = self.world.path(name)
        path.write_text(path.read_text() + name)
        self.world.cache.outputs = {key: out for key, out in self.world.cache.outputs.items() if key[0] != name}

    @rule()
    def release(self):
        kept.registry().release()
        self.world.asked = dict.fromkeys(self.world.asked, kept.EJECTABLE)

    @rule(in_prompt=st.booleans())
    def ram_is_short(self, in_prompt):
        if in_prompt:
            self.world.queue.currently_running[0] = (0, "p", {})
        before = {entry.name for entry in kept.registry().owned()}
        with ram(0.05):
            mm.soft_empty_cache()
        self.world.queue.currently_running.clear()
        after = {entry.name for entry in kept.registry().owned()}
        assert before - after <= (set() if in_prompt else self.kept(kept.KEPT))
        self.world.asked |= dict.fromkeys(before - after, kept.EJECTABLE)

    @rule()
    def ram_is_back(self):
        with ram(0.5):
            mm.soft_empty_cache()

    @rule()
    def install_again(self):
        hooks.install()
        hooks.install()

    @precondition(lambda self: self.foreign < 3)
    @rule(name=st.sampled_from(hooks.NAMES), wrapped=st.booleans(), below=st.booleans())
    def another_pack_patches(self, name, wrapped, below):
        self.foreign += 1
        if below:
            hooks.uninstall()
        original = getattr(mm, name)

        def foreign(*arguments: Any, **keywords: Any) -> Any:
            return original(*arguments, **keywords)

        setattr(mm, name, functools.wraps(original)(foreign) if wrapped else foreign)
        if below:
            hooks.install()

    @invariant()
    def kept_is_registered_and_alive(self):
        by_name = {entry.name: entry for entry in kept.registry().owned()}
        for policy in (kept.KEPT, kept.PINNED):
            for name in self.kept(policy):
                assert by_name[name].policy == policy and by_name[name].intact()

    @invariant()
    def no_entry_twice_and_none_half_unloaded(self):
        modules = {id(loaded): loaded.real_model() for loaded in mm.current_loaded_models}
        assert None not in modules.values()
        # ComfyUI itself lists a network again beside an entry whose patcher has died; nobody keeps such a one.
        living = [
            id(modules[id(loaded)]) for loaded in mm.current_loaded_models if loaded.model or self._is_kept(loaded)
        ]
        assert len(set(living)) == len(living)

    @invariant()
    def books_equal_residency(self):
        listed = [id(loaded.real_model()) for loaded in mm.current_loaded_models]
        for entry in kept.registry().owned():
            for patcher in entry.patchers:
                assert (id(patcher.model) in listed) == bool(patcher.loaded_size()), entry.name

    @invariant()
    def wrappers_raise_nothing(self):
        assert not ERRORS.lines and not self.world.queue.flags

    def teardown(self) -> None:
        for name, original in BASE.items():
            setattr(mm, name, original)


if __name__ == "__main__":
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    importlib.import_module("steadyvsr.memory.process").shared("probe", NoProbe)
    gc.collect()
    gc.freeze()
    gc.disable()
    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=30, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Freeing, settings=settings)
    sys.stdout.write(f"{examples} sequences\n")
