"""What nbval cannot see: a cell without an execution count passes it vacuously, as does one tagged away."""
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "chapters").glob("*.ipynb"))
SKIPS = {"nbval-skip", "skip-execution", "remove-cell"}
IGNORES = {"nbval-ignore-output"}
COMMENT_MARKERS = re.compile(r"^\s*#\s*(NBVAL_SKIP|NBVAL_IGNORE_OUTPUT|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$",
                             re.MULTILINE)
KNOWN_TAGS = SKIPS | IGNORES | {
    "raises-exception", "nbval-raises-exception", "hide-input", "hide-output", "hide-cell", "remove-input",
    "remove-output", "remove-stderr", "remove-stdout", "margin", "full-width", "output_scroll",
}

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def test_there_are_chapters():
    assert len(NOTEBOOKS) >= 2


@notebooks
def test_every_code_cell_was_executed_in_order(path):
    counts = [c.execution_count for c in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), f"run `make notebooks`: execution counts are {counts}"


@notebooks
def test_no_cell_is_skipped_and_few_are_not_compared(path):
    cells = code_cells(path)
    skipped = [c.execution_count for c in cells if tags(c) & SKIPS]
    ignored = [c.execution_count for c in cells if tags(c) & IGNORES]
    marked = [c.execution_count for c in cells if COMMENT_MARKERS.search(c.source)]
    assert not skipped, f"cells {skipped} would not be executed by the tests"
    assert not marked, f"cells {marked} hide an nbval marker in a comment: use a tag"
    assert len(ignored) <= max(1, 0.05 * len(cells)), (
        f"{len(ignored)} of {len(cells)} outputs are not compared: {ignored}")


@notebooks
def test_tags_are_known(path):
    unknown = {tag for c in code_cells(path) for tag in tags(c)} - KNOWN_TAGS
    assert not unknown, f"misspelt, or unknown to nbval and to the book: {unknown}"


@notebooks
def test_no_error_is_stored_unless_it_is_meant(path):
    for cell in code_cells(path):
        errors = [o.ename for o in cell.outputs if o.output_type == "error"]
        if tags(cell) & {"raises-exception", "nbval-raises-exception"}:
            assert errors, f"cell {cell.execution_count} is tagged raises-exception and raised nothing"
        else:
            assert not errors, f"cell {cell.execution_count} ended in {errors}"


@notebooks
def test_widgets_are_alive_without_a_kernel(path):
    """interact and observe need a running kernel: in the built page their sliders would change nothing."""
    source = "\n".join(c.source for c in code_cells(path))
    found = re.findall(r"\binteract(?:ive|ive_output|_manual)?\s*\(|\.observe\s*\(", source)
    assert not found, f"dead in the built book: {found}"


@notebooks
def test_stored_form_is_normalised(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import refresh_notebooks

    stored = path.read_text(encoding="utf-8")
    assert refresh_notebooks.normalise(nbformat.reads(stored, as_version=4), path.stem) == stored, (
        f"run `python scripts/refresh_notebooks.py --keep-outputs chapters/{path.name}`")
