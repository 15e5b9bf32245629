"""A conversation on the page, in a real Chromium: send, stream, stop, settings, editing, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from browser_chromium import Page
from browser_server import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.browser]

DONE = "!document.querySelector('[aria-busy]') && document.querySelector('#stop').hidden"


def ask(page: Page, text: str, *, wait: bool = True) -> None:
    page.run("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")
    if wait:
        page.until(DONE)


def fill(page: Page, **values: Any) -> None:
    """Settings by name, as a user's typing would leave them."""
    for name, value in values.items():
        page.run(
            f"(() => {{ const field = document.getElementById({json.dumps(name)});"
            f" field.value = {json.dumps(str(value))}; for (const kind of ['input', 'change'])"
            " field.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )


def answer(page: Page) -> str:
    return page.text(".turn.assistant:last-child .body")


def announced(page: Page, words: str) -> None:
    page.until(f"document.querySelector('#announcer').textContent.includes({json.dumps(words)})")


def test_it_opens_clean_and_asks_nobody_else(page: Page, server: StandIn) -> None:
    page.until("document.querySelector('#figure-batch').textContent === '4'")
    assert page.run("document.activeElement.id") == "prompt"
    assert page.run("[...document.querySelectorAll('#model option')].map((o) => o.value)") == [
        "demo",
        "other",
    ]
    assert page.complaints == []  # no policy broken, nothing missing, no exception
    assert all(url.startswith(server.url) for url in page.requests)


def test_enter_sends_and_the_answer_streams_in(page: Page, server: StandIn) -> None:
    page.run(
        "window.said = []; const place = document.querySelector('#announcer');"
        "new MutationObserver(() => said.push(place.textContent)).observe(place, {childList: true})"
    )
    server.script.pieces, server.script.pause_s = [f"word{n} " for n in range(20)], 0.02
    ask(page, "Hi", wait=False)
    page.until("document.querySelector('.turn.assistant .body').textContent.includes('word3')")
    assert "word19" not in answer(page)
    page.until(DONE)
    assert answer(page).split() == [f"word{n}" for n in range(20)]
    assert server.asked[0] == {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    figures = page.text(".assistant .figures")
    assert "20 tokens" in figures and "prompt 40, 32 cached" in figures and "first token" in figures
    announced(page, "Answer: word0")
    said = [text for text in page.run("said") if text]
    assert said[-1].startswith("Answer: word0") and len(said) <= 2  # once at the start, once at the end


def test_shift_enter_starts_a_line(page: Page, server: StandIn) -> None:
    page.type("one")
    page.press("Enter", shift=True)
    page.run(
        "document.querySelector('#prompt').setRangeText('\\n', 3, 3, 'end')"
    )  # what the browser does with it
    page.type("two")
    assert server.asked == []
    ask(page, "!")
    assert (
        server.asked[0]["messages"][0]["content"] == "one\ntwo!"
        or "two!" in server.asked[0]["messages"][0]["content"]
    )


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_ends_the_answer_and_tells_the_server(page: Page, server: StandIn, way: str) -> None:
    server.script.pieces, server.script.pause_s = ["tick "] * 500, 0.02
    ask(page, "Count", wait=False)
    page.until("document.querySelector('.turn.assistant .body').textContent.includes('tick')")
    if way == "Escape":
        page.press("Escape")
    else:
        page.click("#stop")
    page.until(DONE)
    assert server.left.acquire(timeout=5), "the server still writes"
    assert 0 < answer(page).count("tick") < 500
    assert page.text(".assistant .note") == "Stopped."
    assert page.run("document.activeElement.id") == "prompt"
    ask(page, "Go on", wait=False)
    page.until("document.querySelectorAll('.turn').length === 4")
    page.press("Escape")
    page.until(DONE)
    roles = [message["role"] for message in server.asked[1]["messages"]]
    assert roles == [
        "user",
        "assistant",
        "user",
    ]  # what was written before the stop stays in the conversation


def test_enter_during_an_answer_keeps_the_text(page: Page, server: StandIn) -> None:
    server.script.pause_s = 0.3
    ask(page, "One", wait=False)
    ask(page, "Two")
    assert len(server.asked) == 1
    assert page.run("document.querySelector('#prompt').value") == "Two"


def test_settings_are_sent_and_only_those_filled_in(page: Page, server: StandIn) -> None:
    given = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 64,
        "seed": 7,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
    }
    fill(page, system="Be short.", **given)
    ask(page, "Hi")
    assert {name: server.asked[0].get(name) for name in given} == given
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be short."}
    page.click("#settings button[type=reset]")
    page.run("document.querySelector('#model').value = 'other'")
    ask(page, "Again")
    assert set(server.asked[1]) == {"model", "messages", "stream", "stream_options"}
    assert server.asked[1]["model"] == "other"


def test_a_wrong_setting_is_not_sent(page: Page, server: StandIn) -> None:
    fill(page, temperature=9)
    ask(page, "Hi")
    assert server.asked == []
    assert page.run("document.activeElement.id") == "temperature"
    assert page.run("document.querySelector('#prompt').value") == "Hi"


def test_structured_output(page: Page, server: StandIn) -> None:
    fill(page, format="json_schema", schema="{not json")
    ask(page, "Hi")
    assert server.asked == [] and page.run("document.activeElement.id") == "schema"
    fill(page, schema='{"type": "object"}')
    ask(page, "")
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert server.asked[0]["response_format"] == {"type": "json_schema", "json_schema": schema}
    fill(page, format="json_object")
    ask(page, "Hi")
    assert server.asked[1]["response_format"] == {"type": "json_object"}


def test_editing_the_last_message_replaces_its_answer(page: Page, server: StandIn) -> None:
    ask(page, "First")
    ask(page, "Secnd")
    page.click(".turn.user:nth-last-child(2) [data-action=edit]")
    assert page.run("document.querySelector('#prompt').value") == "Secnd"
    page.press("Escape")
    assert (
        page.run("document.querySelector('#prompt').value + document.querySelector('#editing').hidden")
        == "true"
    )
    page.click(".turn.user:nth-last-child(2) [data-action=edit]")
    page.run("document.querySelector('#prompt').value = ''")
    ask(page, "Second")
    contents = [message["content"] for message in server.asked[-1]["messages"]]
    assert contents == ["First", "Hello there.", "Second"]
    assert page.run("document.querySelectorAll('.turn').length") == 4
    assert page.run("document.querySelectorAll('[data-action=edit]').length") == 1


def test_regenerate_asks_the_same_again(page: Page, server: StandIn) -> None:
    ask(page, "Hi")
    server.script.pieces = ["Better."]
    page.click("[data-action=regenerate]")
    page.until("document.querySelector('.turn.assistant .body')?.textContent === 'Better.'")
    assert server.asked[0] == server.asked[1]
    assert page.run("document.querySelectorAll('.turn').length") == 2
    assert page.run("document.activeElement.id") == "prompt"


def test_new_chat_and_back(page: Page, server: StandIn) -> None:
    ask(page, "Hi")
    page.click("#new")
    assert page.run("document.querySelectorAll('.turn').length") == 0
    assert page.run("document.activeElement.id") == "prompt"
    page.click("#undo button")
    assert page.run("document.querySelectorAll('.turn').length") == 2
    page.click("#new")
    ask(page, "Fresh")
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["Fresh"]


def test_new_chat_during_an_answer_stops_it(page: Page, server: StandIn) -> None:
    server.script.pieces, server.script.pause_s = ["tick "] * 500, 0.02
    ask(page, "Count", wait=False)
    page.until("document.querySelector('.turn.assistant .body').textContent.includes('tick')")
    page.click("#new")
    assert server.left.acquire(timeout=5)
    page.until(DONE)
    assert page.run("document.querySelectorAll('.turn').length") == 0
    assert page.complaints == []


def test_a_reload_keeps_the_conversation(page: Page, server: StandIn) -> None:
    fill(page, temperature=0.3, key="")
    ask(page, "Hi")
    page.call("Page.reload")
    page.until("document.readyState === 'complete' && document.querySelectorAll('.turn').length === 2")
    assert answer(page) == "Hello there."
    assert page.run("document.querySelector('#temperature').value") == "0.3"


def test_copy_and_export(page: Page, server: StandIn) -> None:
    server.script.pieces = ["Code:\n```python\nprint(1)\n", "print(2)\n```\n"]
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    ask(page, "Hi")
    page.click("figure [data-copy]")
    page.until("window.copied === 'print(1)\\nprint(2)'")
    page.click(".turn.assistant [data-action=copy]")
    page.until("window.copied.startsWith('Code:')")
    announced(page, "Copied.")
    page.run("URL.createObjectURL = (blob) => { window.saved = blob.text(); return 'blob:none'; }")
    page.run("HTMLAnchorElement.prototype.click = function () { window.file = this.download; }")
    fill(page, key="secret", top_k=5)
    page.click("#export")
    found = json.loads(page.run("window.saved"))
    assert page.run("window.file").endswith(".json")
    assert found["schema_version"] == 1 and found["model"] == "demo" and found["settings"] == {"top_k": "5"}
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert "secret" not in json.dumps(found)


def failure(page: Page) -> str:
    page.until("!document.querySelector('#failure').hidden")
    return page.text("#failure")


def test_a_refusal_shows_the_hint_and_can_be_tried_again(page: Page, server: StandIn) -> None:
    error = {"message": "the queue is full", "hint": "try later"}
    server.script.refuse = (429, error, {"Retry-After": "3"})
    ask(page, "Hi")
    shown = failure(page)
    assert "the queue is full" in shown and "Hint: try later" in shown and "Try again in 3 s." in shown
    assert page.run("document.querySelectorAll('.turn').length") == 1
    assert page.run("document.querySelector('#failure').getAttribute('role')") == "alert"
    server.script.refuse = None
    page.click("[data-action=retry]")
    page.until("document.querySelector('.turn.assistant .body')?.textContent === 'Hello there.'")
    assert page.run("document.querySelector('#failure').hidden")


def test_a_missing_key_leads_to_its_field(blank: Page, server: StandIn) -> None:
    server.script.key = "secret"
    blank.open(server.url)
    assert "no valid API key" in failure(blank)
    blank.click("#failure button")
    assert blank.run("document.activeElement.id") == "key"
    blank.type("secret")
    blank.press("Tab")
    blank.until("document.querySelectorAll('#model option').length === 2")
    ask(blank, "Hi")
    assert answer(blank) == "Hello there."
    assert "secret" in blank.run("JSON.stringify({...sessionStorage})")
    assert "secret" not in blank.run("JSON.stringify({...localStorage})")


@pytest.mark.parametrize(
    ("fault", "words"), [("break_after", "ran out of memory"), ("cut_after", "connection ended")]
)
def test_a_stream_that_fails_keeps_what_came(page: Page, server: StandIn, fault: str, words: str) -> None:
    setattr(server.script, fault, 2)
    ask(page, "Hi")
    assert words in failure(page)
    assert answer(page) == "Hello there"
    assert page.text(".assistant .note").startswith("Not whole")


def test_a_server_that_is_gone_is_said_so(page: Page, server: StandIn) -> None:
    server.close()
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    ask(page, "Hi")
    assert "does not answer" in failure(page) and "hasten serve" in failure(page)


def test_an_answer_cut_by_length_says_so(page: Page, server: StandIn) -> None:
    server.script.finish = "length"
    ask(page, "Hi")
    assert "most new tokens" in page.text(".assistant .note")
