"""Serve `_vendor/` (MathJax, the widget manager, fonts; put there by scripts/vendor.py) as static files.

Listing the folder under `html_static_path` in `_config.yml` instead would make Jupyter Book load every
script in it on every page.
"""
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

VENDOR = Path(__file__).resolve().parent.parent / "_vendor"


def add_vendored_files(app: Sphinx, config) -> None:
    if not (VENDOR / ".complete").exists():
        raise ConfigError(f"{VENDOR.name}/ is missing or incomplete. Run `make setup` first.")
    config.html_static_path.append(str(VENDOR))
    config.html_css_files.append("fonts/fonts.css")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", add_vendored_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
