"""The estimate of a run's bytes against a tracker of live storages: on the CPU, and by shapes for the released model.

On the meta device nothing is computed, but every tensor has its shape and lifetime, so a run of the released model at
full size can be tracked in seconds. It takes the paths of a GPU, with attention kernels that keep no work space.
"""

from __future__ import annotations

import pytest
import torch
from steadyvsr.benchmarks.shape_run import FUSED, ShapeTracker
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.flashvsr import (
    CausalLQ4xProjection,
    FlashVSR,
    FlashVSRConfig,
    StreamOptions,
    TCDecoder,
    Transformer,
    transformer,
    upscale_frames,
)
from steadyvsr.models.flashvsr.footprint import activation_bytes, cache_bytes

SMALL = FlashVSRConfig(
    dim=128, num_heads=1, ffn_dim=256, num_layers=2, text_dim=32, lq_hidden=(32, 48), decoder_channels=(32, 16, 16, 8)
)
RELEASED = FlashVSRConfig()
FRAMES = 29  # two process steps: the caches are full after the first
LOWEST, HIGHEST = 0.8, 1.5


def random_model(config: FlashVSRConfig, prompt_tokens: int, dtype: torch.dtype, device: str) -> FlashVSR:
    torch.manual_seed(0)
    with torch.device(device):
        networks = (
            Transformer(config),
            CausalLQ4xProjection(config.lq_hidden, config.dim, config.lq_layers),
            TCDecoder(config.decoder_channels),
        )
        prompt = torch.zeros(1, prompt_tokens, config.text_dim, dtype=dtype)
    for network in networks:
        network.requires_grad_(False).to(dtype)
    return FlashVSR(*networks, prompt, "v1.1", "test")


def weights(model: FlashVSR) -> list[torch.Tensor]:
    networks = (model.transformer, model.lq_projection, model.decoder)
    return [*(parameter for network in networks for parameter in network.parameters()), model.prompt]


def run(model: FlashVSR, size: tuple[int, int], options: StreamOptions, device: str) -> int:
    width, height = (round(side / options.scale) for side in size)
    clip = [torch.rand(height, width, 3) for _ in range(FRAMES)]
    return sum(1 for _ in upscale_frames(model, clip, options, device=device, dtype=model.prompt.dtype))


@pytest.fixture(scope="module")
def small_model() -> FlashVSR:
    model = random_model(SMALL, 16, torch.float32, "cpu")
    run(model, (128, 128), StreamOptions(), "cpu")  # the attention's self-check runs once in a process
    return model


@pytest.mark.parametrize(
    ("size", "kv_ratio"),
    [((128, 128), 3.0), ((256, 128), 3.0), ((256, 256), 2.0), ((384, 256), 3.0), ((300, 200), 4.0), ((512, 256), 3.0)],
)
def test_the_estimate_is_near_the_peak_of_a_run_on_the_cpu(small_model, size, kv_ratio):
    with StorageTracker(exclude=weights(small_model)) as tracker:
        assert run(small_model, size, StreamOptions(kv_ratio=kv_ratio), "cpu") == FRAMES
    estimate = activation_bytes(SMALL, size, kv_ratio, 4, prompt_tokens=16, on_cpu=True)
    assert LOWEST <= estimate / tracker.peak <= HIGHEST


@pytest.fixture
def fused_attention(monkeypatch):
    for name, value in FUSED.items():
        monkeypatch.setattr(transformer, name, value)


@pytest.mark.parametrize("size", [(768, 1280), (1920, 1080)])
def test_the_estimate_is_near_the_peak_of_the_released_model_in_bf16(fused_attention, size):
    model = random_model(RELEASED, 512, torch.bfloat16, "meta")
    with ShapeTracker(weights(model)) as tracker:
        assert run(model, size, StreamOptions(), "meta") == FRAMES
    assert tracker.peak > 4 << 30
    assert LOWEST <= activation_bytes(RELEASED, size, 3.0, 2) / tracker.peak <= HIGHEST


def test_the_key_value_cache_is_that_of_the_paper():
    """2 · 30 layers · 3 pairs · 60 blocks · 128 tokens · 1536 · 2 bytes at 768 × 1280."""
    cache = 2 * 30 * 3 * 60 * 128 * 1536 * 2
    two, three = (cache_bytes(RELEASED, 768 * 1280, kv_ratio, 2) for kv_ratio in (2.0, 3.9))
    assert three - two == pytest.approx(cache / 3, rel=0.01)
    assert cache < three < 1.01 * cache
