"""`benchmarks/gpu.py` runs from end to end without a GPU, on sizes for the interpreter, and checks before it times."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")


def run(root, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(root / "benchmarks" / "gpu.py"), *options],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)},
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip


def test_every_part_runs_and_is_right(root, tmp_path):
    done = run(root, "--tiny", "--to", str(tmp_path / "tiny.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "tiny.json").read_text())
    assert record["device"] == "tiny" and record["versions"]["triton"] and record["date"]
    tables = record["tables"]
    assert set(tables) == {"copy", "decode", "codecs", "blocks", "prefill", "append"}
    assert {row["codec"] for row in tables["codecs"]} == {"bf16", "int8", "int4", "KIVI-4", "KIVI-2"}
    errors = [row["error"] for table in tables.values() for row in table if "error" in row]
    assert len(errors) >= 10 and 0 < max(errors) < 0.02
    assert all(row["sdpa_microseconds"] > 0 for row in tables["decode"])


def test_without_a_gpu_nothing_is_written(root):
    before = sorted((root / "benchmarks" / "results").iterdir())
    done = run(root)
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stderr
    assert sorted((root / "benchmarks" / "results").iterdir()) == before
