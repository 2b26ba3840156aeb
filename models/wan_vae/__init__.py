"""The Wan 2.1 video VAE: weights in modules, running state with the caller."""

from .checkpoint import load_wan_vae
from .layers import CausalCache, rms_norm
from .model import WanVAE
from .streamed import StreamingDecoder
from .tiled import TiledDecode, TiledEncode, peak_bytes

__all__ = [
    "CausalCache",
    "StreamingDecoder",
    "TiledDecode",
    "TiledEncode",
    "WanVAE",
    "load_wan_vae",
    "peak_bytes",
    "rms_norm",
]
