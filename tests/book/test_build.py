"""The book builds without a warning, its links lead somewhere, and its pages load nothing from elsewhere."""
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import yaml

from tests.book.html_pages import read_page

CSS_URL = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")


def is_external(url: str) -> bool:
    return bool(urlsplit(url).netloc) or urlsplit(url).scheme not in ("", "data", "blob")


def pages(book: Path) -> list[Path]:
    """Every page, but not the templates that the theme leaves among the static files."""
    return sorted(path for path in book.rglob("*.html") if path.relative_to(book).parts[0] != "_static")


def test_book_builds_without_a_warning(book_build):
    assert book_build.returncode == 0, f"jupyter-book said:\n{book_build.stdout}"


def test_every_file_of_the_contents_has_a_page(book, root):
    contents = yaml.safe_load((root / "_toc.yml").read_text())
    names = [contents["root"]] + [c["file"] for part in contents["parts"] for c in part["chapters"]]
    missing = [name for name in names if not (book / f"{name}.html").is_file()]
    assert len(names) >= 7 and not missing, f"no page was built for {missing}"


def test_chapters_and_their_figures_have_the_number_of_the_file(book):
    """Though some between them are not written yet."""
    for path in (book / "chapters").glob("[0-9]*.html"):
        number, text = str(int(path.name[:2])), path.read_text(encoding="utf-8")
        assert f"<title>{number}. " in text
        figures = set(re.findall(r'caption-number">Figure (\d+)\.\d+', text))
        assert figures == {number}, f"{path.name}: figures of chapters {figures}"


def test_every_chapter_is_in_the_contents(root):
    contents = (root / "_toc.yml").read_text()
    absent = [path.name for path in (root / "chapters").glob("*.*")
              if path.suffix in (".ipynb", ".md") and f"chapters/{path.stem}\n" not in contents]
    assert not absent, f"not in _toc.yml: {absent}"


def test_every_module_is_in_the_api(root):
    page = (root / "chapters" / "api.md").read_text()
    described = set(re.findall(r"^### kvlib\.(\w+)$", page, re.MULTILINE))
    modules = {path.stem for path in (root / "kvlib").glob("*.py") if not path.stem.startswith("_")} | {"kernels"}
    assert described == modules - {"exercises", "plots"}        # of the book, and no part of the library


def test_links_and_images_inside_the_book_resolve(book):
    broken, checked = [], 0
    for path in pages(book):
        page = read_page(path)
        for url in (*page.links, *page.resources):
            if is_external(url) or url.startswith(("data:", "blob:")):
                continue
            file, anchor = urldefrag(url)
            target = (path.parent / unquote(urlsplit(file).path)).resolve() if file else path
            checked += 1
            if not target.is_file() or not target.is_relative_to(book.resolve()):
                broken.append(f"{path.relative_to(book)} -> {url}: no such file")
            elif anchor and target.suffix == ".html" and unquote(anchor) not in read_page(target).anchors:
                broken.append(f"{path.relative_to(book)} -> {url}: no such place in the page")
    assert checked > 100, "the checker found almost no links: is it reading the pages?"
    assert not broken, "\n".join(broken)


def test_pages_load_nothing_from_elsewhere(book):
    external = [f"{path.relative_to(book)}: {url}" for path in pages(book)
                for url in (*read_page(path).resources,
                            *(u for style in read_page(path).styles for u in CSS_URL.findall(style)))
                if is_external(url)]
    assert not external, "loaded from outside the book:\n" + "\n".join(external)


def test_style_sheets_load_nothing_from_elsewhere(book):
    sheets = sorted(book.rglob("*.css"))
    external = [f"{path.relative_to(book)}: {url}" for path in sheets
                for url in CSS_URL.findall(path.read_text(encoding="utf-8")) if is_external(url)]
    assert sheets and not external, "loaded from outside the book:\n" + "\n".join(external)


def test_pages_hold_no_path_of_this_machine(book, root):
    found = [f"{path.relative_to(book)}: {place}" for path in pages(book) for place in (str(root), sys.prefix)
             if place in path.read_text(encoding="utf-8")]
    assert not found, "\n".join(found)
