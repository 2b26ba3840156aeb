"""What the command line and the nodes share: one clip, a folder of clips, the demo, the doctor. No ComfyUI in here."""
