"""ComfyUI's own server on simulated cards that have memory of their own, in place of `python main.py`.

    STEADYVSR_CARD=simcard[:2] STEADYVSR_CAPACITY=BYTES python simcard_main.py OPTIONS…   (in ComfyUI's folder)

ComfyUI's questions about its devices are answered by the cards before any custom node is loaded.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys

sys.path.append(sys.path.pop(0))  # this folder last: ComfyUI has a `server` of its own
sys.path.insert(0, os.getcwd())
sys.argv[0] = "main.py"

importlib.import_module("comfy.options").enable_args_parsing()
importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first
count = os.environ["STEADYVSR_CARD"].partition(":")[2]
capacity = int(os.environ.get("STEADYVSR_CAPACITY") or 8 << 30)
importlib.import_module("simcard_card").AllocatorCards(capacity, int(count or 1)).install()

runpy.run_path("main.py", run_name="__main__")
