"""The nano network: its sizes, its untrained start, a differentiable pass over one clip, and its file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.flashvsr.checkpoint.load import save_merged
from ..models.flashvsr.config import FlashVSRConfig, StreamOptions
from ..models.flashvsr.lq_projection import CausalLQ4xProjection
from ..models.flashvsr.tc_decoder import TCDecoder
from ..models.flashvsr.transformer import Transformer, TransformerState
from .initialise import initialise_decoder, initialise_projection, initialise_transformer
from .parallel import decode_clip

NANO = FlashVSRConfig(
    dim=128,
    num_heads=1,
    ffn_dim=512,
    num_layers=2,
    text_dim=64,
    lq_hidden=(48, 64),
    lq_layers=1,
    decoder_channels=(64, 32, 16, 8),
)
PROMPT_TOKENS = 16
CLIP_FRAMES, OUTPUT_FRAMES, LATENT_FRAMES = 25, 21, 6
"""Of one process step: frames read, frames made, latents."""
_OPTIONS = StreamOptions(attention="gather")


class NanoNetwork(nn.Module):
    """The three networks and the prompt, from the analytic start."""

    prompt: Tensor

    def __init__(self, seed: int = 0, config: FlashVSRConfig = NANO) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer = Transformer(config, operations=torch.nn)
            self.lq_projection = CausalLQ4xProjection(config.lq_hidden, config.dim, config.lq_layers, torch.nn)
            self.decoder = TCDecoder(config.decoder_channels, config.in_dim, operations=torch.nn)
            self.register_buffer("prompt", torch.randn(1, PROMPT_TOKENS, config.text_dim).half().float())
            initialise_projection(self.lq_projection)
            initialise_transformer(self.transformer, self.lq_projection)
            initialise_decoder(self.decoder)

    def tokens(self, condition: Tensor) -> list[Tensor]:
        """Condition NCTHW with 25 frames in -1..1 → one BLD token tensor per conditioned layer."""
        lists, _ = self.lq_projection(condition)
        assert lists is not None
        return lists

    def latents(self, tokens: list[Tensor], noise: Tensor) -> Tensor:
        """Step 0 of a stream: noise NCTHW with 6 latent frames → clean latents NTCHW."""
        clips = []
        # The noise must cancel, so the (small) transformer runs in fp32 also under autocast.
        with torch.autocast(noise.device.type, enabled=False):
            constants = self.transformer.prepare(self.prompt)
            for clip in range(len(noise)):
                own = [layer[clip : clip + 1].float() for layer in tokens]
                velocity = self.transformer(noise[clip : clip + 1], own, 0, TransformerState(), _OPTIONS, constants)
                clips.append((noise[clip : clip + 1] - velocity).transpose(1, 2))
        return torch.cat(clips)

    def forward(self, condition: Tensor, noise: Tensor | None) -> Tensor:
        """Condition NTCHW with 25 frames in -1..1 → NTHWC with 21 frames in 0..1, not clamped.

        Noise is that of the six latents; None decodes latents of zero.
        """
        batch, _, _, height, width = condition.shape
        if noise is None:
            latents = condition.new_zeros(batch, LATENT_FRAMES, self.decoder.latent_channels, height // 8, width // 8)
        else:
            latents = self.latents(self.tokens(condition.transpose(1, 2)), noise)
        return decode_clip(self.decoder, latents, condition[:, :OUTPUT_FRAMES])


def export(network: NanoNetwork, path: Path) -> None:
    """Writes the merged fp16 file that `load_flashvsr` reads."""
    parts = {part: getattr(network, part).state_dict() for part in ("transformer", "lq_projection", "decoder")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_merged(parts | {"prompt": network.prompt}, path, version="v1.1", family="nano")
