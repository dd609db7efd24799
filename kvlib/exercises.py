"""Exercises: run a check on an answer without stopping the notebook."""

from collections.abc import Callable
from typing import Any


def attempt(check: Callable[[Any], str | None], answer: Any) -> None:
    """Print what ``check(answer)`` finds: "passes", with what the check returns, or "not yet" and the reason.

    A check raises AssertionError with a message that says what it expected and what came. Whatever else an answer
    raises is shown with its type.
    """
    try:
        said = check(answer)
    except AssertionError as error:
        print(f"not yet: {error}")
    except Exception as error:
        print(f"not yet: {type(error).__name__}: {error}")
    else:
        print(f"passes: {said}" if said else "passes")
