"""The nodes at work on ComfyUI or on its double: runs the scenarios of this folder and tells what was seen.

    python tests/nodes/session.py PACK_FOLDER double BASE_FOLDER           anywhere
    python tests/nodes/session.py PACK_FOLDER comfyui BASE_FOLDER          in ComfyUI's folder, by ComfyUI's Python

The last line of its output is JSON: scenario → what was seen, or {"error": traceback}. Names of scenarios that begin
with one of the words in STEADYVSR_SCENARIOS (joined by commas) are run, without it all.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

SUBJECTS = ("schema", "routes", "loaders", "phases", "flashvsr", "vae", "changed")


def tell() -> None:
    importlib.import_module("host")  # starts ComfyUI; the scenarios need that
    wanted = [word for word in os.environ.get("STEADYVSR_SCENARIOS", "").split(",") if word] or SUBJECTS
    seen = {}
    for subject in SUBJECTS:
        if not any(word.startswith(subject) for word in wanted):
            continue
        for name, scenario in importlib.import_module(f"{subject}_scenarios").SCENARIOS.items():
            if f"{subject} {name}".startswith(tuple(wanted)):
                try:
                    seen[f"{subject} {name}"] = scenario()
                except BaseException:  # noqa: B036  told by the test that needs it
                    seen[f"{subject} {name}"] = {"error": traceback.format_exc()[-3000:]}
    sys.stdout.write("\n" + json.dumps(seen, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    tell()
