"""The engine: order, fairness, deadlines, refusals, cancelling, prompts' own results, streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plain_engine import gather, plain, random_prompt

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.engine.scheduler import FairShare
from hasten.errors import DeadlineError, QueueFull, UsageError
from hasten.runtime.sampling import SamplingOptions

GREEDY = SamplingOptions(ignore_eos=True)
ONE_SLOT = EngineOptions(threads=1, context=128, max_sequences=1, prefill_chunk=64)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=256, max_sequences=4, prefill_chunk=64)
    return hasten.load(tiny_folder("qwen3"), "w8", options=options)


@pytest.fixture
def narrow(tiny_folder: Callable[..., Path]) -> LanguageModel:
    """One answer at a time: what runs first ends first."""
    return hasten.load(tiny_folder("qwen3"), "w8", options=ONE_SLOT)


Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Opens engines; at the end each gives every page back."""
    engines: list[Engine] = []

    def open_one(model: LanguageModel, options: ServingOptions | None = None) -> Engine:
        engines.append(Engine(model, options))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()
        pool = engine.model.executor.pool
        assert pool.free == pool.pages


def request(name: str, seed: int = 0, new: int = 4, length: int = 20, **rest: object) -> Request:
    return Request(random_prompt(seed, length), new, GREEDY, id=name, **rest)  # type: ignore[arg-type]


def drain(engine: Engine) -> list[Output]:
    outputs = []
    while engine.busy:
        outputs += engine.step()
    return outputs


def ends(outputs: list[Output]) -> list[str]:
    return [one.request_id for one in outputs if one.finish_reason is not None]


def test_arrival_is_the_order(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow)
    for name in "abc":
        engine.add(request(name))
    assert ends(drain(engine)) == ["a", "b", "c"]


def test_priorities_go_first_and_take_the_place_of_lower_ones(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow, ServingOptions(speculate=False))
    engine.add(request("low", new=30))
    outputs = engine.step()
    engine.add(request("high", 1, priority=2))
    engine.add(request("higher", 2, priority=3))
    outputs += drain(engine)
    assert ends(outputs) == ["higher", "high", "low"]
    assert gather(outputs, "low") == plain(narrow, request("low", new=30))
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.preemptions >= 1


def test_a_higher_priority_takes_pages_too(start: Start, tiny_folder: Callable[..., Path]) -> None:
    options = EngineOptions(threads=1, context=128, max_sequences=4, prefill_chunk=64)
    page = hasten.load(tiny_folder("qwen3"), "w8", options=options).executor.page_bytes
    few = hasten.load(tiny_folder("qwen3"), "w8", options=replace(options, kv_gb=5.5 * page / 1e9))
    engine = start(few, ServingOptions(speculate=False))
    engine.add(request("low", 1, new=20, length=100))
    outputs = engine.step()
    engine.add(request("high", 2, new=20, length=60, priority=9))
    outputs += drain(engine)
    assert ends(outputs) == ["high", "low"]
    assert gather(outputs, "low") == plain(few, request("low", 1, new=20, length=100))


def test_pages_that_others_hold(start: Start, narrow: LanguageModel) -> None:
    """A stream on the same model has all pages: an error, not a step without end."""
    engine = start(narrow)
    stream = narrow.stream(random_prompt(1, 120), 8, GREEDY)
    next(stream)
    engine.add(request("stuck", 2, length=40))
    (output,) = drain(engine)
    assert output.finish_reason == "error"
    assert "others hold the rest" in output.error
    stream.close()  # type: ignore[attr-defined]


def test_slowness_is_not_believed_for_ever(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow, ServingOptions(speculate=False))
    engine.add(request("measured", new=20))
    drain(engine)
    engine.forecast.observe(0, 1, 0.5)
    engine.forecast.observe(0, 1, 0.5)
    for _ in range(300):
        try:
            engine.add(request("again", new=4, deadline_ms=400.0))
        except DeadlineError:
            continue
        break
    assert ends(drain(engine)) == ["again"]


