"""The project's own files as syntax trees, and what they import of each other: for the rules of the house."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE_PACKAGE = {"tests", "benchmarks", "scripts", "example_workflows"}
OUTSIDE = ".."
"""Stands for whatever lies above the package."""


SKIPPED = {"build", "dist", "shared", "demo_output", "__pycache__"}


@cache
def house_files(*suffixes: str) -> tuple[str, ...]:
    """Paths, relative to the root, of the project's own files: no hidden folder, no build output."""
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if not name.startswith(".") and name not in SKIPPED]
        below[:] = [name for name in below if not name.endswith(".egg-info")]
        inside = PurePosixPath(Path(folder).relative_to(ROOT).as_posix())
        found += [str(inside / name) for name in names if PurePosixPath(name).suffix in suffixes]
    return tuple(sorted(found))


def package_files() -> list[str]:
    """The Python files that a user installs."""
    return [path for path in house_files(".py") if room_of(path) not in OUTSIDE_PACKAGE]


@cache
def syntax_tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def room_of(path: str) -> str:
    """The top folder of a path; "" for the root."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else ""


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of attributes on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def dynamic_imports(tree: ast.Module) -> Iterator[str]:
    """Literal names given to importlib."""
    for name, call in calls(tree):
        if name in ("importlib.import_module", "import_module", "__import__") and call.args:
            first = call.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def absolute_imports(tree: ast.Module) -> Iterator[str]:
    """Full names of modules imported absolutely, also inside functions and through importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
    yield from (name for name in dynamic_imports(tree) if not name.startswith("."))


def relative_imports(path: str, tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """What relative imports reach, as parts of a path from the root; the last part may be a module or a name in one.

    `from ..models.video import reader` in nodes/vae.py gives ("models", "video", "reader").
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = [*_above(path, node.level), *(node.module.split(".") if node.module else [])]
            yield from ((*base, alias.name) for alias in node.names)
    for name in dynamic_imports(tree):
        if name.startswith("."):
            module = name.lstrip(".")
            yield (*_above(path, len(name) - len(module)), *module.split("."))


def _above(path: str, level: int) -> list[str]:
    folder = list(PurePosixPath(path).parts[:-1])
    return folder[: len(folder) - level + 1] if level <= len(folder) + 1 else [OUTSIDE]


def imported_files(path: str, files: Iterable[str]) -> set[str]:
    """The files of the package that a file imports relatively; a package's `__init__` stands for what it exports."""
    known, found = set(files), set()
    for target in relative_imports(path, syntax_tree(path)):
        for length in (len(target), len(target) - 1):
            base = "/".join(target[:length])
            hits = {f"{base}.py", f"{base}/__init__.py".lstrip("/")} & known
            if hits:
                found |= hits
                break
    return found - {path}
