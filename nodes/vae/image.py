"""ComfyUI's image VAEs of the SD and Flux kind, as a chain of layers that can be computed exactly in tiles.

The layers are ComfyUI's own and stay in place. What its `decode` does before the decoder, and its `encode` after the
encoder, is left to ComfyUI: both work at the resolution of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as diffusion_modules
import torch
from torch import Tensor, nn

from ...models.image_vae import LayeredJob, Step, decoder_steps, encoder_steps
from ...patches.versions import memory_errors
from .trial import carried_out, differs, once

TRIAL_LATENTS = (3, 5)
PROBE_LATENTS = 2


class _Reached(Exception):  # noqa: N818
    """Ends a call where it has computed what was wanted."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def chain_of(vae: Any, encodes: bool, pixels: int) -> tuple[list[Step], str]:
    """Returns the layers of a VAE's encoder or decoder, or none and the reason.

    The structure must be a known one, and once for each network a small image is computed both ways and compared.

    Args:
        vae: a ComfyUI VAE object whose weights are on its device.
        pixels: per latent along a side.
    """
    network, name = vae.first_stage_model, "encoder" if encodes else "decoder"
    part = getattr(network, name, None)
    if type(part).__module__ != diffusion_modules.__name__ or getattr(part, "carried", False):
        return [], f"{type(network).__name__} is neither a Wan 2.1 VAE nor an image VAE of a known kind"
    place = (vae.device, vae.vae_dtype)
    try:
        with torch.no_grad():
            steps = _steps(network, encodes, vae.latent_channels, pixels, *place)
    except memory_errors():
        raise
    except (ValueError, AttributeError, RuntimeError) as error:
        return [], f"the layers of its {name} are not those of a known kind: {error}"
    why_not = once(network, name, lambda: _trial(network, encodes, steps, vae.latent_channels, pixels, *place))
    return ([], why_not) if why_not else (steps, "")


def _steps(
    network: Any, encodes: bool, channels: int, pixels: int, device: torch.device, dtype: torch.dtype
) -> list[Step]:
    """
    Raises:
        ValueError, AttributeError: the network is not built as expected.
    """
    if encodes:
        # What follows the encoder may fold several of its positions into one latent.
        inner = 2 ** (len(network.encoder.down) - 1)
        steps = encoder_steps(network.encoder, inner)
        wide = steps[-1].channels[1]
        tail = _Tail(network, steps[0].channels[0], pixels)
        return [*steps, Step("encode", tail, (wide, channels), inner, down=pixels // inner, whole=True)]
    head = _Head(network)
    probe = head(torch.zeros(1, channels, PROBE_LATENTS, PROBE_LATENTS, device=device, dtype=dtype))
    up = probe.shape[-1] // PROBE_LATENTS
    steps = decoder_steps(network.decoder, pixels // up)
    return [Step("decode", head, (channels, probe.shape[1]), pixels, up=up, whole=True), *steps]


class _Head:
    """What `decode` does to latents before its decoder."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __call__(self, latents: Tensor) -> Tensor:
        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        with _hooked(self._network.decoder.register_forward_pre_hook, stop):
            try:
                self._network.decode(latents)
            except _Reached as reached:
                return reached.value
        raise ValueError("its decode does not call its decoder")


class _Tail:
    """What `encode` does to the output of its encoder."""

    def __init__(self, network: Any, image_channels: int, pixels: int) -> None:
        self._network, self._channels, self._side = network, image_channels, pixels * PROBE_LATENTS

    def __call__(self, features: Tensor) -> Tensor:
        size = (1, self._channels, self._side, self._side)
        nothing = torch.zeros(size, device=features.device, dtype=features.dtype)
        with _hooked(self._network.encoder.register_forward_hook, lambda *_: features):
            return self._network.encode(nothing)


@contextmanager
def _hooked(register: Callable[[Any], Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def _trial(
    network: Any,
    encodes: bool,
    steps: list[Step],
    channels: int,
    pixels: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Empty, or how the two ways of computing a small image differ."""
    height, width = TRIAL_LATENTS
    generator = torch.Generator().manual_seed(0)
    if encodes:
        size = (1, steps[0].channels[0], height * pixels, width * pixels)
        source = torch.rand(size, generator=generator) * 2 - 1
    else:
        source = torch.randn(1, channels, height, width, generator=generator)

    def both(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        job = LayeredJob(steps, source, 2 * pixels, device=device, dtype=dtype)
        return carried_out(job), (network.encode if encodes else network.decode)(source.to(device, dtype))

    with torch.no_grad():
        return differs("a trial image", both, network, device, dtype)
