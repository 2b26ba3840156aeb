"""The streaming engine: an iterable of frames in, an iterator of upscaled frames out, in memory that does not grow.

The generator pulls input frames when it needs them and yields output frames as soon as they exist. Everything that
one run remembers is in its `StreamState`; the networks hold weights and nothing else. So leaving the loop is
cancelling, and nothing can pass from one run into the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tiling import Span, Tile, blend_weights, grid_tiles
from .colour import METHODS
from .config import LATENT_STRIDE, StreamOptions
from .lq_projection import LQCache
from .model import FlashVSR
from .plan import STEP_FRAMES, output_size, padded_size, step_inputs, step_latents, step_outputs
from .tc_decoder import FRAMES_PER_LATENT, DecoderMemory
from .transformer import TransformerState

TILE_OVERLAP_PIXELS = 128
LATENT_PAIR = 2
"""Latent frames that one draw of the noise generator gives."""

OnStep = Callable[[str, int, "int | None"], Any]


class StreamingVAE(Protocol):
    """A Wan 2.1 decoder that keeps its memory with the caller."""

    def decode_stream(self, latents: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Normalised latents NCTHW → frames NCTHW in -1..1, not clamped: 4T, or 4T - 3 with `cache` None."""
        ...


@dataclass
class TileState:
    """What one spatial tile remembers; a run without tiling has one, over the whole padded frame.

    Attributes:
        lq_cache: of the LQ projection.
        transformer: of the transformer.
        tokens: of the running step's clips, each one BLD tensor per layer.
    """

    transformer: TransformerState
    lq_cache: LQCache | None = None
    tokens: list[list[Tensor]] = field(default_factory=list)


