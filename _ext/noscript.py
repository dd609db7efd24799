"""Say where JavaScript is off, in the place of each explorable, that the still figure beside it shows the same."""
from sphinx.application import Sphinx

WIDGET = '<script type="application/vnd.jupyter.widget-view+json">'
NOTE = ('<noscript><p class="kv-noscript">Here is a figure that answers to your hand, and it needs JavaScript. '
        "The still figure beside it shows the same at rest.</p></noscript>")


def add_notes(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    if "body" in context:
        context["body"] = context["body"].replace(WIDGET, NOTE + WIDGET)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", add_notes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
