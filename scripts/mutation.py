"""Mutation testing: change kvlib in one place at a time, and see whether a test notices.

    python scripts/mutation.py                                    a sample of 320 mutants, on two processes
    python scripts/mutation.py --modules attention blocks --sample 40

Cosmic Ray's operators say what can be changed where. The sample draws places (an operator, a number, a comparison ...),
from each module in proportion to how many it has, and one change for each place: so the eleven other operators that
may stand for a plus sign do not count eleven times.

A first run, unchanged, of all test functions (at most ``--cases`` cases of each) records which test reaches which line.
A mutant is tested by tests that reach its statement: one case of each test function, the module's own tests and the
quick ones first, then other cases, until one fails or their recorded time adds up to ``--seconds``. So a survivor has
passed these; the whole suite may know better.

Results are kept in build/mutation for as long as kvlib and its tests stay as they are: an interrupted run goes on where
it stopped, and a larger sample contains the smaller one of the same seed. ``--write`` puts the result on record in
benchmarks/results/mutation.json.

Not mutated, because no test should notice: annotations; text (f-strings) in a raise statement; the body of __repr__;
strict= of zip, an assertion that holds; slots= of a dataclass; and == into `is` or back, which is the same for small
numbers and interned strings. Cosmic Ray changes no strings, so docstrings and messages stay as they are.
"""

import argparse
import ast
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
from mutants.baseline import measure
from mutants.places import Mutant, sample
from mutants.runs import Job, collect, copy_tree, run_jobs
from mutants.trial import choose, judge, verdict

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "mutation.json"
TESTS = ("tests/unit", "tests/conformance")
BACKENDS = {"arrays", "threads", "spec"}  # below the cache: NumPy or torch, and the shapes


def modules(package: Path, roots: tuple[str, ...] = ("cache", "prefix")) -> list[str]:
    """What the cache and its prefix index are made of: what they import of the package, and what that imports."""
    found, todo = set(), set(roots)
    while todo:
        found |= todo
        nodes = [node for name in todo for node in ast.walk(ast.parse((package / f"{name}.py").read_text()))]
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        todo = {name.removeprefix("kvlib.") for name in names if name.startswith("kvlib.")} - found - BACKENDS
    return sorted(found)


def run_mutants(
    mutants: list[Mutant], baseline: dict[str, Any], kept: Path, pristine: Path, trees: list[Path], budget: float
) -> dict[str, dict[str, Any]]:
    """What became of each mutant, by key. What stands in the file ``kept`` is not run again; the rest is appended."""
    results = {(r := json.loads(line))["key"]: r for line in kept.read_text().splitlines()} if kept.exists() else {}
    todo = [mutant for mutant in mutants if mutant.key not in results]

    def job(mutant: Mutant) -> Job:
        name = f"kvlib/{mutant.module}.py"
        source = (pristine / name).read_text(encoding="utf-8")
        tests = choose(mutant, source, baseline, budget)
        changes = difflib.unified_diff(source.splitlines(), mutant.code.splitlines(), lineterm="", n=0)
        result = {"key": mutant.key, "module": mutant.module, "diff": list(changes)[3:], "tests": len(tests)}

        def work(tree: Path) -> int:
            return judge(tree, {name: mutant.code}, tests) if tests else 0

        def done(tree: Path, status: int, seconds: float) -> None:
            shutil.copy2(pristine / name, tree / name)
            result["outcome"], result["by"] = verdict(status, tree.with_suffix(".log"))
            if mutant.operator == "nothing" and result["outcome"] != "survived":
                sys.exit(tree.with_suffix(".log").read_text() + f"{mutant.module}: its tests fail without any change")
            results[mutant.key] = result | {"seconds": round(seconds, 2)}
            with kept.open("a") as file:
                print(json.dumps(results[mutant.key]), file=file)
            if len(results) % 20 == 0 or result["outcome"] not in ("killed", "survived"):
                print(f"  {len(results)} of {len(mutants)}: {mutant.key} {result['outcome']}", flush=True)

        return Job(work, done)

    run_jobs(map(job, todo), trees)
    return results


