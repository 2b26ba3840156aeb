"""A state machine over the patches on the double of ComfyUI: loads, presses, keeps, pins, releases, prompts, resets.

The rules and invariants are those of tests/patches/free_state_machine.py and the ones here. They are called by a seeded
generator of our own and on networks of some KiB, which makes a step take a millisecond; Hypothesis, which finds the
shortest sequence, would take ten.
"""

from __future__ import annotations

import gc
import importlib
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from steadyvsr.tests.attack.outcome import Outcome

STEPS = 100
"""Of one sequence; it begins with an empty ComfyUI."""
UNIT_BYTES = 4096
"""What the scenarios call a MiB."""
TOLD_STEPS = 12
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "patches"))
machine: Any = importlib.import_module("free_state_machine")
worlds: Any = importlib.import_module("free_worlds")
residency: Any = importlib.import_module("steadyvsr.patches.residency")
kept: Any = machine.kept
machine.MIB = worlds.MIB = UNIT_BYTES


class Running(dict):
    """Running prompts, in which a loader's definition tells its policy: one that asks otherwise is another one."""

    steps: tuple[tuple, ...] = ()

    def __setitem__(self, number: int, item: tuple) -> None:
        definitions = {step[0]: {"inputs": {"keep_loaded": step[1]}} for step in reversed(self.steps)}
        super().__setitem__(number, (*item[:2], definitions))


