"""Which test reaches which line, and how long it takes, on the code as it is."""

import json
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import coverage
import pytest

from mutants.runs import Job, Plugin, run_jobs


class _Recorder(Plugin):
    """Runs at most ``cases`` cases of each test function, drawn at random, and notes what each reaches."""

    def __init__(self, cases: int, lines: coverage.Coverage) -> None:
        self.cases, self.lines, self.seconds = cases, lines, defaultdict(float)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        functions = defaultdict(list)
        for item in items:
            functions[item.nodeid.split("[")[0]].append(item)
        rng = random.Random(0)
        kept = {item for group in functions.values() for item in rng.sample(group, min(self.cases, len(group)))}
        items[:] = [item for item in items if item in kept]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.lines.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def _record(tree: Path, file: str, cases: int) -> tuple[int, dict[str, Any]]:
    """Run one file of tests: pytest's status; the seconds of each test; and by module and line the numbers of the tests
    that reach it, in the order of ``seconds``. A line that only the import reaches stands there without any.
    """
    lines = coverage.Coverage(data_file=None, include=[f"{tree}/kvlib/*"], config_file=False)
    recorder = _Recorder(cases, lines)
    lines.start()
    status = pytest.main(["-q", "-p", "no:cacheprovider", file], plugins=[recorder])
    lines.stop()
    data, reached = lines.get_data(), {}
    number = {test: i for i, test in enumerate(recorder.seconds)}
    for name in data.measured_files():
        by_line = data.contexts_by_lineno(name)
        reached[Path(name).stem] = {line: [number[test] for test in tests if test] for line, tests in by_line.items()}
    return status, {"seconds": recorder.seconds, "reached": reached}


def measure(kept: Path, files: list[str], trees: list[Path], cases: int) -> dict[str, Any]:
    """Which test reaches which line, and how long it takes, on the code as it is. Ends the program if a test fails."""
    if kept.exists():
        return json.loads(kept.read_text())
    start, failed = time.perf_counter(), []
    merged: dict[str, Any] = {"tests": [], "seconds": [], "reached": defaultdict(lambda: defaultdict(list))}

    def job(file: str) -> Job:
        part = trees[0].with_name(f"{file.replace('/', '-')}.json")

        def work(tree: Path) -> int:
            status, found = _record(tree, file, cases)
            part.write_text(json.dumps(found))
            return status

        def done(tree: Path, status: int, seconds: float) -> None:
            if status:
                failed.append(file)
                print(tree.with_suffix(".log").read_text(), file=sys.stderr)
                return
            found = json.loads(part.read_text())
            print(f"  {file}: {len(found['seconds'])} tests, {seconds:.0f} s", flush=True)
            for module, lines in found["reached"].items():
                for line, tests in lines.items():
                    merged["reached"][module][line] += [len(merged["tests"]) + test for test in tests]
            merged["tests"] += found["seconds"]
            merged["seconds"] += found["seconds"].values()

        return Job(work, done)

    run_jobs(map(job, files), trees)
    if failed:
        sys.exit(f"these tests fail without any change: {', '.join(failed)}")
    merged["wall"] = time.perf_counter() - start
    kept.write_text(json.dumps(merged))
    return merged
