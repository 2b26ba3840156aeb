"""The rules of the house, checked on the syntax tree of every file: who may import whom, who may change ComfyUI, what
is never called. Each rule is also run on a planted violation, so that a rule that has stopped looking turns red."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 500

OUTSIDE_PACKAGE = {"tests", "benchmarks", "scripts"}
COMFYUI = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "execution", "folder_paths",
           "latent_preview", "nodes", "server"}  # fmt: skip
ROOMS_THAT_KNOW_COMFYUI = {"nodes", "patches"}
# A room may import from itself and from these. "" is the root: cli.py, __main__.py, __init__.py.
ARROWS = {
    "models": set(),
    "memory": set(),
    "patches": {"memory"},
    "app": {"models", "memory"},
    "nodes": {"app", "patches", "memory", "models"},
    "training": {"app", "models"},
    "": {"app", "models", "memory"},
}
LOGGING_CALLS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".json", ".js", ".css", ".yml", ".yaml"}

Rule = Callable[[str, ast.Module], Iterator[str]]


def room_of(path: str) -> str:
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


def absolute_imports(tree: ast.Module) -> Iterator[str]:
    """Full names of modules imported absolutely, also inside functions and through importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
    for name, call in calls(tree):
        if name in ("importlib.import_module", "import_module", "__import__") and call.args:
            first = call.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                yield first.value


def relative_rooms(path: str, tree: ast.Module) -> Iterator[str]:
    """The rooms (or root modules) that relative imports reach."""
    folder = list(PurePosixPath(path).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = folder[: len(folder) - (node.level - 1)] if node.level > 1 else folder
            target = base + (node.module.split(".") if node.module else [])
            yield from [target[0]] if target else [alias.name for alias in node.names]


def only_nodes_and_patches_import_comfyui(path: str, tree: ast.Module) -> Iterator[str]:
    if room_of(path) not in ROOMS_THAT_KNOW_COMFYUI:
        yield from (f"imports {name}" for name in absolute_imports(tree) if name.split(".")[0] in COMFYUI)


def own_modules_are_imported_relatively(path: str, tree: ast.Module) -> Iterator[str]:
    own = {"steadyvsr", "cli", *ARROWS} - COMFYUI
    yield from (f"imports {name} absolutely" for name in absolute_imports(tree) if name.split(".")[0] in own)


def arrows_go_one_way(path: str, tree: ast.Module) -> Iterator[str]:
    if path == "__init__.py":  # the front door opens the nodes
        return
    room = room_of(path)
    for target in relative_rooms(path, tree):
        if target in ARROWS and target != room and target not in ARROWS[room]:
            yield f"imports from {target}/"


def only_patches_assign_to_comfyui(path: str, tree: ast.Module) -> Iterator[str]:
    if room_of(path) == "patches":
        return
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in COMFYUI}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in COMFYUI:
            bound |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            name = dotted(node)
            if name.split(".")[0] in bound:
                yield f"assigns to {name}"
    for name, call in calls(tree):
        if name in ("setattr", "delattr") and call.args and dotted(call.args[0]).split(".")[0] in bound:
            yield f"calls {name} on {dotted(call.args[0])}"


def nothing_is_printed(path: str, tree: ast.Module) -> Iterator[str]:
    if room_of(path) in {"models", "memory", "nodes", "patches"}:
        yield from ("calls print" for name, _ in calls(tree) if name == "print")


def loggers_carry_the_fixed_name(path: str, tree: ast.Module) -> Iterator[str]:
    for name, call in calls(tree):
        if name in ("logging.getLogger", "getLogger"):
            first = call.args[0] if call.args else None
            value = first.value if isinstance(first, ast.Constant) else None
            if not isinstance(value, str) or value.split(".")[0] != "steadyvsr":
                yield "makes a logger whose name is not a literal steadyvsr[.room]"
        elif name.startswith("logging.") and name.removeprefix("logging.") in LOGGING_CALLS:
            yield f"logs to the root logger ({name})"


def checkpoints_are_loaded_as_weights_only(path: str, tree: ast.Module) -> Iterator[str]:
    for name, call in calls(tree):
        if name == "torch.load":
            given = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
            if not (isinstance(given, ast.Constant) and given.value is True):
                yield "calls torch.load without weights_only=True"
        elif name in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            yield f"calls {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle"):
            yield from (f"imports {a.name} from {node.module}" for a in node.names if a.name in ("load", "loads"))


def no_code_is_run_or_installed(path: str, tree: ast.Module) -> Iterator[str]:
    for name, call in calls(tree):
        if name in ("eval", "exec", "compile", "os.system", "os.popen"):
            yield f"calls {name}"
        elif name.startswith("subprocess."):
            words = {word for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)
                     for word in node.value.split()}  # fmt: skip
            if words & {"pip", "pip3", "uv", "conda"}:
                yield f"installs packages through {name}"
    for name in absolute_imports(tree):
        if name.split(".")[0] in ("pip", "ensurepip"):
            yield f"imports {name}"


PACKAGE_RULES: list[Rule] = [
    only_nodes_and_patches_import_comfyui,
    own_modules_are_imported_relatively,
    arrows_go_one_way,
    only_patches_assign_to_comfyui,
    nothing_is_printed,
    loggers_carry_the_fixed_name,
    checkpoints_are_loaded_as_weights_only,
    no_code_is_run_or_installed,
]


def house_files(*suffixes: str) -> list[str]:
    """Paths, relative to the root, of the project's own files: no hidden folder, no build output."""
    skipped = {"build", "dist", "shared", "demo_output", "__pycache__"}
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") or part in skipped or part.endswith(".egg-info") for part in parts[:-1])
        if path.suffix in suffixes and not hidden and path.is_file():
            found.append("/".join(parts))
    return sorted(found)


