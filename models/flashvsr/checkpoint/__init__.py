"""Reading FlashVSR weights: which files and layouts there are, what they hold, and how they become a model."""

from .load import load_flashvsr

__all__ = ["load_flashvsr"]
