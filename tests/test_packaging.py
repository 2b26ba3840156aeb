"""What is installed and what ComfyUI finds: the package list, the assets, the requirements, and the front door."""

from __future__ import annotations

import asyncio
import glob
import importlib
import importlib.util
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()

# Folders of the repository that are no part of the Python package.
NOT_PACKAGES = {"assets", "benchmarks", "build", "demo_output", "dist", "example_workflows", "locales", "scripts",
                "shared", "tests", "web"}  # fmt: skip
SHIPPED_FOLDERS = ("assets", "web")
FRONT_DOOR = ROOT / "__init__.py"


def packages_in(root: Path) -> set[str]:
    """The dotted name of every folder with Python files of its own, and of the root itself."""
    folders = {path.parent.relative_to(root) for path in root.rglob("*.py")}
    own = [f for f in folders if not any(p.startswith(".") or p == "__pycache__" for p in f.parts)]
    return {".".join(("steadyvsr", *f.parts)) for f in own if not f.parts or f.parts[0] not in NOT_PACKAGES}


def uncovered(root: Path, patterns: list[str]) -> set[str]:
    """Files of the shipped folders that no package-data pattern would put into a wheel."""
    covered = {Path(name) for pattern in patterns for name in glob.glob(pattern, root_dir=root, recursive=True)}
    files = {p.relative_to(root) for name in SHIPPED_FOLDERS for p in (root / name).rglob("*") if p.is_file()}
    return {str(path) for path in files - covered if not any(part.startswith(".") for part in path.parts)}


