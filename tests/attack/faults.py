"""Attacks the engine and the nodes with faults: memory, an error or an interrupt at any operation of torch or step.

After a fault nothing may be held, and the next run must give the same frames bit by bit; a run that recovers gives them
as well; an interrupt and an error leave as they are; and no shortage of memory passes the ladder by. The nodes run on
the double of ComfyUI.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from steadyvsr.tests.attack.outcome import Outcome, failure_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parents[1]
BASE = tempfile.TemporaryDirectory()
sys.argv = [sys.argv[0], str(TESTS.parent), "double", BASE.name]
sys.path.insert(0, str(TESTS / "nodes"))
host: Any = importlib.import_module("host")
small_vaes: Any = importlib.import_module("small_vaes")
tiny: Any = host.pack("benchmarks.tiny_model")
flashvsr: Any = host.pack("models.flashvsr")
memory_plan: Any = host.pack("models.flashvsr.memory_plan")
wan_vae: Any = host.pack("models.wan_vae")

FAULTS, RECOVERIES = 5, 25
"""Faults of one attack: those that end a run, one in each of several runs, and those that one run of it survives."""
Interrupt = host.mm.InterruptProcessingException
KINDS: dict[str, Callable[[], BaseException]] = {
    "memory": lambda: torch.OutOfMemoryError("planted: out of memory"),
    "error": lambda: RuntimeError("planted: an error"),
    "interrupt": lambda: Interrupt(),
    "Ctrl-C": lambda: KeyboardInterrupt(),
}
torch.set_num_threads(1)
logging.disable()
warnings.simplefilter("ignore")


WITHOUT_MEMORY = (
    "aten::detach", "aten::alias", "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::is_same_size",
    "aten::promote_types", "aten::result_type", "prim::device",
)  # fmt: skip
"""Operations that take none, beside views."""


@cache
def takes_memory(function: Any) -> bool:
    return not function.is_view and function._schema.name not in WITHOUT_MEMORY


class Faults(TorchDispatchMode):
    """Counts the operations of torch that take memory, and raises in the place of some of them.

    Attributes:
        planted: number of an operation → what it raises.
        count: of operations so far.
        raised: how many have.
    """

    def __init__(self, planted: dict[int, BaseException]) -> None:
        super().__init__()
        self.planted, self.count, self.raised = planted, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not takes_memory(function):
            return function(*args, **(kwargs or {}))
        self.count += 1
        error = self.planted.pop(self.count, None)
        if error is not None:
            self.raised += 1
            raise error
        return function(*args, **(kwargs or {}))


def held() -> dict[int, int]:
    """Address → bytes of every storage that anything holds, beside what was frozen."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@dataclass
class Ladder:
    """Answers shortages of memory, as a node does.

    Attributes:
        size: of the output.
        steps_down: False: the same plan is tried again.
        asked: how often it was.
        exhausted: whether it had no answer.
    """

    size: tuple[int, int]
    steps_down: bool
    asked: int = 0
    exhausted: bool = False
    plan: Any = None

    def __call__(self, phase: str, plan: Any, error: Exception) -> Any:
        self.asked += 1
        found = memory_plan.smaller(plan, phase, self.size) if self.steps_down else ("", plan)
        self.exhausted |= found is None
        self.plan = found and found[1]
        return self.plan


@dataclass(frozen=True)
class Target:
    """Something that makes tensors, the same ones every time.

    Attributes:
        run: makes them, one by one, into the list that it is given; with the ladder, if it takes one.
        has_ladder: whether shortages of memory are answered inside.
    """

    name: str
    run: Callable[[list[Tensor], Ladder | None], None]
    size: tuple[int, int] = (0, 0)
    has_ladder: bool = False


# What is attacked.

CLIPS = ((1, 16, 16, 4.0), (5, 16, 16, 4.0), (9, 20, 16, 2.0))
RARE = ((2, 48, 80, 4.0), (26, 16, 16, 1.0))
"""Frames, height, width, scale. The rare ones take longer: strips of the decoder below a frame, and two steps."""


@cache
def model(version: str) -> Any:
    return tiny.tiny_model(version)


@cache
def vae_decoder() -> Any:
    torch.manual_seed(0)
    return wan_vae.StreamingDecoder(wan_vae.WanVAE(dim=4).requires_grad_(False).eval())


def clip(count: int, height: int, width: int) -> list[Tensor]:
    """A list: frames of a tensor would be operations of ours."""
    return list(torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count)))


