"""Execute notebooks in place and store them so that only what changed shows in a diff.

    python scripts/refresh_notebooks.py chapters/*.ipynb             execute, normalise, write what changed
    python scripts/refresh_notebooks.py --keep-outputs FILES         normalise only (after working in JupyterLab)

A notebook whose execution fails is left as it was. Normalised means: no timestamps, no version of the Python that
ran it, no scroll state, and the random ids of the widgets replaced by ones that follow from the notebook's name.
"""
import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NOISE = ("execution", "collapsed", "scrolled", "ExecuteTime", "jp-MarkdownHeadingCollapsed")
SVG_DATE = re.compile(r"\s*<dc:date>[^<]*</dc:date>")


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int) -> None:
    """Run every cell in a fresh kernel of this Python, with the notebook's folder as working directory."""
    client = NotebookClient(notebook, timeout=timeout, record_timing=False, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})
    # this environment's kernel, whatever "python3" the user may have installed
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()


def normalise(notebook: nbformat.NotebookNode, name: str) -> str:
    """The text to store for a notebook, which follows from its sources and outputs alone."""
    notebook = nbformat.from_dict(notebook)
    kept = {WIDGET_STATE: widgets} if (widgets := notebook.metadata.get("widgets", {}).get(WIDGET_STATE)) else {}
    notebook.metadata = nbformat.from_dict(METADATA | ({"widgets": kept} if kept else {}))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k not in NOISE})
        cell.setdefault("id", stable_id(f"{name}/cell/{index}")[:8])
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if isinstance(data.get("image/svg+xml"), str):
                data["image/svg+xml"] = SVG_DATE.sub("", data["image/svg+xml"])
    text = nbformat.writes(notebook, version=4)
    for index, model in enumerate(widgets_in_order(widgets, text) if kept else []):
        text = text.replace(model, stable_id(f"{name}/widget/{index}"))
    return text + "\n"


def widgets_in_order(widgets: dict, text: str) -> list[str]:
    """Model ids in the order in which the kernel made them (the order of the stored state)."""
    return [model for model in widgets["state"] if model in text]


def stable_id(what: str) -> str:
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def refresh(path: Path, keep_outputs: bool, timeout: int) -> bool:
    """Bring one notebook up to date; True if the file changed."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    if not keep_outputs:
        notebook.metadata.pop("widgets", None)
        execute(notebook, path.parent, timeout)
    after = normalise(notebook, path.stem)
    if after == before:
        return False
    partial = path.with_suffix(".partial")
    partial.write_text(after, encoding="utf-8")
    os.replace(partial, path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--keep-outputs", action="store_true", help="normalise only, execute nothing")
    parser.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="limit for one cell")
    options = parser.parse_args()
    failed = False
    for path in options.notebooks:
        try:
            changed = refresh(path, options.keep_outputs, options.timeout)
        except CellExecutionError as error:
            failed = True
            print(f"{path}: a cell failed, the file is as it was\n{error}", file=sys.stderr)
        else:
            print(f"{path}: {'updated' if changed else 'no change'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
