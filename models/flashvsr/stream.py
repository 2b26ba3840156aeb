"""The streaming engine: an iterable of frames in, an iterator of upscaled frames out, in memory that does not grow.

The generator pulls input frames when it needs them and yields output frames as soon as they exist. Everything that a
run remembers is in its `StreamState`; the networks hold weights and nothing else. So to cancel a run, leave the loop;
and nothing can leak from one run into the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..operations import downloaded, uploaded
from .colour import METHODS
from .config import LATENT_STRIDE, StreamOptions
from .memory_plan import MemoryPlan
from .model import FlashVSR
from .plan import STEP_FRAMES, output_size, padded_size, step_inputs, step_latents, step_outputs
from .tc_decoder import FRAMES_PER_LATENT, DecoderMemory
from .tiles import RAM, TileState, cut, whole_frame

LATENT_PAIR = 2
"""Latent frames per draw of the noise generator."""

OnStep = Callable[[str, int, "int | None"], Any]
OnMemoryError = Callable[[str, MemoryPlan, Exception], "MemoryPlan | None"]
Result = TypeVar("Result")


class StreamingVAE(Protocol):
    """A Wan 2.1 decoder whose memory the caller owns."""

    def new_cache(self, device: torch.device | None = None) -> Any:
        """Starts a stream; with `device`, its memory rests there."""
        ...

    def copy_cache(self, cache: Any, device: torch.device | None = None) -> Any:
        """A copy for `decode_stream` to change instead of this cache; with `device`, it rests there."""
        ...

    def decode_stream(self, latents: Tensor, cache: Any) -> Tensor:
        """Normalised latents NCTHW → frames NCTHW in -1..1, not clamped: 4T, or 4T - 3 at the start."""
        ...


@dataclass
class StreamState:
    """Everything that one run remembers between process steps.

    Attributes:
        window: input frames HWC that are still needed, as they came.
        window_start: index of the oldest of them in the clip.
        ended: whether the source has run out of frames.
        frames: how many frames the source has given.
        tiles: one for each spatial tile.
        decoder: memory of the TC decoder, or cache of the Wan VAE.
        generator: of the latent noise, on the CPU.
        noise, latents: NCTHW fp32, of the current step only, on the computing device.
        decoded: NCTHW, frames of the newest latent that are decoded but not finished.
    """

    generator: torch.Generator
    tiles: list[TileState] = field(default_factory=list)
    window: deque[Tensor] = field(default_factory=deque)
    window_start: int = 0
    ended: bool = False
    frames: int = 0
    decoder: DecoderMemory | Any | None = None
    noise: Tensor | None = None
    latents: Tensor | None = None
    decoded: Tensor | None = None

    def release(self) -> None:
        """Drops every tensor."""
        self.window.clear()
        self.tiles.clear()
        self.decoder = self.noise = self.latents = self.decoded = None


def upscale_frames(
    model: FlashVSR,
    frames: Iterable[Tensor],
    options: StreamOptions = StreamOptions(),  # noqa: B008  frozen, so one shared default is safe
    *,
    noise: Tensor | None = None,
    vae: StreamingVAE | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
    on_step: OnStep | None = None,
    plan: MemoryPlan | None = None,
    memory_errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError,),
    on_memory_error: OnMemoryError | None = None,
) -> Generator[Tensor, None, None]:
    """Upscales a clip frame by frame: N frames in, N frames of `output_size(width, height, options.scale)` out.

        for frame in upscale_frames(model, clip.frames(), StreamOptions(scale=2)):
            writer.write(frame)

    Args:
        model: networks and prompt.
        frames: HWC float tensors in 0..1, three channels, one size; pulled lazily: 25 before the first output, then 8
            for each 8 frames of output.
        options: see `StreamOptions`.
        noise: NCTHW fp32 latent noise for latent frames 0 … T-1 at the padded output size / 8. Missing latent frames
            are drawn from `options.seed`; those beyond the clip are ignored.
        vae: a streaming Wan 2.1 decoder for the "full" result; None decodes with the TC decoder.
        device: where to compute; default: the model's. Weights may be elsewhere if the model's layers cast on use.
        dtype: what to compute in; default: fp32 on the CPU, else the model's.
        finish: applied on the device to THWC fp32 frames in 0..1 before they leave it, as `ClipWriter.pack`; what it
            returns is yielded row by row. It may be called again for the same frames.
        on_step: called as on_step(phase, done, total) before every LQ clip ("project"), transformer tile ("transform")
            and decoded latent ("decode"); done and total count output frames, total is None while unknown. What it
            raises leaves through this generator, with all state released.
        plan: how to spend memory; default: everything on the device, with `options.tile`, which a given plan replaces.
        memory_errors: exceptions that mean that memory ran out.
        on_memory_error: called as on_memory_error(phase, plan, error) after one of these, with nothing of the failed
            work alive; before the first step the phase is "set up". The plan it returns, the same or a smaller one (see
            `memory_plan.smaller`), holds from then on, and the run resumes at the layer or frame that failed: no frame
            is lost or made twice. None raises the error; a tile larger than the current one is ignored. With `vae`, a
            second copy of the decoder's cache exists while it works, so that a latent can be started again.

    Yields:
        HWC fp32 frames in 0..1 on the CPU, or what `finish` makes of them.

    Raises:
        ValueError: the clip is empty, a frame differs in size, layout or type or holds NaN or infinity, or the noise
            does not fit the frames.
    """
    where = model.prompt.device if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.float32 if where.type == "cpu" else model.prompt.dtype
    attempts = _Attempts(plan or MemoryPlan(tile=options.tile), memory_errors, on_memory_error)
    on_step = on_step or (lambda *_: None)
    # The caller's mode at the first frame holds for the whole run: tensors made in inference mode cannot be changed
    # outside it, and the caller may resume this generator in another mode.
    inference = torch.is_inference_mode_enabled()
    state = StreamState(torch.Generator().manual_seed(options.seed))
    source = iter(frames)
    total = len(frames) if isinstance(frames, Sized) else None
    done = step = 0
    try:
        set_up = partial(attempts.make, None, inference, "set up")
        _pull(state, source, step_inputs(step)[1], set_up)
        if not state.frames:
            raise ValueError("upscale_frames: expected at least one frame; got an empty clip.")
        recoverable = on_memory_error is not None
        engine = set_up(partial(_Engine, model, options, noise, vae, where, dtype, state, recoverable, finish))
        attempt = partial(attempts.make, engine, inference)
        while not state.ended or done < state.frames:
            if state.ended:
                total = state.frames
            for clip in _clips(step):
                on_step("project", done, total)
                attempt("project", partial(engine.project, *clip))
            attempt("transform", partial(engine.begin, step))
            while engine.next_tile(step) is not None:
                on_step("transform", done, total)
                attempt("transform", partial(engine.transform, step))
            for first, last in _decoded(step):
                if state.ended and first >= state.frames:
                    break
                on_step("decode", done, total)
                while first < last and not (state.ended and first >= state.frames):
                    finished = attempt("decode", partial(engine.decode, first, last))
                    first += len(finished)
                    if state.ended:
                        del finished[max(0, state.frames - done) :]
                    while finished:
                        done += 1
                        yield finished.pop(0)
            step += 1
            _forget(state, step_outputs(step)[0])
            if not state.ended:
                _pull(state, source, step_inputs(step)[1], partial(attempt, "project"))
    finally:
        state.release()


class _Engine:
    """The constants of a run, and the three kinds of work that its steps consist of."""

    def __init__(
        self,
        model: FlashVSR,
        options: StreamOptions,
        noise: Tensor | None,
        vae: StreamingVAE | None,
        device: torch.device,
        dtype: torch.dtype,
        state: StreamState,
        recoverable: bool,
        finish: Callable[[Tensor], Tensor] | None,
    ) -> None:
        height, width, _ = state.window[0].shape
        self.model, self.options, self.vae, self.state = model, options, vae, state
        self.device, self.dtype = device, dtype
        self.size = output_size(width, height, options.scale)
        self.padded = padded_size(*self.size)
        columns, rows = (side // LATENT_STRIDE for side in self.padded)
        channels = model.transformer.config.in_dim
        if noise is not None and (noise.ndim, *noise.shape[:2], *noise.shape[3:]) != (5, 1, channels, rows, columns):
            raise ValueError(
                f"upscale_frames: expected noise of shape (1, {channels}, T, {rows}, {columns}) for frames of "
                f"{self.size[0]} × {self.size[1]}; got {tuple(noise.shape)}."
            )
        self.noise = noise
        self.latent_shape = (1, channels, LATENT_PAIR, rows, columns)
        self.constants = model.transformer.prepare(model.prompt.to(device, dtype))
        state.tiles = [whole_frame(rows, columns, device)]
        state.decoder = DecoderMemory() if vae is None else vae.new_cache()
        self.plan, self.recoverable, self.finish = MemoryPlan(), recoverable, finish

    def follow(self, plan: MemoryPlan) -> None:
        """Rearranges what the run remembers. If it raises, it can be called again."""
        state, tiles = self.state, self.state.tiles
        tiled = len(tiles) > 1 or (plan.tile is not None and plan.tile < max(self.padded))
        for tile in tiles:
            tile.transformer.move(RAM if plan.kv_in_ram or tiled else None, self.device)
        index = 0
        while plan.tile is not None and index < len(tiles):
            parts = cut(tiles[index], plan.tile)
            tiles[index : index + 1] = parts
            index += len(parts)
        if isinstance(state.decoder, DecoderMemory):
            state.decoder.move(RAM if plan.decoder_frames == 1 else None, self.device)
        elif self.vae is not None and plan.decoder_frames == 1:
            state.decoder = self.vae.copy_cache(state.decoder, RAM)
        self.plan = plan

    def project(self, first: int, last: int) -> None:
        """Projects input frames first … last-1, a whole number of clips, for each tile that has not seen them."""
        clip = self._lq(first, last).to(self.dtype)
        for tile in self.state.tiles:
            if tile.projected < last:
                part = tile.tile.scaled(LATENT_STRIDE).of(clip)
                tokens, tile.lq_cache = self.model.lq_projection(part, tile.lq_cache)
                if tokens is not None:
                    tile.tokens.append(tokens)
                tile.projected = last

    def begin(self, step: int) -> None:
        """Draws the noise of a process step and zeroes its latents."""
        if self.state.noise is None:
            self.state.noise = uploaded(self._draw_noise(step), self.device)
        self.state.latents = torch.zeros(self.state.noise.shape, device=self.device)

    def next_tile(self, step: int) -> TileState | None:
        """The first tile that has not added its latents to a process step."""
        return next((tile for tile in self.state.tiles if tile.steps <= step), None)

    def transform(self, step: int) -> None:
        """Runs the transformer on the next tile and adds its clean latents to the step's."""
        state, tile = self.state, self.next_tile(step)
        assert tile is not None and state.noise is not None and state.latents is not None
        noise = tile.tile.of(state.noise).to(self.dtype).contiguous()
        if tile.velocity is None:
            if len(tile.tokens) > 1:
                tile.tokens = [[torch.cat(layer, 1) for layer in zip(*tile.tokens, strict=True)]]
            tile.velocity = self.model.transformer(
                noise, tile.tokens[0], step, tile.transformer, self.options, self.constants, tile.corner
            )
            tile.tokens = []
        velocity = tile.velocity
        assert velocity is not None
        clean = (noise.float() - velocity.float()) * tile.weights
        tile.tile.of(state.latents).add_(clean)
        tile.velocity, tile.steps = None, step + 1

    def decode(self, first: int, last: int) -> list[Tensor]:
        """Makes output frames first … last-1, those left of the oldest latent, or as many as the plan takes at once.

        Returns them as `upscale_frames` yields them.
        """
        state, at_once = self.state, self.plan.decoder_frames >= last - first
        lq = self._lq(first, last) if at_once else None
        if state.decoded is None:
            assert state.latents is not None
            latent = state.latents[:, :, :1].to(self.dtype)
            if self.vae is None:
                parts = [self._lq(i, i + 1).to(self.dtype) for i in range(first, last)] if lq is None else []
                condition = torch.cat(parts, 2) if lq is None else lq.to(self.dtype)
                del parts
                decoded, state.decoder = self.model.decoder(
                    latent.transpose(1, 2), condition.transpose(1, 2), state.decoder, self.plan.decoder_strip_pixels
                )
                decoded = decoded.transpose(1, 2)
                del condition
            else:
                # An exception would leave the cache half changed.
                cache = self.vae.copy_cache(state.decoder) if self.recoverable else state.decoder
                decoded = self.vae.decode_stream(latent, cache)
                state.decoder = cache
                del cache
            state.decoded, state.noise = decoded, None
            state.latents = state.latents[:, :, 1:] if state.latents.shape[2] > 1 else None
            del decoded
        if lq is None:
            last = first + 1
            lq = self._lq(first, last)
        waiting = state.decoded
        assert waiting is not None
        frames = waiting[:, :, : last - first].float()
        # Like the released pipeline: the VAE's frames are clamped before the colour transfer, the TC decoder's are not.
        frames = frames.mul(2).sub_(1) if self.vae is None else frames.clamp(-1, 1)
        width, height = self.size
        frames = METHODS[self.options.colour](frames[..., :height, :width], lq[..., :height, :width])
        frames = rearrange(frames.add_(1).div_(2).clamp_(0, 1), "1 c t h w -> t h w c")
        finished = list(downloaded(frames if self.finish is None else self.finish(frames)))
        left = waiting[:, :, last - first :]
        state.decoded = left if left.shape[2] else None
        return finished

    def _lq(self, first: int, last: int) -> Tensor:
        """Input frames first … last-1 at the padded output size: NCTHW fp32 in -1..1 on the device.

        The window keeps frames as they came: enlarging them twice costs little, keeping 25 large ones would cost a lot.
        """
        window, start = self.state.window, self.state.window_start
        frames = torch.stack(
            [uploaded(window[min(i - start, len(window) - 1)], self.device).float() for i in range(first, last)]
        )
        frames = rearrange(frames, "t h w c -> t c h w")
        width, height = self.size
        if frames.shape[2:] != (height, width):
            # Antialiasing matters only where rounding shrinks a side; PIL's bicubic, which the weights saw, has it.
            frames = F.interpolate(frames, (height, width), mode="bicubic", align_corners=False, antialias=True)
        frames = frames.clamp_(0, 1).mul_(2).sub_(1)
        if self.padded != self.size:
            frames = F.pad(frames, (0, self.padded[0] - width, 0, self.padded[1] - height), mode="replicate")
        return rearrange(frames, "t c h w -> 1 c t h w")

    def _draw_noise(self, step: int) -> Tensor:
        """Noise of one step's latent frames, NCTHW fp32 on the CPU.

        The generator advances pair by pair, always in order, so a longer clip's noise begins with the shorter one's.
        """
        first, last = step_latents(step)
        generator, before = self.state.generator, self.state.generator.get_state()
        try:
            pairs = range(first, last, LATENT_PAIR)
            drawn = torch.cat([torch.randn(self.latent_shape, generator=generator) for _ in pairs], 2)
            if self.noise is not None:
                given = self.noise[:, :, first:last].to("cpu", torch.float32)
                drawn[:, :, : given.shape[2]] = given
        except BaseException:
            generator.set_state(before)  # drawn again, it must be the same noise
            raise
        return drawn


