"""What all tests share: hypothesis profiles, what must be installed, the built book."""
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Where there is no GPU, Triton's kernels run in its interpreter; that is decided when Triton is first imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
# set by .ci/run: nothing may be skipped for want of a package or a browser
REQUIRE = os.environ.get("KVLIB_REQUIRE") == "1"

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True, max_examples=50,
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile("thorough" if os.environ.get("KVLIB_HYPOTHESIS") == "thorough" else "ci")


def pytest_sessionstart(session: pytest.Session) -> None:
    needed = ("torch", "transformers", "playwright")
    missing = ", ".join(name for name in needed if importlib.util.find_spec(name) is None)
    if REQUIRE and missing:
        pytest.exit(f"KVLIB_REQUIRE=1, but {missing} cannot be imported: run `make setup`", returncode=3)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def book_build(root):
    """The result of building the whole book anew, warnings as errors."""
    sys.path.insert(0, str(root / "scripts"))
    try:
        import build_book
    finally:
        sys.path.pop(0)
    return build_book.build(fresh=True)


@pytest.fixture(scope="session")
def book(book_build, root) -> Path:
    """The folder of the freshly built pages."""
    if book_build.returncode:
        pytest.fail("the book does not build, see tests/book/test_build.py")
    return root / "_build" / "html"
