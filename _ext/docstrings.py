"""Read the docstring of a property as text.

Napoleon takes "Columns of V: none when V is a view of K" for "type: description" when it stands in the first
line of a property, so the colon is out of its sight while it reads.
"""
from sphinx.application import Sphinx

HIDDEN_COLON = "\ue000"
DESCRIBED_IN_ONE_LINE = ("attribute", "data", "property")


def hide_colon(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    if what in DESCRIBED_IN_ONE_LINE and lines:
        lines[0] = lines[0].replace(": ", HIDDEN_COLON + " ")


def show_colon(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", hide_colon, priority=100)      # Napoleon comes at 500
    app.connect("autodoc-process-docstring", show_colon, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
