"""The Wan 2.1 video VAE: weights in modules, running state with the caller."""

from .checkpoint import load_wan_vae
from .layers import CausalCache
from .model import WanVAE

__all__ = ["CausalCache", "WanVAE", "load_wan_vae"]
