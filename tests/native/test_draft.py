"""Suffix automata against a twin that compares every place with every other."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import SANITIZED

from hasten import _native

ONCE, ALWAYS, MOSTLY, SELDOM = range(4)
PROMPT, RECENT, ANSWER = 1, 2, 3
texts = st.integers(1, 4).flatmap(lambda letters: st.lists(st.integers(0, letters), max_size=60))


def draft_of(text: Sequence[int], recent: _native.RecentTexts | None = None) -> _native.DraftText:
    draft = _native.DraftText(recent)
    draft.append(text)
    return draft


def longest_repeat(text: Sequence[int]) -> tuple[int, int]:
    """(tokens of the longest suffix that ends earlier too, where it last did), by trying every end."""
    best, place = 0, 0
    for end in range(len(text) - 1, 0, -1):
        length = 0
        while length < end and text[end - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length > best:
            best, place = length, end
    return best, place


def longest_in(text: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest suffix of a text that stands in one of the others."""
    for length in range(len(text), 0, -1):
        suffix = list(text[-length:])
        if any(
            list(other[at : at + length]) == suffix
            for other in others
            for at in range(len(other) - length + 1)
        ):
            return length
    return 0


def continued(text: Sequence[int], place: int, most: int) -> list[int]:
    """What follows a place of a text that goes on as it is being guessed."""
    whole = list(text)
    while len(whole) < place + most or len(whole) < len(text) + most:
        whole.append(whole[place + len(whole) - len(text)])
    return whole[place : place + most]


@settings(max_examples=50 if SANITIZED else 300, deadline=None)
@given(texts)
def test_the_longest_repeat_and_what_followed_it_last(text: list[int]) -> None:
    draft = _native.DraftText(None)
    for count, token in enumerate(text, 1):
        draft.append([token])
        length, place = longest_repeat(text[:count])
        assert draft.lengths()[0] == length
        source, matched, tokens, evidence = draft.propose(7)
        if length == 0:
            assert (source, matched, tokens) == (0, 0, [])
        else:
            assert (source, matched) == (PROMPT if place < 1 else ANSWER, length)
            assert tokens == continued(text[:count], place, 7)
        assert len(evidence) == len(tokens)


@settings(max_examples=50 if SANITIZED else 200, deadline=None)
@given(st.lists(texts, max_size=5), texts, st.integers(0, 30))
def test_matches_in_recent_texts_while_more_are_added(
    kept: list[list[int]], text: list[int], early: int
) -> None:
    """States that are split while a sequence stands in them change nothing."""
    recent = _native.RecentTexts(1 << 16)
    draft = _native.DraftText(recent)
    for other in kept[:2]:
        recent.add(draft_of(other))
    draft.append(text[:early])
    for other in kept[2:]:
        recent.add(draft_of(other))
    for at in range(early, len(text)):
        before = draft.lengths()[1]
        draft.append([text[at]])
        now = longest_in(text[: at + 1], kept)
        if early == 0:
            assert draft.lengths()[1] == now
        assert draft.lengths()[1] <= min(now, before + 1)
    source, matched, tokens, _ = draft.propose(5)
    if source == RECENT:
        found = text[len(text) - matched :] + tokens
        assert longest_in(found, kept) == len(found), "a proposal stands in one text, after the match"


def test_a_match_is_found_by_a_sequence_that_was_there_before_the_text() -> None:
    recent = _native.RecentTexts(1000)
    draft = draft_of([1, 2, 3], recent)
    recent.add(draft_of([9, 1, 2, 3, 4, 5]))
    assert draft.propose(8)[:3] == (RECENT, 3, [4, 5])
    draft.append([4])
    assert draft.propose(8)[:3] == (RECENT, 4, [5])


def test_proposals_stop_between_requests() -> None:
    recent = _native.RecentTexts(1000)
    recent.add(draft_of([1, 2, 3]))
    recent.add(draft_of([7, 8, 9]))
    assert draft_of([1, 2], recent).propose(8)[2] == [3]
    assert draft_of([2, 3], recent).propose(8)[2] == []


def test_the_latest_of_several_places_is_copied() -> None:
    assert draft_of([1, 2, 5, 1, 2, 6, 1, 2]).propose(1)[2] == [6]
    recent = _native.RecentTexts(1000)
    for text in ([1, 2, 5], [1, 2, 6], [1, 2, 7]):
        recent.add(draft_of(text))
    assert draft_of([1, 2], recent).propose(1)[2] == [7]


