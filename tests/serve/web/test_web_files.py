"""What the page is made of, read without a browser: whole, nothing inline, colours that can be read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hasten.serve import app
from hasten.serve.app import CONTENT_SECURITY_POLICY, HEADERS, MEDIA_TYPES, assets

TEXTS = {url: asset.body.decode() for url, asset in assets().items()}
SCRIPTS = {url: text for url, text in TEXTS.items() if url.endswith(".js")}
STYLE = TEXTS["/web/style.css"]


class Elements(HTMLParser):
    """Every start tag of a document with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


HTML = Elements(TEXTS["/"]).found


def test_every_file_is_served_and_nothing_else() -> None:
    folder = Path(app.__file__).with_name("web")
    files = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {Path(name).suffix for name in files} <= set(MEDIA_TYPES), (
        "a file without a media type is not served"
    )
    assert set(assets()) == {"/" if name == "index.html" else f"/web/{name}" for name in files}
    assert sum(len(asset.body) for asset in assets().values()) < 100_000


def test_every_reference_is_one_of_the_files() -> None:
    referred = {
        f"/{value}" for _, attributes in HTML for name in ("src", "href") if (value := attributes.get(name))
    }
    referred -= {"/#prompt"}
    imported = {
        f"/web/{name}" for text in SCRIPTS.values() for name in re.findall(r'from "\./([^"]+)"', text)
    }
    assert referred | imported == set(assets()) - {"/"}


def test_nothing_comes_from_elsewhere() -> None:
    allowed = {"http://www.w3.org/2000/svg", "https://html.spec.whatwg.org/multipage/server-sent-events.html"}
    for url, text in TEXTS.items():
        addresses = set(re.findall(r"(?:https?:)?//[a-z0-9][\w.-]*\.[a-z]{2,}[^\s\"'`)]*", text)) - allowed
        assert not addresses, f"{url}: {addresses}"


def test_nothing_is_inline() -> None:
    for tag, attributes in HTML:
        assert tag != "style" and "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "script" or attributes.get("src"), "a script in the document itself"


@pytest.mark.parametrize("url", SCRIPTS)
def test_no_script_parses_markup_or_runs_text(url: str) -> None:
    markup = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|setHTML"
    )
    assert not re.search(rf"{markup}|\beval\b|new Function", SCRIPTS[url])


def test_the_policy_lets_nothing_in() -> None:
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert HEADERS["X-Content-Type-Options"] == "nosniff"


def test_every_control_has_a_label() -> None:
    labelled = {attributes.get("for") for tag, attributes in HTML if tag == "label"}
    for tag, attributes in HTML:
        if tag in ("input", "select", "textarea"):
            assert attributes.get("id") in labelled, attributes


def test_identifiers_are_single_and_exist() -> None:
    ids = [attributes["id"] for _, attributes in HTML if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {name for text in SCRIPTS.values() for name in re.findall(r'byId\("([^"]+)"\)', text)}
    assert used - {"undo"} <= set(ids)
    for name in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
        assert {attributes[name] for _, attributes in HTML if name in attributes} <= set(ids)


@pytest.mark.parametrize("url", [url for url in TEXTS if not url.endswith(".svg")])
def test_files_are_short(url: str) -> None:
    assert len(TEXTS[url].splitlines()) <= 300


COLOURS = {
    name: (light, dark)
    for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", STYLE)
}
PAIRS = [
    *(
        (text, ground, 4.5)
        for text in ("text", "quiet", "accent")
        for ground in ("ground", "raised", "sunken")
    ),
    ("text", "soft", 4.5),
    ("quiet", "soft", 4.5),
    ("bad", "bad-soft", 4.5),
    ("text", "bad-soft", 4.5),
    ("on-accent", "accent", 4.5),
    *(("edge", ground, 3.0) for ground in ("ground", "raised", "sunken")),  # edges of fields and buttons
]


def luminance(colour: str) -> float:
    """Relative luminance: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("front", "back", "least"), PAIRS)
def test_colours_can_be_told_apart(front: str, back: str, least: float, theme: int) -> None:
    low, high = sorted(luminance(COLOURS[name][theme]) for name in (front, back))
    contrast = (high + 0.05) / (low + 0.05)
    assert contrast >= least, f"{front} on {back}: {contrast:.2f}"


def test_the_page_asks_for_engine_figures_that_exist() -> None:
    from dataclasses import fields

    from hasten.engine.request import EngineStats

    read = set(re.findall(r'\bs\.at\(-1\)\.(\w+)|(?:gained|rate)\(s, "(\w+)"', SCRIPTS["/web/live.js"]))
    names = {name for pair in read for name in pair if name}
    assert len(names) >= 8
    assert names <= {field.name for field in fields(EngineStats)} | {"ttft_s_sum", "ttft_count"}
