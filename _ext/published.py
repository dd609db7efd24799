"""Link the pages to their repository when the book is built where one is known (GitHub Actions).

A build on your own machine has no repository to point to, so it shows no such buttons.
"""
import os

from sphinx.application import Sphinx


def link_repository(app: Sphinx, config) -> None:
    server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    if server and repository:
        config.html_theme_options |= {
            "repository_url": f"{server}/{repository}",
            "repository_branch": os.environ.get("GITHUB_REF_NAME", "main"),
            "use_repository_button": True,
            "use_issues_button": True,
        }


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", link_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
