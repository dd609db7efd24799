"""Every figure says what is to be seen, has a name of its own and is referred to; every explorable has a still one."""
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "chapters").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
WIDGET = "application/vnd.jupyter.widget-view+json"


def cells(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def shows(cell, kind: str) -> bool:
    return any(mime.startswith(kind) for output in cell.get("outputs", []) for mime in output.get("data", {}))


def figures(path: Path) -> list:
    return [cell for cell in cells(path) if shows(cell, "image/")]


@notebooks
def test_every_figure_has_a_caption_a_name_and_an_alt_text(path):
    assert len(figures(path)) >= 4
    for cell in figures(path):
        about = cell.metadata.get("mystnb", {})
        where = f"cell {cell.execution_count}"
        assert about.get("figure", {}).get("caption"), f"{where}: no caption"
        assert about["figure"].get("name"), f"{where}: no name"
        alt = about.get("image", {}).get("alt", "")
        assert len(alt.split()) >= 12, f"{where}: the alt text must say what is to be seen, it says {alt!r}"
        assert not re.match(r"(?:a |the )?(?:figure|image|picture) ", alt, re.IGNORECASE), f"{where}: {alt[:30]}"
        assert alt != about["figure"]["caption"], f"{where}: the alt text repeats the caption"


@notebooks
def test_every_figure_is_referred_to(path):
    text = "\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    text += "\n".join(cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "") for cell in figures(path))
    unused = [name for cell in figures(path) if f"{{numref}}`{(name := cell.metadata.mystnb.figure.name)}`" not in text]
    assert not unused, f"no text refers to {unused}"


def test_names_are_unique_in_the_book():
    names = [cell.metadata.mystnb.figure.name for path in NOTEBOOKS for cell in figures(path)]
    assert len(set(names)) == len(names) > 10, sorted(name for name in names if names.count(name) > 1)


@notebooks
def test_every_explorable_has_a_still_figure_beside_it(path):
    """For print, and for readers without JavaScript."""
    code = [cell for cell in cells(path) if cell.cell_type == "code"]
    places = [i for i, cell in enumerate(code) if shows(cell, WIDGET)]
    assert places, "a chapter without an explorable"
    for i in places:
        near = code[max(0, i - 2) : i + 3]
        assert any(shows(cell, "image/") for cell in near), f"cell {code[i].execution_count}: no still figure near it"
