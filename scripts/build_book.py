"""Build the book with warnings as errors, and say where it is.

--fresh reads every page again (the tests do that), instead of only what changed.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
INDEX = ROOT / "_build" / "html" / "index.html"


def command(fresh: bool) -> list[str]:
    book = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", ".",
            "--warningiserror", "--keep-going", "--quiet"]
    return [*book, "--all"] if fresh else book


def build(fresh: bool = False) -> subprocess.CompletedProcess:
    """Run Jupyter Book; its output is captured as text."""
    result = subprocess.run(command(fresh), cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        # a page that was read once is not read again, and its warning would not be seen the next time
        shutil.rmtree(ROOT / "_build" / ".doctrees", ignore_errors=True)
    return result


def main() -> None:
    result = build(fresh="--fresh" in sys.argv[1:])
    if result.returncode:
        said = COLOUR.sub("", result.stdout)
        warnings = [line for line in said.splitlines() if re.search("WARNING|ERROR", line)]
        sys.exit("\n".join(warnings or [said]) + "\nThe book was not built: mend what is said above.")
    pages = len(list(INDEX.parent.glob("chapters/*.html"))) + 1
    print(f"The book is built: {pages} pages. Open {INDEX.relative_to(ROOT)}\n  {INDEX.as_uri()}")


if __name__ == "__main__":
    main()
