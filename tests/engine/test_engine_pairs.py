"""Every feature beside every other: what a request gets is what it would get alone, from an empty cache.

One engine runs requests of all kinds together; what it does to be fast (batches, chunks, prefix hits, drafts,
preemption) is switched on in all combinations. The twin does none of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from plain_engine import Plain, gather, plain, random_prompt

import hasten
from hasten import _native
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.grammar import Grammar
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.runtime.sampling import SamplingOptions

SHARED = random_prompt(1, 45)  # one full page of 32 and a piece of the next
SAMPLED = SamplingOptions(temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)
PENALISED = SamplingOptions(
    temperature=0.8, seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2
)
LETTERS = Grammar("regex", "[a-f]{5,20}[xyz]")
PAIRS = Grammar("regex", "(ab|cd|ef)+z")
REQUESTS = {
    "grows": Request(random_prompt(3, 20), 100, SAMPLED),
    "grows too": Request(random_prompt(4, 20), 105, SamplingOptions(ignore_eos=True)),
    "greedy": Request(SHARED, 20, SamplingOptions(ignore_eos=True)),
    "same prompt": Request(SHARED, 12),
    "sampled": Request((*SHARED, 100), 24, SAMPLED),
    "penalties": Request((*SHARED[:40], 101, 102), 24, PENALISED),
    "bias": Request(SHARED[:33], 16, SamplingOptions(logit_bias={98: 4.0, 99: -100.0})),
    "logprobs": Request((*SHARED, 103), 16, SAMPLED, logprobs=4),
    "several": Request((*SHARED, 104, 105), 10, SAMPLED, n=3, logprobs=0),
    "grammar": Request(SHARED, 30, SamplingOptions(1.0, seed=4), grammar=LETTERS),
    "grammar, penalties": Request(SHARED, 20, PENALISED, grammar=PAIRS, logprobs=2),
    "stop id": Request((*SHARED, 106), 30, SAMPLED, stop_token_ids=(101, 109, 116)),
    "at least": Request(
        SHARED[:20], 30, SamplingOptions(logit_bias={105: 100.0}),
        stop_token_ids=(105,), min_new_tokens=7
    ),
    "few tokens": Request(
        (*SHARED, 107), 12, SAMPLED,
        allowed_tokens=(97, 98, 99, 100), forbidden=((97,), (98, 99))
    ),
    "grammar, at least": Request(
        SHARED, 30, SamplingOptions(1.0, seed=4),
        n=2, grammar=LETTERS, min_new_tokens=28
    ),
    "short": Request((97,), 9, SAMPLED),
    "long": Request(random_prompt(2, 90), 30, SamplingOptions(ignore_eos=True)),
}  # fmt: skip
MODELS = [("qwen3", "w4"), ("qwen3", "w8-kv8"), ("phi3", "w6"), ("gemma3-capped", "bf16"), ("olmo2", "w5")]


class Oracle:
    """Drafts what the answer will be, and now and then something else: every way of being right or wrong."""

    def __init__(self, answers: Sequence[tuple[tuple[int, ...], list[int]]]) -> None:
        self._texts = [[*prompt, *tokens] for prompt, tokens in answers]
        self._random = np.random.default_rng(7)

    def open(self, prompt: Sequence[int], *, shared: bool = True) -> list[int]:
        return list(prompt)

    def propose(self, drafts: Sequence[list[int]], room: Sequence[int]) -> list[list[int]]:
        return [self._guess(text, most) for text, most in zip(drafts, room, strict=True)]

    def _guess(self, text: list[int], most: int) -> list[int]:
        at = len(text)
        known = [one for one in self._texts if one[:at] == text]
        guess = known[0][at : at + 6] if known else [100, 101, 102]
        wrong = self._random.integers(0, 9)
        return [token if i != wrong else 97 for i, token in enumerate(guess)][:most]

    def accept(self, draft: list[int], tokens: Sequence[int], drafted: int) -> None:
        draft += tokens

    def observe(self, rows: int, sequences: int, seconds: float) -> None:
        pass

    def close(self, draft: list[int], keep: bool = True) -> None:
        pass


@pytest.fixture(scope="module")
def load(tiny_folder: Callable[..., Path]) -> Callable[..., LanguageModel]:
    def get(name: str, recipe: str, chunk: int = 512, pages: int | None = None) -> LanguageModel:
        options = EngineOptions(threads=1, context=128, max_sequences=6, prefill_chunk=chunk)
        model = hasten.load(tiny_folder(name), recipe, options=options)
        if pages is None:
            return model
        gigabytes = (pages + 0.5) * model.executor.page_bytes / 1e9
        return hasten.load(tiny_folder(name), recipe, options=EngineOptions(1, 128, 6, chunk, gigabytes))

    return get


@pytest.fixture(scope="module")
def expected(load: Callable[..., LanguageModel]) -> Callable[..., dict[tuple[str, int], Plain]]:
    made: dict[tuple[str, str], dict[tuple[str, int], Plain]] = {}

    def get(name: str, recipe: str) -> dict[tuple[str, int], Plain]:
        if (name, recipe) not in made:
            model = load(name, recipe)
            made[name, recipe] = {
                (kind, index): plain(model, request, index)
                for kind, request in REQUESTS.items()
                for index in range(request.n)
            }
        return made[name, recipe]

    return get


def foretell(engine: Engine, oracle: Oracle | None) -> None:
    """Put an oracle in the speculator's place."""
    engine._speculator = engine._planner._speculator = oracle  # type: ignore[assignment]


