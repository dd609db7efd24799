"""Every number in the text of a chapter is printed by a cell, set in one, or cited."""
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.book.prose import exceptions, origins

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "chapters").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@notebooks
def test_every_number_has_an_origin(path):
    found = origins(nbformat.read(path, as_version=4), exceptions(path.stem))
    orphans = [f"{numeral}: … {where} …" for numeral, origin, where in found if not origin]
    assert len(found) > 20, "hardly a number was found: is the chapter being read?"
    assert not orphans, "printed by no cell, set in none and without a citation:\n" + "\n".join(orphans)


@notebooks
def test_no_exception_is_superfluous(path):
    notebook, excepted = nbformat.read(path, as_version=4), exceptions(path.stem)
    for piece in excepted:
        fewer = {key: why for key, why in excepted.items() if key != piece}
        assert any(not found.origin for found in origins(notebook, fewer)), f"not needed (any longer): {piece!r}"


def test_exceptions_are_few_and_for_chapters():
    counts = {path.stem: len(exceptions(path.stem)) for path in NOTEBOOKS}
    assert max(counts.values()) <= 6, counts


def notebook(text: str, source: str = "x = 1", output: str = ""):
    outputs = [new_output("stream", text=output)] if output else []
    return new_notebook(cells=[new_markdown_cell(text), new_code_cell(source, outputs=outputs)])


@pytest.mark.parametrize(("text", "source", "output", "expected"), [
    ("It takes 131,072 bytes.", "", "bytes: 131072\n", ["printed"]),
    ("It takes 7.34 times more.", "", "ratio 7.3400\n", ["printed"]),
    ("It takes 7.35 times more.", "", "ratio 7.34\n", [""]),
    ("It is 92 % wrong.", "", "92% wrong\n", ["printed"]),
    ("Blocks of 16 tokens.", "block_size = 16", "", ["set"]),
    ("It reads 4.8 TB.", "rate = 4.8e12", "", ["set"]),
    ("The last 5 % of it.", "share = 0.05", "", ["set"]),
    ("The paper has 96.3 % {cite:p}`kwon2023`.", "", "", ["cited"]),
    ("The paper {cite:p}`kwon2023`.\n\nIt has 96.3 %.", "", "", [""]),
    ("- one {cite}`a` 17\n- another 18", "", "", ["cited", ""]),
    ("| a | 17 {cite}`a` |\n| b | 18 |", "", "", ["cited", ""]),
    ("Llama-3-8B in int8 on an H200, `x[3]`, $2n$, in 2023, see section 4.2 and chapter 7.", "", "", []),
    ("1. first\n2. second", "", "", []),
    ("# Of 48 layers", "", "", [""]),
    ("Between 16–128 and 4/3/2 bits", "sizes = 16, 128, 4", "", ["set", "set", "set", "", ""]),
])
def test_the_origin_of_a_number(text, source, output, expected):
    assert [found.origin for found in origins(notebook(text, source, output), {})] == expected


def test_an_exception_excuses_its_own_numbers_only():
    found = origins(notebook("It has 720 orders and 721 others."), {"has 720 orders": "6 factorial"})
    assert [x.origin for x in found] == ["excepted", ""]
