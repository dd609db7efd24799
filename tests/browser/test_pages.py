"""Every page, in light and in dark, in a browser that can reach nothing but the book."""
from pathlib import Path

import pytest
import yaml

from tests.browser.conftest import THEMES, WINDOW

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [CONTENTS["root"]] + [c["file"] for part in CONTENTS["parts"] for c in part["chapters"]]
PHONE = 390

UNLOADED_IMAGES = """async () => {
  const images = [...document.images];
  images.forEach((image) => (image.loading = "eager"));
  await Promise.allSettled(images.map((image) => image.decode()));
  return images.filter((image) => !image.naturalWidth).map((image) => image.src);
}"""
UNTYPESET_MATHS = """() => [...document.querySelectorAll(".math")]
  .filter((math) => !math.querySelector("mjx-container") || math.querySelector("mjx-merror"))
  .map((math) => math.textContent)"""


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", [*PAGES, "genindex"])
def test_page_is_whole(name, theme, server, visit):
    seen = visit(f"{server}{name}.html", theme)
    assert seen.page.locator("html").get_attribute("data-theme") == theme
    assert seen.page.locator("article h1").first.is_visible()
    assert seen.page.evaluate(UNLOADED_IMAGES) == []
    assert seen.page.evaluate(UNTYPESET_MATHS) == []
    assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= WINDOW
    seen.page.set_viewport_size({"width": PHONE, "height": 800})
    assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= PHONE, "scrolls sideways on a phone"
    seen.assert_quiet()


@pytest.mark.parametrize("name", [page for page in PAGES if (ROOT / f"{page}.ipynb").is_file()])
def test_page_makes_sense_without_javascript(name, server, browser):
    """No explorable then, but a note in its place, and every still figure."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{server}{name}.html", wait_until="load")
    notes = page.locator(".kv-noscript")
    assert notes.count() == page.locator('script[type$="widget-view+json"]').count() > 0
    assert all(note.is_visible() for note in notes.all())
    figures = page.locator("figure img")
    assert figures.count() >= 4 and all(image.is_visible() for image in figures.all())
    context.close()


def test_printed_explorables_keep_their_picture_and_lose_their_controls(server, visit):
    page = visit(f"{server}chapters/01_why_cache.html").page
    explorable = page.locator(".kv-explorable").first
    explorable.wait_for()
    page.emulate_media(media="print")
    assert explorable.locator("svg").first.is_visible()
    assert not explorable.locator(".kv-controls").first.is_visible()


def test_index_leads_to_the_introduction(server, visit):
    page = visit(f"{server}index.html").page
    page.wait_for_url(f"**/{CONTENTS['root']}.html")


def test_theme_switch_changes_the_colours(server, visit):
    page = visit(f"{server}{CONTENTS['root']}.html", "light").page
    ink = "getComputedStyle(document.documentElement).getPropertyValue('--kv-ink')"
    before = page.evaluate(ink)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert before and page.evaluate(ink) != before


@pytest.mark.parametrize("theme", THEMES)
def test_search_finds_a_word_of_the_book(theme, server, visit):
    seen = visit(f"{server}search.html?q=reference+count", theme)
    seen.page.locator("#search-results li a").first.wait_for()
    seen.assert_quiet()
