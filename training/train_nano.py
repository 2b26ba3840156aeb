"""Trains the embedded nano network on procedural clips; seeded, and resumable from its checkpoint.

    python -m steadyvsr.training.train_nano --checkpoint nano.pt --minutes 60

Step s is a function of the weights before it and of s alone (its clips, their orientation, its noise, its learning
rate and its loss), so a run that was stopped and resumed equals one that was not. Output 128×128, one process step of
25 frames. `Schedule` says what the stages are.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from ..app.drawn_clips import HELD_OUT_SEEDS, TRAINING_SEED_LIMIT, degrade, enlarge, make_clip
from ..app.metrics import psnr
from ..models.flashvsr.config import FlashVSRConfig
from .initialise import cell_colours, hand_over
from .network import CLIP_FRAMES, LATENT_FRAMES, NANO, OUTPUT_FRAMES, NanoNetwork, export
from .parallel import decode_clip

VALIDATION_SEEDS = range(800_000, 800_008)
_FAN_IN = 300
"""Inputs of a layer above which its learning rate falls as 1 / inputs: a wide layer otherwise loses its start."""
_CHARBONNIER = 1e-3
_REPORT_STEPS, _SAVE_STEPS = 100, 500


@dataclass(frozen=True)
class Schedule:
    """What a training run consists of.

    The defaults are the stages of the committed weights. Their run was stopped and resumed with other lengths of the
    cosines (first 11000 for 12000, 1500 for the third stage's 1000, 2000 for the fourth's 1200), so a fresh run follows
    the same stages, not the same numbers.

    Attributes:
        decoder_steps: the decoder alone, with latents of zero.
        joint_steps: all networks through the decoder.
        align_steps: transformer and projection learn each cell's mean colour as latent channels 0, 1, 2; at their end
            the decoder is made to read a share of it there instead of in its condition (`hand_over`).
        final_steps: all networks through the decoder again.
        mse_from: first step with the squared error; Charbonnier before.
        exact_steps: at the very end, in fp32; bfloat16 autocast before.
        warmup_steps: of linear growth of the learning rate, at the start of each stage.
        peak, align_peak, final_peak: learning rates of layers with at most 300 inputs: of the first two stages, which
            share a half cosine of `cosine_steps`, and of the other two with a half cosine each.
        share: of the mean colour that is read in the latents.
        batch: clips per step.
        size: side of a clip in output pixels.
        pool: number of different clips; they are reused rotated, mirrored, reversed and with permuted colours.
        ema: decay of the averaged weights.
    """

    decoder_steps: int = 1500
    joint_steps: int = 7500
    align_steps: int = 1000
    final_steps: int = 1200
    mse_from: int = 6000
    exact_steps: int = 200
    warmup_steps: int = 300
    cosine_steps: int = 12000
    peak: float = 5e-4
    align_peak: float = 1e-3
    final_peak: float = 1.5e-4
    share: float = 0.15
    batch: int = 2
    size: int = 128
    pool: int = 1200
    ema: float = 0.999

    @property
    def steps(self) -> int:
        return self.hand_over_step + self.final_steps

    @property
    def align_step(self) -> int:
        """The first step of the third stage."""
        return self.decoder_steps + self.joint_steps

    @property
    def hand_over_step(self) -> int:
        """The first step of the fourth stage."""
        return self.align_step + self.align_steps

    def rate(self, step: int) -> float:
        """Learning rate of a step for layers with at most 300 inputs."""
        if step >= self.hand_over_step:
            start, peak, length = self.hand_over_step, self.final_peak, self.final_steps
        elif step >= self.align_step:
            start, peak, length = self.align_step, self.align_peak, self.align_steps
        else:
            start, peak, length = 0, self.peak, self.cosine_steps
        fraction = min(1.0, (step - start) / length)
        since = step - self.decoder_steps if self.decoder_steps <= step < self.align_step else step - start
        warm = min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))


class ClipPool:
    """Training pairs; clips are made when first asked for and kept as 8-bit tensors."""

    def __init__(self, schedule: Schedule) -> None:
        if schedule.pool > VALIDATION_SEEDS.start or min(HELD_OUT_SEEDS) < TRAINING_SEED_LIMIT:
            raise ValueError("ClipPool: expected training seeds apart from the validation and held-out seeds.")
        self.schedule = schedule
        self._clips: dict[int, Tensor] = {}

    def pair(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Condition NTCHW -1..1 (25 frames), target NTHWC 0..1 (21 frames) and noise NCTHW of one step."""
        generator = torch.Generator().manual_seed(step)
        conditions, targets = [], []
        for _ in range(self.schedule.batch):
            clip = self._clip(int(torch.randint(self.schedule.pool, (), generator=generator)))
            turns, mirror, reverse = torch.randint(4, (3,), generator=generator).tolist()
            clip = torch.rot90(clip, turns, (1, 2))[..., torch.randperm(3, generator=generator)]
            flips = [0] * (reverse % 2) + [2] * (mirror % 2)
            clip = clip.flip(flips) if flips else clip
            conditions.append(enlarge(degrade(clip)).permute(0, 3, 1, 2) * 2 - 1)
            targets.append(clip[:OUTPUT_FRAMES])
        cells = self.schedule.size // 8
        noise = torch.randn(self.schedule.batch, 16, LATENT_FRAMES, cells, cells, generator=generator)
        return torch.stack(conditions), torch.stack(targets), noise

    def _clip(self, seed: int) -> Tensor:
        if seed not in self._clips:
            clip = make_clip(seed, CLIP_FRAMES, self.schedule.size, self.schedule.size)
            self._clips[seed] = (clip * 255).round().byte()
        return self._clips[seed].float() / 255


