"""Execute notebooks in place and store them so that only what changed shows in a diff.

    python scripts/refresh_notebooks.py chapters/*.ipynb         execute, normalise, write what changed
    python scripts/refresh_notebooks.py --keep-outputs FILES     normalise only (after working in JupyterLab)

A notebook whose execution fails is left as it was. Normalised means: no timestamps, no version of the Python
that ran it, no scroll state, and widget ids that follow from the notebook's name instead of random ones.
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

ROOT = Path(__file__).resolve().parent.parent
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
ANSI = re.compile(r"\x1b\[[0-9;]*m")
NOISE = ("execution", "collapsed", "scrolled", "ExecuteTime", "jp-MarkdownHeadingCollapsed")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MODEL_REFERENCE = re.compile(r"IPY_MODEL_([0-9a-f]{32})")
SVG = "image/svg+xml"
SVG_DATE = re.compile(r"\s*<dc:date>[^<]*</dc:date>")


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int) -> None:
    """Run every cell in a fresh kernel of this Python, with the notebook's folder as working directory."""
    client = NotebookClient(notebook, timeout=timeout, record_timing=False, kernel_name="python3",
                            extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(folder)}})
    # this environment's kernel, whatever "python3" the user may have installed
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()


def normalise(notebook: nbformat.NotebookNode, name: str) -> str:
    """The text to store for a notebook: it follows from the sources and the outputs, not from the run."""
    notebook = nbformat.from_dict(notebook)
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE)
    kept = {"widgets": {WIDGET_STATE: widgets}} if widgets else {}
    notebook.metadata = nbformat.from_dict(METADATA | kept)
    for index, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k not in NOISE})
        cell.setdefault("id", stable_id(name, "cell", index)[:8])
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
        for output in cell.get("outputs", []):
            if output.output_type == "error":  # a traceback names files where they lie on this machine
                output.traceback = [line.replace(f"{ROOT}{os.sep}", "") for line in output.traceback]
            if SVG in output.get("data", {}):
                output.data[SVG] = SVG_DATE.sub("", output.data[SVG])
    notebook.nbformat_minor = 5
    if widgets:
        text = json.dumps(notebook)
        for index, model in enumerate(models_in_order(notebook, widgets["state"])):
            text = text.replace(model, stable_id(name, "widget", index))
        notebook = nbformat.from_dict(json.loads(text))
    return nbformat.writes(notebook, version=4) + "\n"


def merge_streams(outputs: list) -> list:
    """What a cell printed as one output: the kernel sends it in pieces that depend on the moment."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            merged.append(output)
    return merged


def models_in_order(notebook: nbformat.NotebookNode, state: dict) -> list[str]:
    """Widget models as the reader meets them: each one shown, what it refers to, then the rest by content."""
    order: dict[str, None] = {}

    def visit(model: str) -> None:
        if model in state and model not in order:
            order[model] = None
            for reference in MODEL_REFERENCE.findall(json.dumps(state[model], sort_keys=True)):
                visit(reference)

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            visit(output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id"))
    # a link between two widgets is shown nowhere
    for model in sorted(state, key=lambda m: MODEL_REFERENCE.sub("", json.dumps(state[m], sort_keys=True))):
        visit(model)
    return list(order)


def stable_id(*what: str | int) -> str:
    return hashlib.sha256("/".join(map(str, what)).encode()).hexdigest()[:32]


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
            message = ANSI.sub("", str(error))
            print(f"{path}: a cell failed, the file is as it was\n{message}", file=sys.stderr)
        else:
            print(f"{path}: {'updated' if changed else 'no change'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
