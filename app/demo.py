"""The demo: a generated clip is made four times smaller, upscaled from file to file, and compared with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..memory.plot import lettering
from ..models.flashvsr import FlashVSR, StreamOptions
from ..models.video import ClipWriter, encode_png, open_clip
from .clip import OutputOptions, RunReport, footage_of, open_writer, upscale_clip
from .drawn_clips import HELD_OUT_SEEDS, SCALE, degrade, enlarge, make_clip
from .metrics import psnr, ssim

SEED = HELD_OUT_SEEDS[0]
"""Of a clip that the embedded network was not trained on."""
HEIGHT, WIDTH, FRAME_RATE = 256, 256, 24
GAP, LETTER_SCALE, GROUND = 8, 2, 0.08


@dataclass(frozen=True)
class DemoReport:
    """What the demo wrote and measured: PSNR (dB) and SSIM against the original, over all frames before encoding."""

    run: RunReport
    input: str
    comparison: str
    seed: int
    bicubic_psnr: float
    bicubic_ssim: float
    output_psnr: float
    output_ssim: float


def run_demo(
    folder: Path,
    seconds: float,
    model: FlashVSR,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_frame: Callable[[Tensor], object] = lambda frame: None,
) -> DemoReport:
    """Writes input.mkv (lossless), output.mp4 and comparison.png (middle frame) into `folder`, replacing older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = make_clip(SEED, max(1, round(seconds * FRAME_RATE)), HEIGHT, WIDTH)
    small = degrade(truth)
    frames, height, width, _ = small.shape
    source = folder / "input.mkv"
    with ClipWriter(source, width, height, FRAME_RATE, codec="ffv1", force=True) as writer:
        for frame in small:
            writer.write(frame)

    outputs: list[Tensor] = []

    def keep(frame: Tensor) -> None:
        outputs.append(frame)
        on_frame(frame)

    footage = footage_of(open_clip(source))
    run = upscale_clip(
        model, footage, open_writer(footage, folder / "output.mp4", SCALE, OutputOptions(force=True)),
        StreamOptions(scale=SCALE), device=device, dtype=dtype, on_frame=keep, packed=False,
    )  # fmt: skip
    bicubic, output = enlarge(small), torch.stack(outputs)
    middle = frames // 2
    panels = [
        ("INPUT", small[middle].repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1)),
        ("BICUBIC", bicubic[middle]),
        ("OUTPUT", output[middle]),
        ("GROUND TRUTH", truth[middle]),
    ]
    comparison = folder / "comparison.png"
    comparison.write_bytes(encode_png(side_by_side(panels)))
    return DemoReport(
        run=run,
        input=str(source),
        comparison=str(comparison),
        seed=SEED,
        bicubic_psnr=psnr(bicubic, truth),
        bicubic_ssim=ssim(bicubic, truth),
        output_psnr=psnr(output, truth),
        output_ssim=ssim(output, truth),
    )


def side_by_side(panels: list[tuple[str, Tensor]]) -> Tensor:
    """HWC pictures of one size side by side, each below its label, on a dark ground; HWC."""
    height, width, _ = panels[0][1].shape
    top = 2 * GAP + 7 * LETTER_SCALE
    sheet = torch.full((top + height + GAP, GAP + len(panels) * (width + GAP), 3), GROUND)
    for index, (label, picture) in enumerate(panels):
        left = GAP + index * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
        dots = torch.from_numpy(lettering(label)).float()
        letters = dots.repeat_interleave(LETTER_SCALE, 0).repeat_interleave(LETTER_SCALE, 1)[:, :width]
        sheet[GAP : GAP + letters.shape[0], left : left + letters.shape[1]] += letters[..., None] * (0.9 - GROUND)
    return sheet
