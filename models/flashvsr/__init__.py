"""FlashVSR: one-step streaming video super-resolution (arXiv 2510.12747)."""
