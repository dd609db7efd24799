"""Serve everything from the book itself.

`_vendor/` (MathJax, the widget manager, fonts; put there by scripts/vendor.py) becomes static files. Listing
it under `html_static_path` in `_config.yml` instead would make Jupyter Book load every script on every page.
Thebe, which Jupyter Book always brings along and which runs code on a server elsewhere, stays out.
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


def leave_thebe_out(app: Sphinx, config) -> None:
    for event in ("env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners[event]):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", add_vendored_files)
    app.connect("config-inited", leave_thebe_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
