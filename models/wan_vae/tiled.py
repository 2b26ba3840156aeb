"""A clip through the Wan 2.1 VAE in tiles, with the result of the whole frame.

Only the attention needs a whole frame, and it works at an eighth of the resolution. So the stages at latent resolution
see whole frames, one latent at a time. The others see one tile at a time, with as many pixels around it as their
convolutions reach, and carry the past of that tile from chunk to chunk. What passes between the stages waits on the
CPU. Nothing is blended: each pixel is computed once, as in the whole frame.

Between two units a job holds nothing on the device, and a unit that raised can be tried again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ..tiling.areas import Area
from ..tiling.job import NotFinite, OnStep
from .layers import CausalCache
from .model import FRAMES_PER_LATENT, PIXELS_PER_LATENT, WanVAE, frame_chunks

Elementwise = Callable[[Tensor], Tensor]
"""NCTHW to NCTHW, element by element: between a caller's range of values and the network's."""

RAM = torch.device("cpu")
FRAME_CACHE_TILES = 16
"""Frames larger than this many tiles keep their past in RAM: 33 kB per 64 pixels that would otherwise stay on the
device for as long as the clip lasts."""


def is_large(size: tuple[int, int], tile: int) -> bool:
    """Whether a job with tiles of this side keeps the past of frames of this height and width in RAM."""
    return size[0] * size[1] > FRAME_CACHE_TILES * tile**2


def encode_tiled(vae: WanVAE, frames: Tensor, tile: int = 256) -> Tensor:
    """Encodes a clip in tiles: what `WanVAE.encode` returns, up to rounding, in the memory of one tile.

        latents = encode_tiled(vae, frames, tile=256)

    Args:
        vae: the weights, on the device of the frames or in layers that cast on use.
        frames: NCTHW in -1..1, T = 4k+1, height and width multiples of 8; computed on their device, in their dtype.
        tile: largest side of a tile in pixels; what the network reads around it is not counted.

    Returns:
        Latents NCTHW on the CPU, normalised, in fp32 at least.

    Raises:
        ValueError: wrong shape, or the weights have no encoder.
        NotFinite: NaN or infinity came out. It names the tile.
    """
    vae.check_frames(frames)
    return _result(TiledEncode(vae, frames, tile, device=frames.device, dtype=frames.dtype))


def decode_tiled(vae: WanVAE, latents: Tensor, tile: int = 256) -> Tensor:
    """Decodes latents in tiles: what `WanVAE.decode` returns, up to rounding, in the memory of one tile.

    The reverse of `encode_tiled`: `latents` are NCTHW and normalised, `tile` counts pixels of the frames; the 4T - 3
    frames NCTHW that come out are clamped to -1..1.
    """
    vae.check_latents(latents)
    return _result(TiledDecode(vae, latents, tile, device=latents.device, dtype=latents.dtype))


def _result(job: TiledJob) -> Tensor:
    while job.done < job.total:
        job.advance(lambda: None)
    return job.result


class TiledJob(ABC):
    """What encoding and decoding have in common: a `models.tiling.TileJob` whose units are tiles and whole frames.

    Args:
        vae: the weights, on `device`.
        tile: largest side of a tile in pixels of the frames; what the network reads around it is not counted.
        device, dtype: of the computation.

    Attributes:
        result: NCTHW on the CPU, in fp32 at least.
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
        self._clip = self.done = 0
        self._tiles = self._cut(self._plane)
        self._features: list[Tensor] = []
        self._whole_frames_done = False

    @property
    def total(self) -> int:
        left = len(self._clips) - self._clip
        if not left:
            return self.done
        others = (left - 1) * (len(self._cut(self._plane)) + 1)
        return self.done + len(self._tiles) + (not self._whole_frames_done) + others

    def cut(self, tile: int) -> None:
        """Goes on in tiles of at most this side; finished ones are kept."""
        self.tile = tile
        self._tiles = [part for area in self._tiles for part in self._cut(area)]

    @torch.no_grad()
    def advance(self, on_step: OnStep) -> None:
        """Computes one tile, or the stages that see the whole frame.

        Raises:
            NotFinite: NaN or infinity came out.
            RuntimeError: the job is done.
        """
        if self._clip == len(self._clips):
            raise RuntimeError("Tiled VAE: expected units left to compute; got a job that is done.")
        if self._tiles and self._whole_frames_done == self.whole_frames_first:
            self._local(self._tiles[0], on_step)
            self._tiles.pop(0)
        else:
            self._global(on_step)
            self._whole_frames_done = True
        self.done += 1
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
            dtype = str(x.dtype).removeprefix("torch.")
            raise NotFinite(f"Tiled VAE: expected finite numbers; got NaN or infinity in {where}, computed in {dtype}.")
        return x

    def _frame_cache(self) -> CausalCache:
        """The past of whole frames at latent resolution; that of large ones would outweigh everything else."""
        return CausalCache(RAM if is_large(self._plane.shape, self.tile) else None)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=torch.contiguous_format)


class TiledDecode(TiledJob):
    """Decodes latents to frames. In memory the result is NTHWC, as it is mostly wanted.

    Args (the others as of `TiledJob`):
        latents: NCTHW, normalised as `vae` expects.
        finish: applied to each piece of the result in fp32, on the device; None clamps to -1..1.
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
        finish: Elementwise | None = None,
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
                features.append(self._finite(x, f"the stage of the whole frame, latent {i}").cpu())
            on_step()
        self._features = features

    def _local(self, area: Area, on_step: OnStep) -> None:
        decoder, cache = self.vae.decoder, CausalCache()
        read = decoder.local_areas(area)[0]
        result = area.of(self.result[self._clip : self._clip + 1])
        for (start, stop), features in zip(frame_chunks(len(self._features)), self._features, strict=True):
            with cache.chunk(last=stop == result.shape[2]):
                frames = decoder.local_stage(self._to_device(read.of(features)), cache, area)
            frames = self._finish(self._finite(frames, f"{area}, frames {start}–{stop}").to(self._wide))
            result[:, :, start:stop] = frames.cpu()
            del frames
            on_step()


class TiledEncode(TiledJob):
    """Encodes frames to latents: the mean of the distribution, normalised as `vae` expects.

    Args (the others as of `TiledJob`):
        frames: NCTHW on the CPU, T = 4k+1, height and width multiples of 8.
        prepare: brings a piece of `frames` to -1..1, on the device; None takes them as they are.
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
        prepare: Elementwise | None = None,
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
            x = self._finite(x, f"{area}, frames {start}–{stop}")
            if len(self._features) <= i:
                whole = self.result.shape[-2:]
                self._features.append(torch.empty(*x.shape[:3], *whole, dtype=x.dtype))
            if self._features[i].dtype.itemsize < x.dtype.itemsize:
                # A tile that overflowed in half precision was computed again in fp32.
                self._features[i] = self._features[i].to(x.dtype)
            at_latents.of(self._features[i])[:] = x.cpu()
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
            self.result[self._clip : self._clip + 1, :, i : i + 1] = mean.cpu()
            on_step()
