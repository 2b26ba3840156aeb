"""What a node shows of itself while it runs and afterwards: lines on the node, in the page that queued the prompt."""

from __future__ import annotations

from typing import Any

from ..patches import prompt

EVENT = "steadyvsr.node"


def send(node_id: str | None, **message: Any) -> None:
    """Sends parts of a node's status; the page keeps the parts that are left out.

    Args:
        node_id: of the node in its graph; None (outside the executor) sends nothing.
        message: policy and policy_reason; receipt {line, verdict}; progress {phase, frames, total, fps, eta};
            memory {predicted, measured, budget, advice} in bytes and words.
    """
    server = prompt.server()
    # A prompt without a client comes from a script: ComfyUI would tell every page, whose nodes have the same ids.
    if server is not None and node_id is not None and server.client_id is not None:
        server.send_sync(EVENT, {"node": node_id, **message}, server.client_id)