def test_the_own_text_goes_first_where_both_match_as_long() -> None:
    recent = _native.RecentTexts(1000)
    recent.add(draft_of([1, 2, 5]))
    assert draft_of([1, 2, 6, 1, 2], recent).propose(1)[:3] == (PROMPT, 2, [6])
    recent.add(draft_of([6, 1, 2, 9]))
    assert draft_of([1, 2, 6, 1, 2], recent).propose(1)[:3] == (RECENT, 3, [9])


def test_a_loop_is_proposed_as_often_as_it_fits() -> None:
    assert draft_of([4, 5, 6, 4, 5, 6]).propose(8)[2] == [4, 5, 6, 4, 5, 6, 4, 5]


def test_the_prompt_is_told_from_the_answer() -> None:
    draft = draft_of([1, 2, 3, 4])
    draft.append([1, 2])
    assert draft.propose(1)[:3] == (PROMPT, 2, [3])
    draft.append([9, 1, 2])
    assert draft.propose(1)[:3] == (ANSWER, 2, [9])


def test_evidence() -> None:
    assert draft_of([1, 2, 9, 1]).propose(1)[3] == [ONCE]
    assert draft_of([1, 2, 8, 1, 2, 9, 1]).propose(2)[3] == [ALWAYS, MOSTLY]
    assert draft_of([1, 2, 8, 1, 2, 7, 1, 2, 9, 1, 2]).propose(1)[2:] == ([9], [SELDOM])
    assert draft_of([1, 2, 8, 1, 2, 9, 4, 1, 2, 9, 5, 1, 2]).propose(1)[2:] == ([9], [MOSTLY])


def test_matches_shorter_than_asked_are_none() -> None:
    draft = draft_of([1, 2, 3, 9, 2, 3])
    assert draft.propose(3, least=2)[1] == 2
    assert draft.propose(3, least=3) == (0, 0, [], [])
    assert draft.propose(0)[2] == []


@pytest.mark.parametrize("most", [0, 1, 2, 3, 10, 64, 1000])
def test_recent_texts_hold_no_more_than_they_may(most: int) -> None:
    recent = _native.RecentTexts(most)
    rng = random.Random(most)
    full = 0
    for _ in range(60):
        text = [rng.randrange(50) for _ in range(rng.choice([1, 5, 40, most, 2 * most + 1]))]
        recent.add(draft_of(text, recent))
        assert recent.tokens <= most
        full = max(full, recent.tokens)
    assert full >= most // 4


def test_memory_stays_bounded() -> None:
    """100 bytes a token, twice that where the vectors have just grown; random text is the worst."""
    recent = _native.RecentTexts(4096)
    rng = random.Random(1)
    sizes = []
    for _ in range(100):
        recent.add(draft_of([rng.randrange(100_000) for _ in range(500)]))
        sizes.append(recent.bytes)
    assert max(sizes) < 200 * 4096
    assert max(sizes[50:]) <= max(sizes[:50]), "what is forgotten is given back"


def test_the_oldest_go_first() -> None:
    recent = _native.RecentTexts(100)
    for start in range(0, 1000, 10):
        recent.add(draft_of(range(start, start + 10)))
    assert draft_of([990, 991], recent).propose(1)[2] == [992]
    assert draft_of([950, 951], recent).propose(1)[2] == [952], "the half before is still there"
    assert draft_of([10, 11], recent).propose(1)[2] == []


def test_a_shared_beginning_is_stored_once() -> None:
    recent = _native.RecentTexts(1 << 16)
    prompt = list(range(1000))
    recent.add(draft_of([*prompt, 5000]))
    once = recent.tokens
    for answer in range(20):
        recent.add(draft_of([*prompt, 6000 + answer, 7000]))
    assert recent.tokens < once + 20 * 40
    recent.add(draft_of([*prompt, 5000]))
    assert recent.tokens < once + 20 * 40, "what is known altogether is not stored"
    assert draft_of([*prompt[-3:], 6007], recent).propose(1)[2] == [7000]


def test_a_sequence_keeps_its_place_over_generations() -> None:
    recent = _native.RecentTexts(100)
    draft = draft_of([1, 2, 3], recent)
    for start in range(100, 1100, 10):
        recent.add(draft_of([*range(start, start + 8), 1, 2, 3, start]))
        assert draft.propose(1)[:3] == (RECENT, 3, [start])


def test_one_repeated_token_costs_no_more_than_others() -> None:
    draft = draft_of([3] * 20_000)
    assert draft.lengths()[0] == 19_999
    assert draft.propose(4)[2] == [3, 3, 3, 3]
    assert draft.bytes < 200 * 20_000


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        draft_of([1, -1])
    with pytest.raises(TypeError):
        draft_of(["a"])  # type: ignore[list-item]
