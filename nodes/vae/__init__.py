"""The tiled VAE nodes: exact where the layers of a VAE are known, blended otherwise, always measured."""
