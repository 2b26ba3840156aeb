"""The FlashVSR nodes: load, upscale an IMAGE batch, upscale a VIDEO from file to file."""