class SmallWorld(machine.PolicyWorld):
    """Its networks take KiB where those of the scenarios take MiB.

    Attributes:
        owned_reads: name → how often the registry had it read, and the size of the file at the last time.
    """

    owned_reads: dict[str, tuple[int, int]]

    def read(self, name: str, mib: int = 1, device: Any = worlds.FIRST, module: Any = torch.nn.Module) -> Any:
        self.reads[name] = self.reads.get(name, 0) + 1
        made = type(name, (module,), {})()
        made.linear = torch.nn.Linear(mib, UNIT_BYTES // 4, bias=False)
        self.modules.append(worlds.weakref.ref(made))
        self.modules = [ref for ref in self.modules if ref() is not None]
        return worlds.ModelPatcher(made, device, worlds.REST)

    def prompt(self, *steps: tuple, **options: Any) -> None:
        if not isinstance(self.queue.currently_running, Running):
            self.queue.currently_running = Running()
        self.queue.currently_running.steps = steps
        super().prompt(*steps, **options)

    def load(self, name: str, keep: Any, **options: Any) -> Any:
        if keep == "unmanaged":
            return self.read(name, machine.SIZES[name])
        key = kept.Key.of("model", [self.path(name)])

        def read() -> Any:
            self.owned_reads[name] = self.owned_reads.get(name, (0, 0))[0] + 1, self.path(name).stat().st_size
            return self.read(name, machine.SIZES[name])

        value = kept.registry().obtain(key, keep, read, lambda patcher: [patcher], name)
        self.asked[name] = keep
        return value.clone()


machine.PolicyWorld = SmallWorld


class Patches(machine.Freeing):
    """What the panel, the node cache and other holders of values do as well."""

    def __init__(self) -> None:
        super().__init__()
        self.world.owned_reads = {}
        self.holds: list[Any] = []

    def _entry(self, name: str) -> Any:
        return next((entry for entry in kept.registry().entries() if entry.name == name), None)

    @rule(name=machine.names, policy=machine.policies)
    def panel_sets_a_policy(self, name: str, policy: str) -> None:
        entry = self._entry(name)
        if entry is not None:
            alive = entry.value is not None
            kept.registry().set_policy(entry.id, policy)
            kept.registry().settle()  # the worker's turn
            self.world.asked[name] = policy if alive else kept.EJECTABLE

    @rule(name=machine.names)
    def panel_releases_one(self, name: str) -> None:
        entry = next((entry for entry in kept.registry().owned() if entry.name == name), None)
        if entry is not None:
            assert [gone.name for gone in kept.registry().release([entry.id])] == [name]
            kept.registry().settle()
            self.world.asked[name] = kept.EJECTABLE

    @rule(name=machine.names)
    def panel_offloads_one(self, name: str) -> None:
        entry = self._entry(name)
        patchers = list(entry.patchers) if entry is not None else []
        if patchers:
            residency.offload_model(patchers[0])
            assert not patchers[0].loaded_size()

    @rule()
    def node_cache_is_reset(self) -> None:
        self.world.executor.reset()

    @rule(name=machine.names)
    def node_cache_forgets(self, name: str) -> None:
        outputs = self.world.cache.outputs
        self.world.cache.outputs = {key: value for key, value in outputs.items() if key[0] != name}

    @rule(name=machine.names, policy=machine.policies)
    def somebody_holds_a_value(self, name: str, policy: str) -> None:
        self.holds = [*self.holds[-3:], self.world.node(name, policy)]

    @rule(cycle=st.booleans())
    def held_values_die(self, cycle: bool) -> None:
        if cycle and self.holds:
            self.holds.append(self.holds)  # they die at a collection
        self.holds = []

    @rule(unload=st.booleans(), free=st.booleans())
    def end_of_a_turn(self, unload: bool, free: bool) -> None:
        self.world.tail(unload, free)

    @invariant()
    def no_network_is_owned_twice(self) -> None:
        modules = [id(patcher.model) for entry in kept.registry().owned() for patcher in entry.patchers]
        assert len(set(modules)) == len(modules)


def values(strategy: Any) -> list[Any]:
    """All that a strategy of Hypothesis can give, for those that the rules use."""
    strategy = getattr(strategy, "wrapped_strategy", strategy)
    if hasattr(strategy, "elements"):
        return list(strategy.elements)
    if hasattr(strategy, "start"):
        return list(range(strategy.start, strategy.end + 1))
    return [False, True]


def marked(mark: str) -> list[Any]:
    """Rules or invariants of the machine, as Hypothesis marks them."""
    found = [getattr(getattr(Patches, name), f"hypothesis_stateful_{mark}", None) for name in sorted(dir(Patches))]
    return [item for item in found if item is not None]


RULES = [
    (rule.function, {name: values(strategy) for name, strategy in rule.arguments.items()}, rule.preconditions)
    for rule in marked("rule")
]
"""What each rule does, the values of its arguments, and its preconditions."""
INVARIANTS = [invariant.function for invariant in marked("invariant")]


def run(seed: int) -> Outcome:
    """One sequence of steps."""
    rng, told = random.Random(seed), []
    gc.collect()
    played, steps = Patches(), 0
    try:
        while steps < STEPS:
            act, arguments, preconditions = rng.choice(RULES)
            if not all(condition(played) for condition in preconditions):
                continue
            steps += 1
            chosen = {key: rng.choice(options) for key, options in arguments.items()}
            told = [*told[1 - TOLD_STEPS :], f"{act.__name__}({', '.join(map(str, chosen.values()))})"]
            before = {key: played.world.owned_reads.get(key) for key in _kept_names()}
            act(played, **chosen)
            for check in INVARIANTS:
                check(played)
            for key in _kept_names() & before.keys():
                was, now = before[key], played.world.owned_reads.get(key)
                assert was == now or was is None or was[1] != now[1], f"{key} was read again though kept"
    except BaseException as error:  # noqa: B036  whatever it is, it is the finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        end = f"{type(error).__name__} in {place.name}: {place.line}"
        return Outcome(f"step {steps}: {' → '.join(told)}", end[:150], False, str(error)[:300], units=steps)
    finally:
        played.teardown()
        played.holds.clear()
    return Outcome(f"{STEPS} steps", "kept", True, units=STEPS)


def _kept_names() -> set[str]:
    return {entry.name for entry in kept.registry().owned(kept.KEPT, kept.PINNED) if entry.intact()}


importlib.import_module("steadyvsr.memory.process").shared("probe", machine.NoProbe)
run(0)  # what is imported at the first use is frozen as well: collections are most of the time
gc.collect()
gc.freeze()
gc.disable()