@dataclass
class StreamState:
    """Everything that one run remembers between process steps.

    Attributes:
        window: input frames HWC that are still needed, as they came.
        window_start: index of the oldest of them in the clip.
        ended: whether the source has no more frames.
        frames: how many frames the source has given.
        tiles: one for each spatial tile.
        decoder: memory of the TC decoder or cache of the Wan VAE.
        generator: of the latent noise, on the CPU.
        noise, latents: NCTHW fp32, of the running step only.
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

    def release(self) -> None:
        """Drops every tensor."""
        self.window.clear()
        self.tiles.clear()
        self.decoder = self.noise = self.latents = None


def upscale_frames(
    model: FlashVSR,
    frames: Iterable[Tensor],
    options: StreamOptions = StreamOptions(),  # noqa: B008  frozen, so one shared default is safe
    *,
    noise: Tensor | None = None,
    vae: StreamingVAE | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Generator[Tensor, None, None]:
    """Upscales a clip frame by frame.

    N frames in give N frames out, of `output_size(width, height, options.scale)`.

    Args:
        model: networks and prompt.
        frames: HWC float tensors in 0..1, three channels, one size; pulled lazily: 25 before the first output, then 8
            for each 8 frames of output.
        options: see `StreamOptions`.
        noise: NCTHW fp32 latent noise for latent frames 0 … T-1 at the padded output size / 8. Latent frames that it
            lacks are drawn from `options.seed`; those beyond the clip are ignored.
        vae: a streaming Wan 2.1 decoder for the "full" result; None decodes with the TC decoder.
        device: where to compute; default: the model's. Weights may lie elsewhere if its layers cast on use.
        dtype: what to compute in; default: fp32 on the CPU, else the model's.
        on_step: called as on_step(phase, done, total) before every LQ clip ("project"), transformer tile ("transform")
            and decoded latent ("decode"); done and total count output frames, total is None while unknown. What it
            raises leaves through this generator, with all state released.

    Yields:
        HWC fp32 frames in 0..1 on the CPU.

    Raises:
        ValueError: an empty clip; a frame of another size, layout or type, or with values that are not finite; noise of
            another size.
    """
    where = model.prompt.device if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.float32 if where.type == "cpu" else model.prompt.dtype
    return _stream(model, frames, options, noise, vae, where, dtype, on_step or (lambda phase, done, total: None))


def _stream(
    model: FlashVSR,
    frames: Iterable[Tensor],
    options: StreamOptions,
    noise: Tensor | None,
    vae: StreamingVAE | None,
    device: torch.device,
    dtype: torch.dtype,
    on_step: OnStep,
) -> Generator[Tensor, None, None]:
    # The caller's mode at the first frame holds for the whole run: a cache made in inference mode cannot be changed
    # outside it, and the caller may resume this generator in another mode.
    inference = torch.is_inference_mode_enabled()
    state = StreamState(torch.Generator().manual_seed(options.seed))
    source = iter(frames)
    total = len(frames) if isinstance(frames, Sized) else None
    done = step = 0
    try:
        _pull(state, source, step_inputs(step)[1])
        if not state.frames:
            raise ValueError("upscale_frames: expected at least one frame; got an empty clip.")
        with _computing(inference):
            run = _Run(model, options, noise, vae, device, dtype, state)
        while not state.ended or done < state.frames:
            if state.ended:
                total = state.frames
            for clip in _clips(step):
                on_step("project", done, total)
                with _computing(inference):
                    run.project(*clip)
            with _computing(inference):
                run.begin(step)
            for tile in range(len(run.tiles)):
                on_step("transform", done, total)
                with _computing(inference):
                    run.transform(step, tile)
            for first, last in _decoded(step):
                if state.ended and first >= state.frames:
                    break
                on_step("decode", done, total)
                with _computing(inference):
                    decoded = run.decode(first, last)
                if state.ended:
                    del decoded[state.frames - first :]
                while decoded:
                    done += 1
                    yield decoded.pop(0)
            step += 1
            _forget(state, step_outputs(step)[0])
            if not state.ended:
                _pull(state, source, step_inputs(step)[1])
    finally:
        state.release()


class _Run:
    """One run's constants, and the three kinds of work that its steps consist of."""

    def __init__(
        self,
        model: FlashVSR,
        options: StreamOptions,
        noise: Tensor | None,
        vae: StreamingVAE | None,
        device: torch.device,
        dtype: torch.dtype,
        state: StreamState,
    ) -> None:
        height, width, _ = state.window[0].shape
        self.model, self.options, self.vae, self.state = model, options, vae, state
        self.device, self.dtype = device, dtype
        self.size = output_size(width, height, options.scale)
        self.padded = padded_size(*self.size)
        columns, rows = (side // LATENT_STRIDE for side in self.padded)
        channels = model.transformer.config.in_dim
        if noise is not None and (
            noise.ndim != 5 or (noise.shape[:2] != (1, channels) or noise.shape[3:] != (rows, columns))
        ):
            raise ValueError(
                f"upscale_frames: expected noise of shape (1, {channels}, T, {rows}, {columns}) for frames of "
                f"{self.size[0]} × {self.size[1]}; got {tuple(noise.shape)}."
            )
        self.noise = noise
        self.latent_shape = (1, channels, LATENT_PAIR, rows, columns)
        self.constants = model.transformer.prepare(model.prompt.to(device, dtype))
        self.tiles = [Tile(Span(0, rows, 0, 0), Span(0, columns, 0, 0))]
        if options.tile is not None:
            self.tiles = grid_tiles(rows, columns, options.tile // LATENT_STRIDE, TILE_OVERLAP_PIXELS // LATENT_STRIDE)
        self.weights = [weight.to(device) for weight in blend_weights(self.tiles, rows, columns)]
        # The caches of tiles that rest lie in RAM; with one tile there is nothing to make room for.
        rest = torch.device("cpu") if len(self.tiles) > 1 else None
        state.tiles = [TileState(transformer=TransformerState(device=rest)) for _ in self.tiles]

    def project(self, first: int, last: int) -> None:
        """Projects input frames first … last-1, a whole number of clips, for every tile."""
        clip = self._lq(first, last).to(self.dtype)
        for tile, state in zip(self.tiles, self.state.tiles, strict=True):
            rows, columns = (slice(span.start * LATENT_STRIDE, span.stop * LATENT_STRIDE) for span in tile)
            tokens, state.lq_cache = self.model.lq_projection(clip[..., rows, columns], state.lq_cache)
            if tokens is not None:
                state.tokens.append(tokens)

    def begin(self, step: int) -> None:
        """Draws the noise of a process step and clears its latents."""
        self.state.noise = self._draw_noise(step)
        self.state.latents = torch.zeros_like(self.state.noise)

    def transform(self, step: int, index: int) -> None:
        """Runs the transformer on one tile and adds its clean latents to the step's."""
        state, tile, tile_state = self.state, self.tiles[index], self.state.tiles[index]
        assert state.noise is not None and state.latents is not None
        rows, columns = (slice(span.start, span.stop) for span in tile)
        noise = state.noise[..., rows, columns].to(self.dtype).contiguous()
        tokens = [torch.cat(layer, 1) for layer in zip(*tile_state.tokens, strict=True)]
        tile_state.tokens.clear()
        velocity = self.model.transformer(noise, tokens, step, tile_state.transformer, self.options, self.constants)
        state.latents[..., rows, columns] += (noise.float() - velocity.float()) * self.weights[index]

    def decode(self, first: int, last: int) -> list[Tensor]:
        """Decodes the state's oldest latent to the output frames first … last-1: HWC fp32 in 0..1 on the CPU."""
        state = self.state
        assert state.latents is not None
        latent = state.latents[:, :, :1].to(self.dtype)
        state.latents = state.latents[:, :, 1:] if state.latents.shape[2] > 1 else None
        state.noise = None
        lq = self._lq(first, last)
        if self.vae is None:
            decoded, state.decoder = self.model.decoder(
                latent.transpose(1, 2), lq.to(self.dtype).transpose(1, 2), state.decoder
            )
            frames = decoded.transpose(1, 2).float().mul_(2).sub_(1)
            del decoded
        else:
            frames, state.decoder = self.vae.decode_stream(latent, state.decoder)
            # The released pipeline takes colours from the VAE's clamped frames, from the TC decoder's as they are.
            frames = frames.clamp(-1, 1)
        width, height = self.size
        frames = METHODS[self.options.colour](frames[..., :height, :width], lq[..., :height, :width])
        frames = frames.add_(1).div_(2).clamp_(0, 1)[0].permute(1, 2, 3, 0)
        return [frame.to("cpu", copy=True, memory_format=torch.contiguous_format) for frame in frames]

    def _lq(self, first: int, last: int) -> Tensor:
        """Input frames first … last-1 at the padded output size: NCTHW fp32 in -1..1 on the device.

        The window holds frames as they came: making them large twice costs little, holding 25 large ones would not.
        """
        window, start = self.state.window, self.state.window_start
        frames = torch.stack(
            [window[min(i - start, len(window) - 1)].to(self.device).float() for i in range(first, last)]
        )
        frames = frames.permute(0, 3, 1, 2)
        width, height = self.size
        if frames.shape[2:] != (height, width):
            # Antialiasing matters only where a side shrinks by rounding; PIL's bicubic, which the weights saw, has it.
            frames = F.interpolate(frames, (height, width), mode="bicubic", align_corners=False, antialias=True)
        frames = frames.clamp_(0, 1).mul_(2).sub_(1)
        if self.padded != self.size:
            frames = F.pad(frames, (0, self.padded[0] - width, 0, self.padded[1] - height), mode="replicate")
        return frames.transpose(0, 1)[None]

    def _draw_noise(self, step: int) -> Tensor:
        """Noise of one step's latent frames, NCTHW fp32 on the device.

        The generator advances by pairs, always in order, so a longer clip has the shorter one's noise as its beginning.
        """
        first, last = step_latents(step)
        pairs = range(first, last, LATENT_PAIR)
        drawn = torch.cat([torch.randn(self.latent_shape, generator=self.state.generator) for _ in pairs], 2)
        if self.noise is not None:
            given = self.noise[:, :, first:last].to("cpu", torch.float32)
            drawn[:, :, : given.shape[2]] = given
        return drawn.to(self.device)


@contextmanager
def _computing(inference: bool) -> Iterator[None]:
    """Without gradients; never held over a `yield` to the caller, whose own modes must stay as they are."""
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


def _pull(state: StreamState, source: Iterator[Tensor], needed: int) -> None:
    """Takes frames from the source until `needed` have come, or it ends."""
    while state.frames < needed:
        frame = next(source, None)
        if frame is None:
            state.ended = True
            return
        _check(frame, state.frames, state.window[0] if state.window else None)
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
