"""Speculation over whole answers: what is drafted, learnt and kept, without a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from hasten.engine.speculate import Draft, Speculator
from hasten.errors import UsageError


def cheap(rows: int) -> float:
    return 0.01 * (1 + 0.05 * (rows - 1))


def dear(rows: int) -> float:
    return 0.01 * rows


def answer(
    speculator: Speculator,
    prompt: Sequence[int],
    text: Sequence[int],
    seconds: Callable[[int], float] = cheap,
) -> tuple[float, int, int]:
    """Decode a text that is known, as an engine would: (seconds, tokens drafted, tokens accepted)."""
    draft = speculator.open(prompt)
    speculator.accept(draft, text[:1], 0)
    at, spent, drafted, accepted = 1, 0.0, 0, 0
    while at < len(text):
        room = len(text) - at - 1
        (guess,) = speculator.propose([draft], [room])
        assert len(guess) <= max(room, 0)
        right = 0
        while right < len(guess) and guess[right] == text[at + right]:
            right += 1
        took = seconds(1 + len(guess))
        speculator.observe(1 + len(guess), 1, took)
        speculator.accept(draft, text[at : at + right + 1], len(guess))
        at, spent = at + right + 1, spent + took
        drafted, accepted = drafted + len(guess), accepted + right
    speculator.close(draft)
    return spent, drafted, accepted


def noise(count: int, seed: int, vocabulary: int = 5000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


def test_an_answer_that_repeats_its_prompt_is_several_times_as_fast() -> None:
    prompt = noise(300, 1)
    spent, _, accepted = answer(Speculator(), prompt, prompt[20:220])
    assert accepted > 150
    assert spent < 200 * cheap(1) / 4


def test_an_answer_like_no_other_costs_nothing() -> None:
    """Few tokens, so that short matches are everywhere, and drawn so that they mean nothing."""
    speculator = Speculator()
    spent = sum(answer(speculator, noise(200, seed, 20), noise(300, seed + 50, 20))[0] for seed in range(5))
    assert spent < 5 * 299 * cheap(1) / 0.98


def test_where_rows_cost_a_step_each_nothing_is_drafted_once_that_is_known() -> None:
    speculator = Speculator()
    prompt = noise(300, 1)
    answer(speculator, prompt, prompt[:200], dear)
    spent, drafted, _ = answer(speculator, noise(300, 2), noise(300, 2)[:200], dear)
    assert spent <= 199 * dear(1) / 0.98
    assert drafted < 20


def test_it_comes_back_as_soon_as_matches_are_long() -> None:
    speculator = Speculator()
    for seed in range(5):
        answer(speculator, noise(200, seed, 20), noise(300, seed + 50, 20))
    prompt = noise(300, 9)
    text = [*noise(100, 10, 20), *prompt[:100]]
    spent, _, accepted = answer(speculator, prompt, text)
    assert accepted > 70
    assert spent < (100 + 45) * cheap(1)


def test_a_request_asked_again_is_drafted_from_the_first_answer() -> None:
    speculator = Speculator()
    prompt, text = noise(50, 1), noise(200, 2)
    _, drafted, _ = answer(speculator, prompt, text)
    assert drafted < 20
    spent, _, accepted = answer(speculator, prompt, text)
    assert accepted > 150
    assert spent < 200 * cheap(1) / 4


@pytest.mark.parametrize("how", ["not kept", "not shared", "nothing is remembered"])
def test_what_must_not_be_seen_by_others_is_not(how: str) -> None:
    speculator = Speculator(recent_tokens=0 if how == "nothing is remembered" else 1000)
    draft = speculator.open(noise(100, 1), shared=how != "not shared")
    speculator.propose([draft], [4])
    speculator.close(draft, keep=how != "not kept")
    assert speculator.recent_tokens == 0


def test_a_sequence_that_shares_nothing_reads_nothing() -> None:
    speculator = Speculator()
    speculator.close(speculator.open(noise(100, 1)))
    assert speculator.recent_tokens == 101
    alone, other = (speculator.open(noise(100, 1)[:50], shared=shared) for shared in (False, True))
    speculator.propose([alone, other], [5, 5])
    assert alone.proposal == []
    assert other.proposal == noise(100, 1)[50:55]


def test_room_and_most_are_kept() -> None:
    speculator = Speculator(most=6)
    loop = [1, 2, 3] * 30
    drafts: list[Draft | None] = [speculator.open(loop), None, speculator.open(loop), speculator.open(loop)]
    guesses = speculator.propose(drafts, [2, 9, 0, 100])
    assert guesses[0] == [1, 2]
    assert guesses[1:3] == [[], []]
    assert guesses[3] == [1, 2, 3, 1, 2, 3]
    assert Speculator(most=0).propose([speculator.open(loop)], [9]) == [[]]


def test_the_prompt_is_looked_through_at_the_first_proposal() -> None:
    speculator = Speculator()
    draft = speculator.open([1, 2, 3, 1])
    speculator.accept(draft, [2], 0)
    assert draft.text is None
    assert speculator.propose([draft], [3]) == [[3, 1, 2]]
    assert draft.text is not None
    speculator.close(draft)
    assert draft.text is None
    assert speculator.recent_tokens == 6


def test_an_answer_that_ends_before_its_first_proposal_is_kept() -> None:
    speculator = Speculator()
    speculator.close(speculator.open([1, 2, 3]))
    draft = speculator.open([1, 2])
    speculator.propose([draft], [4])
    assert draft.proposal == [3]


def test_equal_observations_give_equal_choices() -> None:
    """No clock, no chance, no order of sets: two runs are alike."""
    runs = []
    for _ in range(2):
        speculator = Speculator()
        trace = []
        for seed in range(4):
            prompt = noise(120, seed, 30)
            trace.append(answer(speculator, prompt, prompt[30:] + noise(60, seed + 9, 30)))
        runs.append(trace)
    assert runs[0] == runs[1]


def test_only_what_the_answer_got_counts() -> None:
    """An engine may verify less than was proposed: for want of pages, or for a grammar."""
    speculator = Speculator()
    draft = speculator.open([1, 2, 3, 4, 5, 1, 2])
    (guess,) = speculator.propose([draft], [10])
    assert guess[:3] == [3, 4, 5]
    speculator.accept(draft, [3, 4], 1)
    assert draft.native().lengths()[0] == 4
    with pytest.raises(AssertionError):
        speculator.accept(draft, [5, 1], 0)


@pytest.mark.parametrize("bad", [{"most": -1}, {"recent_tokens": -1}])
def test_negative_limits_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError) as error:
        Speculator(**bad)
    assert error.value.hint