def test_the_earliest_deadline_goes_first(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow)
    for name, deadline in (("none", None), ("late", 9e6), ("early", 9e5)):
        engine.add(request(name, deadline_ms=deadline))
    assert ends(drain(engine)) == ["early", "late", "none"]


def test_clients_get_even_shares(start: Start, narrow: LanguageModel) -> None:
    """Ten requests of one client, then one of another: that one does not wait for all ten."""
    engine = start(narrow)
    for i in range(10):
        engine.add(request(f"many {i}", i, client="many"))
    outputs = [*engine.step(), *engine.step()]
    engine.add(request("one", 50, client="one"))
    order = ends(outputs + drain(engine))
    assert order.index("one") <= 2
    assert [name for name in order if name != "one"] == [f"many {i}" for i in range(10)]


def test_a_client_that_was_away_has_no_credit(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow)
    for i in range(3):
        engine.add(request(f"first {i}", i, client="first"))
    drain(engine)
    for i in range(6):
        engine.add(request(f"new {i}", i, client="new"))
        engine.add(request(f"old {i}", i, client="first"))
    order = ends(drain(engine))
    assert abs(sum(name.startswith("new") for name in order[:6]) - 3) <= 1


def test_debts_are_bounded() -> None:
    """Who had a thousand times as much does not wait a thousand times as long."""
    share = FairShare()
    for client in "abc":
        share.join(client, "abc")
    share.serve("a", 1_000_000, 0)
    share.join("a", "abc")
    assert share.of("b") < share.of("a") <= share.of("b") + 2048


def test_users_of_a_key_share_what_their_key_gets() -> None:
    share = FairShare()
    for client in ("a/1", "a/2", "b"):
        share.join(client, ())
    share.serve("a/1", 100, 0)
    share.serve("b", 60, 0)
    assert share.of("a") == share.of("a/1") > share.of("b") > share.of("a/2") == 0
    share.serve("a/2", 10, 0)
    assert share.of("a") == share.of("a/1") + share.of("a/2")


def test_who_names_no_user_is_one_user_of_a_key() -> None:
    """It waits neither for all of the key's users together, nor does its key get credit for theirs."""
    share = FairShare()
    for client in ("a/1", "a/2", "a"):
        share.join(client, ())
    share.serve("a/1", 100, 0)
    share.serve("a/2", 100, 0)
    share.serve("a", 10, 0)
    assert share.order("a") < share.order("a/1")
    share.join("b", ("a/1", "a/2"))
    assert share.of("b") == share.of("a") == 210
    for number in range(20_000):
        share.join(f"{number}/x", ())
    assert len(share._served) < 10_000


def test_what_cannot_be_done_in_time_is_refused_at_once(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow, ServingOptions(speculate=False))
    engine.add(request("measured", new=20))
    drain(engine)
    with pytest.raises(DeadlineError, match=r"would take about \d+ ms, its deadline is 0\.01 ms"):
        engine.add(request("hopeless", deadline_ms=0.01))
    assert engine.stats().refused == 1
    assert engine.add(request("easy", deadline_ms=60_000.0)) == "easy"
    assert ends(drain(engine)) == ["easy"]


def test_what_was_computed_before_takes_no_time_of_a_deadline(start: Start, model: LanguageModel) -> None:
    """A hundred prompt tokens would take a second: there is time for those that begin like an earlier one."""
    engine = start(model, ServingOptions(speculate=False))
    prompt = random_prompt(7, 100)
    first = Request(prompt, 2, GREEDY, id="first")
    engine.add(first)
    drain(engine)
    engine.forecast.prefill_s, engine.forecast._decode_s = 0.01, {1: 0.001}
    with pytest.raises(DeadlineError, match="would take about 1002 ms"):
        engine.add(request("new", 8, new=2, length=100, deadline_ms=700.0))
    with pytest.raises(DeadlineError):
        engine.add(replace(first, id="other salt", salt="mine", deadline_ms=700.0))
    with pytest.raises(DeadlineError):
        engine.add(replace(first, id="every row", prompt_logprobs=1, deadline_ms=700.0))
    engine.forecast.prefill_s, engine.forecast._decode_s = 0.01, {1: 0.001}
    engine.add(replace(first, id="again", deadline_ms=700.0))
    engine.add(replace(first, id="behind it", deadline_ms=700.0))
    outputs = drain(engine)
    assert sorted(ends(outputs)) == ["again", "behind it"]
    assert all(output.finish_reason != "deadline" for output in outputs)


