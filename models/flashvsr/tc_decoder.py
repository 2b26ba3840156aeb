"""The tiny conditional decoder: latents and low-quality frames in, frames out, one latent at a time.

Layout NTCHW. The module holds weights under the official keys; what a stream remembers between calls is a
`DecoderMemory` owned by the caller. The three transitions "nearest ×2 → 1×1 (time growth) → 3×3" are linear, so they
run as four 2×2 convolutions on the small map, one per output phase: the same result without the large tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..operations import cast_on_use, to_like, weight_and_bias

CONDITION_CELL = (4, 8, 8)
"""Frames, rows and columns of low-quality video behind one latent cell."""
CONDITION_CHANNELS = 3 * math.prod(CONDITION_CELL)
FRAMES_PER_LATENT = 4
STRIP_PIXELS = 1 << 20
"""Full-resolution pixels of a frame whose last-stage activations exist at once: bounds the decoder's peak."""
CPU_STRIP_PIXELS = 1 << 14
"""The same on a CPU, where a strip that fits its caches is no slower than a whole frame."""
LAST_STAGE_HALO = 2
"""Full-resolution rows beyond a strip that the two 3×3 convolutions after the last transition see."""
BLOCK_HALO = 3
"""Rows beyond a strip that the three 3×3 convolutions of a memory block see."""

_WORK_BLOCKS = ((5, 6, 7), (11, 12, 13), (17, 18, 19))
_TRANSITIONS = ((9, 10), (15, 16), (21, 22))
LAST_STAGE = len(_WORK_BLOCKS) - 1


