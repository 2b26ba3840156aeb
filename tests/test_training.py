"""The nano network's training: clips, metrics, analytic start, whole-clip decoder, resuming."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from steadyvsr.app.drawn_clips import HELD_OUT_SEEDS, TRAINING_SEED_LIMIT, degrade, enlarge, make_clip
from steadyvsr.app.metrics import psnr, ssim
from steadyvsr.models.flashvsr import FlashVSRConfig, TCDecoder
from steadyvsr.training.initialise import cell_colours, hand_over, initialise_decoder
from steadyvsr.training.parallel import decode_clip
from steadyvsr.training.train_nano import VALIDATION_SEEDS, Schedule, Trainer

CHANNELS = (64, 32, 16, 8)
TINY = FlashVSRConfig(
    dim=128,
    num_heads=1,
    ffn_dim=16,
    num_layers=1,
    freq_dim=8,
    text_dim=8,
    lq_hidden=(4, 4),
    decoder_channels=(49, 13, 7, 4),
)
TINY_SCHEDULE = Schedule(
    decoder_steps=1, joint_steps=1, align_steps=1, final_steps=1, mse_from=1, exact_steps=1, batch=1, pool=2
)


def condition_of(clip: torch.Tensor) -> torch.Tensor:
    return enlarge(degrade(clip)).permute(0, 3, 1, 2)[None] * 2 - 1


def test_a_clip_depends_on_its_seed_alone_and_starts_like_a_shorter_one():
    clip = make_clip(3, 5, 48, 64)
    assert clip.shape == (5, 48, 64, 3) and clip.dtype == torch.float32
    assert torch.equal(clip, make_clip(3, 5, 48, 64))
    assert torch.equal(clip[:2], make_clip(3, 2, 48, 64))
    assert not torch.equal(clip, make_clip(4, 5, 48, 64))
    assert not torch.equal(clip[0], clip[1])
    assert torch.equal((clip * 255).round() / 255, clip)


def test_held_out_clips_are_never_trained_on():
    assert len(set(HELD_OUT_SEEDS)) == 8
    assert Schedule.pool <= min(VALIDATION_SEEDS) and max(VALIDATION_SEEDS) < TRAINING_SEED_LIMIT < min(HELD_OUT_SEEDS)


def test_bicubic_on_held_out_clips_lies_between_22_and_30_db():
    for seed in HELD_OUT_SEEDS[:2]:
        clip = make_clip(seed, 2, 256, 256)
        assert 22 < psnr(enlarge(degrade(clip)), clip) < 30


def test_degrading_keeps_constants_and_gives_a_quarter_of_the_size_in_8_bit():
    constant = torch.full((1, 16, 24, 3), 77 / 255)
    assert torch.allclose(degrade(constant), torch.full((1, 4, 6, 3), 77 / 255), atol=1e-7)
    small = degrade(make_clip(1, 1, 32, 32))
    assert torch.equal((small * 255).round() / 255, small)


def test_degrading_is_antialiased():
    every_fourth = (torch.arange(64) % 4 == 0).float().expand(64, 64)[None, :, :, None].expand(1, 64, 64, 3)
    inside = degrade(every_fourth)[:, 2:-2, 2:-2]
    assert (inside - 0.25).abs().max() < 0.03


def test_degrading_refuses_a_size_that_has_no_quarter():
    with pytest.raises(ValueError, match="multiples of 4; got 30x32"):
        degrade(torch.zeros(1, 30, 32, 3))


@pytest.mark.parametrize("offset, decibels", [(0.1, 20.0), (0.01, 40.0)])
def test_psnr_of_a_constant_offset(offset: float, decibels: float):
    clip = torch.rand(2, 16, 16, 3, dtype=torch.float64)
    assert psnr(clip + offset, clip) == pytest.approx(decibels, abs=1e-9)
    assert psnr(clip, clip) == math.inf


def test_ssim_is_one_for_equal_clips_and_follows_the_formula_for_constants():
    clip = make_clip(1, 1, 32, 32)
    assert ssim(clip, clip) == pytest.approx(1, abs=1e-12)
    a, b, c1 = 0.4, 0.6, 0.01**2
    constants = (torch.full((1, 16, 16, 3), value, dtype=torch.float64) for value in (a, b))
    assert ssim(*constants) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


def test_ssim_falls_with_noise():
    clip = make_clip(1, 1, 32, 32)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert 1 > ssim(clip + 0.02 * noise, clip) > ssim(clip + 0.1 * noise, clip) > 0


@pytest.fixture(scope="module")
def started() -> TCDecoder:
    torch.manual_seed(0)
    decoder = TCDecoder(CHANNELS)
    initialise_decoder(decoder)
    return decoder.requires_grad_(False)


def test_the_analytic_start_enlarges_within_1_5_db_of_bicubic(started: TCDecoder):
    clip = make_clip(HELD_OUT_SEEDS[0], 5, 128, 128)
    condition = condition_of(clip)
    frames, _ = started(torch.zeros(1, 2, 16, 16, 16), condition)
    assert psnr(frames[0].permute(0, 2, 3, 1).clamp(0, 1), clip) > psnr(enlarge(degrade(clip)), clip) - 1.5


def test_the_analytic_start_is_grey_for_grey_up_to_the_border(started: TCDecoder):
    frames, _ = started(torch.zeros(1, 2, 16, 4, 4), torch.zeros(1, 5, 3, 32, 32))
    assert (frames - 0.5).abs().max() < 1e-5


def test_whole_clip_decoding_equals_the_stream():
    torch.manual_seed(1)
    decoder = TCDecoder(CHANNELS).requires_grad_(False)
    latents, condition = torch.randn(2, 3, 16, 4, 6), torch.rand(2, 9, 3, 32, 48) * 2 - 1
    whole = decode_clip(decoder, latents, condition).permute(0, 1, 4, 2, 3)
    streamed, memory = decoder(latents[:, :2], condition[:, :5])
    rest, _ = decoder(latents[:, 2:], condition[:, 5:], memory)
    assert torch.allclose(whole, torch.cat([streamed, rest], 1), atol=1e-6)


def test_handing_over_keeps_the_result_where_latents_hold_the_colours(started: TCDecoder):
    decoder = TCDecoder(CHANNELS).requires_grad_(False)
    decoder.load_state_dict(started.state_dict())
    condition = condition_of(make_clip(2, 5, 64, 64)) * 0.3
    latents = torch.zeros(1, 2, 16, 8, 8)
    latents[:, :, :3] = cell_colours(condition)
    before, _ = decoder(latents, condition)
    hand_over(decoder, 0.2)
    after, _ = decoder(latents, condition)
    without, _ = decoder(torch.zeros_like(latents), condition)
    assert (after - before).abs().mean() < 5e-4
    assert (without - before).abs().mean() > 5e-3


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path):
    def run(steps: int, trainer: Trainer) -> Trainer:
        for _ in range(steps):
            trainer.train_step()
        return trainer

    whole = run(4, Trainer(TINY_SCHEDULE, config=TINY))
    run(2, Trainer(TINY_SCHEDULE, config=TINY)).save(tmp_path / "nano.pt")
    resumed = Trainer(TINY_SCHEDULE, config=TINY)
    resumed.load(tmp_path / "nano.pt")
    run(2, resumed)
    assert resumed.step == whole.step == 4
    for (name, value), other in zip(whole.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(value, other), name
        assert torch.equal(whole.average[name], resumed.average[name]), name
