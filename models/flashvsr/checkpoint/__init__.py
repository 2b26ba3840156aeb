"""Reading FlashVSR weights: which files and layouts there are, what they hold, and how they become a model."""

from pathlib import Path

from .load import load_flashvsr

NANO_FILE = Path(__file__).resolve().parents[3] / "assets" / "nano.safetensors"
"""The tiny network that comes with the pack: to try out, not for quality."""

__all__ = ["NANO_FILE", "load_flashvsr"]
