"""Whether this machine can build the simulated card."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch.utils.cpp_extension as cpp_extension

COMPILERS = ("c++", "g++", "clang++")

# In a virtual environment that is not active, its ninja is not on PATH, where torch looks for it.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def missing() -> str:
    """What the build needs and is absent, in words; "" where all is there."""
    found = {"a C++ compiler": any(map(shutil.which, COMPILERS)), "ninja": cpp_extension.is_ninja_available()}
    return " and ".join(what for what, there in found.items() if not there)