def run(engine: Engine, requests: dict[str, Request]) -> list[Output]:
    """All requests at once, in the engine's own steps."""
    outputs: list[Output] = []
    for kind, request in requests.items():
        engine.add(Request(**{**request.__dict__, "id": kind}))
    while engine.busy:
        outputs += engine.step()
    return outputs


def check(outputs: list[Output], expected: dict[tuple[str, int], Plain], kinds: Sequence[str]) -> None:
    for (kind, index), answer in expected.items():
        if kind in kinds:
            assert gather(outputs, kind, index) == answer, (kind, index)


@pytest.mark.parametrize(("name", "recipe"), MODELS, ids="-".join)
@pytest.mark.parametrize(
    ("drafts", "chunk", "pages", "prefix"),
    [*itertools.product([False, True], [512, 7], [None, 6], [True]), (True, 512, None, False)],
    ids=str,
)
def test_company_changes_nothing(
    load: Callable[..., LanguageModel],
    expected: Callable[..., dict[tuple[str, int], Plain]],
    name: str,
    recipe: str,
    drafts: bool,
    chunk: int,
    pages: int | None,
    prefix: bool,
) -> None:
    """Twice in a row: the second time prompts are in the prefix cache."""
    model, answers = load(name, recipe, chunk, pages), expected(name, recipe)
    engine = Engine(model, ServingOptions(prefix_cache=prefix, speculate=False))
    if drafts:
        texts = [(REQUESTS[kind].prompt, answer.tokens) for (kind, _), answer in answers.items()]
        foretell(engine, Oracle(texts))
    kinds = list(REQUESTS)
    for _ in range(2):
        check(run(engine, REQUESTS), answers, kinds)
        while engine.tidy():
            pass
    stats = engine.stats()
    assert (stats.drafted_tokens > 0) == drafts
    assert (stats.accepted_tokens > 0) == drafts
    assert (stats.preemptions > 0) == (pages is not None)
    assert (stats.prefix_hit_tokens > 0) == prefix
    engine.close()
    assert model.executor.pool.free == model.executor.pool.pages


