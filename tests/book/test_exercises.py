"""Every exercise can be failed and can be solved: the stored outputs, which nbval compares, are the proof.

An exercise begins with `{exercise-start}` or `{exercise}` and its label; its cells reach to the next one. The stub, and
at least one plausible wrong answer, must be told "not yet"; in its folded solution an answer must pass.
"""
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "chapters").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
START = re.compile(r"\{exercise(?:-start)?\}.*?:label: (\S+)", re.DOTALL)
SOLUTION = re.compile(r"\{solution-start\}\s+(\S+)")


class Exercise(NamedTuple):
    label: str
    before: list[str]       # what attempts said before the solution
    inside: list[str]       # and within it


def exercises(path: Path) -> list[Exercise]:
    found, solving = [], False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and found:
            said = re.findall(r"^(?:passes|not yet\b)", "".join(o.get("text", "") for o in cell.outputs), re.MULTILINE)
            (found[-1].inside if solving else found[-1].before).extend(said)
            continue
        for mark in re.finditer(r"\{(?:exercise(?:-start)?|solution-start|solution-end)\}", cell.source):
            if "exercise" in mark[0]:
                found.append(Exercise(START.match(cell.source, mark.start())[1], [], []))
            solving = mark[0] == "{solution-start}"
            if solving:
                assert SOLUTION.match(cell.source, mark.start())[1] == found[-1].label, "a solution of another exercise"
    return found


@notebooks
def test_there_are_three_to_five(path):
    labels = [exercise.label for exercise in exercises(path)]
    assert 3 <= len(set(labels)) == len(labels) <= 5, labels


@notebooks
def test_the_stub_and_a_plausible_answer_fail_and_the_solution_passes(path):
    for label, before, inside in exercises(path):
        assert before and set(before) == {"not yet"}, f"{label}: the stub must fail, it says {before}"
        assert "passes" in inside, f"{label}: no solution that passes, it says {inside}"
        assert (before + inside).count("not yet") >= 2, f"{label}: no wrong answer but the stub fails"
