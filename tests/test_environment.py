"""The set-up behind the README's two commands, run with a stand-in for the interpreter that records its calls."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not shutil.which("bash"), reason="needs a POSIX bash")

# Answers what environment.sh asks an interpreter. LACKS names the things that it has not: version, venv, torch, index;
# inner-torch is lacking in the new environment alone.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
lacks() { case " $LACKS " in *" $1 "*) exit 1 ;; esac; }
case "$*" in
    --version) echo "Python 3.8.1" ;;
    *version_info*) lacks version ;;
    *ensurepip*) lacks venv ;;
    *"import torch"*) case "$0" in *.venv/*) [ -e .venv/*.pth ] || lacks inner-torch ;; esac; lacks torch ;;
    *platlib*) case "$0" in *.venv/*) echo .venv ;; *) echo "/packages of the starter" ;; esac ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) lacks index ;;
esac
exit 0
"""


class Machine:
    """A copy of the scripts in a folder of its own, and an interpreter that lacks the things named."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        self.calls_file = folder / "calls"
        self.interpreter = folder / "python-stand-in"
        self.interpreter.write_text(STAND_IN)
        self.interpreter.chmod(0o755)
        shutil.copytree(ROOT / "scripts", self.folder / "scripts")
        for name in ("pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.folder)

    def run(self, script: str, *arguments: str, lacks: str = "", **environment: str) -> tuple[int, str, list[str]]:
        """Exit code, standard error, and the calls that the interpreters got."""
        self.calls_file.write_text("")
        base = {"PATH": "/usr/bin:/bin", "PYTHON": str(self.interpreter), "LACKS": lacks, "CALLS": str(self.calls_file)}
        command = ["bash", str(self.folder / "scripts" / script), *arguments]
        done = subprocess.run(command, env=base | environment, capture_output=True, text=True, timeout=60, cwd="/")
        return done.returncode, done.stderr, self.calls_file.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call.removeprefix("-m pip install ") for call in calls if call.startswith("-m pip install")]


def test_an_empty_machine_gets_torch_and_the_project(machine: Machine) -> None:
    code, _, calls = machine.run("test.sh", lacks="torch")
    assert code == 0
    assert "-m venv --clear .venv" in calls
    assert installs(calls) == ["torch==2.13.0", "--quiet --editable .[test]"]


def test_the_torch_of_the_interpreter_stays(machine: Machine) -> None:
    code, _, calls = machine.run("test.sh")
    assert code == 0
    assert "-m venv --clear --system-site-packages .venv" in calls
    assert installs(calls) == ["--quiet --editable .[test]"]


def test_the_torch_of_an_interpreter_in_an_environment_of_its_own_stays(machine: Machine) -> None:
    """There, --system-site-packages shows the packages of the base installation only."""
    code, _, calls = machine.run("demo.sh", lacks="inner-torch")
    assert (code, installs(calls)) == (0, ["--quiet --editable ."])
    assert [path.read_text() for path in (machine.folder / ".venv").glob("*.pth")] == ["/packages of the starter\n"]


def test_the_named_index_is_used_for_torch_alone(machine: Machine) -> None:
    _, _, calls = machine.run("demo.sh", lacks="torch", STEADYVSR_TORCH_INDEX="file:///an index")
    assert installs(calls) == ["--index-url file:///an index torch==2.13.0", "--quiet --editable ."]


def test_a_second_run_installs_nothing(machine: Machine) -> None:
    machine.run("demo.sh", lacks="torch")
    code, _, calls = machine.run("demo.sh", "--json", lacks="torch")
    assert (code, calls) == (0, ["-m steadyvsr demo --json"])


def test_a_changed_requirement_is_installed(machine: Machine) -> None:
    machine.run("demo.sh")
    with (machine.folder / "requirements.txt").open("a") as requirements:
        requirements.write("another\n")
    assert installs(machine.run("demo.sh")[2]) == ["--quiet --editable ."]


def test_the_tests_ask_for_their_own_extra_after_a_demo(machine: Machine) -> None:
    machine.run("demo.sh")
    assert installs(machine.run("test.sh")[2]) == ["--quiet --editable .[test]"]


def test_a_failed_installation_is_tried_again(machine: Machine) -> None:
    code, message, _ = machine.run("demo.sh", lacks="torch index")
    assert code == 1 and "torch==2.13.0 could not be installed" in message
    assert "torch==2.13.0" in installs(machine.run("demo.sh", lacks="torch")[2])


def test_an_old_interpreter_is_named(machine: Machine) -> None:
    code, message, _ = machine.run("demo.sh", lacks="version")
    assert code == 1 and "expected Python 3.10 or newer; got Python 3.8.1" in message


def test_a_missing_interpreter_is_named(machine: Machine) -> None:
    code, message, _ = machine.run("demo.sh", PYTHON="no-such-python")
    assert code == 1 and "'no-such-python'; found none" in message


def test_a_missing_venv_module_is_named(machine: Machine) -> None:
    code, message, _ = machine.run("demo.sh", lacks="venv")
    assert code == 1 and "venv module" in message


def test_the_exit_code_is_that_of_the_tests(machine: Machine) -> None:
    machine.run("test.sh")
    python = machine.folder / ".venv" / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\n[ "$2" != pytest ] || exit 5\n')
    assert machine.run("test.sh")[0] == 5
