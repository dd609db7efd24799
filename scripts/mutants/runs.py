"""Jobs in forked children, each on a copy of the tree.

The parent imports NumPy, PyTorch and pytest once, and never kvlib: so a child starts in milliseconds, and imports the
kvlib that its own copy of the tree holds.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import ml_dtypes  # noqa: F401  imported here so that no child has to
import numpy  # noqa: F401
import pytest
import torch

COPIED = ("kvlib", "tests", "pyproject.toml")

torch.set_num_threads(1)


class Job(NamedTuple):
    """``work(tree)`` runs in a child, whose tree, wait status and wall time go to ``done``."""

    work: Callable[[Path], int]
    done: Callable[[Path, int, float], None]


def copy_tree(root: Path, target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(root / name, target)
    return target


def run_jobs(jobs: Iterable[Job], trees: list[Path]) -> None:
    """Run each job in a child of its own, one per tree at a time."""
    free, running = list(trees), {}

    def wait() -> None:
        pid, status = os.wait()
        job, tree, start = running.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a test may have started and a mutant not ended
        free.append(tree)
        job.done(tree, status, time.perf_counter() - start)

    try:
        for job in jobs:
            tree = free.pop()
            running[_fork(job.work, tree)] = job, tree, time.perf_counter()
            if not free:
                wait()
        while running:
            wait()
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)


def _fork(work: Callable[[Path], int], tree: Path) -> int:
    """The id of a child in which ``work`` runs, with what it prints in a file beside the tree."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        log = os.open(tree.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        status = work(tree)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = pytest.ExitCode.INTERNAL_ERROR
    finally:
        os._exit(int(status))


def collect(files: list[str]) -> int:
    """Let Python and pytest keep compiled files in this tree, which saves every mutant seconds."""
    return pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files])


class Plugin:
    """What all runs of pytest share: hypothesis that does not shrink, and kvlib from the copy of the tree."""

    def pytest_collection(self) -> None:
        quick = {"phases": [hypothesis.Phase.explicit, hypothesis.Phase.generate], "database": None}
        hypothesis.settings.register_profile("mutation", hypothesis.settings.default, **quick)
        hypothesis.settings.load_profile("mutation")

    def pytest_collection_finish(self) -> None:
        if kvlib := sys.modules.get("kvlib"):  # it is not there if a mutant cannot be imported
            assert Path(kvlib.__file__).is_relative_to(Path.cwd()), f"{kvlib.__file__} is not the copy"