def syntax_tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    files = [path for path in house_files(".py") if room_of(path) not in OUTSIDE_PACKAGE]
    assert len(files) > 3
    assert [f"{path}: {finding}" for path in files for finding in rule(path, syntax_tree(path))] == []


PLANTED = [
    (only_nodes_and_patches_import_comfyui, "models/a.py", "import comfy.utils"),
    (only_nodes_and_patches_import_comfyui, "memory/a.py", "def f():\n    from comfy import model_management"),
    (only_nodes_and_patches_import_comfyui, "models/a.py", "import importlib\nimportlib.import_module('folder_paths')"),
    (only_nodes_and_patches_import_comfyui, "cli.py", "import nodes"),
    (own_modules_are_imported_relatively, "nodes/a.py", "from steadyvsr.models import flashvsr"),
    (own_modules_are_imported_relatively, "nodes/a.py", "import models.flashvsr"),
    (arrows_go_one_way, "models/flashvsr/a.py", "from ...memory import probe"),
    (arrows_go_one_way, "models/a.py", "from .. import nodes"),
    (arrows_go_one_way, "memory/a.py", "from ..patches.free import x"),
    (arrows_go_one_way, "patches/a.py", "from ..models.video import read"),
    (arrows_go_one_way, "cli.py", "from .nodes import x"),
    (only_patches_assign_to_comfyui, "nodes/a.py", "import comfy.model_management as mm\nmm.free_memory = None"),
    (only_patches_assign_to_comfyui, "nodes/a.py", "import comfy.utils\ncomfy.utils.x = 1"),
    (only_patches_assign_to_comfyui, "nodes/a.py", "from comfy.ops import Linear\nsetattr(Linear, 'x', 1)"),
    (only_patches_assign_to_comfyui, "nodes/a.py", "from comfy import utils\ndel utils.x"),
    (nothing_is_printed, "memory/a.py", "def f():\n    print(1)"),
    (loggers_carry_the_fixed_name, "models/a.py", "import logging\nlogging.getLogger(__name__)"),
    (loggers_carry_the_fixed_name, "models/a.py", "import logging\nlogging.getLogger('steadyvsrx.a')"),
    (loggers_carry_the_fixed_name, "models/a.py", "import logging\nlogging.warning('x')"),
    (checkpoints_are_loaded_as_weights_only, "models/a.py", "import torch\ntorch.load('x')"),
    (checkpoints_are_loaded_as_weights_only, "models/a.py", "import torch\ntorch.load('x', weights_only=False)"),
    (checkpoints_are_loaded_as_weights_only, "models/a.py", "from torch import load"),
    (checkpoints_are_loaded_as_weights_only, "models/a.py", "import pickle\npickle.loads(b'')"),
    (no_code_is_run_or_installed, "nodes/a.py", "eval('1')"),
    (no_code_is_run_or_installed, "nodes/a.py", "exec('1')"),
    (no_code_is_run_or_installed, "nodes/a.py", "import subprocess\nsubprocess.run(['python', '-m', 'pip'])"),
    (no_code_is_run_or_installed, "nodes/a.py", "import subprocess\nsubprocess.check_call('pip install x')"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_the_rule_finds_a_planted_violation(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule(path, ast.parse(source)))) == 1


PERMITTED = [
    (only_nodes_and_patches_import_comfyui, "patches/a.py", "import comfy.model_management"),
    (own_modules_are_imported_relatively, "nodes/a.py", "import nodes"),
    (arrows_go_one_way, "nodes/a.py", "from ..models.flashvsr import stream\nfrom . import vae"),
    (arrows_go_one_way, "models/flashvsr/a.py", "from ..video import read\nfrom .plan import x\nfrom .memory import y"),
    (only_patches_assign_to_comfyui, "patches/a.py", "import comfy.utils\ncomfy.utils.x = 1"),
    (only_patches_assign_to_comfyui, "nodes/a.py", "import comfy.utils\nself.x = comfy.utils.y"),
    (nothing_is_printed, "cli.py", "print(1)"),
    (loggers_carry_the_fixed_name, "models/a.py", "import logging\nlogging.getLogger('steadyvsr.models')"),
    (checkpoints_are_loaded_as_weights_only, "models/a.py", "torch.load('x', weights_only=True)"),
    (no_code_is_run_or_installed, "models/a.py", "model.eval()\nre.compile('x')\nsubprocess.run(['ffmpeg'])"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PERMITTED)
def test_the_rule_leaves_permitted_code_alone(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, ast.parse(source))) == []


def too_long(source: str) -> bool:
    return len(source.splitlines()) > MAX_FILE_LINES


def test_no_file_is_longer_than_the_limit() -> None:
    assert too_long("x\n" * (MAX_FILE_LINES + 1)) and not too_long("x\n" * MAX_FILE_LINES)
    files = house_files(".py", ".sh", ".js")
    assert [path for path in files if too_long((ROOT / path).read_text(encoding="utf-8"))] == []


# A folder that exists on one machine only, where a reader of the repository has none.
MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9_.])/(?:work|root|home|Users|mnt)/[A-Za-z0-9_.]+")


def test_no_file_names_a_path_of_one_machine() -> None:
    assert MACHINE_PATH.search("open('/" + "home/name/clip.mp4')") and not MACHINE_PATH.search("tests/work/x")
    files = house_files(*TEXT_SUFFIXES)
    found = [(path, MACHINE_PATH.findall((ROOT / path).read_text(encoding="utf-8"))) for path in files]
    assert [(path, hits) for path, hits in found if hits] == []


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "misc"}
    assert [path for path in house_files(".py") if PurePosixPath(path).stem in drawers] == []
