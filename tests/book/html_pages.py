"""Read a built page: what it defines, what it links to, what a browser would fetch for it."""
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

# <link rel=...> that a browser does not fetch
NOT_FETCHED = {"author", "canonical", "help", "license", "next", "prev", "search"}


class Page(NamedTuple):
    anchors: frozenset[str]             # every id and name
    links: tuple[str, ...]              # href of <a> and <area>
    resources: tuple[str, ...]          # whatever is loaded: scripts, styles, images, frames, media
    styles: tuple[str, ...]             # style sheets and style attributes written in the page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.links, self.resources, self.styles = set(), [], [], []
        self.in_style = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        self.in_style = tag == "style"
        if "style" in given:
            self.styles.append(given["style"])
        if tag in ("a", "area"):
            if "href" in given:
                self.links.append(given["href"])
        elif tag == "link":
            if not NOT_FETCHED.intersection(given.get("rel", "").lower().split()):
                self.resources.append(given.get("href", ""))
        elif tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            self.links.append(given.get("content", "").partition("url=")[2].strip())
        elif tag == "use":
            self.resources += [given[name] for name in ("href", "xlink:href") if name in given]
        else:
            self.resources += [given[name] for name in ("src", "data", "poster") if name in given]
            if "srcset" in given:
                self.resources += [part.split()[0] for part in given["srcset"].split(",")]

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.styles.append(data)


@cache
def read_page(path: Path) -> Page:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return Page(frozenset(reader.anchors), tuple(reader.links), tuple(reader.resources), tuple(reader.styles))
