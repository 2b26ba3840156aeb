"""The tiled VAE nodes: exact where the layers of the VAE are known, blended elsewhere, measured in both cases."""
