"""Stop texts in pieces equal stop texts in the whole."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.answer import StopTexts

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_any_pieces_give_the_text_before_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = StopTexts(stops)
    shown, hit = "", None
    for start, end in pairwise(edges):
        piece, hit = found.push(text[start:end])
        shown += piece
        assert text.startswith(shown)
        if hit is not None:
            break
    else:
        shown += found.flush()
    places = [text.find(stop) for stop in stops if stop in text]
    assert (hit is not None) == bool(places)
    if hit is None:
        assert shown == text
    else:
        # what ends first is seen first; of those that end together the one that begins first
        assert text.startswith(shown + hit)
        assert not any(stop in shown for stop in stops)


@given(TEXT, STOPS)
def test_the_earliest_stop_of_one_piece(text: str, stops: list[str]) -> None:
    shown, hit = StopTexts(stops).push(text)
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        assert shown == text[: min(places)]
        assert hit in stops


def test_nothing_is_held_back_for_long() -> None:
    found = StopTexts(["abcd"])
    assert found.push("xab") == ("x", None)
    assert found.push("abx") == ("ababx", None)
    assert found.push("abc") == ("", None)
    assert found.flush() == "abc"
    assert found.flush() == ""


def test_the_stop_that_ended_it_is_shown_where_that_is_asked_for() -> None:
    found = StopTexts(["bc"], shown=True)
    assert found.push("ab") == ("a", None)
    assert found.push("cd") == ("bc", "bc")
