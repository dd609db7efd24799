"""The committed files speak of the project alone: no path of somebody's machine, no host of a registry."""
import re
import subprocess

import pytest

MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:root|work|home/\w+|Users/\w+|tmp/\w+|var/folders)/[\w.]+")
REGISTRY = re.compile(r"registry\.(?:npmjs\.org|yarnpkg\.com)|pythonhosted\.org|pypi\.org/simple|file:///\w")


def committed_files(root) -> list:
    """What git tracks, and what it would track after `git add .`."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                           capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    return [root / name for name in names.stdout.split("\0") if name and (root / name).is_file()]


def text_of(path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry host"])
def test_no_committed_text_holds(pattern, root):
    found = [f"{path.relative_to(root)}:{number}: {match[0]}"
             for path in committed_files(root) if (text := text_of(path)) is not None
             for number, line in enumerate(text.splitlines(), 1) if (match := pattern.search(line))]
    assert not found, "\n".join(found)