@pytest.mark.parametrize("isa", _native.isas())
def test_every_instruction_set(
    load: Callable[..., LanguageModel], isa: str, request: pytest.FixtureRequest
) -> None:
    """Each has its own arithmetic; on each the engine gives what plain decoding gives."""
    before = _native.isa()
    request.addfinalizer(lambda: _native.use_isa(before))
    _native.use_isa(isa)
    model = load("qwen3", "w4", 16, 6)
    kinds = ["grows", "grows too", "greedy", "sampled", "several", "grammar, penalties", "long"]
    answers = {
        (kind, index): plain(model, REQUESTS[kind], index)
        for kind in kinds
        for index in range(REQUESTS[kind].n)
    }
    engine = Engine(model, ServingOptions(speculate=False))
    foretell(engine, Oracle([(REQUESTS[k].prompt, a.tokens) for (k, _), a in answers.items()]))
    for _ in range(2):
        check(run(engine, {kind: REQUESTS[kind] for kind in kinds}), answers, kinds)
        while engine.tidy():
            pass
    engine.close()


def test_requests_that_come_and_go(
    load: Callable[..., LanguageModel], expected: Callable[..., dict[tuple[str, int], Plain]]
) -> None:
    """Random arrivals and cancels, drafts, few pages: who stays gets what it gets alone; no page is lost."""
    model, answers = load("qwen3", "w4", 24, 6), expected("qwen3", "w4")
    engine = Engine(model, ServingOptions(speculate=False))
    foretell(engine, Oracle([(REQUESTS[k].prompt, a.tokens) for (k, _), a in answers.items()]))
    rng = np.random.default_rng(3)
    kinds, outputs, cancelled, added = list(REQUESTS), [], set(), []
    while len(added) < 60 or engine.busy:
        if len(added) < 60 and rng.random() < 0.4:
            added.append(f"{kinds[rng.integers(len(kinds))]}#{len(added)}")
            engine.add(Request(**{**REQUESTS[added[-1].split("#")[0]].__dict__, "id": added[-1]}))
        if added and rng.random() < 0.05:
            victim = added[rng.integers(len(added))]
            if engine.cancel(victim):
                cancelled.add(victim)
        outputs += engine.step()
    for name in added:
        kind = name.split("#")[0]
        for index in range(REQUESTS[kind].n):
            got = gather(outputs, name, index)
            if name in cancelled:
                whole = answers[kind, index].tokens
                assert got.tokens == whole[: len(got.tokens)]
            else:
                assert got == answers[kind, index], name
    assert cancelled
    assert engine.stats().preemptions
    engine.close()
    assert model.executor.pool.free == model.executor.pool.pages


def test_rules_of_a_request_hold(expected: Callable[..., dict[tuple[str, int], Plain]]) -> None:
    """What the twin gives, that the other tests compare with: the rules say something there."""
    answers = expected("qwen3", "w4")
    least = answers["at least", 0].tokens
    assert 105 not in least[:7] and least[7:] == [105]  # the bias makes it the likeliest
    few = answers["few tokens", 0].tokens
    assert set(few) <= {98, 99, 100} and (98, 99) not in itertools.pairwise(few) and len(few) == 12
    for index in (0, 1):
        ended = answers["grammar, at least", index]
        assert ended.finish == "stop" and len(ended.tokens) < 28  # the grammar cannot go on so far


def test_stop_texts_beside_the_rest(load: Callable[..., LanguageModel]) -> None:
    """A stop text that the answer really contains, across token borders, drafts on and off."""
    model = load("qwen3", "w4")
    said = plain(model, Request(SHARED, 40, SAMPLED))
    text = model.tokenizer.decode(said.tokens)
    stop = text[13:16]
    request = Request(SHARED, 40, SAMPLED, stop=("never there", stop, stop + "x"), logprobs=1)
    answer = plain(model, request)
    assert answer.finish == "stop"
    assert answer.text == text[: text.find(stop)]
    for oracle in (None, Oracle([(SHARED, said.tokens)])):
        engine = Engine(model, ServingOptions(speculate=False))
        foretell(engine, oracle)
        outputs = run(engine, {"one": request, "other": REQUESTS["sampled"]})
        assert gather(outputs, "one") == answer
        assert (
            outputs[[o.request_id == "one" and o.finish_reason is not None for o in outputs].index(True)].stop
            == stop
        )
        engine.close()
