"""The Wan 2.1 video VAE: weights in modules, running state with the caller."""

from .checkpoint import load_wan_vae
from .costs import WanCosts, peak_bytes
from .layers import CausalCache, rms_norm
from .model import WanVAE
from .streamed import StreamingDecoder
from .tiled import TiledDecode, TiledEncode, decode_tiled, encode_tiled

__all__ = [
    "CausalCache",
    "StreamingDecoder",
    "TiledDecode",
    "TiledEncode",
    "WanCosts",
    "WanVAE",
    "decode_tiled",
    "encode_tiled",
    "load_wan_vae",
    "peak_bytes",
    "rms_norm",
]
