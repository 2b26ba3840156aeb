"""Memory against the length of the clip, from file to file and for an IMAGE batch.

    python -m steadyvsr.benchmarks.stream_memory [--json FILE]

At 512 × 512 output. Peak bytes of live tensors come from a dispatch-mode tracker around a small random model, resident
memory from the command line with the embedded network, in a process of its own for each length. Exits with 1 where
memory grows with the clip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from steadyvsr.benchmarks.tiny_model import parameters, tiny_model
from steadyvsr.memory.tracker import StorageTracker, tensor_bytes
from steadyvsr.models.flashvsr import StreamOptions, upscale_frames
from steadyvsr.models.video import ClipWriter, open_clip
from torch import Tensor

SIDE, SCALE = 128, 4.0
LENGTHS = (50, 400)
TENSOR_GROWTH = 1.02
RSS_GROWTH_BYTES = 16 << 20
FRAMES_AHEAD = 33


def picture(index: int) -> Tensor:
    """HWC: a moving gradient with some texture."""
    ramp = torch.linspace(0, 1, SIDE)
    noise = torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(index)) * 0.1
    return ((ramp[:, None] + ramp + index / 50)[..., None] % 1 * 0.9 + noise).clamp(0, 1)


def write_clip(path: Path, frames: int) -> None:
    with ClipWriter(path, SIDE, SIDE, 25) as writer:
        for index in range(frames):
            writer.write(picture(index))


def file_to_file(source: Path, target: Path) -> int:
    """Upscales one file into another and returns how far the source was ever read ahead of the newest output."""
    pulled = [0]

    def count(frames: Iterator[Tensor]) -> Iterator[Tensor]:
        for frame in frames:
            pulled[0] += 1
            yield frame

    ahead = written = 0
    side = round(SIDE * SCALE)
    with ClipWriter(target, side, side, 25) as writer:
        for frame in upscale_frames(MODEL, count(open_clip(source).frames()), StreamOptions(scale=SCALE)):
            ahead = max(ahead, pulled[0] - written)
            writer.write(frame)
            written += 1
    return ahead


MODEL = tiny_model()


def resident_peak(source: Path, target: Path) -> int:
    """Peak resident bytes of the command line upscaling one file with the embedded network, in its own process."""
    command = [sys.executable, "-m", "steadyvsr", "upscale", str(source), str(target), "--scale", str(SCALE), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout)["peak_rss_bytes"]


def measure(folder: Path, frames: int) -> dict[str, int]:
    source, target = folder / f"{frames}.mp4", folder / f"{frames}-out.mp4"
    write_clip(source, frames)
    with StorageTracker(exclude=parameters(MODEL)) as tracker:
        ahead = file_to_file(source, target)
    target.unlink()
    clip = torch.stack([picture(index) for index in range(frames)])
    with StorageTracker(exclude=[*parameters(MODEL), clip]) as image:
        result = torch.empty(frames, round(SIDE * SCALE), round(SIDE * SCALE), 3)
        for index, frame in enumerate(upscale_frames(MODEL, clip, StreamOptions(scale=SCALE))):
            result[index] = frame
    return {
        "file_tensor_peak": tracker.peak,
        "storages_made": tracker.created,
        "image_tensor_peak": image.peak,
        "image_output": tensor_bytes([result]),
        "rss": resident_peak(source, target),
        "ahead": ahead,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        short, long = (measure(Path(folder), frames) for frames in LENGTHS)
    growth = long["file_tensor_peak"] / short["file_tensor_peak"]
    rss = long["rss"] - short["rss"]
    rest = [row["image_tensor_peak"] - row["image_output"] for row in (short, long)]
    mib = 1 << 20
    print(f"weights: {tensor_bytes(parameters(MODEL)) / mib:.2f} MiB, listed apart")
    print(f"file to file, tensors: {short['file_tensor_peak'] / mib:.2f} MiB at {LENGTHS[0]} frames, "
          f"{long['file_tensor_peak'] / mib:.2f} at {LENGTHS[1]}: {growth:.4f} (target {TENSOR_GROWTH})")  # fmt: skip
    print(f"file to file, resident: {short['rss'] / mib:.0f} MiB, {long['rss'] / mib:.0f} MiB: {rss / mib:+.1f} MiB "
          f"(target {RSS_GROWTH_BYTES / mib:.0f})")  # fmt: skip
    print(f"input frames ahead of the newest output: {long['ahead']} (target {FRAMES_AHEAD})")
    print(f"IMAGE, beside input and output: {rest[0] / mib:.2f} MiB, {rest[1] / mib:.2f} MiB")
    passed = {
        "tensors": growth <= TENSOR_GROWTH,
        "resident": rss <= RSS_GROWTH_BYTES,
        "ahead": 21 <= long["ahead"] <= FRAMES_AHEAD,
        "image": rest[1] <= rest[0] * TENSOR_GROWTH,
    }
    print("passed" if all(passed.values()) else f"missed: {[name for name, met in passed.items() if not met]}")
    if options.json:
        options.json.write_text(
            json.dumps({"lengths": LENGTHS, "short": short, "long": long, "passed": passed}, indent=1) + "\n"
        )
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
