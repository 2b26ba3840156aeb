"""Image VAEs of the kind that SD, SDXL, SD3 and Flux use, layer by layer: exact, whatever the tile."""

from .chain import decoder_steps, encoder_steps
from .layered import LayeredJob, Step, map_bytes, predicted_bytes

__all__ = ["LayeredJob", "Step", "decoder_steps", "encoder_steps", "map_bytes", "predicted_bytes"]
