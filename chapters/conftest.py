"""Figures are looked at, not compared: nbval leaves out PNG by itself, and SVG because of this.

Where Triton cannot be installed (it exists for Linux only), the chapter that needs it is left out, and that is said.
"""
import importlib.util

WITHOUT_TRITON = importlib.util.find_spec("triton") is None
NEEDS_TRITON = "17_paged_kernel.ipynb"


def pytest_collectstart(collector) -> None:
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("image/svg+xml",)


def pytest_ignore_collect(collection_path, config) -> bool | None:
    return True if WITHOUT_TRITON and collection_path.name == NEEDS_TRITON else None


def pytest_report_header(config) -> str | None:
    return f"{NEEDS_TRITON} is not executed: Triton is not installed, it exists for Linux only" if WITHOUT_TRITON else None
