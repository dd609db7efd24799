"""One mutant on trial: the tests that are chosen for it, what runs them, and the verdict."""

import ast
import os
import random
import resource
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from mutants.places import Mutant
from mutants.runs import Plugin

MEMORY = 6 << 30  # bytes that a child may ask for on top: a mutant must not take the machine down
START_LIMIT = 60.0  # seconds for importing and collecting


def around(source: str, line: int) -> list[range]:
    """The lines of the statement that ``line`` belongs to (of a block its head alone), then of ever larger blocks."""
    ranges = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            body = getattr(node, "body", None)
            ends = [node.end_lineno, body[0].lineno - 1] if body else [node.end_lineno]
            ranges += [range(first, max(first, end) + 1) for end in ends]
    whole = range(1, source.count("\n") + 2)
    return sorted({r for r in ranges if line in r} | {whole}, key=len)


def choose(mutant: Mutant, source: str, baseline: dict[str, Any], budget: float) -> dict[str, float]:
    """The tests for a mutant, in order, with their seconds; none if no test and no import reaches it."""
    reached = baseline["reached"].get(mutant.module, {})
    near = around(source, mutant.place[0])
    if not any(str(line) in reached for line in near[0]):
        return {}
    found = ({test for line in lines for test in reached.get(str(line), ())} for lines in near)
    tests = sorted(next(filter(None, found), ()))
    cases = defaultdict(list)
    for test in random.Random(mutant.key).sample(tests, len(tests)):
        cases[baseline["tests"][test].split("[")[0]].append(test)
    order = [
        (turn, f"test_{mutant.module}" not in function, baseline["seconds"][test], baseline["tests"][test])
        for function, group in cases.items()
        for turn, test in enumerate(group)
    ]
    chosen, spent = {}, 0.0
    for *_, seconds, test in sorted(order):
        if spent + seconds <= budget:
            chosen[test] = seconds
            spent += seconds
    return chosen


class _Judge(Plugin):
    """Runs the chosen tests in their order, each under a time limit, and notes the first that fails."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.ran, self.failed = seconds, 0, None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.seconds if name in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # nobody handles the signal: it ends the process, even within C code
        signal.setitimer(signal.ITIMER_REAL, 10 + 5 * self.seconds[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = "import"


def judge(tree: Path, change: dict[str, str], seconds: dict[str, float]) -> int:
    """Put the texts of ``change`` in place, and run the tests named in ``seconds`` until one fails: pytest's status."""
    sys.dont_write_bytecode = True  # compiled mutants must not outlive their sources
    for name, text in change.items():
        (tree / name).write_text(text, encoding="utf-8")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT)
    plugin = _Judge(seconds)
    files = dict.fromkeys(name.split("::")[0] for name in seconds)
    # unit tests by themselves first: many mutants go no further, and the others take seconds to collect
    for stage in ([file for file in files if "/unit/" in file], [file for file in files if "/unit/" not in file]):
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *stage], plugins=[plugin]) if stage else 0
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            break
    print("failed:", plugin.failed)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and plugin.ran:
        return pytest.ExitCode.OK
    return status


def verdict(status: int, log: Path) -> tuple[str, str]:
    """Killed, timed out, survived or error, from a child's wait status and what it printed; and which test failed."""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return ("timed out" if name == "SIGALRM" else "killed"), name
    code = os.waitstatus_to_exitcode(status)
    if code == pytest.ExitCode.USAGE_ERROR:
        return "killed", "import"  # of a conftest
    if code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return "killed", log.read_text(errors="replace").rsplit("failed: ", 1)[-1].strip()
    return ("survived" if code == pytest.ExitCode.OK else "error"), ""
