"""The Markdown renderer in a real Chromium: what it draws, what it refuses, its linear time."""

from __future__ import annotations

import json
import random
import re

import pytest
from browser_chromium import Page

pytestmark = [pytest.mark.slow, pytest.mark.browser]

MADE = {
    "p",
    "h4",
    "h5",
    "h6",
    "ul",
    "ol",
    "li",
    "blockquote",
    "hr",
    "strong",
    "em",
    "del",
    "code",
    "pre",
    "a",
}
MADE |= {"figure", "figcaption", "button", "span", "div", "table", "thead", "tbody", "tr", "th", "td"}

RENDER = """
(async () => {
  const { render } = await import(new URL("web/markdown.js", document.baseURI));
  const place = document.createElement("div");
  for (const text of %s) render(place, text);
  return %s;
})()
"""


def drawn(page: Page, *texts: str, give: str = "place.innerHTML") -> str:
    """HTML of a text; several are drawn one after another into the same place."""
    html = str(page.run(RENDER % (json.dumps(texts), give)))
    return re.sub(r' (class|tabindex|role|target|rel|aria-label|type|data-copy|scope)="[^"]*"', "", html)


CASES = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "## A\n#### B\n### C\n# D": "<h4>A</h4><h5>B</h5><h5>C</h5><h4>D</h4>",
    "**a** *b* ~~c~~ `d` __e__ _f_": "<p><strong>a</strong> <em>b</em> <del>c</del> <code>d</code>"
    " <strong>e</strong> <em>f</em></p>",
    "***both*** a * b * c snake_case_name 2**3": "<p><strong><em>both</em></strong>"
    " a * b * c snake_case_name 2**3</p>",
    r"\*not\* `a\*b` ``x`y``": "<p>*not* <code>a\\*b</code> <code>x`y</code></p>",
    "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "| a | b |\n|---|--:|\n| 1 | `x` |": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td>1</td><td><code>x</code></td></tr></tbody></table></div>",
    "[a](https://x.org/b_(c)) <https://y.org>.": '<p><a href="https://x.org/b_(c)">a</a>'
    ' &lt;<a href="https://y.org/">https://y.org</a>&gt;.</p>',
    "![cat](https://x.org/cat.png)": '<p><a href="https://x.org/cat.png">cat</a></p>',
    "[a](/local) [b](javascript:x) [c](data:a,x)": "<p>a (/local) b (javascript:x) c (data:a,x)</p>",
    "": "",
}


@pytest.mark.parametrize("text", CASES)
def test_it_draws(quiet_page: Page, text: str) -> None:
    assert drawn(quiet_page, text) == CASES[text]


def test_code_keeps_every_character(quiet_page: Page) -> None:
    code = "if a < b & c:\n\n    print('`x`')  # **not strong**"
    assert drawn(quiet_page, f"```python\n{code}\n```", give="place.querySelector('pre').textContent") == code
    assert (
        drawn(quiet_page, f"~~~\n{code}", give="place.querySelector('pre').textContent") == code
    )  # still open
    inside = "1. x\n\n   ```\n   a\n     b\n   ```\n2. y"
    assert drawn(quiet_page, inside, give="place.querySelector('ol > li pre').textContent") == "a\n  b"


HOSTILE = [
    "<script>window.hit = 1</script>",
    '<img src=x onerror="window.hit = 1">',
    "<svg/onload=window.hit=1>",
    "[x](javascript:window.hit=1)",
    "[x](JaVaScRiPt:window.hit=1)",
    "[x](java\tscript:window.hit=1)",
    "[x](\x01javascript:window.hit=1)",
    "[x](data:text/html,<script>window.hit=1</script>)",
    "[x](vbscript:x)",
    '[x](https://a.org/"onmouseover="window.hit=1)',
    "![x](https://a.org/track.gif)",
    "```html\n<script>window.hit = 1</script>\n```",
    '```" onclick="window.hit=1\nx\n```',
    "| <b>a</b> |\n|---|\n| <iframe src=//a.org> |",
    "<style>*{display:none}</style><base href=//a.org><meta http-equiv=refresh content=0>",
    "`<img src=x onerror=window.hit=1>`",
]


