"""Run by a real ComfyUI's Python, in its folder: the seven phases with our VAE nodes, to a video file.

    python tiled_phases_session.py PACK_FOLDER BASE_FOLDER

On the simulated card that holds any one of the models and no two. Prints one JSON object on the last line; the
assertions are in test_tiled_phases.py.
"""

from __future__ import annotations

import json
import sys

import av
import phases_workflow as workflow
from phases_host import BASE, CARD, EXECUTOR, FILES, RECORD, nodes, resident


def spy(name: str, reports: list) -> None:
    """Keeps the report of a node, as it leaves it."""
    kind = nodes.NODE_CLASS_MAPPINGS[name]
    original = kind.execute.__func__

    def execute(cls, **inputs):
        output = original(cls, **inputs)
        reports.append(json.loads(output.args[1]))
        return output

    kind.execute = classmethod(execute)


def main() -> None:
    reports: list = []
    for name in ("SteadyVSR_VAEEncodeTiled", "SteadyVSR_VAEDecodeTiled"):
        spy(name, reports)
    outcome = EXECUTOR.run(workflow.tiled_phases(FILES))
    loads, ended = RECORD.take()
    phases = []
    for number, phase in enumerate(ended):
        here = [load["resident"] for load in loads if load["phase"] == number]
        phases.append({"phase": phase["name"], "loads": here, "before": phase["before"], "after": phase["after"]})
    videos = []
    for path in sorted((BASE / "output").rglob("*.mp4")):
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        videos.append({"frames": len(frames), "size": [frames[0].width, frames[0].height]})
    seen = {"error": outcome["error"], "failed": outcome["failed_node"], "phases": phases, "videos": videos}
    seen |= {"reports": reports, "resident_at_end": resident(), "capacity": CARD.capacity}
    sys.stdout.write("\n" + json.dumps(seen) + "\n")


main()
