"""`pip install .` gives a working kvlib: its data files are in it, and NumPy is enough to import it."""
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

IMPORT = """
import json, sys
import kvlib
spec = kvlib.CacheSpec(num_kv_heads=1, head_dim=4, dtype="float32")
kvlib.KVCache(spec, batch=1, max_tokens=8)
print(json.dumps([kvlib.__file__, sorted({"torch", "transformers", "matplotlib"} & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """A wheel built from a copy, so that the build leaves nothing in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(root / "kvlib", source / "kvlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
                            "--wheel-dir", out, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("kvlib-*.whl"))


def test_wheel_holds_the_data_files(wheel, root):
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [path for folder in ("data", "widgets") for path in (root / "kvlib" / folder).rglob("*")]
    wanted = {path.relative_to(root).as_posix() for path in files
              if path.is_file() and "__pycache__" not in path.parts}
    assert len(wanted) > 4 and not wanted - packed


def test_wheel_imports_with_numpy_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    run = subprocess.run([sys.executable, "-c", first + IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    where, heavy = json.loads(run.stdout)
    assert where.startswith(str(tmp_path)) and heavy == []


def test_the_code_of_the_readme_runs(root, capsys):
    """As a newcomer would paste it: both pieces, one after the other."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    pieces = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(pieces) == 2
    names: dict = {}
    for piece in pieces:
        exec(piece, names)
    assert names["out"].shape == (1, 8, 1, 64)
    assert "KIVI-2" in capsys.readouterr().out
