"""The Wan 2.1 video VAE: eight pixels and four frames to one latent, causal in time.

The modules hold weights and nothing else, under the official state-dict keys. A clip may come whole or in chunks: both
ways run the same passes, one latent frame at a time, so they agree bit for bit and memory does not grow with the clip.
Everything is computed on the device and in the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operations import cast_on_use
from ..tiling.areas import Area
from .layers import AttentionBlock, CausalCache, Downsample, ResidualBlock, RMSNorm, Upsample, causal, with_past
from .state_dict import check_keys, read_sizes, strip_prefix

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4
CHANNEL_MULTIPLES = (1, 2, 4, 4)
LOCAL_DOWNSAMPLES, GLOBAL_UPSAMPLES = 9, 3
"""Blocks of the encoder before its features reach latent resolution, and of the decoder before they leave it."""
PIXEL_DOWNSAMPLES, PIXEL_UPSAMPLES = 3, 11
"""Blocks of the encoder that read full resolution, and of the decoder before it is reached."""

# Mean and standard deviation of each latent channel over the training data (Wan 2.1, wan/modules/vae.py).
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


def frame_chunks(latents: int, started: bool = False) -> Iterator[tuple[int, int]]:
    """Frames [first, last) of each latent: four, or a single one at the start of a clip."""
    last = 0
    for i in range(latents):
        first, last = last, last + (FRAMES_PER_LATENT if started or i else 1)
        yield first, last


def middle_blocks(channels: int, operations) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels, operations),
            AttentionBlock(channels, operations),
            ResidualBlock(channels, channels, operations),
        ]
    )


def read_through(blocks: Any, area: Area) -> list[Area]:
    """What each block (of a slice of a ModuleList) must read for the last one to give `area`; then `area` itself."""
    areas = [area]
    for block in reversed(blocks):
        areas.insert(0, block.reads(areas[0]))
    return areas


def output_head(channels_in: int, channels_out: int, operations) -> nn.ModuleDict:
    conv = operations.Conv3d(channels_in, channels_out, 3, padding=(0, 1, 1))
    return nn.ModuleDict({"0": RMSNorm(channels_in, 3), "2": conv})


class Encoder(nn.Module):
    """Frames to the moments of the latent distribution, in two stages: only the second sees the whole frame."""

    def __init__(self, dim: int, moments: int, operations) -> None:
        super().__init__()
        widths = [dim * m for m in CHANNEL_MULTIPLES]
        self.conv1 = operations.Conv3d(3, dim, 3, padding=(0, 1, 1))
        blocks: list[nn.Module] = []
        previous = dim
        for level, width in enumerate(widths):
            blocks += [ResidualBlock(previous, width, operations), ResidualBlock(width, width, operations)]
            if level < 3:
                blocks.append(Downsample(width, temporal=level > 0, operations=operations))
            previous = width
        self.downsamples = nn.ModuleList(blocks)
        self.middle = middle_blocks(previous, operations)
        self.head = output_head(previous, moments, operations)

    def local_areas(self, area: Area) -> list[Area]:
        """What each convolution of the local stage reads for one area of its features; first the area of the frames."""
        areas = read_through(self.downsamples[:LOCAL_DOWNSAMPLES], area)
        return [areas[0].grown(1), *areas]

    def local_stage(self, x: Tensor, cache: CausalCache, area: Area) -> Tensor:
        """One chunk of frames to an area of the features at latent resolution, by convolutions of limited reach.

        They reach 29 pixels to the left and top, 36 to the right and bottom: `x` holds `local_areas(area)[0]`.
        """
        areas = self.local_areas(area)
        x = torch.cat([self._pixel_stage(piece, cache.pixels, areas) for piece in cache.pieces(x)], dim=2)
        blocks = self.downsamples[PIXEL_DOWNSAMPLES:LOCAL_DOWNSAMPLES]
        for block, wanted in zip(blocks, areas[PIXEL_DOWNSAMPLES + 2 :], strict=True):
            x = block(x, cache, wanted)
        return x

    def _pixel_stage(self, x: Tensor, cache: CausalCache, areas: list[Area]) -> Tensor:
        """The layers at full resolution, which decide how much memory encoding takes."""
        frames = x.shape[2]
        x = with_past(x, cache)
        x = areas[1].inside(causal(self.conv1, x, frames), areas[0])
        for block, wanted in zip(self.downsamples[:PIXEL_DOWNSAMPLES], areas[2:], strict=False):
            x = block(x, cache, wanted)
        return x

    def global_stage(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Features at latent resolution to moments; includes the attention among all pixels of a frame."""
        frames, whole = x.shape[2], Area.whole(*x.shape[-2:])
        for block in [*self.downsamples[LOCAL_DOWNSAMPLES:], *self.middle]:
            x = block(x, cache, whole)
        x = F.silu(self.head["0"](x), inplace=True)
        x = with_past(x, cache)
        return causal(self.head["2"], x, frames)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        features = Area.whole(x.shape[-2] // PIXELS_PER_LATENT, x.shape[-1] // PIXELS_PER_LATENT)
        return self.global_stage(self.local_stage(x, cache, features), cache)


class Decoder(nn.Module):
    """Latents to frames, in two stages: only the first sees the whole frame."""

    def __init__(self, dim: int, z_dim: int, operations) -> None:
        super().__init__()
        widths = [dim * m for m in reversed(CHANNEL_MULTIPLES)]
        previous = widths[0]
        self.conv1 = operations.Conv3d(z_dim, previous, 3, padding=(0, 1, 1))
        self.middle = middle_blocks(previous, operations)
        blocks: list[nn.Module] = []
        for level, width in enumerate(widths):
            blocks += [ResidualBlock(previous if i == 0 else width, width, operations) for i in range(3)]
            if level < 3:
                blocks.append(Upsample(width, temporal=level < 2, operations=operations))
                previous = width // 2
        self.upsamples = nn.ModuleList(blocks)
        self.head = output_head(dim, 3, operations)

    def global_stage(self, x: Tensor, cache: CausalCache) -> Tensor:
        """One latent frame to features of the same size; includes the attention among all pixels of a frame."""
        frames, whole = x.shape[2], Area.whole(*x.shape[-2:])
        x = causal(self.conv1, with_past(x, cache), frames)
        for block in [*self.middle, *self.upsamples[:GLOBAL_UPSAMPLES]]:
            x = block(x, cache, whole)
        return x

    def local_areas(self, area: Area) -> list[Area]:
        """What each block of the local stage reads for one area of the frames; first the area of the features."""
        return read_through(self.upsamples[GLOBAL_UPSAMPLES:], area.grown(1))

    def local_stage(self, x: Tensor, cache: CausalCache, area: Area) -> Tensor:
        """Features to an area of the frames, by convolutions of limited reach.

        They reach 50 pixels, that is 7 latents, to every side: `x` holds `local_areas(area)[0]`.
        """
        _, *areas = self.local_areas(area)
        inner = PIXEL_UPSAMPLES - GLOBAL_UPSAMPLES
        for block, wanted in zip(self.upsamples[GLOBAL_UPSAMPLES:PIXEL_UPSAMPLES], areas, strict=False):
            x = block(x, cache, wanted)
        pieces = [self._pixel_stage(piece, cache.pixels, areas[inner:], area) for piece in cache.pieces(x)]
        return torch.cat(pieces, dim=2)

    def _pixel_stage(self, x: Tensor, cache: CausalCache, areas: list[Area], area: Area) -> Tensor:
        """The layers at full resolution."""
        for block, wanted in zip(self.upsamples[PIXEL_UPSAMPLES:], areas, strict=True):
            x = block(x, cache, wanted)
        x = F.silu(self.head["0"](x), inplace=True)
        frames = x.shape[2]
        x = with_past(x, cache)
        return area.inside(causal(self.head["2"], x, frames), areas[-1])

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        frames = Area.whole(x.shape[-2] * PIXELS_PER_LATENT, x.shape[-1] * PIXELS_PER_LATENT)
        return self.local_stage(self.global_stage(x, cache), cache, frames)


class WanVAE(nn.Module):
    """Wan 2.1 VAE.

    Args:
        dim: channels at full resolution (96 in the released weights).
        z_dim: latent channels.
        with_encoder: False for weights of the decoder alone; `encode` then raises.
        latents_mean, latents_std: `z_dim` numbers each; normalised latents are (latents - mean) / std.
        operations: namespace with Conv2d and Conv3d, the latter with `autopad` as in `models.operations`.

    Raises:
        ValueError: the statistics do not have `z_dim` numbers.
    """

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        with_encoder: bool = True,
        latents_mean: Sequence[float] = LATENTS_MEAN,
        latents_std: Sequence[float] = LATENTS_STD,
        operations=cast_on_use,
    ) -> None:
        super().__init__()
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(
                f"Wan VAE: expected mean and std for {z_dim} latent channels; got {len(latents_mean)} and "
                f"{len(latents_std)} numbers. Give latents_mean and latents_std of this VAE."
            )
        self.dim = dim
        self.z_dim = z_dim
        self.latents_mean = tuple(latents_mean)
        self.latents_std = tuple(latents_std)
        self.encoder = Encoder(dim, 2 * z_dim, operations) if with_encoder else None
        self.conv1 = operations.Conv3d(2 * z_dim, 2 * z_dim, 1) if with_encoder else None
        self.conv2 = operations.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, operations)
        self.requires_grad_(False)

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor], operations=cast_on_use) -> WanVAE:
        """A VAE whose weights are the tensors of `sd`, not copied; sizes are read from them.

        Raises:
            ValueError: keys are missing, unexpected or misshapen (all are listed), or there are not 16 latent channels.
        """
        sd = strip_prefix(sd)
        dim, z_dim = read_sizes(sd)
        with_encoder = any(key.startswith(("encoder.", "conv1.")) for key in sd)
        with torch.device("meta"):  # no memory and no initialisation for weights that are replaced anyway
            vae = cls(dim, z_dim, with_encoder, operations=operations)
        check_keys(vae, sd)
        vae.load_state_dict(sd, strict=True, assign=True)
        return vae

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encodes a whole clip.

        Args:
            frames: NCTHW, -1..1, T = 4k+1, height and width multiples of 8.

        Returns:
            Latents NCTHW, normalised: the mean of the distribution, (T-1)/4+1 frames at an eighth of the size.

        Raises:
            ValueError: wrong shape, or the weights have no encoder.
        """
        return self._encode(frames, CausalCache(), whole=True)

    @torch.no_grad()
    def encode_with_cache(self, frames: Tensor, cache: CausalCache | None = None) -> tuple[Tensor, CausalCache]:
        """Encodes the next frames of a clip.

        Args:
            frames: NCTHW, -1..1; T = 4k+1 in the first call, 4k in later ones.
            cache: None to start a clip, then the one returned by the last call. Changed in place.

        Returns:
            Latents NCTHW, normalised and bit-equal to those of `encode` for the whole clip; and the cache.
        """
        cache = CausalCache() if cache is None else cache
        return self._encode(frames, cache, whole=False), cache

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes a whole clip.

        Args:
            latents: NCTHW, normalised, T ≥ 1.

        Returns:
            Frames NCTHW, clamped to -1..1, 4T-3 of them.

        Raises:
            ValueError: wrong shape.
        """
        return self._decode(latents, CausalCache(), whole=True).clamp_(-1, 1)

    @torch.no_grad()
    def decode_with_cache(self, latents: Tensor, cache: CausalCache | None = None) -> tuple[Tensor, CausalCache]:
        """Decodes the next latents of a clip.

        Args:
            latents: NCTHW, normalised, T ≥ 1.
            cache: None to start a clip, then the one returned by the last call. Changed in place.

        Returns:
            Frames NCTHW, not clamped, 4T-3 of them in the first call and 4T in later ones; and the cache.
        """
        cache = CausalCache() if cache is None else cache
        return self._decode(latents, cache, whole=False), cache

    def normalise(self, latents: Tensor) -> Tensor:
        """Brings latents NCTHW, as the encoder gives them, to mean 0 and deviation 1 per channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = like.new_tensor(self.latents_mean).view(1, -1, 1, 1, 1)
        return mean, like.new_tensor(self.latents_std).view(1, -1, 1, 1, 1)

    def check_frames(self, frames: Tensor, started: bool = False) -> None:
        """Raises a ValueError unless these frames can be encoded: as a whole clip, or where a stream has `started`."""
        if self.encoder is None:
            raise ValueError(
                "Wan VAE: expected weights with an encoder; got a decoder alone. Load the whole Wan 2.1 VAE."
            )
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise ValueError(f"Wan VAE: expected frames NCTHW with 3 channels; got shape {tuple(frames.shape)}.")
        t, h, w = frames.shape[2:]
        if t < 1 or (t - (not started)) % FRAMES_PER_LATENT or h % PIXELS_PER_LATENT or w % PIXELS_PER_LATENT:
            raise ValueError(
                f"Wan VAE: expected {'4k' if started else '4k+1'} frames of a height and width that 8 divides; "
                f"got {t} frames of {h}x{w}. Pad or crop the clip."
            )

    def check_latents(self, latents: Tensor) -> None:
        """Raises a ValueError unless `decode` can take these latents."""
        if latents.ndim != 5 or latents.shape[1] != self.z_dim or latents.shape[2] < 1:
            raise ValueError(
                f"Wan VAE: expected latents NCTHW with {self.z_dim} channels and at least one frame; "
                f"got shape {tuple(latents.shape)}."
            )

    def _encode(self, frames: Tensor, cache: CausalCache, whole: bool) -> Tensor:
        self.check_frames(frames, cache.started)
        assert self.encoder is not None and self.conv1 is not None
        n, _, t, h, w = frames.shape
        first = 0 if cache.started else 1
        count = first + (t - first) // FRAMES_PER_LATENT
        latents = frames.new_empty(n, self.z_dim, count, h // PIXELS_PER_LATENT, w // PIXELS_PER_LATENT)
        for i, (start, stop) in enumerate(frame_chunks(count, cache.started)):
            with cache.chunk(last=whole and i == count - 1):
                moments = self.conv1(self.encoder(frames[:, :, start:stop], cache))
            latents[:, :, i : i + 1] = self.normalise(moments[:, : self.z_dim])
        return latents

    def _decode(self, latents: Tensor, cache: CausalCache, whole: bool) -> Tensor:
        self.check_latents(latents)
        n, _, t, h, w = latents.shape
        count = FRAMES_PER_LATENT * t - (0 if cache.started else FRAMES_PER_LATENT - 1)
        frames = latents.new_empty(n, 3, count, h * PIXELS_PER_LATENT, w * PIXELS_PER_LATENT)
        for i, (start, stop) in enumerate(frame_chunks(t, cache.started)):
            with cache.chunk(last=whole and i == t - 1):
                frames[:, :, start:stop] = self.decoder(self.conv2(self.denormalise(latents[:, :, i : i + 1])), cache)
        return frames
