"""The house rules: what imports what, how long a module may be, and how little `import kvlib` brings in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "kvlib"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
MODULES["kernels"] = PACKAGE / "kernels"  # a package: its files are one module here

# From the bottom up. The core: a module may import what stands before it, and nothing else of kvlib.
CORE = [
    "spec",
    "threads",
    "arrays",
    "attention",
    "blocks",
    "planes",
    "integers",
    "floatbits",
    "minifloat",
    "float4",
    "rotation",
    "codecs",
    "storage",
    "tail",
    "eviction",
    "tables",
    "sight",
    "kernels",
    "tiling",
    "retention",
    "attending",
    "writing",
    "rollback",
    "reading",
    "checks",
    "cache",
    "catalogue",
]
# On top of it, in the order in which they may know each other; modules that are not named here may not
# form circles.
ABOVE = [
    "prefix",
    "prefill",
    "peak",
    "memory",
    "swap",
    "serving",
    "metrics",
    "scheduler",
    "steps",
    "groups",
    "rope",
    "families",
    "settings",
    "parts",
    "config",
    "ops",
    "heads",
    "feedforward",
    "checkpoint",
    "model",
    "generation",
    "engine",
    "simulation",
    "registry",
    "footprint",
    "comparison",
    "sizing",
    "devices",
    "roofline",
    "plots",
    "widgets",
]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports; those inside functions too, unless
    ``top_level_only``. Of a package, what all of its files import from elsewhere, or what importing it brings in.
    """
    if path.is_dir() and not top_level_only:
        found = set().union(*map(imports, path.glob("*.py")))
        return {name for name in found if not name.startswith(f"kvlib.{path.name}")}
    if path.is_dir():
        path = path / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            names |= (
                {f"kvlib.{alias.name}" for alias in node.names} if node.module == "kvlib" else {node.module}
            )
    return names


def neighbours(path: Path) -> set[str]:
    """The modules of kvlib that a module imports."""
    parts = (name.split(".") for name in imports(path))
    return {part[1] for part in parts if part[0] == "kvlib" and part[1] in MODULES}


def test_there_is_something_to_check():
    assert set(CORE) - {"eviction"} <= set(MODULES)
    assert neighbours(MODULES["cache"]) >= {"spec", "arrays", "storage"}


@pytest.mark.parametrize("module", [m for m in CORE if m in MODULES])
def test_the_core_imports_downwards(module):
    assert neighbours(MODULES[module]) <= set(CORE[: CORE.index(module)])


@pytest.mark.parametrize("module", [m for m in ABOVE if m in MODULES])
def test_the_rest_imports_downwards(module):
    assert not neighbours(MODULES[module]) & set(ABOVE[ABOVE.index(module) :])


def test_no_circles():
    below = {name: neighbours(path) for name, path in MODULES.items()}
    while below:
        ground = {name for name, needs in below.items() if not needs & below.keys()}
        assert ground, f"these import each other in a circle: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in ground}


@pytest.mark.parametrize("module", [m for m in CORE if m in MODULES])
def test_the_core_needs_numpy_alone(module):
    """Whatever else it uses is imported where it is used."""
    outside = {name.partition(".")[0] for name in imports(MODULES[module], top_level_only=True)}
    assert outside - set(sys.stdlib_module_names) <= {"numpy", "kvlib"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_a_module_can_be_read_in_one_sitting(path):
    """About 250 lines is the aim, 300 the limit."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_kvlib_brings_in_numpy_and_nothing_else():
    out = python(
        "import sys, numpy; before = set(sys.modules); import kvlib\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert set(out.split()) - set(sys.stdlib_module_names) == {"kvlib"}


def test_works_with_numpy_alone():
    """torch and the other extras cannot be imported; caches in float32 and float16 work all the same."""
    extras = [
        "torch",
        "array_api_compat",
        "ml_dtypes",
        "safetensors",
        "transformers",
        "matplotlib",
        "anywidget",
        "tqdm",
    ]
    out = python(f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
import kvlib
for name, settings in kvlib.CATALOGUE.items():
    for dtype in ("float32", "float16"):
        cache = kvlib.KVCache(kvlib.CacheSpec(2, 32, dtype=dtype), batch=2, max_tokens=64, **settings)
        k = np.ones((2, 2, 40, 32), dtype)
        cache.append(k, k * 3)
        assert np.allclose(cache.attend(k), 3, rtol=5e-3)
        assert cache.read(0)[0].shape == (2, 40, 32)
for backend, dtype, message in (
    ("torch", "float32", "needs torch"),
    ("numpy", "bfloat16", "needs the package ml_dtypes"),
):
    try:
        kvlib.KVCache(kvlib.CacheSpec(2, 8, dtype=dtype), backend=backend)
    except ImportError as error:
        assert message in str(error), error
        print(backend, dtype)
    else:
        raise AssertionError(backend)
""")
    assert out.split() == ["torch", "float32", "numpy", "bfloat16"]
