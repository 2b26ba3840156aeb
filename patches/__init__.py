"""What changes in ComfyUI, and what knows its books: kept models, verified offloads. Imports ComfyUI and `memory`."""
