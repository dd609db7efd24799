"""Where each number in a chapter's text comes from.

    python tests/book/prose.py chapters/05_paging.ipynb         lists them all

A number in prose, in a caption or in an alt text is either *printed* by a cell of the page, *set* literally in the code
of one, or *cited*: its paragraph, list item or table row carries a citation.
Names that contain digits (int8, Llama-3-8B), code, formulas, years, and numbers of sections, chapters, figures and
Python versions are no claims and are left out. What remains is an orphan, unless it is excepted, with a reason, in
number_exceptions.toml.
"""
import io
import re
import sys
import tokenize
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat

EXCEPTIONS = Path(__file__).with_name("number_exceptions.toml")
NUMERAL = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?!\d)|\d+")
SCIENTIFIC = re.compile(r"(\d+(?:\.\d+)?)e[+-]?\d+")
CITATION = re.compile(r"\{cite(?::\w+)?\}`")
NOT_PROSE = [
    re.compile(r"\$\$.*?\$\$", re.DOTALL),                         # formulas
    re.compile(r"(?<!\\)\$[^$]+\$"),
    re.compile(r"\{[\w:+-]+\}`[^`]*`"),                             # roles: references, citations
    re.compile(r"``[^`].*?``|`[^`\n]+`"),                            # code
    re.compile(r"\]\([^)]*\)"),                                    # targets of links
    re.compile(r"\{\.[\w-]+\}"),
    re.compile(r"^\s*(?::::*|```+).*$", re.MULTILINE),             # borders of directives
    re.compile(r"^\s*:[\w-]+:.*$", re.MULTILINE),                  # and their options
    re.compile(r"^\s*\d+\.\s", re.MULTILINE),                      # markers of ordered lists
    re.compile(r"\b(?:section|sections|chapter|chapters|figure|fig\.|table|equation|part|appendix|version|python)\s+"
               r"\d+(?:\.\d+)*", re.IGNORECASE),
    re.compile(r"\b(?:19|20)\d\d\b(?![,.]\d)"),                    # years
    re.compile(r"\b\d+ minutes\b"),                                # of reading
]


class Origin(NamedTuple):
    """One number of the text. ``origin``: "printed", "set", "cited", "excepted", or "" for an orphan."""

    numeral: str
    origin: str
    where: str          # the text around it


def value(numeral: str) -> float:
    return float(numeral.replace(",", ""))


def numbers_in(text: str) -> set[float]:
    """Every number that can be read in a printed text, grouped digits as one."""
    found = {value(match) for match in NUMERAL.findall(text)}
    return found | {float(match) for match in SCIENTIFIC.findall(text)}


def numbers_set(source: str) -> set[float]:
    """Number literals of a cell's code; of 4.8e12 the 4.8 too."""
    found = set()
    code = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NUMBER and not token.string.lower().endswith("j"):
            text = token.string.replace("_", "").lower()
            found.add(float(int(text, 0)) if text.startswith(("0x", "0b", "0o")) else float(text))
            if "e" in text and not text.startswith("0x"):
                found.add(float(text.partition("e")[0]))
    return found


def printed(cell) -> str:
    """What a cell says in words, if that is compared. The labels of a figure do not count: they are not."""
    if "nbval-ignore-output" in cell.metadata.get("tags", []):
        return ""
    texts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts.append(output.evalue)
        else:
            texts.append(re.sub(r"^<Figure .*", "", output.data.get("text/plain", "")))
    return "\n".join(texts)


def blocks(markdown: str) -> list[str]:
    """Paragraphs, list items and table rows: as far as a citation reaches."""
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)|(?<=\|)\n(?=\|)|^#+ .*$", markdown, flags=re.MULTILINE)
    return [piece for piece in pieces if piece and piece.strip()] + re.findall(r"^#+ .*$", markdown, re.MULTILINE)


def claims(block: str) -> list[tuple[str, str]]:
    """(numeral, the text around it) for each number of a block that is no name."""
    for pattern in NOT_PROSE:
        block = pattern.sub(" ", block)
    block = re.sub(r"\s+", " ", block)
    found = []
    for match in NUMERAL.finditer(block):
        word = re.search(r"\S*$", block[: match.start()])[0]
        named = re.search(r"[A-Za-z]", word) and re.search(r"[\w./+-]$", word)      # int8, Llama-3-8B, v1.2
        if not named:
            found.append((match[0], block[max(0, match.start() - 40) : match.end() + 30].strip()))
    return found


def texts(notebook) -> list[str]:
    """Every block of prose, every caption and every alt text."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found += blocks(cell.source)
        else:
            about = cell.metadata.get("mystnb", {})
            found += [about[part][key] for part, key in (("figure", "caption"), ("image", "alt"))
                      if key in about.get(part, {})]
    return found


def exceptions(chapter: str) -> dict[str, str]:
    """{a piece of the chapter's text: why its numbers need no origin}"""
    return tomllib.loads(EXCEPTIONS.read_text(encoding="utf-8")).get(chapter, {})


def origins(notebook, excepted: dict[str, str]) -> list[Origin]:
    """Every number of a chapter's text, in the order in which it is read."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = set().union(*(numbers_in(printed(cell)) for cell in cells))
    given = set().union(*(numbers_set(cell.source) for cell in cells))
    found = []
    for block in texts(notebook):
        excused = {numeral for piece in excepted if piece in re.sub(r"\s+", " ", block)
                   for numeral, _ in claims(piece)}
        for numeral, where in claims(block):
            number = value(numeral)
            share = number / 100 if re.search(re.escape(numeral) + r"\s*%", where) else None
            if number in shown:
                origin = "printed"
            elif number in given or (share is not None and any(abs(share - other) < 1e-12 for other in given)):
                origin = "set"
            elif CITATION.search(block):
                origin = "cited"
            else:
                origin = "excepted" if numeral in excused else ""
            found.append(Origin(numeral, origin, where))
    return found


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        for numeral, origin, where in origins(nbformat.read(path, as_version=4), exceptions(path.stem)):
            print(f"{path.stem} | {numeral:>12} | {origin or 'ORPHAN':8} | {where}")


if __name__ == "__main__":
    main()
