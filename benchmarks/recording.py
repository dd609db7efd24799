"""What every results file says about the run behind it, and how it is written: whole or not at all."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import kvlib

RESULTS = Path(__file__).parent / "results"


def save(name: str | Path, content: dict[str, Any], packages: tuple[str, ...] = ("numpy",)) -> Path:
    """Write results/``name``: date, machine and versions, then ``content``."""
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": kvlib.threads.num_threads(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            "kvlib": kvlib.__version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"{name}.part"
    part.write_text(json.dumps(about | content, indent=1) + "\n")
    return part.replace(RESULTS / name)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Aligned columns: text to the left, numbers, given as text, to the right; None is a dash."""
    cells = [["–" if cell is None else str(cell) for cell in row] for row in [header, *rows]]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        first, *others = (cell.rjust(size) for cell, size in zip(row, sizes, strict=True))
        print("  ".join([first.strip().ljust(sizes[0]), *others]))
