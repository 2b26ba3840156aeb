"""Memory that does not suffice in the middle of a run: which plan comes next, and that nothing is lost or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steadyvsr.app.card.random_model import tiny_model
from steadyvsr.app.clip import Ladder
from steadyvsr.models.flashvsr import StreamOptions, upscale_frames
from steadyvsr.models.flashvsr.memory_plan import HELPS, MemoryPlan, plans, smaller
from steadyvsr.models.wan_vae import StreamingDecoder, WanVAE
from steadyvsr.tests.models.live_tensors import live_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

OPTIONS = StreamOptions(scale=4.0)
FRAMES, WIDTH, HEIGHT = 25, 96, 64
SIZE = (384, 256)
PHASES = ("project", "transform", "decode")
TILE_DB = 30.0


def clip(frames: int = FRAMES) -> Tensor:
    return torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(frames))


def psnr(first: Tensor, second: Tensor) -> float:
    return -10 * (first - second).square().mean().log10().item()


class Failing(TorchDispatchMode):
    """Raises an out-of-memory error at chosen allocations: operators that make a new storage, counted from 0.

    Only what the networks compute counts, which is what is made without gradients.
    """

    def __init__(self, fails: Callable[[int], bool] = lambda index: False) -> None:
        super().__init__()
        self.fails, self.count, self.raised = fails, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        if not torch.is_grad_enabled() and any(x.untyped_storage()._cdata not in given for x in made):
            self.count += 1
            if self.fails(self.count - 1):
                self.raised += 1
                raise torch.OutOfMemoryError("scripted")
        return result


class Card:
    """A card on which a phase fits only with some plans: what does not fit fails at a chosen allocation of the unit.

    It stands on the two callbacks of a run, as a device stands under it.
    """

    def __init__(self, fits: Callable[[str, MemoryPlan], bool], allocation: int = 3, plan: MemoryPlan | None = None):
        self.plan = plan or MemoryPlan()
        self.fits, self.allocation = fits, allocation
        self.phase, self.attempts, self.frames_at_failure = "", [], []
        self.mode = Failing(self._fails)

    def _fails(self, index: int) -> bool:
        return index >= self.allocation and not self.fits(self.phase, self.plan)

    def on_step(self, phase: str, done: int, total: int | None) -> None:
        self.phase, self.mode.count, self.done = phase, 0, done

    def on_memory_error(self, phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        assert phase == self.phase and plan == self.plan and error.__traceback__ is None
        found = smaller(plan, phase, SIZE)
        self.attempts.append((phase, found and found[0]))
        self.frames_at_failure.append(self.done)
        self.mode.count = 0
        if found is not None:
            self.plan = found[1]
        return found and found[1]

    def run(self, frames: Tensor, options: StreamOptions = OPTIONS) -> Tensor:
        kept = []
        with self.mode:
            for frame in upscale_frames(
                MODEL, frames, options, plan=self.plan, on_step=self.on_step, on_memory_error=self.on_memory_error
            ):  # fmt: skip
                kept.append(frame)
        return torch.stack(kept)


MODEL = tiny_model()


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    return torch.stack(list(upscale_frames(MODEL, clip(), OPTIONS)))


def test_the_rungs_come_in_the_documented_order() -> None:
    names = [name for name, _ in plans(MemoryPlan(), (1920, 1080))]
    assert names == [
        "as planned", "KV cache in RAM", "decoder in smaller chunks", "decoder strips", "decoder strips",
        *["spatial tiles"] * 5,
    ]  # fmt: skip
    assert list(HELPS) == list(dict.fromkeys(names[1:]))
    tiles = [plan.tile for _, plan in plans(MemoryPlan(), (1920, 1080))]
    assert tiles == [None] * 5 + [1024, 768, 512, 384, 256]


def test_tiles_that_are_not_smaller_than_the_frame_are_no_rung() -> None:
    assert [plan.tile for name, plan in plans(MemoryPlan(), SIZE) if name == "spatial tiles"] == [256]
    assert [plan.tile for name, plan in plans(MemoryPlan(tile=512), (1920, 1080)) if name == "spatial tiles"] == [
        384,
        256,
    ]
    assert not [name for name, _ in plans(MemoryPlan(), (256, 256)) if name == "spatial tiles"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_passes_over_the_rungs_that_cannot_help_it(phase: str) -> None:
    plan, order = MemoryPlan(), []
    while (found := smaller(plan, phase, SIZE)) is not None:
        order.append(found[0])
        plan = found[1]
    assert list(dict.fromkeys(order)) == [rung for rung, phases in HELPS.items() if phase in phases]


@pytest.mark.parametrize("field", [{"decoder_frames": 2}, {"decoder_strip_pixels": 0}, {"tile": 200}, {"tile": 128}])
def test_a_plan_out_of_range_names_its_field(field: dict) -> None:
    with pytest.raises(ValueError, match=f"MemoryPlan.{next(iter(field))}: expected"):
        MemoryPlan(**field)


NEUTRAL = [
    MemoryPlan(kv_in_ram=True),
    MemoryPlan(kv_in_ram=True, decoder_frames=1),
    MemoryPlan(kv_in_ram=True, decoder_frames=1, decoder_strip_pixels=1 << 12),
]


@pytest.mark.parametrize("plan", NEUTRAL, ids=str)
def test_a_plan_without_tiles_gives_the_same_frames(plan: MemoryPlan, undisturbed: Tensor) -> None:
    frames = torch.stack(list(upscale_frames(MODEL, clip(), OPTIONS, plan=plan)))
    torch.testing.assert_close(frames, undisturbed, rtol=0, atol=1e-5)


def small_clip() -> Tensor:
    return clip()[:, :32, :32]


def allocations(plan: MemoryPlan, samples: int) -> list[int]:
    """Some allocations of a whole run, without what comes before its first unit of work and is not made again; and many
    of the last step of the transformer, whose caches are full."""
    units: list[tuple[str, int]] = []
    with Failing() as mode:
        on_step = lambda *unit: units.append((unit[0], mode.count))  # noqa: E731
        list(upscale_frames(MODEL, small_clip(), OPTIONS, plan=plan, on_step=on_step))
    assert mode.count > 1000
    last = max(index for index, unit in enumerate(units) if unit[0] == "transform")
    first, end = units[last][1], units[last + 1][1]
    everywhere = range(units[0][1], mode.count, mode.count // samples)
    return [*everywhere, *range(first, end, max(1, (end - first) // (2 * samples)))]


def test_an_error_at_any_allocation_loses_and_changes_nothing() -> None:
    """The callback frees something elsewhere and keeps the plan, as after unloading another model."""
    wanted = torch.stack(list(upscale_frames(MODEL, small_clip(), OPTIONS)))
    for index in allocations(MemoryPlan(), 10):
        failures: list[str] = []

        def again(phase: str, plan: MemoryPlan, error: Exception, failures: list[str] = failures) -> MemoryPlan:
            failures.append(phase)
            return plan

        with Failing(lambda count, index=index: count == index) as mode:
            frames = torch.stack(list(upscale_frames(MODEL, small_clip(), OPTIONS, on_memory_error=again)))
        assert mode.raised == len(failures) == 1, index
        assert torch.equal(frames, wanted), (index, failures)


def test_an_error_in_the_set_up_or_in_the_noise_is_answered_and_changes_nothing() -> None:
    wanted, marks = torch.stack(list(upscale_frames(MODEL, small_clip(), OPTIONS))), []
    with Failing() as mode:
        stream = upscale_frames(
            MODEL, small_clip(), OPTIONS, on_step=lambda phase, *_: marks.append((phase, mode.count))
        )
        next(stream)
        stream.close()
    set_up, begun = marks[0][1], next(count for phase, count in marks if phase == "transform")
    assert set_up > 0
    for index in [*range(0, set_up, max(1, set_up // 5)), *range(begun - 5, begun)]:
        phases: list[str] = []

        def again(phase: str, plan: MemoryPlan, error: Exception, phases: list[str] = phases) -> MemoryPlan:
            phases.append(phase)
            return plan

        with Failing(lambda count, index=index: count == index):
            frames = torch.stack(list(upscale_frames(MODEL, small_clip(), OPTIONS, on_memory_error=again)))
        assert len(phases) == 1 and (phases == ["set up"]) is (index < set_up), (index, phases)
        assert torch.equal(frames, wanted), (index, phases)


def test_a_set_up_that_never_fits_ends_in_the_error_after_the_rungs_that_cost_no_quality() -> None:
    asked: list[MemoryPlan | None] = []

    def down(phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        found = smaller(plan, phase, SIZE)
        asked.append(found and found[1])
        return found and found[1]

    with Failing(lambda count: True), pytest.raises(torch.OutOfMemoryError, match="scripted"):
        next(upscale_frames(MODEL, small_clip(), OPTIONS, on_memory_error=down))
    assert asked == [MemoryPlan(kv_in_ram=True), MemoryPlan(kv_in_ram=True, decoder_frames=1), None]


@pytest.mark.parametrize("plan", NEUTRAL[-1:], ids=str)
def test_an_error_at_any_allocation_of_a_small_plan_loses_nothing(plan: MemoryPlan) -> None:
    wanted = torch.stack(list(upscale_frames(MODEL, small_clip(), OPTIONS, plan=plan)))
    for index in allocations(plan, 4):
        with Failing(lambda count, index=index: count == index) as mode:
            again = lambda phase, plan, error: plan  # noqa: E731
            frames = upscale_frames(MODEL, small_clip(), OPTIONS, plan=plan, on_memory_error=again)
            assert torch.equal(torch.stack(list(frames)), wanted), index
        assert mode.raised == 1


@pytest.mark.parametrize("allocation", [0, 12])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rung", list(HELPS))
def test_a_phase_goes_down_to_the_first_plan_that_fits(
    rung: str, phase: str, allocation: int, undisturbed: Tensor
) -> None:
    if phase not in HELPS[rung]:
        pytest.skip("this rung cannot help this phase")
    needed = {
        "KV cache in RAM": lambda plan: plan.kv_in_ram,
        "decoder in smaller chunks": lambda plan: plan.decoder_frames == 1,
        "decoder strips": lambda plan: plan.decoder_strip_pixels == 1 << 16,
        "spatial tiles": lambda plan: plan.tile == 256,
    }[rung]
    # Only from the second process step on: then there are finished frames and full caches to lose.
    card = Card(lambda running, plan: running != phase or card.done < 21 or needed(plan), allocation)
    frames = card.run(clip())
    helping = [name for name, phases in HELPS.items() if phase in phases]
    expected = helping[: helping.index(rung) + 1]
    if rung == "decoder strips":
        expected.append(rung)
    assert card.attempts == [(phase, name) for name in expected]
    assert set(card.frames_at_failure) == {21}
    assert frames.shape == undisturbed.shape
    if rung == "spatial tiles":
        assert torch.equal(frames[:21], undisturbed[:21])
        assert TILE_DB < psnr(frames, undisturbed) < 120
    else:
        torch.testing.assert_close(frames, undisturbed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("phase", PHASES)
def test_at_the_bottom_the_error_leaves_and_nothing_is_held(phase: str) -> None:
    frames = clip()
    before = {id(tensor) for tensor in live_tensors()}
    card = Card(lambda running, plan: running != phase or card.done < 21)
    with pytest.raises(torch.OutOfMemoryError, match="scripted"):
        card.run(frames)
    assert card.attempts[-1] == (phase, None) and len(card.attempts) >= 4
    assert [tuple(tensor.shape) for tensor in live_tensors(before)] == []


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(kv_in_ram=True, decoder_frames=1)], ids=str)
def test_a_wan_decoder_that_runs_out_of_memory_begins_the_latent_anew(plan: MemoryPlan) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wan = WanVAE(dim=8, with_encoder=False).requires_grad_(False)
    vae = StreamingDecoder(wan)
    frames, options = clip(2)[:, :16, :16].repeat(5, 1, 1, 1), StreamOptions(scale=4.0)
    wanted = torch.stack(list(upscale_frames(MODEL, frames, options, vae=vae)))
    failed: list[str] = []

    def again(phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan:
        failed.append(phase)
        return plan

    def fail_once(*_: object) -> None:
        if len(failed) < 2 and started[0] >= 5:
            raise torch.OutOfMemoryError("scripted")

    started = [0]
    layers = [module for module in wan.decoder.modules() if isinstance(module, torch.nn.Conv3d)]
    layers[-2].register_forward_pre_hook(fail_once)  # when nearly all of the cache has been replaced
    run = upscale_frames(
        MODEL, frames, options, vae=vae, plan=plan, on_memory_error=again,
        on_step=lambda phase, done, total: started.__setitem__(0, done),
    )  # fmt: skip
    result = torch.stack(list(run))
    assert failed == ["decode", "decode"]
    assert torch.equal(result, wanted)


def test_the_command_line_goes_down_the_ladder_and_says_so(undisturbed: Tensor) -> None:
    ladder = Ladder(SIZE, torch.device("cpu"))
    card = Card(lambda running, plan: running != "decode" or plan.kv_in_ram)
    down = ladder.on_memory_error

    def watched(phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        card.plan = down(phase, plan, error) or plan
        return card.plan

    with card.mode:
        frames = list(upscale_frames(MODEL, clip(), OPTIONS, on_step=card.on_step, on_memory_error=watched))
    assert torch.equal(torch.stack(frames), undisturbed)
    assert ladder.notes == ["Out of memory in decode; the run went on with less: KV cache in RAM."]
    bottom = MemoryPlan(kv_in_ram=True, decoder_frames=1, decoder_strip_pixels=1 << 16, tile=256)
    assert down("transform", bottom, torch.OutOfMemoryError()) is None and len(ladder.notes) == 1


@pytest.mark.parametrize("allocation", [0, 60])
def test_a_cut_into_tiles_loses_nothing_that_a_tile_can_see(allocation: int) -> None:
    """Where each attention block sees itself alone, in time, tiles that a running step is cut into change nothing."""
    alone = StreamOptions(scale=4.0, local_range=1, topk_ratio=100.0)
    wanted = torch.stack(list(upscale_frames(MODEL, clip(), alone)))
    card = Card(lambda running, plan: running != "transform" or card.done < 21 or plan.tile is not None, allocation)
    frames = card.run(clip(), alone)
    assert card.attempts[-1] == ("transform", "spatial tiles") and card.plan.tile == 256
    torch.testing.assert_close(frames, wanted, rtol=0, atol=1e-4)