def test_hostile_text_stays_text(quiet_page: Page) -> None:
    before = len([url for url in quiet_page.requests if "a.org" in url])
    for text in HOSTILE:
        script = "document.body.append(place), [...place.querySelectorAll('*')]"
        names = quiet_page.run(RENDER % (json.dumps([text]), f"({script}).map((e) => e.localName)"))
        assert set(names) <= MADE, text
        attributes = RENDER % (
            json.dumps([text]),
            "[...place.querySelectorAll('*')].flatMap((e) => [...e.attributes])"
            ".map((a) => a.name + '=' + a.value)",
        )
        for attribute in quiet_page.run(attributes):
            assert not attribute.startswith(("on", "src", "style")), (text, attribute)
            assert not attribute.startswith("href=") or re.match("href=(https?|mailto):", attribute), (
                text,
                attribute,
            )
    assert quiet_page.run("window.hit") is None
    assert len([url for url in quiet_page.requests if "a.org" in url]) == before, "something was fetched"


def test_the_browser_itself_refuses_markup(quiet_page: Page) -> None:
    assert (
        quiet_page.run(
            "(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } })()"
        )
        == "TypeError"
    )


PARTS = [
    "# ",
    "- ",
    "1. ",
    "> ",
    "```",
    "\n",
    "\n\n",
    "**",
    "*",
    "_",
    "`",
    "[a](",
    "https://x.org",
    ")",
    "| a |",
    "---",
]
PARTS += ["word", " ", "  ", "\\", "~~", "!["]


def test_streaming_ends_where_drawing_at_once_does(quiet_page: Page) -> None:
    chance = random.Random(3)
    for _ in range(40):
        pieces = [chance.choice(PARTS) for _ in range(40)]
        prefixes = ["".join(pieces[:end]) for end in range(1, len(pieces) + 1)]
        assert drawn(quiet_page, *prefixes) == drawn(quiet_page, prefixes[-1]), repr(prefixes[-1])


def test_a_finished_block_is_not_drawn_again(quiet_page: Page) -> None:
    script = """
    (async () => {
      const { render } = await import(new URL("web/markdown.js", document.baseURI));
      const place = document.createElement("div");
      render(place, "one\\n\\n```\\nx");
      const [first, code] = place.children;
      render(place, "one\\n\\n```\\nx\\ny\\n```\\n\\nend");
      const same = place.children[0] === first && place.children[1] === code;
      return same && code.querySelector("code").textContent;
    })()
    """
    assert quiet_page.run(script) == "x\ny"


LONG = 60_000
ATTACKS = [
    "*",
    "**",
    "_",
    "`",
    "[",
    "](",
    "![a](",
    "[a](b",
    "~~",
    "> ",
    "- ",
    "1. ",
    "#",
    "|",
    "|-",
    "a|b\n-|-\n",
]
ATTACKS += [
    "https://",
    "\\",
    "*a ",
    "_a ",
    "`a``",
    "[](x ",
    "- - ",
    "* ",
    " ",
    "~~~",
    "\n",
    "a\n",
    "<",
    "https://x.org..",
    "|  ",
]


def test_time_is_linear(quiet_page: Page) -> None:
    texts = [attack * (LONG // len(attack)) + end for attack in ATTACKS for end in ("", "x`")]
    each = """
    (async () => {
      const { render } = await import(new URL("web/markdown.js", document.baseURI));
      return %s.map((text) => {
        const start = performance.now();
        render(document.createElement("div"), text);
        return performance.now() - start;
      });
    })()
    """
    times = dict(zip(texts, quiet_page.run(each % json.dumps(texts)), strict=True))
    slow = {text[:20]: round(time) for text, time in times.items() if time > 2000}
    assert not slow, f"milliseconds: {slow}"