class MemBlock(nn.Module):
    """ReLU(conv(ReLU(conv(ReLU(conv([x_t, x_{t-1}]))))) + x_t), all 3×3 with zero padding."""

    def __init__(self, channels: int, operations) -> None:
        super().__init__()
        conv = operations.Conv2d
        self.conv = nn.Sequential(
            conv(2 * channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu_(self.conv(torch.cat([x, past], 1)).add_(x))


class TimeGrow(nn.Module):
    """Holds the 1×1 kernel that turns one time step into `stride` of them (`TGrow` in the official code)."""

    def __init__(self, channels: int, stride: int, operations) -> None:
        super().__init__()
        self.stride = stride
        self.conv = operations.Conv2d(channels, channels * stride, 1, bias=False)


@dataclass
class DecoderMemory:
    """What one stream's decoder remembers: the inputs of its nine memory blocks at the previous time step.

    It changes only between two layers: after an exception, the next call resumes the latent at the layer that failed.

    Attributes:
        past: block index → NCHW tensor; empty before the first latent.
        kernels: transition index → its phase kernels, derived from the weights once per stream.
        device: where `past` rests; None: where the decoder computes.
        waiting: maps of the current latent still to be processed, the next one last: (stage, layer of the stage, NCHW).
        frames: finished frames of the current latent, N3HW.
        skipped: frames at the start of the stream still to be left out.
    """

    past: dict[int, Tensor] = field(default_factory=dict)
    kernels: dict[int, list[Tensor]] = field(default_factory=dict)
    device: torch.device | None = None
    waiting: list[tuple[int, int, Tensor]] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    skipped: int = 0

    def move(self, device: torch.device | None, computing: torch.device) -> None:
        """Moves `past` to `device` (None: `computing`), map by map, and keeps it there from now on."""
        self.device = device
        for index, past in self.past.items():
            self.past[index] = past.to(device or computing)


def condition_cells(frames: Tensor) -> Tensor:
    """Low-quality frames NTCHW (T a multiple of 4) → cells N,T/4,768,H/8,W/8, channel = ((c·4+t)·8+y)·8+x."""
    time, rows, columns = CONDITION_CELL
    return rearrange(frames, "n (t f) c (h y) (w x) -> n t (c f y x) h w", f=time, y=rows, x=columns)


def phase_kernels(grow: Tensor, conv: Tensor, stride: int) -> list[Tensor]:
    """Folds nearest ×2, a 1×1 convolution `grow` and a 3×3 convolution `conv` into 2×2 kernels.

    Output row 2r reads input rows r-1, r with the taps (k0, k1+k2); output row 2r+1 reads r, r+1 with (k0+k1, k2);
    columns alike. Zero padding of the large map becomes zero padding of the small one.

    Args:
        grow: (stride · C, C, 1, 1).
        conv: (O, C, 3, 3).

    Returns:
        One tensor (4, O, C, 2, 2) per time step, in conv's dtype and folded in fp32; its first axis is (row phase,
        column phase), row-major.
    """
    kernels = []
    for mix in grow[:, :, 0, 0].float().chunk(stride):
        mixed = torch.einsum("omyx,mc->ocyx", conv.float(), mix)
        phases = [phase for rows in _phases(mixed, 2) for phase in _phases(rows, 3)]
        kernels.append(torch.stack(phases).to(conv.dtype))
    return kernels


def _phases(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The two taps of the even and of the odd outputs along one axis of three taps."""
    first, middle, last = kernel.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


def upsample_phases(padded: Tensor, kernel: Tensor) -> Tensor:
    """Runs one folded transition.

    Args:
        padded: N,C,H+2,W+2: the small map with a border of one, zero where the image ends.
        kernel: (4, O, C, 2, 2) of `phase_kernels`.

    Returns:
        N,O,2H,2W.
    """
    batch, _, height, width = padded.shape
    height, width, outputs = height - 2, width - 2, kernel.shape[1]
    # Channels last in memory, where the four interleaved writes are runs of whole pixels.
    out = padded.new_empty(batch, height, 2, width, 2, outputs)
    for row in range(2):
        for column in range(2):
            window = padded[:, :, row : row + height + 1, column : column + width + 1]
            out[:, :, row, :, column] = F.conv2d(window, kernel[2 * row + column]).permute(0, 2, 3, 1)
    # Not `rearrange`: for a batch of one it gives strides that no longer say "channels last" to the convolutions.
    return out.view(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)


class TCDecoder(nn.Module):
    """FlashVSR's tiny decoder. State-dict keys are the official ones (`decoder.N.…`).

    Args:
        channels: widths at 1/8, 1/4, 1/2 and full resolution.
        latent_channels: of the diffusion latent.
        operations: namespace with `Conv2d`; see `models.operations`.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (512, 256, 128, 128),
        latent_channels: int = 16,
        operations=cast_on_use,
    ) -> None:
        super().__init__()
        conv = operations.Conv2d
        c0, c1, c2, c3 = channels
        layers: list[nn.Module] = [nn.Identity() for _ in range(27)]
        layers[1] = conv(CONDITION_CHANNELS + latent_channels, c0, 3, padding=1)
        layers[3] = conv(c0, c0, 3, padding=1, bias=False)
        for width, indices in zip((c0, c1, c2), _WORK_BLOCKS, strict=True):
            for index in indices:
                layers[index] = MemBlock(width, operations)
        for (grow, index), (before, after), stride in zip(
            _TRANSITIONS, ((c0, c1), (c1, c2), (c2, c3)), (1, 2, 2), strict=True
        ):
            layers[grow] = TimeGrow(before, stride, operations)
            layers[index] = conv(before, after, 3, padding=1, bias=False)
        layers[24] = conv(c3, c3, 3, padding=1, bias=False)
        layers[26] = conv(c3, 3, 3, padding=1)
        self.decoder = nn.Sequential(*layers)
        self.latent_channels = latent_channels

    def forward(
        self, latents: Tensor, condition: Tensor, memory: DecoderMemory | None = None, strip_pixels: int | None = None
    ) -> tuple[Tensor, DecoderMemory]:
        """Decodes the next latents of a stream, or the rest of a single one that an exception interrupted.

        Args:
            latents: NTCHW.
            condition: NTCHW low-quality frames in -1..1 at output size: 4T frames, or 4T - 3 at the start of a stream.
                Not read for the rest of a latent.
            memory: left by the latents before, changed in place; None or an empty one starts a stream.
            strip_pixels: full-resolution pixels of the strips in which the two largest stages are computed. None: only
                the last stage, in strips of the default size.

        Returns:
            Frames NTCHW, nominally 0..1 and not clamped, 4T of them or 4T - 3 at the start; and the memory.

        Raises:
            ValueError: the condition does not fit the latents.
        """
        batch, time, _, height, width = latents.shape
        if memory is None:
            memory = DecoderMemory()
        resumed = bool(memory.waiting or memory.frames)
        start = not memory.past and not resumed
        frames = FRAMES_PER_LATENT * time - 3 * start
        expected = (batch, frames, 3, height * CONDITION_CELL[1], width * CONDITION_CELL[2])
        if not resumed and condition.shape != expected:
            raise ValueError(
                f"TCDecoder: expected a condition of shape {expected} for latents {tuple(latents.shape)} "
                f"{'at the start' if start else 'inside'} of a stream; got {tuple(condition.shape)}."
            )
        decoded = []
        position = 0
        for step in range(time):
            if not resumed:
                skipped = 3 if start and step == 0 else 0
                taken = condition[:, position : position + FRAMES_PER_LATENT - skipped]
                position += FRAMES_PER_LATENT - skipped
                if skipped:
                    taken = torch.cat([taken[:, :1].expand(-1, skipped, -1, -1, -1), taken], 1)
                x = self._enter(latents[:, step], taken)
                memory.waiting, memory.skipped = [(0, 0, x)], skipped
                del taken, x
            resumed = False
            while memory.waiting:
                self._advance(memory, strip_pixels)
            decoded.append(torch.stack(memory.frames, 1))
            memory.frames = []
        return decoded[0] if time == 1 else torch.cat(decoded, 1), memory

    def _enter(self, latent: Tensor, condition: Tensor) -> Tensor:
        """One latent N,16,h,w and its four low-quality frames → N,C,h,w."""
        x = torch.cat([condition_cells(condition)[:, 0], latent], 1)
        # Convolutions are fastest with channels last, on CPUs and tensor cores; every later map inherits the layout.
        x = x.contiguous(memory_format=torch.channels_last)
        x = 3 * torch.tanh(x.div_(3))
        return F.relu_(self.decoder[3](F.relu_(self.decoder[1](x))))

    def _advance(self, memory: DecoderMemory, strip_pixels: int | None) -> None:
        """Takes the next map of the current latent through one layer: a memory block, or a time step of a transition.

        Depth first: a map is taken down to its frames before the next one is made.
        """
        stage, layer, x = memory.waiting[-1]
        blocks = _WORK_BLOCKS[stage]
        if layer < len(blocks):
            past = memory.past.get(blocks[layer])
            y = self._remember(self.decoder[blocks[layer]], x, past, strip_pixels if stage == LAST_STAGE else None)
            memory.past[blocks[layer]] = x if memory.device is None else x.to(memory.device)
            memory.waiting[-1] = (stage, layer + 1, y)
            return
        time = layer - len(blocks)
        kernels = self._kernels(_TRANSITIONS[stage], x, memory)
        made: list[tuple[int, int, Tensor]] = []
        if stage < LAST_STAGE:
            made = [(stage + 1, 0, upsample_phases(F.pad(x, (1, 1, 1, 1)), kernels[time]))]
        elif memory.skipped:
            # The last stage has no memory, so the frames that a new stream drops need not be computed.
            memory.skipped -= 1
        else:
            memory.frames.append(self._finish(x, kernels[time], strip_pixels))
        left = [(stage, layer + 1, x)] if time + 1 < len(kernels) else []
        memory.waiting[-1:] = [*left, *made]

    def _remember(self, block: nn.Module, x: Tensor, past: Tensor | None, strip_pixels: int | None) -> Tensor:
        """A memory block, whole or in strips of rows."""
        batch, _, height, width = x.shape
        # One pixel of these maps is two by two of a frame.
        rows = height if strip_pixels is None else max(1, strip_pixels // (4 * width))
        if rows >= height:
            return block(x, torch.zeros_like(x) if past is None else past.to(x.device))
        y = torch.empty_like(x)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            low, high = max(0, top - BLOCK_HALO), min(height, bottom + BLOCK_HALO)
            strip = x[:, :, low:high]
            before = torch.zeros_like(strip) if past is None else past[:, :, low:high].to(x.device)
            y[:, :, top:bottom] = block(strip, before)[:, :, top - low : bottom - low]
        return y

    def _kernels(self, transition: tuple[int, int], like: Tensor, memory: DecoderMemory) -> list[Tensor]:
        grow, conv = transition
        if conv not in memory.kernels:
            grown, convolution = cast(TimeGrow, self.decoder[grow]), cast(nn.Conv2d, self.decoder[conv])
            folded = phase_kernels(_weight(grown.conv, like), _weight(convolution, like), grown.stride)
            memory.kernels[conv] = [to_like(kernel, like) for kernel in folded]
        return memory.kernels[conv]

    def _finish(self, x: Tensor, kernel: Tensor, strip_pixels: int | None) -> Tensor:
        """Last transition and the two 3×3 convolutions, in strips of rows: N,C,h,w → N,3,2h,2w."""
        batch, _, height, width = x.shape
        pixels = CPU_STRIP_PIXELS if x.device.type == "cpu" else STRIP_PIXELS
        pixels = min(pixels, strip_pixels or pixels)
        rows = max(1, pixels // (4 * width))
        frame = x.new_empty(batch, 3, 2 * height, 2 * width)
        halo = LAST_STAGE_HALO // 2
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            low, high = max(0, top - halo), min(height, bottom + halo)
            strip = x[:, :, max(0, low - 1) : high + 1]
            strip = F.pad(strip, (1, 1, 1 if low == 0 else 0, 1 if high == height else 0))
            strip = F.relu_(upsample_phases(strip, kernel))
            strip = self.decoder[26](F.relu_(self.decoder[24](strip)))
            frame[:, :, 2 * top : 2 * bottom] = strip[:, :, 2 * (top - low) : 2 * (bottom - low)]
        return frame


def _weight(conv: nn.Conv2d, like: Tensor) -> Tensor:
    """On the device of `like`, in its own dtype: kernels are folded before they are rounded."""
    return weight_and_bias(conv, like.new_empty(0, dtype=conv.weight.dtype))[0]
