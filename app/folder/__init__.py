"""A folder of clips, as many at once as the cards hold, each worker a process of its own. Knows nothing of ComfyUI."""

from .admission import Workers, admit
from .clips import Job, find_jobs, holds_videos
from .manifest import Manifest
from .night import Night, NightReport, folder_settings, run_night
from .worker import ClipResult, WorkerSettings

__all__ = [
    "ClipResult",
    "Job",
    "Manifest",
    "Night",
    "NightReport",
    "Workers",
    "WorkerSettings",
    "admit",
    "find_jobs",
    "folder_settings",
    "holds_videos",
    "run_night",
]
