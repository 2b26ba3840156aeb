"""The FlashVSR nodes: load a model, upscale an IMAGE batch, upscale a VIDEO from file to file."""
