"""FlashVSR: one-step streaming video super-resolution (arXiv 2510.12747)."""

from .checkpoint import load_flashvsr
from .config import FlashVSRConfig, StreamOptions
from .lq_projection import BufferLQ4xProjection, CausalLQ4xProjection
from .model import FlashVSR
from .plan import frame_plan, output_size, padded_size
from .stream import upscale_frames
from .tc_decoder import TCDecoder
from .transformer import Transformer, TransformerState

__all__ = [
    "BufferLQ4xProjection",
    "CausalLQ4xProjection",
    "FlashVSR",
    "FlashVSRConfig",
    "StreamOptions",
    "TCDecoder",
    "Transformer",
    "TransformerState",
    "frame_plan",
    "load_flashvsr",
    "output_size",
    "padded_size",
    "upscale_frames",
]
