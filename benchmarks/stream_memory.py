"""Memory against the length of the clip, from file to file and for an IMAGE batch.

    python -m steadyvsr.benchmarks.stream_memory [--json FILE]

At 512 × 512 output. Peak bytes of live tensors come from a dispatch-mode tracker around a small random model, resident
memory from the command line with the embedded network, in a process of its own for each length. Exit status 1 where
memory grows with the clip.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from steadyvsr.app.card.random_model import parameters, tiny_model
from steadyvsr.benchmarks import frame
from steadyvsr.memory.tracker import StorageTracker, tensor_bytes
from steadyvsr.models.flashvsr import FlashVSR, StreamOptions, upscale_frames
from steadyvsr.models.video import ClipWriter, open_clip
from torch import Tensor

SIDE, SCALE = 128, 4.0
OUTPUT_SIDE = round(SIDE * SCALE)
OPTIONS = StreamOptions(scale=SCALE)
LENGTHS = (50, 400)
TENSOR_GROWTH = 1.02
RSS_GROWTH_BYTES = 16 << 20
FRAMES_AHEAD = 33


def picture(index: int) -> Tensor:
    """HWC: a moving gradient with some texture."""
    ramp = torch.linspace(0, 1, SIDE)
    noise = torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(index)) * 0.1
    return ((ramp[:, None] + ramp + index / 50)[..., None] % 1 * 0.9 + noise).clamp(0, 1)


def file_to_file(model: FlashVSR, source: Path, target: Path) -> int:
    """Upscales one file into another and returns how far the source was ever read ahead of the newest output."""
    pulled = ahead = 0

    def counted() -> Iterator[Tensor]:
        nonlocal pulled
        for image in open_clip(source).frames():
            pulled += 1
            yield image

    with ClipWriter(target, OUTPUT_SIDE, OUTPUT_SIDE, 25) as writer:
        for written, image in enumerate(upscale_frames(model, counted(), OPTIONS)):
            ahead = max(ahead, pulled - written)
            writer.write(image)
    return ahead


def resident_peak(source: Path, target: Path) -> int:
    """Peak resident bytes of the command line upscaling one file with the embedded network, in its own process."""
    command = [sys.executable, "-m", "steadyvsr", "upscale", str(source), str(target), "--scale", str(SCALE), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout)["peak_rss_bytes"]


def measure(model: FlashVSR, folder: Path, frames: int) -> dict[str, int]:
    source, target = folder / f"{frames}.mp4", folder / f"{frames}-out.mp4"
    clip = torch.stack([picture(index) for index in range(frames)])
    with ClipWriter(source, SIDE, SIDE, 25) as writer:
        for image in clip:
            writer.write(image)
    with StorageTracker(exclude=parameters(model)) as tracker:
        ahead = file_to_file(model, source, target)
    target.unlink()
    with StorageTracker(exclude=[*parameters(model), clip]) as image_tracker:
        result = torch.empty(frames, OUTPUT_SIDE, OUTPUT_SIDE, 3)
        for index, image in enumerate(upscale_frames(model, clip, OPTIONS)):
            result[index] = image
    return {
        "file_tensor_peak": tracker.peak,
        "storages_made": tracker.created,
        "image_tensor_peak": image_tracker.peak,
        "image_output": tensor_bytes([result]),
        "rss": resident_peak(source, target),
        "ahead": ahead,
    }


def main(arguments: list[str] | None = None) -> int:
    options = frame.parser(__doc__).parse_args(arguments)
    model, mib = tiny_model(), frame.MIB
    with tempfile.TemporaryDirectory() as folder:
        short, long = (measure(model, Path(folder), frames) for frames in LENGTHS)
    growth = long["file_tensor_peak"] / short["file_tensor_peak"]
    rss = long["rss"] - short["rss"]
    rest = [row["image_tensor_peak"] - row["image_output"] for row in (short, long)]
    print(f"weights: {tensor_bytes(parameters(model)) / mib:.2f} MiB, listed apart")
    print(f"file to file, tensors: {short['file_tensor_peak'] / mib:.2f} MiB at {LENGTHS[0]} frames, "
          f"{long['file_tensor_peak'] / mib:.2f} at {LENGTHS[1]}: {growth:.4f} (target {TENSOR_GROWTH})")  # fmt: skip
    print(f"file to file, resident: {short['rss'] / mib:.0f} MiB, {long['rss'] / mib:.0f} MiB: {rss / mib:+.1f} MiB "
          f"(target {RSS_GROWTH_BYTES / mib:.0f})")  # fmt: skip
    print(f"input frames ahead of the newest output: {long['ahead']} (target {FRAMES_AHEAD})")
    print(f"IMAGE, beside input and output: {rest[0] / mib:.2f} MiB, {rest[1] / mib:.2f} MiB")
    targets = {
        "tensors": growth <= TENSOR_GROWTH,
        "resident": rss <= RSS_GROWTH_BYTES,
        "ahead": 21 <= long["ahead"] <= FRAMES_AHEAD,
        "image": rest[1] <= rest[0] * TENSOR_GROWTH,
    }
    return frame.finish(options.json, {"lengths": LENGTHS, "short": short, "long": long}, frame.unmet(targets))


if __name__ == "__main__":
    sys.exit(main())
