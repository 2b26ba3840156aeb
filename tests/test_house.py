"""The rules of the house, checked on the syntax tree of every file: who may import whom, who may change ComfyUI, what
is never called. Each rule is also run on a planted violation, so that a rule that has stopped looking turns red."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import pytest
from steadyvsr.tests.source_tree import (
    OUTSIDE,
    OUTSIDE_PACKAGE,
    ROOT,
    absolute_imports,
    calls,
    dotted,
    house_files,
    package_files,
    relative_imports,
    room_of,
    syntax_tree,
)

MAX_FILE_LINES = 500

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
DOOR = {"nodes"}
"""Of __init__.py: ComfyUI enters there."""
LOGGING_CALLS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".json", ".js", ".css", ".yml", ".yaml"}

Rule = Callable[[str, ast.Module], Iterator[str]]


def targets(path: str, tree: ast.Module) -> Iterator[str]:
    """The rooms that relative imports reach; "" is the root with its modules, ".." what lies above it."""
    for target in relative_imports(path, tree):
        yield target[0] if target[0] in (*ARROWS, *OUTSIDE_PACKAGE, OUTSIDE) else ""


def only_nodes_and_patches_import_comfyui(path: str, tree: ast.Module) -> Iterator[str]:
    if room_of(path) not in ROOMS_THAT_KNOW_COMFYUI:
        yield from (f"imports {name}" for name in absolute_imports(tree) if name.split(".")[0] in COMFYUI)


def own_modules_are_imported_relatively(path: str, tree: ast.Module) -> Iterator[str]:
    own = {"steadyvsr", "cli", *ARROWS, *OUTSIDE_PACKAGE} - COMFYUI
    yield from (f"imports {name} absolutely" for name in absolute_imports(tree) if name.split(".")[0] in own)


def arrows_go_one_way(path: str, tree: ast.Module) -> Iterator[str]:
    room = room_of(path)
    allowed = {room, *(DOOR if path == "__init__.py" else ARROWS.get(room, ()))}
    for target in dict.fromkeys(targets(path, tree)):
        if target not in allowed:
            yield f"imports from {target or 'the root'}"


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


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    files = package_files()
    assert len(files) > 100
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
    (arrows_go_one_way, "models/a.py", "from ..upscale import x"),
    (arrows_go_one_way, "models/flashvsr/a.py", "from ... import upscale"),
    (arrows_go_one_way, "app/a.py", "from ..cli import main"),
    (arrows_go_one_way, "app/folder/a.py", "from ... import cli"),
    (arrows_go_one_way, "app/a.py", "from ..patches import residency"),
    (arrows_go_one_way, "nodes/a.py", "def f():\n    from .. import __version__"),
    (arrows_go_one_way, "nodes/vae/a.py", "import importlib\nimportlib.import_module('...cli', __package__)"),
    (arrows_go_one_way, "nodes/a.py", "from ..training import x"),
    (arrows_go_one_way, "training/a.py", "from ..memory import probe"),
    (arrows_go_one_way, "__init__.py", "from .patches import hooks"),
    (arrows_go_one_way, "memory/a.py", "from ..tests import conftest"),
    (arrows_go_one_way, "cli.py", "from .benchmarks import tiny_model"),
    (arrows_go_one_way, "models/a.py", "from ...comfy import x"),
    (own_modules_are_imported_relatively, "models/a.py", "from tests.double import comfy"),
    (own_modules_are_imported_relatively, "cli.py", "import benchmarks.tiny_model"),
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
    (arrows_go_one_way, "__main__.py", "from .cli import main"),
    (arrows_go_one_way, "cli.py", "from .app import clip\nfrom .memory import probe"),
    (arrows_go_one_way, "__init__.py", "def comfy_entrypoint():\n    from .nodes import FlashVSRExtension"),
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
    # The double has ComfyUI's own names.
    named_here = [path for path in house_files(".py") if not path.startswith("tests/double/")]
    assert [path for path in named_here if PurePosixPath(path).stem in drawers] == []
