"""Upscales a folder of clips with as many worker processes as memory allows. Knows nothing of ComfyUI.

jobs finds the clips, lock keeps other runs out, admission decides how many workers run, manifest records what is done,
scheduler hands out the clips, process is a worker as the scheduler sees it, worker is what runs in that process, report
says how it ended.
"""

from .admission import admit
from .jobs import Job, find_jobs, holds_videos
from .lock import FolderLock
from .manifest import Manifest, folder_settings
from .report import FolderReport
from .scheduler import FolderRun, run_folder
from .worker import WorkerSettings

__all__ = [
    "FolderLock",
    "Job",
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
