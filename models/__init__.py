"""What the networks compute: FlashVSR, the Wan VAE, tiling plans, video files. Knows nothing of ComfyUI."""