def load_front_door(folder: Path, name: str) -> ModuleType:
    """The root `__init__.py` of `folder`, imported under another name, as ComfyUI's loader does."""
    path = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(folder)])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planted_pack(tmp_path: Path, request: pytest.FixtureRequest):
    """A pack folder with the real front door and a `nodes.py` of the test's own; gives a function source → module."""
    names = []

    def plant(nodes: str) -> ModuleType:
        shutil.copy(FRONT_DOOR, tmp_path)
        (tmp_path / "nodes.py").write_text(nodes)
        names.append(f"planted_pack_{request.node.name}")
        return load_front_door(tmp_path, names[-1])

    yield plant
    for name in [key for key in sys.modules if key.split(".")[0] in names]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def registry_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as the registry delivers it: a folder `steadyvsr` without what `.comfyignore` names."""
    folder = tmp_path_factory.mktemp("registry") / "steadyvsr"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "shared", "demo_output"))
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert all((ROOT / name.strip("/")).exists() for name in ignored), "a name without a pattern, of something here"
    for path in [path for pattern in ignored for path in folder.glob(pattern.rstrip("/"))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not (folder / "tests").exists()
    return folder


def test_the_package_list_is_the_tree() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in(ROOT)


def test_every_listed_package_has_an_init_file() -> None:
    folders = [ROOT.joinpath(*name.split(".")[1:]) for name in PROJECT["tool"]["setuptools"]["packages"]]
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_a_forgotten_package_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "models" / "new").mkdir(parents=True)
    (tmp_path / "models" / "new" / "layer.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").touch()
    assert packages_in(tmp_path) == {"steadyvsr.models.new"}


def test_every_shipped_file_is_in_the_wheel() -> None:
    assert uncovered(ROOT, PROJECT["tool"]["setuptools"]["package-data"]["steadyvsr"]) == set()


def test_an_asset_outside_the_patterns_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "nano.safetensors").touch()
    (tmp_path / "assets" / "nano.json").touch()
    assert uncovered(tmp_path, ["assets/*.safetensors"]) == {str(Path("assets/nano.json"))}


def test_no_requirement_can_replace_an_installed_torch() -> None:
    requirements = [Requirement(line) for line in REQUIREMENTS if line.strip() and not line.startswith("#")]
    bounds = [r for r in requirements if {spec.operator for spec in r.specifier} - {">="}]
    assert [str(r) for r in bounds] == []
    torch = next(r for r in requirements if r.name == "torch")
    assert not torch.specifier and torch.url is None
    tied_to_a_torch_build = {"torchvision", "torchaudio", "torchcodec", "triton", "xformers", "flash-attn"}
    assert tied_to_a_torch_build.isdisjoint(r.name for r in requirements)


def test_comfyui_is_no_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    names = [Requirement(line).name for line in [*REQUIREMENTS, *(line for extra in extras for line in extra)]]
    assert [name for name in names if name.lower().startswith("comfy")] == []


def test_the_registry_entry_names_no_web_folder() -> None:
    """With WEB_DIRECTORY set as well, ComfyUI would serve and load every script twice."""
    assert "web" not in PROJECT["tool"]["comfy"]
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == ">=0.3.64"


def test_the_registry_entry_locks_no_machine_out() -> None:
    """Installers filter on these: one accelerator named refuses every other."""
    classifiers = PROJECT["project"]["classifiers"]
    assert [name for name in classifiers if name.startswith("Operating System ::")] == [
        "Operating System :: OS Independent"
    ]
    assert [name for name in classifiers if name.startswith("Environment ::")] == []


def test_the_registry_entry_holds_no_placeholder_addresses() -> None:
    """Icon, banner and links are full addresses of the public repository, or absent."""
    entry = PROJECT["tool"]["comfy"]
    addresses = [entry[name] for name in ("Icon", "Banner") if name in entry]
    addresses += PROJECT["project"].get("urls", {}).values()
    assert [text for text in addresses if not text.startswith("https://") or "example" in text] == []


def test_the_console_command_exists() -> None:
    module, function = PROJECT["project"]["scripts"]["steadyvsr"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_front_door_imports_nothing_of_comfyui_or_torch() -> None:
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('pack', sys.argv[1], submodule_search_locations=[])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(roots & {'comfy', 'comfy_api', 'folder_paths', 'nodes', 'server', 'torch', 'numpy'}))\n"
    )
    command = [sys.executable, "-c", program, str(FRONT_DOOR)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT.parent)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_front_door_offers_the_v3_entry_point_only(planted_pack) -> None:
    """ComfyUI reads NODE_CLASS_MAPPINGS first and then never asks for `comfy_entrypoint`."""
    pack = planted_pack("")
    assert inspect.iscoroutinefunction(pack.comfy_entrypoint)
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")


def test_the_web_directory_is_named_exactly_when_it_exists(planted_pack) -> None:
    assert hasattr(planted_pack(""), "WEB_DIRECTORY") == (ROOT / "web").is_dir()


def test_the_entry_point_gives_the_extension(planted_pack) -> None:
    pack = planted_pack("class FlashVSRExtension:\n    pass\n")
    assert type(asyncio.run(pack.comfy_entrypoint())).__name__ == "FlashVSRExtension"


def test_an_import_error_in_the_nodes_is_logged_with_its_traceback(planted_pack, caplog) -> None:
    pack = planted_pack("import a_module_that_does_not_exist\n")
    with caplog.at_level(logging.ERROR, logger="steadyvsr"), pytest.raises(ImportError):
        asyncio.run(pack.comfy_entrypoint())
    (record,) = [record for record in caplog.records if record.name == "steadyvsr"]
    assert record.exc_info and "a_module_that_does_not_exist" in caplog.text
    assert "Traceback" in caplog.text and "nodes.py" in caplog.text


def run_in(folder: Path, program: str, *arguments: str | Path) -> str:
    """The output of a Python program to which `steadyvsr` is the pack in that folder, and nothing else."""
    # The finder of an editable install would give what is missing in the copy from the checkout.
    program = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')]\n" + program
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=folder.parent, env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"from {folder / '__init__.py'}" in done.stdout
    return done.stdout


def test_the_commands_work_in_a_registry_install(registry_install: Path, tmp_path: Path) -> None:
    """One process for all of them: to import torch takes longer than the commands."""
    program = (
        "import runpy, steadyvsr\n"
        "print('from', steadyvsr.__file__)\n"
        "for command in (['--help'], ['demo', '--seconds', '0.04', '--out', sys.argv[1]], ['inspect', sys.argv[2]]):\n"
        "    sys.argv = ['steadyvsr', *command]\n"
        "    try:\n"
        "        runpy.run_module('steadyvsr', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(command[0], end.code)\n"
    )
    said = run_in(registry_install, program, tmp_path, registry_install / "assets" / "nano.safetensors")
    assert {"--help 0", "demo 0", "inspect 0"} <= set(said.splitlines())
    assert all(command in said for command in ("upscale", "inspect", "demo", "doctor"))
    assert (tmp_path / "output.mp4").is_file() and "family nano" in said


def test_the_nodes_load_in_a_registry_install(registry_install: Path) -> None:
    program = (
        "import asyncio, steadyvsr\n"
        "print('from', steadyvsr.__file__)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "async def nodes():\n"
        "    return await (await steadyvsr.comfy_entrypoint()).get_node_list()\n"
        "print(*(node.define_schema().node_id for node in asyncio.run(nodes())))\n"
    )
    said = run_in(registry_install, program, ROOT / "tests" / "double")
    declared = json.loads((ROOT / "tests" / "node_schemas.json").read_text(encoding="utf-8"))
    assert set(said.splitlines()[-1].split()) == set(declared)
