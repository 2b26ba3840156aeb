"""Which frames, latents and pixels each step of a stream needs: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from .config import BLOCK_PIXELS

FIRST_STEP_FRAMES = 25
"""Input frames that the first process step needs."""
STEP_FRAMES = 8
"""Input frames that each later step needs, and output frames that it makes."""
LOOK_AHEAD_FRAMES = 4
"""Input frames beyond the newest output frame."""
FIRST_STEP_LATENTS = 6
STEP_LATENTS = 2
MINIMUM_SIDE = 16


@dataclass(frozen=True)
class FramePlan:
    """How a clip is processed.

    Attributes:
        frames: of the clip, in and out.
        padded_frames: frames fed to the networks, the last one repeated. Always 8k + 1 ≥ 25.
        steps: process steps.
        latent_frames: latents decoded, 6 + 2 (steps - 1).
    """

    frames: int
    padded_frames: int
    steps: int
    latent_frames: int


def frame_plan(frames: int) -> FramePlan:
    """The plan for a clip of `frames` ≥ 1 frames.

    Raises:
        ValueError: fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"frame_plan: expected at least 1 frame; got {frames}.")
    beyond_first = frames - (FIRST_STEP_FRAMES - LOOK_AHEAD_FRAMES)
    steps = 1 + max(0, -(-beyond_first // STEP_FRAMES))
    padded = FIRST_STEP_FRAMES + STEP_FRAMES * (steps - 1)
    return FramePlan(frames, padded, steps, FIRST_STEP_LATENTS + STEP_LATENTS * (steps - 1))


def step_inputs(step: int) -> tuple[int, int]:
    """Input frames [first, last) that the LQ projection reads in a process step."""
    if step == 0:
        return 0, FIRST_STEP_FRAMES
    return FIRST_STEP_FRAMES + STEP_FRAMES * (step - 1), FIRST_STEP_FRAMES + STEP_FRAMES * step


def step_latents(step: int) -> tuple[int, int]:
    """Latent frames [first, last) of a process step; also their rotary positions."""
    if step == 0:
        return 0, FIRST_STEP_LATENTS
    first = FIRST_STEP_LATENTS + STEP_LATENTS * (step - 1)
    return first, first + STEP_LATENTS


def step_outputs(step: int) -> tuple[int, int]:
    """Output frames [first, last) of a process step, before they are cut to the clip's length."""
    first, last = step_inputs(step)
    return max(0, first - LOOK_AHEAD_FRAMES), last - LOOK_AHEAD_FRAMES


def output_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height of the result: Python's `round` (half to even) of each side times `scale`.

    Raises:
        ValueError: a side below 16 pixels, or a scale outside 1.0 to 8.0.
    """
    if min(width, height) < MINIMUM_SIDE:
        raise ValueError(f"output_size: expected frames of at least 16 × 16 pixels; got {width} × {height}.")
    if not 1.0 <= scale <= 8.0:
        raise ValueError(f"output_size: expected a scale of 1.0 to 8.0; got {scale}.")
    return round(width * scale), round(height * scale)


def padded_size(width: int, height: int) -> tuple[int, int]:
    """Width and height rounded up to multiples of 128, so that they hold whole attention blocks."""
    return -(-width // BLOCK_PIXELS) * BLOCK_PIXELS, -(-height // BLOCK_PIXELS) * BLOCK_PIXELS
