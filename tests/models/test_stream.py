"""The engine: frames in, frames out, nothing left behind."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator

import pytest
import torch
from steadyvsr.app.card.random_model import parameters, tiny_model
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.flashvsr import StreamOptions, upscale_frames
from steadyvsr.tests.models.live_tensors import live_tensors
from torch import Tensor

SMALL = StreamOptions(scale=2.0)


def coloured(count: int, width: int = 24, height: int = 16) -> Tensor:
    """THWC; every frame has a mean colour of its own, 40 grey levels or more from its neighbours'."""
    generator = torch.Generator().manual_seed(count)
    order = torch.stack([(torch.arange(count) * step % 11) / 11 * 0.7 + 0.15 for step in (3, 5, 7)], 1)
    return order[:, None, None] + (torch.rand(count, height, width, 3, generator=generator) - 0.5) * 0.05


def upscaled(clip: Tensor, options: StreamOptions = SMALL, **keywords) -> Tensor:
    return torch.stack(list(upscale_frames(tiny_model(), clip, options, **keywords)))


@pytest.mark.parametrize("count", [1, 2, 20, 21, 22, 25, 29, 30, 33, 41, 100])
def test_every_frame_comes_out_once_and_in_its_place(count: int) -> None:
    clip = coloured(count)
    result = upscaled(clip)
    assert result.shape == (count, 32, 48, 3)
    assert (result.mean((1, 2)) - clip.mean((1, 2))).abs().max() < 2 / 255


@pytest.mark.parametrize(("width", "height", "scale"), [(16, 16, 1.0), (51, 17, 1.5), (33, 70, 3.7), (16, 40, 8.0)])
def test_the_size_is_exactly_the_one_asked_for(width: int, height: int, scale: float) -> None:
    result = upscaled(coloured(2, width, height), StreamOptions(scale=scale))
    assert result.shape == (2, round(height * scale), round(width * scale), 3)
    assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1


def test_scale_one_is_not_resampled() -> None:
    """The decoder's condition is the input itself."""
    model, seen = tiny_model(), []
    model.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    clip = torch.rand(1, 128, 128, 3)
    list(upscale_frames(model, clip, StreamOptions(scale=1.0)))
    torch.testing.assert_close(seen[0][0, 0], clip[0].permute(2, 0, 1) * 2 - 1, rtol=0, atol=1e-7)


def test_a_longer_clip_begins_with_the_frames_of_a_shorter_one() -> None:
    clip = coloured(60)
    assert torch.equal(upscaled(clip)[:37], upscaled(clip[:41])[:37])


def test_noise_that_is_too_short_goes_on_from_the_seed() -> None:
    clip = coloured(30)
    generator = torch.Generator().manual_seed(SMALL.seed)
    pairs = [torch.randn(1, 16, 2, 16, 16, generator=generator) for _ in range(6)]
    noise = torch.cat(pairs, 2)
    drawn = upscaled(clip)
    for frames in (1, 3, 6, 12):
        assert torch.equal(upscaled(clip, noise=noise[:, :, :frames]), drawn)
    assert not torch.equal(upscaled(clip, noise=noise + 0.5), drawn)
    assert not torch.equal(upscaled(clip, StreamOptions(scale=2.0, seed=1)), drawn)


