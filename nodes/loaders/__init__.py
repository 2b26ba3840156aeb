"""ComfyUI's own loaders with `keep_loaded`, a choice of device, and a verified offload."""