def test_a_deadline_that_passes_ends_the_answer(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow)
    engine.add(request("late", new=100, deadline_ms=1e-3))  # nothing is measured yet: it cannot be refused
    (output,) = drain(engine)
    assert output.finish_reason == "deadline"
    assert "deadline" in output.error


def test_a_full_queue_refuses(start: Start, narrow: LanguageModel) -> None:
    engine = start(narrow, ServingOptions(max_waiting=2))
    engine.add(request("a"))
    engine.add(request("b"))
    with pytest.raises(QueueFull, match="2 requests wait already") as caught:
        engine.add(request("c"))
    assert caught.value.retry_after_s >= 1.0
    assert ends(drain(engine)) == ["a", "b"]


def test_bad_requests(start: Start, model: LanguageModel) -> None:
    engine = start(model)
    engine.add(request("taken"))
    for bad, message in [
        (request("taken"), "'taken' is running"),
        (request("long", length=256), "256 tokens, the context holds 256"),
        (Request((5, 99999)), "99999 is not in the vocabulary"),
        (Request((5, -1)), "-1 is not in the vocabulary"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            engine.add(bad)
        assert caught.value.hint
    for wrong in [
        {"prompt": ()},
        {"max_new_tokens": -1},
        {"n": 0},
        {"n": 129},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"deadline_ms": 0},
        {"stop": ("a", "")},
    ]:
        with pytest.raises(UsageError):
            replace(request("x"), **wrong)  # type: ignore[arg-type]
    assert engine.stats().refused == 4
    drain(engine)


def test_an_answer_ends_where_the_context_does(start: Start, model: LanguageModel) -> None:
    engine = start(model)
    engine.add(request("full", length=250, new=100))
    got = gather(drain(engine), "full")
    assert (len(got.tokens), got.finish) == (6, "length")


def test_cancel(start: Start, model: LanguageModel) -> None:
    engine = start(model, ServingOptions(speculate=False))
    engine.add(request("a", 1, new=50))
    engine.add(request("b", 2, new=10, n=3))
    engine.add(request("waits", 3))
    outputs = engine.step()
    assert engine.cancel("b")
    assert not engine.cancel("b")
    assert not engine.cancel("never there")
    outputs += drain(engine)
    assert [o.finish_reason for o in outputs if o.request_id == "b" and o.finish_reason] == ["cancelled"] * 3
    assert gather(outputs, "a") == plain(model, request("a", 1, new=50))
    assert engine.stats().cancelled == 1


def test_streams_run_side_by_side(start: Start, model: LanguageModel) -> None:
    """Two streams and a request of `add`: each output reaches whom it belongs to."""
    engine = start(model, ServingOptions(speculate=False))
    engine.add(request("added", 3, new=12))
    one, two = engine.stream(request("one", 1, new=8)), engine.stream(request("two", 2, new=30))
    first = list(one)
    some = [next(two), next(two)]
    two.close()
    assert "".join(o.text for o in first) == plain(model, request("one", 1, new=8)).text
    assert [o.token_ids[0] for o in some] == plain(model, request("two", 2, new=2)).tokens
    assert gather(drain(engine), "added") == plain(model, request("added", 3, new=12))
    assert not engine.busy


def test_prompt_logprobs(start: Start, model: LanguageModel) -> None:
    """In chunks, beside others, after a hit would have been possible: all of the prompt, and exact."""
    asked = request("asked", 4, new=2, length=150, prompt_logprobs=3)
    logits = model.logits(np.asarray(asked.prompt, np.int32)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    engine = start(model)
    for _ in range(2):
        engine.add(request("other", 5, new=20))
        engine.add(asked)
        outputs = [o for o in drain(engine) if o.request_id == "asked"]
        got = outputs[0].prompt_logprobs
        assert got is not None
        assert all(o.prompt_logprobs is None for o in outputs[1:])
        assert got[0] is None
        assert [one.token for one in got[1:] if one] == list(asked.prompt[1:])
        if model.executor.name != "amx":  # `logits` computes texts as answers
            expected = [logprobs[i, token] for i, token in enumerate(asked.prompt[1:])]
            assert np.allclose([one.logprob for one in got[1:] if one], expected, atol=1e-5)
        assert all(one is None or len(one.top) == 3 for one in got)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings(start: Start, tiny_folder: Callable[..., Path], pooling: str) -> None:
    options = EngineOptions(threads=1, context=256, prefill_chunk=64)
    model = hasten.load(tiny_folder("qwen3"), "bf16", options=options)
    ask = Request(random_prompt(6, 150), 0, pooling=pooling, id="e")  # type: ignore[arg-type]
    hidden = model.hidden(np.asarray(ask.prompt, np.int32))
    engine = start(model)
    for _ in range(2):
        engine.add(request("other", 6, length=140))
        engine.add(ask)
        (output,) = [o for o in drain(engine) if o.request_id == "e"]
        assert output.finish_reason == "length"
        assert output.embedding is not None
        expected = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]
        assert np.allclose(output.embedding, expected, rtol=1e-5, atol=1e-5)


def test_usage(start: Start, model: LanguageModel) -> None:
    engine = start(model, ServingOptions(speculate=False))
    engine.add(request("a", 7, new=6, length=100))
    first = drain(engine)[-1].usage
    engine.add(request("b", 7, new=6, length=100))
    second = drain(engine)[-1].usage
    assert first is not None
    assert second is not None
    assert (first.prompt_tokens, first.cached_tokens, first.output_tokens) == (100, 0, 6)
    assert second.cached_tokens >= 96
    assert first.ttft_ms is not None
    assert 0 <= first.queue_ms <= first.ttft_ms <= first.e2e_ms


def test_prompts_that_begin_the_same_are_computed_once(start: Start, model: LanguageModel) -> None:
    """Four at once, none cached: three wait a step for the first one's pages."""
    engine = start(model)
    for i in range(4):
        engine.add(Request((*random_prompt(8, 100), 97 + i), 3, GREEDY, id=str(i)))
    outputs = drain(engine)
    assert engine.stats().prompt_tokens <= 101 + 3 * 5
    for i in range(4):
        assert gather(outputs, str(i)) == plain(model, Request((*random_prompt(8, 100), 97 + i), 3, GREEDY))


def test_salts_share_nothing(start: Start, model: LanguageModel) -> None:
    engine = start(model)
    for salt in ("", "a", "b"):
        engine.add(request(f"salt {salt}", 9, length=100, salt=salt))
        usage = drain(engine)[-1].usage
        assert usage is not None
        assert usage.cached_tokens == 0


def test_a_second_turn_finds_the_first_answer(start: Start, model: LanguageModel) -> None:
    """Where answers take other kernels than prompts, once the engine had time to tidy up."""
    engine = start(model)
    prompt = random_prompt(10, 50)
    engine.add(Request(prompt, 40, GREEDY, id="first"))
    answer = gather(drain(engine), "first").tokens
    while engine.tidy():
        pass
    assert not engine.untidy
    second = Request((*prompt, *answer, 97, 98, 99), 5, GREEDY, id="second")
    engine.add(second)
    outputs = drain(engine)
    usage = outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens >= 88
    assert gather(outputs, "second") == plain(model, second)


def test_scheduling_costs_little(start: Start, model: LanguageModel) -> None:
    """Not a timing: what is beside computing is counted, and counted apart."""
    engine = start(model)
    engine.add(request("a", new=20))
    drain(engine)
    stats = engine.stats()
    assert 0 < stats.schedule_s < stats.step_s
    assert stats.steps <= 20
