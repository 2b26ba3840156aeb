"""A workflow as ComfyUI's front end saves it, as the prompt that its server takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
ONLY_IN_THE_FRONT_END = {"Note", "MarkdownNote"}


def api_form(workflow: dict, object_info: dict) -> dict[str, dict]:
    """The prompt of a saved workflow.

    Args:
        object_info: what the server tells of its nodes; a node that it lacks raises KeyError.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ONLY_IN_THE_FRONT_END:
            continue
        wired = {item["name"]: links[item["link"]] for item in node["inputs"] if item["link"] is not None}
        values = iter(node.get("widgets_values", []))
        inputs = dict(_widgets(object_info[node["type"]]["input"], values))
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | wired}
    return prompt


def _widgets(declared: dict, values: Iterator[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a node's widgets: the saved ones in the order of the declaration, then the defaults."""
    for name, (kind, *more) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        options = more[0] if more else {}
        if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
            continue
        dynamic = kind == "COMFY_DYNAMICCOMBO_V3"
        choices = kind if isinstance(kind, list) else options.get("options", [])
        first = (choices[0]["key"] if dynamic else choices[0]) if choices else None
        value = next(values, options.get("default", first))
        yield f"{prefix}{name}", value
        if dynamic:
            (chosen,) = [option for option in choices if option["key"] == value]
            yield from _widgets(chosen["inputs"], values, f"{prefix}{name}.")
        if options.get("control_after_generate"):
            next(values, None)
