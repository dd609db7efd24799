"""Build the book with warnings as errors, and say where it is.

--fresh reads every page again (the tests do that), instead of only what changed.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "_build" / "html" / "index.html"


def command(fresh: bool) -> list[str]:
    book = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", ".",
            "--warningiserror", "--keep-going", "--quiet"]
    return [*book, "--all"] if fresh else book


def build(fresh: bool = False) -> subprocess.CompletedProcess:
    """Run Jupyter Book; its output is captured as text."""
    # Jupyter Book colours its output even in a pipe
    return subprocess.run(command(fresh), cwd=ROOT, env=os.environ | {"NO_COLOR": "1", "COLUMNS": "100"},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    result = build(fresh="--fresh" in sys.argv[1:])
    if result.returncode:
        sys.exit(result.stdout + "\nThe book was not built: mend the warnings above.")
    pages = len(list(INDEX.parent.glob("chapters/*.html"))) + 1
    print(f"The book is built: {pages} pages. Open {INDEX.relative_to(ROOT)}\n  {INDEX.as_uri()}")


if __name__ == "__main__":
    main()
