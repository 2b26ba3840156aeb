"""Fixtures of folder runs."""

from __future__ import annotations

import os
from multiprocessing import Pipe

import pytest
from steadyvsr.app.folder import process, worker
from steadyvsr.tests.app.folder_runs import WorkerThread


@pytest.fixture(autouse=True)
def importable(monkeypatch, package_environment):
    """Worker processes take over `sys.path`; the package must be found there, installed or not."""
    for folder in package_environment.get("PYTHONPATH", "").split(os.pathsep):
        if folder:
            monkeypatch.syspath_prepend(folder)


@pytest.fixture
def in_threads(monkeypatch):
    """Workers as threads of this process: a test can put a fault into them, and none has to import torch."""
    context = type("Context", (), {"Pipe": staticmethod(Pipe), "Process": WorkerThread})
    monkeypatch.setattr(process, "_context", context)
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda *_: None)
