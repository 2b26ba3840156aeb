"""Upscales a folder of clips with as many worker processes as memory allows. Knows nothing of ComfyUI.

jobs finds the clips, admission decides how many workers run, manifest records what is done, scheduler hands out the
clips, worker is the process that upscales them.
"""

from .admission import admit
from .jobs import find_jobs, holds_videos
from .manifest import Manifest, folder_settings
from .scheduler import FolderReport, FolderRun, run_folder
from .worker import WorkerSettings

__all__ = [
    "Manifest",
    "FolderRun",
    "FolderReport",
    "WorkerSettings",
    "admit",
    "find_jobs",
    "folder_settings",
    "holds_videos",
    "run_folder",
]
