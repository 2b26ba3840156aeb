"""FlashVSR models with random weights, tiny or of the released size: the shapes count, not the picture."""

from __future__ import annotations

from typing import Any

import torch

from ...models.flashvsr import (
    BufferLQ4xProjection,
    CausalLQ4xProjection,
    FlashVSR,
    FlashVSRConfig,
    TCDecoder,
    Transformer,
)
from ...models.operations import cast_on_use

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
        transformer, projection, decoder = _networks(version, config, cache_order, operations)
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


def released_model(version: str, dtype: torch.dtype, device: torch.device) -> FlashVSR:
    """A model of the released size with random weights, made on its device; nothing is read or downloaded.

    On the meta device it has shapes alone.
    """
    config = FlashVSRConfig()
    with torch.device("meta"):
        networks = _networks(version, config, "fixed", cast_on_use)
        prompt: Any = torch.zeros(1, 512, config.text_dim, dtype=dtype)
    for network in networks:
        network.requires_grad_(False).to(dtype)
    if device.type != "meta":
        for network in networks:
            network.to_empty(device=device)
            for name, parameter in network.named_parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
                unit = "norm" in name and name.endswith(("weight", "gamma"))
                parameter.data.fill_(1) if unit else parameter.data.normal_(std=fan_in**-0.5)
        prompt = torch.randn(prompt.shape, dtype=dtype, device=device)
    return FlashVSR(*networks, prompt, version, "flashvsr")


def _networks(
    version: str, config: FlashVSRConfig, cache_order: str, operations: Any
) -> tuple[Transformer, CausalLQ4xProjection, TCDecoder]:
    sizes = (config.lq_hidden, config.dim, config.lq_layers)
    if version == "v1":
        projection = BufferLQ4xProjection(*sizes, cache_order=cache_order, operations=operations)
    else:
        projection = CausalLQ4xProjection(*sizes, operations=operations)
    decoder = TCDecoder(config.decoder_channels, operations=operations)
    return Transformer(config, operations=operations), projection, decoder