def engine(rng: random.Random) -> Target:
    version, colour = rng.choice(["v1", "v1.1"]), rng.choice(["adain", "wavelet", "none"])
    count, height, width, scale = rng.choice(RARE if rng.random() < 0.04 else CLIPS)
    with_vae, inference = rng.random() < 0.15, rng.random() < 0.5
    frames = clip(count, height, width)
    options = flashvsr.StreamOptions(scale=scale, colour=colour)
    size = (round(width * scale), round(height * scale))
    network, vae = model(version), vae_decoder() if with_vae else None

    def run(out: list[Tensor], ladder: Ladder | None) -> None:
        with torch.inference_mode(inference):
            stream = flashvsr.upscale_frames(network, frames, options, vae=vae, on_memory_error=ladder)
            try:
                for frame in stream:
                    out.append(frame)
            finally:
                stream.close()

    name = f"engine {version}, {count} frames of {width}x{height} times {scale:g}, {colour}"
    name += f"{', Wan VAE' if vae else ''}{', inference mode' if inference else ''}"
    return Target(name, run, size)


@cache
def node_model() -> Any:
    return host.call("LoadFlashVSR", model_set="nano (embedded)", version="auto", precision="auto", device="auto",
                     attention="auto", lq_cache_order="fixed", download=False)[0]  # fmt: skip


def upscale_node(rng: random.Random) -> Target:
    batch = torch.stack(clip(rng.choice([1, 5]), 16, 16))
    options = {"scale": 4.0, "seed": 3, "sparse_ratio": 2.0, "kv_ratio": 3.0, "local_range": 11, "colour": "adain",
               "decoder": "tc", "flashvsr": node_model(), "image": batch}  # fmt: skip

    def run(out: list[Tensor], ladder: Ladder | None) -> None:
        result, report = host.call("Upscale", **options)
        json.loads(report)
        out.append(result)

    return Target(f"FlashVSR Upscale, {len(batch)} frames", run, has_ladder=True)


@cache
def vae(kind: str) -> Any:
    return small_vaes.SMALL_VAES[kind]()


def vae_node(rng: random.Random) -> Target:
    kind, mode, encodes = rng.choice(["sd", "wan"]), rng.choice(["auto", "blend"]), rng.random() < 0.4
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"vae": vae(kind), "tile_size": 64, "overlap": 16, "mode": mode, "memory_budget_gb": 2.0,
                               "on_oom": "shrink"}  # fmt: skip
    if encodes:
        options["pixels"] = torch.rand(1, 64, 96, 3, generator=generator)
    else:
        shape = (1, 16, 1, 8, 12) if kind == "wan" else (1, 4, 8, 12)
        options["samples"] = {"samples": torch.randn(shape, generator=generator)}
    name = "VAEEncodeTiled" if encodes else "VAEDecodeTiled"

    def run(out: list[Tensor], ladder: Ladder | None) -> None:
        result, report = host.call(name, **options)
        json.loads(report)
        out.append(result["samples"] if encodes else result)

    return Target(f"{name} {kind}, {mode}", run, has_ladder=True)


TARGETS = (engine,) * 18 + (upscale_node, vae_node)


# One attack.


EXPECTED: dict[str, tuple[list[Tensor], int]] = {}
"""Name of a target → what it makes undisturbed, and in how many operations."""


