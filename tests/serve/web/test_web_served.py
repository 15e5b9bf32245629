"""The page against `hasten serve` with the demo model: what a user sees is what the engine did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from browser_chromium import Chromium, Page

pytestmark = [pytest.mark.demo, pytest.mark.browser]

KEY = "a-key-for-tests"
DONE = "!document.querySelector('[aria-busy]') && document.querySelector('.turn.assistant:last-child')"


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """Address of a server that wants a key."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hasten", "serve", "demo", "--recipe", "w4", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HASTEN_API_KEY": KEY},
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip() + "/"
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def page(chromium: Chromium, served: str) -> Iterator[Page]:
    page = chromium.page()
    page.open(served)
    page.run("sessionStorage.setItem('hasten.key', JSON.stringify('%s'))" % KEY)  # noqa: UP031
    page.open(served)
    page.until("document.querySelector('#model').value")
    page.complaints.clear()  # the models were asked for before there was a key
    yield page
    page.close()


def figures(served: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{served}stats", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)["models"]["demo"]
    return found


def ask(page: Page, text: str) -> None:
    page.run("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


def fill(page: Page, name: str, value: object) -> None:
    field = f"document.getElementById({json.dumps(name)})"
    page.run(f"{field}.value = {json.dumps(str(value))}")
    page.run(f"{field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_two_turns_and_their_figures(page: Page, served: str) -> None:
    fill(page, "system", "You are a patient teacher of programming. " * 12)
    fill(page, "temperature", 0)
    fill(page, "max_tokens", 48)
    ask(page, "Write a Python function that reverses a string.")
    page.until(DONE)
    assert "def " in page.text(".turn.assistant .body")
    before = figures(served)
    ask(page, "Now for a list.")
    page.until("document.querySelectorAll('.turn').length === 4")
    page.until(DONE)
    shown = page.text(".turn.assistant:last-child .figures")
    cached = int(shown.rsplit(", ", 1)[1].split()[0])
    after = figures(served)
    assert cached == after["prefix_hit_tokens"] - before["prefix_hit_tokens"] > 0
    assert f"{after['output_tokens'] - before['output_tokens']} tokens" in shown
    page.until("document.querySelector('#live-note').textContent.startsWith('demo, up')")
    page.until("document.querySelector('#figure-hits').textContent.includes('%')")
    assert page.complaints == []


def test_stop_cancels_in_the_engine(page: Page, served: str) -> None:
    before = figures(served)
    fill(page, "max_tokens", 4000)
    ask(page, "Count from one to five hundred in words.")
    page.until("document.querySelector('.turn.assistant .body').textContent.length > 20")
    page.press("Escape")
    page.until(DONE)
    page.run("new Promise((done) => setTimeout(done, 1000))")
    after = figures(served)
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["running"] == after["waiting"] == 0
    assert page.text(".assistant .note") == "Stopped."


def test_an_answer_that_matches_a_schema(page: Page) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 30},
            "people": {"type": "integer", "maximum": 10**8},
        },
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    fill(page, "format", "json_schema")
    fill(page, "schema", json.dumps(schema))
    fill(page, "temperature", 0)
    fill(page, "max_tokens", 100)
    ask(page, "The capital of France and its population.")
    page.until(DONE)
    assert set(json.loads(page.text(".turn.assistant .body"))) == {"city", "people"}


def test_what_the_server_refuses_is_shown_in_its_words(page: Page) -> None:
    fill(page, "max_tokens", 1_000_000)
    ask(page, "Hi")
    page.until("!document.querySelector('#failure').hidden")
    assert "1000000" in page.text("#failure").replace(",", "").replace("_", "")