class Trainer:
    """Weights, their average, the optimiser and the step: everything that a checkpoint holds."""

    def __init__(self, schedule: Schedule, seed: int = 0, config: FlashVSRConfig = NANO) -> None:
        self.schedule, self.seed, self.step = schedule, seed, 0
        self.network = NanoNetwork(seed, config)
        self.average = {name: value.detach().clone() for name, value in self.network.named_parameters()}
        groups = []
        for parameter in self.network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            groups.append({"params": [parameter], "scale": min(1.0, _FAN_IN / fan_in)})
        self.optimiser = torch.optim.Adam(groups, lr=schedule.peak, betas=(0.9, 0.99))
        self.pool = ClipPool(schedule)

    def train_step(self) -> float:
        """One step; returns the PSNR of its batch in dB (of the colours in the third stage)."""
        schedule = self.schedule
        if self.step == schedule.hand_over_step:
            self._hand_over()
        condition, target, noise = self.pool.pair(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = schedule.rate(self.step) * group["scale"]
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.steps - self.step > schedule.exact_steps):
            if schedule.align_step <= self.step < schedule.hand_over_step:
                colours = self.network.latents(self.network.tokens(condition.transpose(1, 2)), noise)[:, :, :3]
                error = (colours - cell_colours(condition[:, :OUTPUT_FRAMES])).square()
            else:
                output = self.network(condition, noise if self.step >= schedule.decoder_steps else None)
                error = (output.float() - target).square()
        loss = error.mean() if self.step >= schedule.mse_from else (error + _CHARBONNIER**2).sqrt().mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(schedule.ema, self.step / (self.step + 100))
        with torch.no_grad():
            for name, value in self.network.named_parameters():
                self.average[name].lerp_(value, 1 - decay)
        return -10 * math.log10(error.mean().item())

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Starts the last stage from the averaged decoder, which now reads a share of the colours in the latents."""
        for name, value in self.network.decoder.named_parameters():
            value.copy_(self.average[f"decoder.{name}"])
        hand_over(self.network.decoder, self.schedule.share)
        for name, value in self.network.named_parameters():
            self.average[name].copy_(value)

    def averaged(self) -> NanoNetwork:
        """A network with the averaged weights, rounded to fp16 as they will be stored."""
        network = NanoNetwork(self.seed, self.network.transformer.config)
        with torch.no_grad():
            for name, value in network.named_parameters():
                value.copy_(self.average[name].half().float())
        return network

    def save(self, path: Path) -> None:
        """Writes the checkpoint beside `path` and renames it, so that a killed run leaves the last one whole."""
        state = {
            "schedule": asdict(self.schedule),
            "seed": self.seed,
            "step": self.step,
            "average": self.average,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint of a run with the same seed; the schedule may differ."""
        state = torch.load(path, weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(f"{path}: expected a checkpoint of seed {self.seed}; got {state['seed']}.")
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.step = state["average"], state["step"]


@torch.no_grad()
def validate(network: NanoNetwork, joint: bool, size: int) -> dict[str, float]:
    """Mean PSNR in dB over the validation clips: of bicubic and of the output.

    With `joint` also of the output where the velocity is zero, and where the LQ tokens are.
    """
    scores: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for seed in VALIDATION_SEEDS:
        clip = make_clip(seed, CLIP_FRAMES, size, size)
        large, target = enlarge(degrade(clip)), clip[:OUTPUT_FRAMES]
        condition = large.permute(0, 3, 1, 2)[None] * 2 - 1
        noise = torch.randn(1, 16, LATENT_FRAMES, size // 8, size // 8, generator=generator)
        outputs = {"bicubic": large[:OUTPUT_FRAMES], "output": network(condition, noise if joint else None)[0]}
        if joint:
            silent = [torch.zeros_like(layer) for layer in network.tokens(condition.transpose(1, 2))]
            for name, latents in (
                ("velocity zero", noise.transpose(1, 2)),
                ("LQ tokens zero", network.latents(silent, noise)),
            ):
                outputs[name] = decode_clip(network.decoder, latents, condition[:, :OUTPUT_FRAMES])[0]
        for name, output in outputs.items():
            scores.setdefault(name, []).append(psnr(output.clamp(0, 1), target))
    return {name: mean(values) for name, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded nano network.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="training resumes from it if it exists")
    parser.add_argument("--export", type=Path, help="merged fp16 file to write with every checkpoint")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (and save) after this time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    schedule = Schedule()
    trainer = Trainer(schedule, arguments.seed)
    if arguments.checkpoint.exists():
        trainer.load(arguments.checkpoint)
    started, recent = time.monotonic(), []
    while trainer.step < schedule.steps and time.monotonic() - started < arguments.minutes * 60:
        recent.append(trainer.train_step())
        if trainer.step % _REPORT_STEPS == 0:
            taken, batch, rate = time.monotonic() - started, mean(recent), schedule.rate(trainer.step - 1)
            print(f"step {trainer.step}  {taken:.0f} s  batch {batch:.3f} dB  rate {rate:.2e}", flush=True)
            recent = []
        if trainer.step % _SAVE_STEPS == 0:
            _checkpoint(trainer, arguments)
    _checkpoint(trainer, arguments)


def _checkpoint(trainer: Trainer, arguments: argparse.Namespace) -> None:
    trainer.save(arguments.checkpoint)
    network = trainer.averaged()
    if arguments.export:
        export(network, arguments.export)
    scores = validate(network, trainer.step > trainer.schedule.decoder_steps, trainer.schedule.size)
    print(f"step {trainer.step}  validation", *(f" {name} {value:.3f}" for name, value in scores.items()), flush=True)


if __name__ == "__main__":
    main()