class _Attempts:
    """Repeats units of work until they succeed, under the current plan.

    A unit changes the run's state only at its end or part by part, so it can be repeated after an exception.
    """

    def __init__(self, plan: MemoryPlan, errors: tuple[type[Exception], ...], on_error: OnMemoryError | None) -> None:
        self.plan, self._errors, self._on_error = plan, errors, on_error

    def make(self, engine: _Engine | None, inference: bool, phase: str, work: Callable[[], Result]) -> Result:
        while True:
            try:
                with _computing(inference):
                    if engine is not None and engine.plan != self.plan:
                        engine.follow(self.plan)
                    return work()
            except self._errors as error:
                if self._on_error is None:
                    raise
                # A traceback would keep every tensor of the failed work alive.
                failure = error.with_traceback(None)
                failure.__context__ = failure.__cause__ = None
            plan = self._on_error(phase, self.plan, failure)
            try:
                if plan is None:
                    raise failure
            finally:
                del failure
            self.plan = plan


@contextmanager
def _computing(inference: bool) -> Iterator[None]:
    """Turns gradients off; never held across a `yield` to the caller, whose own modes must stay as they are."""
    with torch.inference_mode(inference), torch.no_grad():
        yield


def _clips(step: int) -> Iterator[tuple[int, int]]:
    """Input frames [first, last) of each call of the LQ projection in a process step."""
    first, last = step_inputs(step)
    if step == 0:
        yield 0, 1
        first = 1
    for start in range(first, last, STEP_FRAMES):
        yield start, min(start + STEP_FRAMES, last)