def test_noise_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected noise of shape"):
        upscaled(coloured(1), noise=torch.zeros(1, 16, 6, 16, 8))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ([], "empty clip"),
        ([torch.rand(16, 16, 4)], "3 channels; frame 0"),
        ([torch.zeros(16, 16, 3, dtype=torch.uint8)], "float tensors"),
        ([torch.rand(16, 16, 3), torch.rand(16, 17, 3)], "one size.*frame 1"),
        ([torch.rand(16, 16, 3), torch.full((16, 16, 3), float("nan"))], "frame 1 holds NaN"),
        ([torch.rand(8, 16, 3)], "at least 16 × 16"),
    ],
)
def test_bad_frames_are_named(clip: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(upscale_frames(tiny_model(), clip, SMALL))


@pytest.mark.parametrize(
    "field",
    [
        {"scale": 0}, {"scale": float("nan")}, {"seed": -1}, {"sparse_ratio": 0.0}, {"topk_ratio": -1.0},
        {"kv_ratio": 1.9}, {"local_range": 0}, {"colour": "lab"}, {"attention": "dense"}, {"tile": 200},
        {"scale": None}, {"seed": None}, {"sparse_ratio": None}, {"kv_ratio": None}, {"local_range": "11"},
    ],
)  # fmt: skip
def test_options_out_of_range_name_their_field(field: dict) -> None:
    with pytest.raises(ValueError, match=f"StreamOptions.{next(iter(field))}: expected"):
        StreamOptions(**field)


def counted(clip: Tensor, pulled: list[int]) -> Iterator[Tensor]:
    for frame in clip:
        pulled[0] += 1
        yield frame


def test_at_most_33_frames_are_pulled_ahead_of_the_newest_output() -> None:
    pulled, furthest = [0], 0
    for index, _ in enumerate(upscale_frames(tiny_model(), counted(coloured(70), pulled), SMALL)):
        furthest = max(furthest, pulled[0] - index)
    assert pulled[0] == 70 and 21 <= furthest <= 33


def test_steps_are_reported_with_their_phase_and_the_total_once_known() -> None:
    steps: list[tuple] = []
    list(upscale_frames(tiny_model(), iter(coloured(30)), SMALL, on_step=lambda *step: steps.append(step)))
    assert [phase for phase, *_ in steps].count("transform") == 3
    assert [phase for phase, *_ in steps].count("decode") == 6 + 2 + 1
    assert steps[0] == ("project", 0, None) and steps[-1] == ("decode", 29, 30)


class Stop(Exception):
    pass


def failing_source(clip: Tensor) -> Iterator[Tensor]:
    yield from clip
    raise Stop


def failing_step(phase: str, done: int, total: int | None) -> None:
    if done >= 21 and phase == "transform":
        raise Stop


@pytest.mark.parametrize("ending", ["completed", "closed", "source", "on_step", "decoder"])
def test_no_tensor_of_a_run_is_alive_afterwards(ending: str) -> None:
    model, clip = tiny_model(), coloured(40)
    before = {id(tensor) for tensor in live_tensors()}
    with StorageTracker() as tracker:
        if ending == "source":
            run = upscale_frames(model, failing_source(clip[:30]), SMALL)
        elif ending == "on_step":
            run = upscale_frames(model, iter(clip), SMALL, on_step=failing_step)
        else:
            run = upscale_frames(model, iter(clip), SMALL)
        next(run)
        during = tracker.now
        if ending == "closed":
            run.close()
        elif ending == "completed":
            deque(run, maxlen=0)
        elif ending == "decoder":
            handle = model.decoder.register_forward_hook(_raise)
            with contextlib.suppress(Stop):
                list(run)
            handle.remove()
        else:
            with contextlib.suppress(Stop):
                list(run)
    assert during > 1_000_000
    state = weakref.ref(run)
    del run
    assert state() is None
    left = live_tensors(before)
    assert [tuple(tensor.shape) for tensor in left] == []
    assert tracker.now == 0


def _raise(*_: object) -> None:
    raise Stop


def test_nothing_accumulates_over_200_frames() -> None:
    clip, model = coloured(200), tiny_model()
    after_step: list[int] = []

    def read(phase: str, done: int, total: int | None) -> None:
        if phase == "project" and (not after_step or done != marks[-1]):
            after_step.append(tracker.now)
            marks.append(done)

    marks = [0]
    with StorageTracker(exclude=parameters(model)) as tracker:
        for _ in upscale_frames(model, iter(clip), SMALL, on_step=read):
            pass
    steady = after_step[3:]
    assert len(steady) >= 20 and min(steady) > 100_000
    assert set(steady) == {steady[0]}


def test_v1_and_v11_peak_alike() -> None:
    peaks = []
    for version in ("v1", "v1.1"):
        model = tiny_model(version)
        with StorageTracker(exclude=parameters(model)) as tracker:
            for _ in upscale_frames(model, coloured(40), SMALL):
                pass
        peaks.append(tracker.peak)
    assert peaks[0] > 1_000_000 and abs(peaks[0] - peaks[1]) < 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frames_are_fp32_on_the_cpu_whatever_the_weights(dtype: torch.dtype) -> None:
    clip = coloured(2)
    result = torch.stack(list(upscale_frames(tiny_model(dtype=dtype), clip, SMALL)))
    assert result.dtype == torch.float32 and result.device.type == "cpu"
    torch.testing.assert_close(result, upscaled(clip), rtol=0, atol=0.02)


def test_computing_in_bf16_stays_near_fp32() -> None:
    clip = coloured(22)
    coarse = torch.stack(list(upscale_frames(tiny_model(dtype=torch.bfloat16), clip, SMALL, dtype=torch.bfloat16)))
    assert coarse.dtype == torch.float32
    assert (coarse - upscaled(clip)).abs().mean() < 0.02


def test_the_callers_gradient_mode_is_its_own_and_no_graph_is_made() -> None:
    model = tiny_model()
    for parameter in parameters(model)[:-1]:
        parameter.requires_grad_(True)
    modes = []
    for frame in upscale_frames(model, coloured(30), SMALL):
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        assert frame.grad_fn is None and not frame.requires_grad
    assert set(modes) == {(True, False)}


def test_a_run_survives_a_change_of_the_callers_mode() -> None:
    expected = upscaled(coloured(30))
    run = upscale_frames(tiny_model(), coloured(30), SMALL)
    with torch.inference_mode():
        frames = [next(run).clone()]
        assert torch.is_inference_mode_enabled()
    frames += list(run)
    assert torch.equal(torch.stack(frames), expected)
    run = upscale_frames(tiny_model(), coloured(30), SMALL)
    frames = [next(run)]
    with torch.inference_mode():
        frames += [next(run).clone() for _ in range(15)]
    frames += list(run)
    assert torch.equal(torch.stack(frames), expected)


def test_tiles_give_every_frame_and_report_each_tile() -> None:
    clip, phases = coloured(22, 160, 96), []
    options = StreamOptions(scale=4.0, tile=384)
    tiled = upscaled(clip, options, on_step=lambda phase, *_: phases.append(phase))
    assert tiled.shape == (22, 384, 640, 3) and phases.count("transform") == 2 * 2
    whole = upscaled(clip, StreamOptions(scale=4.0))
    assert 0 < (tiled - whole).abs().mean() < 0.02


def test_one_tile_over_everything_is_no_tiling() -> None:
    clip = coloured(3)
    assert torch.equal(upscaled(clip, StreamOptions(scale=2.0, tile=512)), upscaled(clip))
