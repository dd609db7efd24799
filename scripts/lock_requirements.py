"""Resolve requirements.txt in a clean environment and write requirements.lock.

What depends on the machine stays out of the lock: torch's CUDA packages (pip adds them where torch asks for
them), the local part of a version ("2.13.0+cpu"), and pip itself.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = re.compile(r"^(nvidia-|cuda-)", re.IGNORECASE)
LINUX = '; platform_system == "Linux"'      # triton is built for nothing else
HEADER = """\
# Every package, for Python 3.11, 3.12 and 3.13. Written by `make lock` from requirements.txt.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(Path(folder, "bin", "python")), "-m", "pip"]
        subprocess.run([*pip, "install", "-qq", "--requirement", ROOT / "requirements.txt"], check=True)
        frozen = subprocess.run([*pip, "freeze", "--all", "--exclude", "pip"], check=True,
                                stdout=subprocess.PIPE, text=True).stdout.splitlines()
    lines = []
    for line in frozen:
        name, _, version = line.partition("==")
        if version and not CUDA.match(name):
            lines.append(f"{name}=={version.partition('+')[0]}" + (LINUX if name == "triton" else ""))
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"requirements.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
