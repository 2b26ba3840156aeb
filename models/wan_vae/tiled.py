"""A clip through the Wan 2.1 VAE in tiles, with the result of the whole frame.

Only the attention needs a whole frame, and it works at an eighth of the resolution. The stages at latent resolution
therefore see whole frames, one latent at a time; the others see one tile at a time, with as many pixels around it as
their convolutions reach, and carry the past of that tile from chunk to chunk. What lies between the stages waits on
the CPU. Nothing is blended: each pixel is computed once, as in the whole frame.

Between two units nothing of a job lies on the device, and a unit that raised can be tried again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor

from ..tiling.job import NotFinite, OnStep
from .areas import Area
from .layers import ATTENTION_SCORES, CausalCache
from .model import FRAMES_PER_LATENT, PIXELS_PER_LATENT, WanVAE

PerChunk = Callable[[Tensor], Tensor]
"""NCTHW to NCTHW, element by element; for what lies between a caller's numbers and the network's."""

RAM = torch.device("cpu")
RELEASED_DIM = 96
FRAME_CACHE_TILES = 16
"""Frames of more pixels than so many tiles have keep their past in RAM: 33 kB for 64 pixels, which they would otherwise
need on the device for as long as the clip lasts."""

# Numbers alive at once at the released size (dim 96), counted on the meta device: `benchmarks.wan_tiles`.
DECODE_TILE = ((0, 455), (73_800, 2525), (81_100, 3141))
"""Of tiles of a clip of 1, 2, more latents: per pixel of the side, and of the area, of what is read."""
ENCODE_TILE = ((0, 292), (0, 2060), (0, 2060))
DECODE_FRAME, ENCODE_FRAME = (2720, 9632, 10432), (2688, 8896, 9664)
"""Of the stages that see whole frames, per latent pixel; the first also where their past lies in RAM."""


def peak_bytes(vae: WanVAE, *, encodes: bool, latents: int, size: tuple[int, int], tile: int, itemsize: int) -> int:
    """Bytes that a job will need on its device at most, beside the weights.

    Args:
        latents: of the clip, in time.
        size: height and width of the frames in pixels.
        itemsize: bytes of one number.
    """
    length = min(latents, 3) - 1
    at_side, at_area = (ENCODE_TILE if encodes else DECODE_TILE)[length]
    around = 65 if encodes else 14
    height, width = (min(tile, side) + around for side in size)
    of_tile = at_area * height * width + at_side * (height + width) // 2
    in_ram = _is_large(size, tile)
    per_latent = (ENCODE_FRAME if encodes else DECODE_FRAME)[0 if in_ram else length]
    tokens = (size[0] // PIXELS_PER_LATENT) * (size[1] // PIXELS_PER_LATENT)
    unfused = 3 * min(ATTENTION_SCORES, tokens**2)  # of attention by a kernel that writes its scores down
    return (max(of_tile, per_latent * tokens) * vae.dim // RELEASED_DIM + unfused) * itemsize


def _is_large(size: tuple[int, int], tile: int) -> bool:
    return size[0] * size[1] > FRAME_CACHE_TILES * tile**2


def frame_chunks(latents: int) -> Iterator[tuple[int, int]]:
    """First and last frame (exclusive) of each latent: one frame, then four by four."""
    yield 0, 1
    for i in range(1, latents):
        yield FRAMES_PER_LATENT * i - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT * i + 1


class TiledJob(ABC):
    """What encode and decode have in common; see `models.tiling.job.TileJob`.

    Attributes:
        device, dtype: of the next unit.
        tile: largest side of a tile in pixels; what the network reads around it is not counted.
        result: NCTHW on the CPU.
    """

    result: Tensor
    whole_frames_first: bool

    def __init__(
        self,
        vae: WanVAE,
        clips: Tensor,
        size: tuple[int, int],
        tile: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.vae, self.tile = vae, tile
        self.device, self.dtype = torch.device(device), dtype
        self._clips, self._plane = clips, Area.whole(*size)
        self._wide = torch.promote_types(dtype, torch.float32)
        self._clip = self._units_done = 0
        self._tiles = self._cut(self._plane)
        self._features: list[Tensor] = []
        self._whole_frames_done = False

    @property
    def done(self) -> int:
        return self._units_done

    @property
    def total(self) -> int:
        left = len(self._clips) - self._clip
        if not left:
            return self._units_done
        others = (left - 1) * (len(self._cut(self._plane)) + 1)
        return self._units_done + len(self._tiles) + (not self._whole_frames_done) + others

    def cut(self, tile: int) -> None:
        """Goes on in tiles of at most this side; those that are done stay done."""
        self.tile = tile
        self._tiles = [part for area in self._tiles for part in self._cut(area)]

    @torch.no_grad()
    def advance(self, on_step: OnStep) -> None:
        """One tile, or the stages that see the whole frame.

        Raises:
            NotFinite: the unit gave NaN or infinity.
            RuntimeError: everything is done.
        """
        if self._clip == len(self._clips):
            raise RuntimeError("Tiled VAE: expected units left to compute; got a job that is done.")
        if self._tiles and self._whole_frames_done == self.whole_frames_first:
            self._local(self._tiles[0], on_step)
            self._tiles.pop(0)
        else:
            self._global(on_step)
            self._whole_frames_done = True
        self._units_done += 1
        if self._whole_frames_done and not self._tiles:
            self._clip, self._whole_frames_done = self._clip + 1, False
            self._features, self._tiles = [], self._cut(self._plane)

    @abstractmethod
    def _local(self, area: Area, on_step: OnStep) -> None:
        """The stages that see one tile."""

    @abstractmethod
    def _global(self, on_step: OnStep) -> None:
        """The stages that see the whole frame."""

    def _cut(self, area: Area) -> list[Area]:
        return area.parts(self.tile, PIXELS_PER_LATENT)

    def _finite(self, x: Tensor, where: str) -> Tensor:
        if not torch.isfinite(x).all():
            raise NotFinite(
                f"Tiled VAE: expected finite numbers; got NaN or infinity in {where}, computed in {x.dtype}."
            )
        return x

    def _frame_cache(self) -> CausalCache:
        """The past of whole frames, at latent resolution; of large ones it would outweigh everything else."""
        return CausalCache(RAM if _is_large(self._plane.shape, self.tile) else None)

    def _to_ram(self, x: Tensor) -> Tensor:
        return x.cpu()

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=torch.contiguous_format)


class TiledDecode(TiledJob):
    """Latents to frames.

    Args:
        vae: the weights, on `device`.
        latents: NCTHW, normalised as `vae` has it.
        tile: side of the tiles in pixels of the frames.
        device, dtype: of the computation.
        finish: applied to each piece of the result in fp32, on the device; None clamps to -1..1.

    The result is NCTHW fp32, in memory NTHWC.
    """

    whole_frames_first = True

    def __init__(
        self,
        vae: WanVAE,
        latents: Tensor,
        tile: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        finish: PerChunk | None = None,
    ) -> None:
        n, _, t, h, w = latents.shape
        height, width = h * PIXELS_PER_LATENT, w * PIXELS_PER_LATENT
        super().__init__(vae, latents, (height, width), tile, device, dtype)
        self._finish = finish or (lambda frames: frames.clamp_(-1, 1))
        frames = FRAMES_PER_LATENT * (t - 1) + 1
        result = torch.empty(n, frames, height, width, 3, dtype=self._wide)
        self.result = rearrange(result, "n t h w c -> n c t h w")

    def _global(self, on_step: OnStep) -> None:
        cache, features = self._frame_cache(), []
        latents = self._clips[self._clip : self._clip + 1]
        for i in range(latents.shape[2]):
            with cache.chunk(last=i == latents.shape[2] - 1):
                x = self.vae.denormalise(latents[:, :, i : i + 1].to(self.device, self._wide))
                x = self.vae.decoder.global_stage(self.vae.conv2(self._to_device(x)), cache)
                features.append(self._to_ram(self._finite(x, f"the stage of the whole frame, latent {i}")))
            on_step()
        self._features = features

    def _local(self, area: Area, on_step: OnStep) -> None:
        decoder, cache = self.vae.decoder, CausalCache()
        read = decoder.local_areas(area)[0]
        result = area.of(self.result[self._clip : self._clip + 1])
        for (start, stop), features in zip(frame_chunks(len(self._features)), self._features, strict=True):
            with cache.chunk(last=stop == result.shape[2]):
                frames = decoder.local_stage(self._to_device(read.of(features)), cache, area)
            frames = self._finish(self._finite(frames, f"{area}, frames {start}…{stop}").to(self._wide))
            result[:, :, start:stop] = self._to_ram(frames)
            del frames
            on_step()


class TiledEncode(TiledJob):
    """Frames to latents, the mean of the distribution.

    Args:
        vae: the weights, on `device`.
        frames: NCTHW on the CPU, T = 4k+1, height and width multiples of 8.
        tile: side of the tiles in pixels of the frames.
        device, dtype: of the computation.
        prepare: brings a piece of `frames` to -1..1, on the device; None takes them as they are.

    The result is NCTHW fp32, normalised as `vae` has it.
    """

    whole_frames_first = False

    def __init__(
        self,
        vae: WanVAE,
        frames: Tensor,
        tile: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        prepare: PerChunk | None = None,
    ) -> None:
        n, _, t, height, width = frames.shape
        super().__init__(vae, frames, (height, width), tile, device, dtype)
        self._prepare = prepare or (lambda x: x)
        self._latents = 1 + (t - 1) // FRAMES_PER_LATENT
        size = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
        self.result = torch.empty(n, vae.z_dim, self._latents, *size, dtype=self._wide)

    def _local(self, area: Area, on_step: OnStep) -> None:
        encoder, cache = self.vae.encoder, CausalCache()
        assert encoder is not None
        at_latents = area.halved().halved().halved()
        read = encoder.local_areas(at_latents)[0]
        frames = self._clips[self._clip : self._clip + 1]
        for i, (start, stop) in enumerate(frame_chunks(self._latents)):
            x = self._prepare(read.of(frames[:, :, start:stop]).to(self.device, copy=True))
            with cache.chunk(last=stop == frames.shape[2]):
                x = encoder.local_stage(self._to_device(x), cache, at_latents)
            x = self._finite(x, f"{area}, frames {start}…{stop}")
            if len(self._features) <= i:
                whole = self.result.shape[-2:]
                self._features.append(torch.empty(*x.shape[:3], *whole, dtype=x.dtype))
            if self._features[i].dtype.itemsize < x.dtype.itemsize:
                # A tile that fits no smaller number format was computed again in fp32.
                self._features[i] = self._features[i].to(x.dtype)
            at_latents.of(self._features[i])[:] = self._to_ram(x)
            del x
            on_step()

    def _global(self, on_step: OnStep) -> None:
        encoder, cache = self.vae.encoder, self._frame_cache()
        assert encoder is not None and self.vae.conv1 is not None
        for i, features in enumerate(self._features):
            with cache.chunk(last=i == self._latents - 1):
                moments = self.vae.conv1(encoder.global_stage(self._to_device(features), cache))
            moments = self._finite(moments, f"the stage of the whole frame, latent {i}")
            mean = self.vae.normalise(moments[:, : self.vae.z_dim].to(self._wide))
            self.result[self._clip : self._clip + 1, :, i : i + 1] = self._to_ram(mean)
            on_step()
