"""What a ComfyUI VAE object takes and returns: sizes, layouts, channels and frames, alike in every version.

Nothing here moves or computes. The functions ask the object itself, so they need not know any kind of VAE by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...patches import versions

CROP, PAD = "crop", "pad"


def checked_vae(vae: Any, node: str) -> bool:
    """Whether a VAE can be computed tile by tile here.

    False where it can only be called as a whole: it tiles by itself, or it is another pack's object without a network
    and a patcher of ComfyUI's kind.

    Raises:
        ValueError: it has no weights, or it is for sound or shapes.
    """
    if getattr(vae, "first_stage_model", vae) is None:
        raise ValueError(
            f"{node}: expected a VAE with weights; got an empty one. The checkpoint it comes from has none: "
            "load a VAE file with Load VAE."
        )
    if not hasattr(vae, "first_stage_model") or not hasattr(vae, "patcher"):
        return False
    if getattr(vae, "latent_dim", 2) not in (2, 3) or getattr(vae, "extra_1d_channel", None) is not None:
        name = type(vae.first_stage_model).__name__
        raise ValueError(f"{node}: expected a VAE for images or video; got {name}, which is not. Use its own nodes.")
    return not versions.tiles_itself(vae)


def compression(ratio: Any) -> int:
    """Pixels per latent along a side, of a VAE's `downscale_ratio` or `upscale_ratio`."""
    return int(ratio[-1] if isinstance(ratio, tuple | list) else ratio)


def pixels_for(vae: Any, pixels: Tensor, odd_size: str, node: str) -> tuple[Tensor, list[str]]:
    """Returns an IMAGE, BHWC or BTHWC in 0..1, as the network takes it (NCHW, or NCTHW for a video VAE), and notes on
    the changes.

    As in ComfyUI, a video VAE takes a batch of images as the frames of one clip, unless it is for single images.

    Raises:
        ValueError: an empty batch, an image smaller than one latent, too few channels, video for an image VAE.
    """
    notes: list[str] = []
    if pixels.ndim not in (4, 5) or 0 in pixels.shape:
        raise ValueError(f"{node}: expected at least 1 image, BHWC or BTHWC; got shape {tuple(pixels.shape)}.")
    video = getattr(vae, "latent_dim", 2) == 3
    if pixels.ndim == 5 and not video:
        raise ValueError(
            f"{node}: expected images BHWC for an image VAE; got a video of shape {tuple(pixels.shape)}. "
            "Use a video VAE, or join batch and frames into one batch."
        )
    pixels = _fit_channels(vae, pixels, node, notes)
    pixels = _fit_size(pixels, compression(vae.downscale_ratio), odd_size, node, notes).movedim(-1, 1)
    if not video:
        return pixels, notes
    if pixels.ndim == 4:
        pixels = pixels.unsqueeze(2) if getattr(vae, "not_video", False) else pixels.movedim(1, 0).unsqueeze(0)
    frames = pixels.shape[2]
    if isinstance(vae.downscale_ratio, tuple | list) and callable(vae.downscale_ratio[0]):
        used = vae.upscale_ratio[0](vae.downscale_ratio[0](frames))
        if 0 < used < frames:
            notes.append(f"{frames} frames were trimmed to {used}: this VAE's latents stand for so many.")
            pixels = pixels[:, :, :used]
    return pixels, notes


def latents_for(vae: Any, samples: dict[str, Any], node: str) -> tuple[Tensor, list[str]]:
    """Returns a LATENT's tensor as the network takes it (NCHW, or NCTHW for a video VAE), and notes on the changes.

    Raises:
        ValueError: it is empty, or has a shape that no image or video has.
    """
    notes: list[str] = []
    latents = samples["samples"]
    several = versions.several_latents(latents)
    if several is not None:
        latents = several[0]
        notes.append("Of several latents in one the first was decoded.")
    if latents.ndim not in (4, 5) or 0 in latents.shape:
        raise ValueError(f"{node}: expected at least 1 latent, NCHW or NCTHW; got shape {tuple(latents.shape)}.")
    video = getattr(vae, "latent_dim", 2) == 3
    if latents.ndim == 5 and not video:
        if latents.shape[2] > 1:
            notes.append(f"Of {latents.shape[2]} latent frames the first was decoded: this VAE is for images.")
        latents = latents[:, :, 0]
    if latents.ndim == 4 and video:
        notes.append("The image latents were decoded as clips of one frame.")
        latents = latents.unsqueeze(2)
    return latents, notes


def latent_output(vae: Any, result: Tensor) -> Tensor:
    """A network's latents as a LATENT carries them."""
    latents = result.to(device=vae.output_device, dtype=versions.vae_output_dtype(vae))
    return versions.formatted_latents(vae, latents)


def image_output(vae: Any, result: Tensor) -> Tensor:
    """Pixels in 0..1, NCHW or NCTHW, as an IMAGE: BHWC, clips one after another."""
    pixels = result.to(device=vae.output_device, dtype=versions.vae_output_dtype(vae)).movedim(1, -1)
    return pixels.reshape(-1, *pixels.shape[-3:]) if pixels.ndim == 5 else pixels


def _fit_channels(vae: Any, pixels: Tensor, node: str, notes: list[str]) -> Tensor:
    wanted, got = getattr(vae, "output_channels", 3), pixels.shape[-1]
    if got > wanted:
        notes.append(f"The first {wanted} of {got} channels were encoded.")
        return pixels[..., :wanted]
    if got < wanted:
        value = versions.channel_padding(vae)
        if value is None:
            raise ValueError(f"{node}: expected images of {wanted} channels; got {got}. Convert them to RGB.")
        notes.append(f"The images have {got} channels; the missing {wanted - got} of {wanted} were filled.")
        mode, fill = (value, None) if isinstance(value, str) else ("constant", value)
        return F.pad(pixels, (0, wanted - got), mode=mode, value=fill)
    return pixels


def _fit_size(pixels: Tensor, step: int, odd_size: str, node: str, notes: list[str]) -> Tensor:
    """Makes height and width multiples of `step`: cropped around the centre as in ComfyUI, or padded by repetition."""
    height, width = pixels.shape[-3:-1]
    if odd_size == PAD:
        below, right = -height % step, -width % step
        if below or right:
            notes.append(f"{width}×{height} was continued to {width + right}×{height + below}, right and below.")
            rows = torch.arange(height + below).clamp_(max=height - 1)
            columns = torch.arange(width + right).clamp_(max=width - 1)
            pixels = pixels[..., rows, :, :][..., columns, :]
        return pixels
    if min(height, width) < step:
        raise ValueError(f"{node}: expected images of at least {step}×{step} for this VAE; got {width}×{height}.")
    if height % step or width % step:
        notes.append(f"{width}×{height} was cropped to {width // step * step}×{height // step * step}.")
    top, left = height % step // 2, width % step // 2
    return pixels[..., top : top + height // step * step, left : left + width // step * step, :]
