"""Every explorable answers to the keyboard and to the mouse.

The contract of an explorable: its root has class `kv-explorable` and an attribute `data-state` that says what
it shows. Its controls are <input type=range|checkbox|radio|number>, <button> and <select>. A control that
would do nothing is disabled, or says that it is on already (aria-pressed, checked). A control that starts
something over time, such as "play", changes `data-state` at once.
"""
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
CONTROLS = "input, button, select"

# what the reader sees of it, leaving the controls themselves out
VISIBLE = """root => {
  const copy = root.cloneNode(true);
  copy.querySelectorAll("input, button, select").forEach((control) => control.remove());
  return copy.innerHTML + [...root.querySelectorAll("canvas")].map((c) => c.toDataURL()).join();
}"""
IDLE = """control => control.disabled || control.getAttribute("aria-pressed") === "true"
  || control.getAttribute("aria-checked") === "true" || (control.type === "radio" && control.checked)"""

NAMELESS = """controls => controls
  .filter((c) => !(c.labels?.length || c.ariaLabel || c.getAttribute("aria-labelledby") || c.title
    || (c.tagName === "BUTTON" && c.textContent.trim())))
  .map((c) => c.outerHTML)"""

DRAWN = "[...document.querySelectorAll('.widget-subarea > *')].filter((w) => w.childElementCount)"


def by_keyboard(control) -> None:
    control.focus()
    kind = control.evaluate("c => c.tagName === 'INPUT' ? c.type : c.tagName.toLowerCase()")
    if kind in ("range", "number"):
        at_end = control.evaluate("c => c.max !== '' && +c.value >= +c.max")
        up, down = ("ArrowRight", "ArrowLeft") if kind == "range" else ("ArrowUp", "ArrowDown")
        control.press(down if at_end else up)
    elif kind == "select":
        control.press("ArrowUp" if control.evaluate("c => c.selectedIndex === c.length - 1") else "ArrowDown")
    else:
        control.press("Space")


def by_mouse(control) -> None:
    control.scroll_into_view_if_needed()
    kind = control.evaluate("c => c.tagName === 'INPUT' ? c.type : c.tagName.toLowerCase()")
    if kind == "range":
        box = control.bounding_box()
        share = control.evaluate("c => (c.value - (c.min || 0)) / ((c.max || 100) - (c.min || 0))")
        y, mouse = box["y"] + box["height"] / 2, control.page.mouse
        mouse.move(box["x"] + box["width"] * (0.02 + 0.96 * share), y)
        mouse.down()
        mouse.move(box["x"] + box["width"] * (0.1 if share > 0.5 else 0.9), y, steps=5)
        mouse.up()
    elif kind in ("select", "number"):      # the list of a select is drawn by the system, outside the page
        if kind == "select":
            control.select_option(index=control.evaluate("c => (c.selectedIndex + 1) % c.length"))
        else:
            control.fill(control.evaluate("c => String(+c.value > +c.min ? +c.value - 1 : +c.value + 1)"))
    else:
        control.click()


def open_explorables(visit, address: str):
    seen = visit(address)
    roots = seen.page.locator(".kv-explorable")
    roots.first.wait_for()
    shown = seen.page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count()
    seen.page.wait_for_function(f"n => ({DRAWN}).length >= n", arg=shown)
    return seen, roots


def operate_all(root, act) -> None:
    """Operate every control once, those that are idle at first when another has woken them."""
    page = root.page
    waiting = list(range(root.locator(CONTROLS).count()))
    assert waiting, "an explorable without a control"
    while waiting:
        ready = [i for i in waiting if not root.locator(CONTROLS).nth(i).evaluate(IDLE)]
        assert ready, "never awake: " + ", ".join(
            root.locator(CONTROLS).nth(i).evaluate("c => c.outerHTML") for i in waiting)
        index = ready[0]
        control = root.locator(CONTROLS).nth(index)
        name = control.evaluate("c => c.outerHTML")
        before = root.get_attribute("data-state"), root.evaluate(VISIBLE)
        assert before[0] is not None, "an explorable without data-state"
        act(control)
        try:
            page.wait_for_function(
                f"([root, state, seen]) => root.dataset.state !== state && ({VISIBLE})(root) !== seen",
                arg=[root.element_handle(), *before], timeout=10_000)
        except Exception:
            after = root.get_attribute("data-state"), root.evaluate(VISIBLE)
            parts = zip(("data-state", "what the reader sees"), before, after, strict=True)
            same = " and ".join(part for part, old, new in parts if old == new)
            pytest.fail(f"{act.__name__} left {same} as it was: {name}")
        waiting.remove(index)


@pytest.mark.parametrize("act", [by_keyboard, by_mouse])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_explorables_answer(chapter, act, server, visit):
    seen, roots = open_explorables(visit, f"{server}chapters/{chapter}.html")
    nameless = roots.locator(CONTROLS).evaluate_all(NAMELESS)
    assert not nameless, f"a screen reader cannot say what these do: {nameless}"
    for index in range(roots.count()):
        operate_all(roots.nth(index), act)
    seen.assert_quiet()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_explorables_answer_from_a_file(chapter, book, visit):
    """The built book also works when its files are opened without any server."""
    seen, roots = open_explorables(visit, (book / "chapters" / f"{chapter}.html").as_uri())
    operate_all(roots.first, by_keyboard)
    assert not seen.foreign and not seen.failed, (seen.foreign, seen.failed)