def _decoded(step: int) -> Iterator[tuple[int, int]]:
    """Output frames [first, last) of each latent of a process step; the very first latent is one frame."""
    first, last = step_outputs(step)
    while first < last:
        stop = first + (FRAMES_PER_LATENT if first else 1)
        yield first, stop
        first = stop


def _pull(state: StreamState, source: Iterator[Tensor], needed: int, attempt: Callable[[Any], None]) -> None:
    """Takes frames from the source until `needed` have come or it ends; what looks at a frame may be repeated."""
    while state.frames < needed:
        frame = next(source, None)
        if frame is None:
            state.ended = True
            return
        attempt(partial(_check, frame, state.frames, state.window[0] if state.window else None))
        state.window.append(frame)
        state.frames += 1


def _check(frame: Tensor, index: int, earlier: Tensor | None) -> None:
    if frame.ndim != 3 or frame.shape[2] != 3 or not frame.is_floating_point():
        raise ValueError(
            f"upscale_frames: expected frames as HWC float tensors with 3 channels; frame {index} has shape "
            f"{tuple(frame.shape)} and type {frame.dtype}."
        )
    if earlier is not None and frame.shape != earlier.shape:
        raise ValueError(
            f"upscale_frames: expected frames of one size, {earlier.shape[1]} × {earlier.shape[0]}; frame {index} is "
            f"{frame.shape[1]} × {frame.shape[0]}."
        )
    if not torch.isfinite(frame).all():
        raise ValueError(f"upscale_frames: expected finite values; frame {index} holds NaN or infinity.")


def _forget(state: StreamState, first: int) -> None:
    """Drops input frames before `first`, but never the last one, which pads the end."""
    while state.window_start < first and len(state.window) > 1:
        state.window.popleft()
        state.window_start += 1