def table(results: list[dict[str, Any]], places: Counter) -> dict[str, dict[str, Any]]:
    """By module and in all: places, mutants, those killed (of them by the time limit, or when the module is imported),
    survivors, and the share killed.
    """
    rows = {}
    for name in [*places, "all"]:
        mine = [result for result in results if name in (result["module"], "all")]
        count = Counter(result["outcome"] for result in mine)
        killed = count["killed"] + count["timed out"]
        rows[name] = {
            "places": places.total() if name == "all" else places[name],
            "mutants": count.total(),
            "killed": killed,
            "timed out": count["timed out"],
            "at import": sum(result["by"] == "import" for result in mine),
            "survived": count.total() - killed,
            "%": round(100 * killed / max(1, count.total()), 1),
        }
    return rows


def report(results: list[dict[str, Any]], places: Counter) -> dict[str, Any]:
    """Print what came out, and return it for the record."""
    rows = table(results, places)
    print(f"\n{'':12}" + "".join(f"{column:>10}" for column in rows["all"]))
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{value:>10}" for value in row.values()))
    print(f"\n{sum(r['seconds'] for r in results) / max(1, len(results)):.1f} s per mutant")
    listed = {
        outcome: [
            {"mutant": r["key"], "diff": r["diff"], "tests": r["tests"]} for r in results if r["outcome"] == outcome
        ]
        for outcome in ("survived", "timed out", "error")
    }
    for r in listed["survived"]:
        print(f"\n{r['mutant']} passed {r['tests']} tests", *r["diff"], sep="\n  ")
    return {"modules": rows, **listed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=320, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of tests for a mutant, as the baseline took them")
    parser.add_argument("--cases", type=int, default=50, help="of each test function, at most")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="default: cache, prefix, and what these import")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="files or folders")
    parser.add_argument("--write", action="store_true", help="put the result on record in benchmarks/results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children and copies go too
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run(options, Path(scratch))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")


def run(options: argparse.Namespace, scratch: Path) -> None:
    start = time.perf_counter()
    pristine = copy_tree(ROOT, scratch / "pristine")
    trees = [copy_tree(pristine, scratch / f"tree{i}") for i in range(options.processes)]
    files = [
        str(file.relative_to(pristine))
        for path in options.tests
        for file in sorted(pristine.glob(f"{path}/**/test_*.py")) or [pristine / path]
    ]
    state = hashlib.sha256(" ".join(files).encode())
    for file in sorted(pristine.glob("**/*.py")):
        state.update(file.read_bytes())
    folder = ROOT / "build" / "mutation" / state.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)

    names = options.modules or modules(pristine / "kvlib")
    sources = {name: (pristine / "kvlib" / f"{name}.py").read_text(encoding="utf-8") for name in names}
    mutants, places = sample(sources, options.sample, options.seed)
    print(f"{len(mutants)} mutants at {places.total()} places in {len(sources)} modules", flush=True)
    baseline = measure(folder / f"baseline-{options.cases}.json", files, trees, options.cases)
    run_jobs([Job(lambda tree: collect(files), lambda *_: None)] * len(trees), trees)
    print(f"unchanged: {len(baseline['tests'])} tests pass in {baseline['wall']:.0f} s, with coverage")

    kept = folder / f"results-{options.cases}-{options.seconds:g}.jsonl"
    unchanged = [mutant._replace(operator="nothing", code=sources[mutant.module]) for mutant in mutants]
    unchanged = list({mutant.module: mutant for mutant in unchanged}.values())
    run_mutants(unchanged, baseline, kept, pristine, trees, options.seconds)
    print(f"chosen tests pass unchanged, for each module; {time.perf_counter() - start:.0f} s so far")

    results = run_mutants(mutants, baseline, kept, pristine, trees, options.seconds)
    found = report([results[mutant.key] for mutant in mutants], places)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if options.write:
        RECORD.write_text(json.dumps(about(options, baseline) | found, indent=2) + "\n")


def about(options: argparse.Namespace, baseline: dict[str, Any]) -> dict[str, Any]:
    packages = ("cosmic-ray", "pytest", "hypothesis", "numpy", "torch")
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "seed": options.seed,
        "seconds of tests per mutant": options.seconds,
        "cases of each test function": options.cases,
        "tests": len(baseline["tests"]),
    }


if __name__ == "__main__":
    main()
