"""The options of ComfyUI's command line that the pack reads."""

from types import SimpleNamespace

args = SimpleNamespace(listen="127.0.0.1")
