"""Decoding and encoding clips with PyAV: one frame at a time, sound copied, timestamps kept."""

from .encoding import Encoding, choose_encoding
from .images import ImageSequenceWriter, encode_png
from .pixels import ColourTags
from .reader import Clip, open_clip
from .source import DamagedVideoError, VideoError
from .waveform import Waveform
from .writer import ClipWriter, MuxingError

__all__ = [
    "Clip",
    "ClipWriter",
    "ColourTags",
    "DamagedVideoError",
    "Encoding",
    "ImageSequenceWriter",
    "MuxingError",
    "VideoError",
    "Waveform",
    "choose_encoding",
    "encode_png",
    "open_clip",
]
