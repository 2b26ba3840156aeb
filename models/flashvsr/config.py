"""The shapes of a FlashVSR model and the choices of a run, as frozen values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .attention import check_backend
from .colour import METHODS

HEAD_DIM = 128
PATCH = 2
LATENT_STRIDE = 8
"""Pixels per latent cell, each way."""
BLOCK_PIXELS = 128
"""One attention block covers 8 × 8 tokens of 16 × 16 pixels: frames are padded to multiples of this."""
COLOURS = tuple(METHODS)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Number formats a user can choose; which of them "auto" means depends on the host and the device."""
LQ_CACHE_ORDERS = ("fixed", "as_trained")
LAYER_LIMIT, SIZE_LIMIT = 128, 1 << 20
"""Far beyond any released model; what claims more is damaged, and building it would take long."""
TRAINED_AREA = 768 * 1280
"""Pixels at which `sparse_ratio` is stated: top-k ratio = sparse_ratio · 768 · 1280 / (H · W) (official scripts)."""


def check_tile(tile: int | None, field: str) -> None:
    """Raises a ValueError unless the transformer can work in tiles of this side, or None."""
    if tile is not None and (not isinstance(tile, int) or tile < 2 * BLOCK_PIXELS or tile % BLOCK_PIXELS):
        raise ValueError(
            f"{field}: expected None or a multiple of {BLOCK_PIXELS} of at least {2 * BLOCK_PIXELS}; got {tile!r}."
        )


@dataclass(frozen=True)
class FlashVSRConfig:
    """Sizes of the three networks. The defaults are those of the released 1.3 B model."""

    dim: int = 1536
    num_heads: int = 12
    ffn_dim: int = 8960
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    in_dim: int = 16
    out_dim: int = 16
    lq_hidden: tuple[int, int] = (2048, 3072)
    lq_layers: int = 1
    decoder_channels: tuple[int, int, int, int] = (512, 256, 128, 128)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            most = LAYER_LIMIT if field.name in ("num_layers", "lq_layers") else SIZE_LIMIT
            if not all(1 <= size <= most for size in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"FlashVSRConfig.{field.name}: expected 1 to {most:,}; got {value}.")
        if self.dim % self.num_heads:
            raise ValueError(
                f"FlashVSRConfig: expected dim divisible by num_heads; got {self.dim} and {self.num_heads}."
            )
        third = self.head_dim // 3
        if self.head_dim % 2 or third % 2:
            raise ValueError(
                f"FlashVSRConfig: expected a head dim whose rotary axes are even (hd even, hd // 3 even); "
                f"got {self.head_dim}. Pass num_heads."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_tensors(
        cls,
        transformer: Mapping[str, Tensor],
        lq_projection: Mapping[str, Tensor],
        decoder: Mapping[str, Tensor],
        num_heads: int | None = None,
    ) -> FlashVSRConfig:
        """Reads every size from state dicts with official, un-prefixed keys; the tensors may be on the meta device.

        Args:
            num_heads: needed only where the head dim is not 128; no tensor shows it.

        Raises:
            KeyError: a key that fixes a size is missing, or a layer among the others.
            ValueError: the sizes do not fit a FlashVSR model.
        """
        patch = transformer["patch_embedding.weight"]
        dim = patch.shape[0]
        if num_heads is None:
            if dim % HEAD_DIM:
                raise ValueError(
                    f"FlashVSRConfig: expected a width divisible by {HEAD_DIM}; got {dim}. Pass num_heads."
                )
            num_heads = int(dim // HEAD_DIM)
        c0, c1, c2, c3 = (decoder[f"decoder.{i}.weight"].shape[0] for i in (1, 10, 16, 22))
        return cls(
            dim=dim,
            num_heads=num_heads,
            ffn_dim=transformer["blocks.0.ffn.0.weight"].shape[0],
            num_layers=_layers(transformer, "blocks"),
            freq_dim=transformer["time_embedding.0.weight"].shape[1],
            text_dim=transformer["text_embedding.0.weight"].shape[1],
            in_dim=patch.shape[1],
            out_dim=transformer["head.head.weight"].shape[0] // PATCH**2,
            lq_hidden=(lq_projection["conv1.weight"].shape[0], lq_projection["conv2.weight"].shape[0]),
            lq_layers=_layers(lq_projection, "linear_layers"),
            decoder_channels=(c0, c1, c2, c3),
        )


def _layers(entries: Mapping[str, Tensor], name: str) -> int:
    """How many layers there are. Their largest number is not believed: each one before it must be there too."""
    numbers = {key.split(".")[1] for key in entries if key.startswith(f"{name}.")}
    absent = {str(number) for number in range(len(numbers))} - numbers
    if absent:
        raise KeyError(f"{name}.{min(absent)}")
    return len(numbers)


@dataclass(frozen=True)
class StreamOptions:
    """The choices of one run.

        StreamOptions(scale=2, colour="wavelet")

    Attributes:
        scale: output size over input size, 1.0 to 8.0.
        seed: of the latent noise, 0 … 2**63 - 1.
        sparse_ratio: selected key blocks per query block, in units of 60; see `TRAINED_AREA`.
        topk_ratio: selected block pairs over all pairs of one time group; when given, replaces sparse_ratio.
        kv_ratio: latent-frame pairs kept in the key/value cache, at least 2; fractions are dropped.
        local_range: side of the local attention window, in blocks of 128 pixels.
        colour: adain | wavelet | none.
        attention: "auto", or the name of a backend in `attention.BACKENDS`.
        tile: side of spatial transformer tiles in output pixels (a multiple of 128), or None for whole frames. Tiling
            costs quality: it is the last thing to try when memory is short.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    scale: float = 4.0
    seed: int = 0
    sparse_ratio: float = 2.0
    topk_ratio: float | None = None
    kv_ratio: float = 3.0
    local_range: int = 11
    colour: str = "adain"
    attention: str = "auto"
    tile: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("colour", "attention") or (value is None and field.name in ("topk_ratio", "tile")):
                continue
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"StreamOptions.{field.name}: expected a finite number; got {value!r}.")
        seed_fits = isinstance(self.seed, int) and 0 <= self.seed < 2**63
        for name, fits, expected in (
            ("scale", 1.0 <= self.scale <= 8.0, "1.0 to 8.0"),
            ("seed", seed_fits, "an integer from 0 to 2**63 - 1"),
            ("sparse_ratio", self.sparse_ratio > 0, "a positive number"),
            ("topk_ratio", self.topk_ratio is None or self.topk_ratio > 0, "a positive number or None"),
            ("kv_ratio", self.kv_ratio >= 2, "at least 2"),
            ("local_range", isinstance(self.local_range, int) and self.local_range >= 1, "an integer of at least 1"),
            ("colour", self.colour in COLOURS, f"one of {', '.join(COLOURS)}"),
        ):
            if not fits:
                raise ValueError(f"StreamOptions.{name}: expected {expected}; got {getattr(self, name)!r}.")
        check_backend(self.attention, "StreamOptions.attention")
        check_tile(self.tile, "StreamOptions.tile")

    @property
    def cached_pairs(self) -> int:
        """Latent-frame pairs whose keys and values are kept between process steps."""
        return int(self.kv_ratio)

    def block_pair_ratio(self, height: int, width: int) -> float:
        """The top-k ratio for a frame of height × width pixels (official: sparse_ratio · 768 · 1280 / (H · W))."""
        if self.topk_ratio is not None:
            return self.topk_ratio
        return self.sparse_ratio * TRAINED_AREA / (height * width)
