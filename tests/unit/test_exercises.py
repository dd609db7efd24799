"""`attempt` says which of three things happened, and never raises."""

import pytest

from kvlib.exercises import attempt


def check(answer):
    if answer() != 4:
        raise AssertionError(f"expected 4, got {answer()}")  # an assert statement, pytest would rewrite
    return "four"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: 4, "passes: four\n"),
        (lambda: 5, "not yet: expected 4, got 5\n"),
        (lambda: 1 / 0, "not yet: ZeroDivisionError: division by zero\n"),
        (None, "not yet: TypeError: 'NoneType' object is not callable\n"),
    ],
)
def test_what_is_said(answer, said, capsys):
    attempt(check, answer)
    assert capsys.readouterr().out == said


def test_a_check_that_returns_nothing(capsys):
    attempt(lambda answer: None, 1)
    assert capsys.readouterr().out == "passes\n"
