"""A FlashVSR-shaped model with random weights, small enough for tests: the shapes count, not the picture."""

from __future__ import annotations

import torch
from steadyvsr.models.flashvsr import (
    BufferLQ4xProjection,
    CausalLQ4xProjection,
    FlashVSR,
    FlashVSRConfig,
    TCDecoder,
    Transformer,
)
from steadyvsr.models.operations import cast_on_use

TINY = FlashVSRConfig(
    dim=32,
    num_heads=1,
    ffn_dim=32,
    num_layers=2,
    freq_dim=16,
    text_dim=8,
    lq_hidden=(8, 8),
    decoder_channels=(8, 8, 8, 8),
)


def tiny_model(
    version: str = "v1.1",
    config: FlashVSRConfig = TINY,
    cache_order: str = "fixed",
    dtype: torch.dtype = torch.float32,
    operations=cast_on_use,
    seed: int = 0,
) -> FlashVSR:
    """The same weights for the same seed, whatever the version, dtype and operations."""
    # Some layers draw when they are made; the state of the global generator is not the caller's to lose.
    with torch.random.fork_rng(devices=[]):
        if version == "v1":
            projection = BufferLQ4xProjection(
                config.lq_hidden, config.dim, config.lq_layers, cache_order=cache_order, operations=operations
            )
        else:
            projection = CausalLQ4xProjection(config.lq_hidden, config.dim, config.lq_layers, operations=operations)
        transformer = Transformer(config, operations=operations)
        decoder = TCDecoder(config.decoder_channels, operations=operations)
    generator = torch.Generator().manual_seed(seed)
    for network in (transformer, projection, decoder):
        for name, parameter in sorted(network.named_parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            values = torch.randn(parameter.shape, generator=generator)
            unit = "norm" in name and name.endswith(("weight", "gamma"))
            parameter.data = torch.ones_like(values) if unit else values * (0.1 if fan_in == 1 else fan_in**-0.5)
        network.requires_grad_(False).to(dtype)
    prompt = torch.randn(1, 4, config.text_dim, generator=generator).to(dtype)
    return FlashVSR(transformer, projection, decoder, prompt, version, "tiny")


def parameters(model: FlashVSR) -> list[torch.Tensor]:
    """Every tensor that the model consists of."""
    networks = (model.transformer, model.lq_projection, model.decoder)
    return [*(p for network in networks for p in network.parameters()), model.prompt]
