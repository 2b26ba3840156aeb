"""The arrows of the house: which room, folder and module imports which. They are printed (`pytest -s`), they all point
one way, and between rooms and inside nodes/ they are exactly those that stand here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest
from steadyvsr.tests.source_tree import imported_files, package_files, room_of

Graph = dict[str, set[str]]

ROOMS: Graph = {
    "memory": set(),
    "models": set(),
    "patches": {"memory"},
    "app": {"memory", "models"},
    "nodes": {"app", "memory", "models", "patches"},
    "training": {"app", "models"},
    "root": {"app", "memory", "models", "nodes"},
}
"""The root's arrow to nodes is `comfy_entrypoint`, where ComfyUI enters."""
MAX_ARROWS_IN_NODES = 24
NODES: Graph = {
    "attempts": set(),
    "doctor": {"guidance", "sockets"},
    "flashvsr": {"attempts", "node_status", "sockets", "vae"},
    "free": {"sockets"},
    "guidance": {"node_status", "receipts"},
    "loaders": {"node_status", "sockets"},
    "node_status": set(),
    "panel": {"flashvsr", "receipts"},
    "phases": {"node_status", "receipts", "sockets"},
    "receipts": set(),
    "sockets": set(),
    "vae": {"attempts", "node_status", "sockets"},
}


def graph(part_of: Callable[[str], str]) -> Graph:
    """Arrows between the parts that `part_of` makes of the package's files; "" is no part."""
    files, found = package_files(), {}
    for path in files:
        part = part_of(path)
        if part:
            reached = {part_of(other) for other in imported_files(path, files)}
            found[part] = found.get(part, set()) | reached - {part, ""}
    return found


def order(arrows: Mapping[str, set[str]]) -> list[str]:
    """The parts, each after what it imports.

    Raises:
        AssertionError: there is a circle; the message names it.
    """
    try:
        in_order = {part: sorted(reached) for part, reached in sorted(arrows.items())}
        return list(TopologicalSorter(in_order).static_order())
    except CycleError as error:
        raise AssertionError("a circle of imports: " + " → ".join(reversed(error.args[1]))) from None


def told(title: str, arrows: Mapping[str, set[str]]) -> None:
    """One line for each part, from the bottom up; shown by `pytest -s`."""
    print(f"\n{title}: {sum(map(len, arrows.values()))} arrows")  # noqa: T201
    for part in order(arrows):
        print(f"    {part} → {', '.join(sorted(arrows[part])) or '(nothing)'}")  # noqa: T201


def room(path: str) -> str:
    return room_of(path) or "root"


def top_part(of: str) -> Callable[[str], str]:
    """The folders and modules that lie directly in a folder; its `__init__` is left out: it opens what is there."""
    depth = len(PurePosixPath(of).parts)

    def part(path: str) -> str:
        parts = PurePosixPath(path).parts
        if "/".join(parts[:depth]) != of or len(parts) == depth:
            return ""
        name = parts[depth].removesuffix(".py")
        return "" if name == "__init__" else name

    return part


def test_between_rooms_the_arrows_are_those_that_were_agreed_on() -> None:
    arrows = graph(room)
    told("the house", arrows)
    assert arrows == ROOMS


def test_inside_nodes_the_arrows_are_those_that_stand_here() -> None:
    arrows = graph(top_part("nodes"))
    told("nodes", arrows)
    assert arrows == NODES
    assert sum(map(len, arrows.values())) <= MAX_ARROWS_IN_NODES


@pytest.mark.parametrize("folder", ["memory", "patches", "app", "training", "models"])
def test_inside_a_room_there_is_no_circle(folder: str) -> None:
    arrows = graph(top_part(folder))
    told(folder, arrows)
    assert len(arrows) > 1


def modules(path: str) -> str:
    return path.removesuffix(".py")


def test_no_module_imports_itself_through_others() -> None:
    assert len(order(graph(modules))) > 100


def test_a_planted_circle_is_named() -> None:
    with pytest.raises(AssertionError, match="a → b → a|b → a → b"):
        order({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_imports_are_followed_to_their_files() -> None:
    files = package_files()
    assert "patches/kept.py" in imported_files("nodes/panel/routes.py", files)
    assert "models/flashvsr/__init__.py" in imported_files("app/clip.py", files)
    assert "nodes/__init__.py" in imported_files("__init__.py", files)