@dataclass
class Attack:
    """Faults of one kind in one target.

    Attributes:
        recovers: whether the run is to go on after shortages of memory.
        steps_down: whether it goes on with a smaller plan.
        expected: what the target makes undisturbed.
        operations: that it takes.
    """

    target: Target
    rng: random.Random
    kind: str
    recovers: bool
    steps_down: bool
    expected: list[Tensor] = field(init=False)
    operations: int = field(init=False)

    @property
    def case(self) -> str:
        how = f"{self.kind}{', goes on' if self.recovers else ''}{', steps down' if self.steps_down else ''}"
        return f"{self.target.name}: {how}"

    @property
    def faults(self) -> int:
        return RECOVERIES if self.recovers and not self.target.has_ladder else FAULTS

    def ladder(self) -> Ladder | None:
        return Ladder(self.target.size, self.steps_down) if self.recovers and not self.target.has_ladder else None

    def carry_out(self) -> Outcome:
        if self.target.name not in EXPECTED:
            counter, frames = Faults({}), []
            with counter:
                self.target.run(frames, None)
            EXPECTED[self.target.name] = frames, counter.count
        self.expected, self.operations = EXPECTED[self.target.name]
        fatal = self._recovering() if self.recovers else self._fatal()
        if fatal is not None:
            return fatal
        again: list[Tensor] = []
        self.target.run(again, None)
        if not equal(again, self.expected):
            return self.outcome("a wrong rerun", False)
        return self.outcome("recovered" if self.recovers else "left clean", True)

    def outcome(self, end: str, good: bool, detail: str = "") -> Outcome:
        return Outcome(self.case, end, good, detail, units=self.faults)

    def planted(self, count: int) -> dict[int, BaseException]:
        # Many operations belong to the set-up and to the end of a run; those are attacked as often as the middle.
        first = self.rng.choice([40, self.operations, self.operations])
        places = self.rng.sample(range(1, max(first, count + 1)), count)
        return {place: KINDS[self.kind]() for place in places}

    def _fatal(self) -> Outcome | None:
        """Faults that end a run, one in each of several runs."""
        for _ in range(FAULTS):
            before, frames = held(), []
            faults = Faults(self.planted(1))
            (place,), (planted,) = faults.planted.keys(), (type(e) for e in faults.planted.values())
            end = self.once(faults, frames, planted)
            if end is not None:
                return self.outcome(f"{end[0]}", False, f"operation {place} of {self.operations}: {end[1]}")
            if not equal(frames, self.expected[: len(frames)]):
                return self.outcome("wrong frames before the fault", False, f"operation {place} of {self.operations}")
            del frames, planted
            faults.planted.clear()
            left = {address: size for address, size in held().items() if address not in before}
            if left:
                where = f"operation {place} of {self.operations}"
                return self.outcome("bytes held", False, f"{sum(left.values())} bytes in {len(left)} after {where}")
        return None

    def once(self, faults: Faults, frames: list[Tensor], planted: type) -> tuple[str, str] | None:
        """None where the fault came out as it went in, or not at all because nothing was left to do."""
        try:
            with faults:
                self.target.run(frames, None)
        except (Exception, KeyboardInterrupt, Interrupt) as error:
            if type(error) is planted or (self.kind == "memory" and isinstance(error, torch.OutOfMemoryError)):
                return None
            found = failure_of(self.case, error, "turns into")
            return found.end, found.detail
        if faults.raised and not (self.kind == "memory" and self.target.has_ladder):
            return f"swallows {planted.__name__}", "the run went on"
        return None

    def _recovering(self) -> Outcome | None:
        """Shortages of memory that a run survives, several in one run."""
        before, frames, ladder = held(), [], self.ladder()
        faults = Faults(self.planted(self.faults))
        places = sorted(faults.planted)
        where = f"operations {places} of {self.operations}"
        try:
            with faults:
                self.target.run(frames, ladder)
        except torch.OutOfMemoryError as error:
            told = "nothing is left to try" in str(error)
            if (ladder is not None and not ladder.exhausted) or (ladder is None and not told):
                found = failure_of(self.case, error, "passes the ladder by")
                return self.outcome(found.end, False, where)
        except (Exception, KeyboardInterrupt) as error:
            found = failure_of(self.case, error, "turns into")
            return self.outcome(found.end, False, f"{where}: {found.detail}")
        else:
            tiled = ladder is not None and ladder.plan is not None and ladder.plan.tile is not None
            if not self.target.has_ladder and not tiled and not equal(frames, self.expected):
                return self.outcome("recovers with other bits", False, where)
            if self.target.has_ladder and not alike(frames, self.expected):
                return self.outcome("recovers with another picture", False, where)
        del frames, ladder
        faults.planted.clear()
        left = {address: size for address, size in held().items() if address not in before}
        if left:
            return self.outcome("bytes held", False, f"{sum(left.values())} bytes in {len(left)} after {where}")
        return None


def equal(one: Iterable[Tensor], two: Iterable[Tensor]) -> bool:
    one, two = list(one), list(two)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def alike(one: list[Tensor], two: list[Tensor]) -> bool:
    """The same picture but for where smaller tiles were blended."""
    return len(one) == len(two) and all(
        a.shape == b.shape and float((a - b).norm() / b.norm()) < 0.2 for a, b in zip(one, two, strict=True)
    )


def warm_up() -> None:
    """What stays for good after the first use, such as constants and verdicts, is no finding."""
    for seed, make in enumerate((engine, engine, upscale_node, vae_node, vae_node, vae_node)):
        with Faults({}):  # its first use imports much of torch, which every look for tensors would go through again
            make(random.Random(seed)).run([], None)
    gc.collect()
    gc.freeze()


def run(seed: int) -> Outcome:
    """Faults of one kind in one target."""
    rng = random.Random(seed)
    target = rng.choice(TARGETS)(rng)
    kind = rng.choice(["memory", "memory", "memory", "error", "interrupt", "Ctrl-C"])
    recovers = kind == "memory" and (target.has_ladder or rng.random() < 0.7)
    return Attack(target, rng, kind, recovers, recovers and rng.random() < 0.5).carry_out()


warm_up()
