"""A chapter has the number that its file name begins with, though some between are not written yet.

Sphinx numbers the pages of a table of contents one after another. Once it has, this puts the file's own number in the
first place of every number of its sections and figures.
"""
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

LEADING = re.compile(r"(?:.*/)?(\d+)_[^/]*$")


def number_by_file(app: Sphinx, env: BuildEnvironment) -> list[str]:
    for page in env.found_docs:
        match = LEADING.match(page)
        if match and page in env.toc_secnumbers:
            renumber(env, page, int(match[1]))
    return []


def renumber(env: BuildEnvironment, page: str, chapter: int) -> None:
    def own(number: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return (chapter, *number[1:]) if number else number

    sections = env.toc_secnumbers[page]
    sections.update({anchor: own(number) for anchor, number in sections.items()})
    for titles in (env.titles, env.longtitles):
        if "secnumber" in titles[page]:
            titles[page]["secnumber"] = own(titles[page]["secnumber"])
    for reference in env.tocs[page].findall(nodes.reference):
        if "secnumber" in reference:
            reference["secnumber"] = own(reference["secnumber"])
    for figures in env.toc_fignumbers.get(page, {}).values():
        figures.update({figure: own(number) for figure, number in figures.items()})


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-get-updated", number_by_file, priority=900)        # Sphinx's own numbering comes at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
