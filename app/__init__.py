"""What the command line does: upscale one file or a folder of them, the demo, the doctor. Knows nothing of ComfyUI."""
