"""Around the conversation, in a real Chromium: live figures, themes, narrow screens, keyboard and names."""

from __future__ import annotations

import pytest
from browser_chromium import Page
from browser_server import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.browser]

TALK = "document.querySelector('#conversation')"


def test_live_figures_follow_the_server(page: Page, server: StandIn) -> None:
    page.until("document.querySelectorAll('#figures polyline').length >= 6")
    shown = page.run(
        "Object.fromEntries([...document.querySelectorAll('.value')].map((e) => [e.id, e.textContent]))"
    )
    assert shown["figure-batch"] == "4" and shown["figure-queue"] == "3"
    assert (
        shown["figure-pages"] == "25 %" and shown["figure-hits"] == "50 %" and shown["figure-ttft"] == "40 ms"
    )
    assert 40 <= int(shown["figure-rate"]) <= 60
    assert page.text("#live-note").startswith("demo, up")
    page.run(
        "(() => { const choice = document.querySelector('#model');"
        " choice.value = 'other'; choice.dispatchEvent(new Event('change')); })()"
    )
    page.until("document.querySelector('#live-note').textContent.includes('not loaded')")
    assert page.text("#figure-batch") == "\u2013"


def test_figures_rest_while_nobody_looks(page: Page, server: StandIn) -> None:
    page.until("document.querySelector('#figure-batch').textContent === '4'")
    page.click("#panel-toggle")
    page.run("new Promise((done) => setTimeout(done, 300))")  # what was under way
    before = sum(url.endswith("/stats") for url in page.requests)
    page.run("new Promise((done) => setTimeout(done, 1500))")
    assert sum(url.endswith("/stats") for url in page.requests) == before
    page.click("#panel-toggle")
    page.until("!document.querySelector('#panel').hidden")
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert sum(url.endswith("/stats") for url in page.requests) > before


def test_a_server_without_figures_is_said_so(blank: Page, server: StandIn) -> None:
    server.script.stats = False
    blank.open(server.url)
    blank.until("document.querySelector('#live-note').textContent.startsWith('No figures')")


def ground(page: Page) -> str:
    return str(page.run("getComputedStyle(document.body).backgroundColor"))


def test_themes(page: Page, server: StandIn) -> None:
    page.prefer(prefers_color_scheme="light")
    light = ground(page)
    page.prefer(prefers_color_scheme="dark")
    dark = ground(page)
    assert light != dark
    page.click("#theme")
    assert page.run("document.querySelector('#theme').getAttribute('aria-label')") == "Theme: light"
    assert ground(page) == light
    page.open(server.url)
    assert ground(page) == light  # kept, and set before anything is drawn
    page.click("#theme")
    page.prefer(prefers_color_scheme="light")
    assert ground(page) == dark
    page.click("#theme")
    assert ground(page) == light


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, server: StandIn, width: int) -> None:
    page.resize(width, 700)
    wide = "A " + "longword" * 60 + "\n```\n" + "x" * 400 + "\n```\n|a|b|\n|-|-|\n|" + "c" * 300 + "|d|\n"
    server.script.pieces = [wide]
    page.type("wide " + "w" * 300)
    page.press("Enter")
    page.until("document.querySelector('.turn.assistant .figures')?.textContent")
    over = "document.documentElement.scrollWidth - innerWidth"
    assert page.run(over) <= 0
    inside = f"{TALK}.scrollWidth - {TALK}.clientWidth"
    assert page.run(inside) <= 0
    page.run("document.querySelector('#panel').hidden && document.querySelector('#panel-toggle').click()")
    assert page.run(over) <= 0


def test_the_message_box_grows_with_its_text(page: Page) -> None:
    height = "document.querySelector('#prompt').offsetHeight"
    single = page.run(height)
    page.type("many words " * 30)
    assert page.run(height) > 1.5 * single
    assert page.run("document.querySelector('#prompt').scrollHeight") < page.run(height)  # nothing to scroll
    page.type("line\n" * 100)
    assert page.run(height) <= 0.4 * 800
    page.run("document.querySelector('#prompt').select()")
    page.type("x")
    assert page.run(height) == single


def test_the_panel_covers_a_narrow_screen(page: Page) -> None:
    page.resize(390, 700)
    page.until("document.querySelector('#panel').hidden")
    expanded = "document.querySelector('#panel-toggle').getAttribute('aria-expanded')"
    assert page.run(expanded) == "false"
    page.click("#panel-toggle")
    covered = "getComputedStyle(document.querySelector('#composer')).display === 'none'"
    assert page.run(covered) and not page.run("document.querySelector('#panel').hidden")
    assert page.run(expanded) == "true"
    page.click("#panel-toggle")
    assert not page.run(covered)


def test_the_page_follows_the_end_unless_the_reader_left_it(page: Page, server: StandIn) -> None:
    server.script.pieces, server.script.pause_s = [f"line {n}\n\n" for n in range(80)], 0.02
    page.type("Write")
    page.press("Enter")
    gap = f"{TALK}.scrollHeight - {TALK}.scrollTop - {TALK}.clientHeight"
    page.until("document.querySelector('#conversation').scrollTop > 100")
    assert page.run(gap) < 48
    page.run("document.querySelector('#conversation').scrollTop = 0")
    page.until("!document.querySelector('#to-end').hidden")
    page.run("new Promise((done) => setTimeout(done, 200))")
    assert page.run("document.querySelector('#conversation').scrollTop") == 0
    page.click("#to-end")
    page.until(f"{gap} < 48 && document.querySelector('#to-end').hidden")
    page.press("Escape")
    page.resize(390, 400)  # a phone's keyboard comes up
    page.until(f"{gap} < 48")


def test_every_control_has_a_name(page: Page, server: StandIn) -> None:
    server.script.pieces = ["```python\nx\n```\n"]
    page.type("Hi")
    page.press("Enter")
    page.until("document.querySelector('.turn.assistant .figures')?.textContent")
    roles = {
        "button",
        "textbox",
        "spinbutton",
        "combobox",
        "link",
        "region",
        "complementary",
        "form",
        "group",
    }
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert len(found) > 25
    assert [pair for pair in found if not pair[1]] == []
    kinds = {node["role"]["value"] for node in nodes if not node["ignored"]}
    assert {"banner", "main", "complementary", "heading", "status"} <= kinds


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page: Page, server: StandIn) -> None:
    page.type("Hi")
    page.press("Enter")
    page.until("document.querySelector('[data-action=regenerate]')")
    page.run("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.press("Tab")
        where, outline = page.run(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " return [e.id || e.dataset.action || e.localName, s.outlineStyle + s.outlineWidth]; })()"
        )
        if where != "body":
            assert outline.startswith("solid") and not outline.endswith("solid0px"), where
        reached.add(where)
    controls = {
        "model",
        "new",
        "export",
        "theme",
        "panel-toggle",
        "conversation",
        "prompt",
        "temperature",
        "key",
    }
    assert controls | {"edit", "regenerate", "copy", "system", "format"} <= reached


def test_still_for_those_who_ask_for_it(page: Page, server: StandIn) -> None:
    server.script.pause_s = 0.5
    page.prefer(prefers_reduced_motion="reduce")
    page.type("Hi")
    page.press("Enter")
    page.until("document.querySelector('[aria-busy]')")
    style = "getComputedStyle(document.querySelector('[aria-busy] .body'), '::after').animationName"
    assert page.run(style) == "none"
    page.prefer(prefers_reduced_motion="no-preference")
    assert page.run(style) == "blink"
