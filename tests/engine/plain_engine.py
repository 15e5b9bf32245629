"""The plain twin of the engine: one request alone, prompt in one piece, a token a step, nothing shared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from hasten.engine.engine import Engine
from hasten.engine.grammar_compiler import GrammarCompiler
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.runtime.executor import Part
from hasten.runtime.pages import CachedSequence
from hasten.runtime.sampling import SequenceSampler, TokenLogprob, choose


@dataclass
class Plain:
    """One finished answer."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


def plain(model: LanguageModel, request: Request, index: int = 0) -> Plain:
    """What the engine must give, whatever else it does."""
    executor, done = model.executor, Plain()
    sampling = replace(request.sampling, seed=request.sampling.seed + index)
    sampler = SequenceSampler(sampling, request.prompt, model.config.vocab)
    grammar = None
    if request.grammar is not None:
        grammar = GrammarCompiler(model.tokenizer, model.config.vocab).compile(request.grammar).start()
    known, prompt = list(request.prompt), len(request.prompt)
    sequence = CachedSequence()
    sequence.kv_class = executor.kv_class(prompt, True)
    try:
        while done.finish is None:
            kv_class = executor.kv_class(len(known), True)
            if sequence.length and sequence.kv_class != kv_class:  # LongRoPE: all of it is prompt now
                executor.pool.truncate(sequence, 0)
                prompt = len(known)
                sequence.kv_class = kv_class
            new = known[sequence.length :]
            part = Part(sequence, new, as_prompt=len(known) == prompt, hidden=1)
            (result,) = executor.collect(executor.submit([part]))
            assert result.hidden is not None
            masks = None if grammar is None else grammar.masks([])
            if request.min_new_tokens or request.allowed_tokens or request.forbidden:
                masks = _ruled(model, request, done.tokens, masks)
            choice = choose(
                executor.head(result.hidden), [sampler], [[]], [len(known)], [masks], [request.logprobs]
            )[0]
            known += choice.tokens
            done.tokens += choice.tokens
            done.logprobs += choice.logprobs
            _finish(model, request, done, len(known))
            if grammar is not None and done.finish is None:
                grammar.accept(choice.tokens)
    finally:
        executor.pool.truncate(sequence, 0)
    return done


def _ruled(model: LanguageModel, request: Request, made: list[int], masks: np.ndarray | None) -> np.ndarray:
    """The mask with the bits of tokens that the request forbids taken out, unless that leaves none."""
    ends = () if request.sampling.ignore_eos else model.tokenizer.eos_ids
    vocabulary = model.config.vocab
    allowed = np.zeros((vocabulary + 31) // 32, np.uint32)
    for token in range(vocabulary):
        answer = (*made, token)
        is_early = len(answer) <= request.min_new_tokens and token in (*ends, *request.stop_token_ids)
        is_other = bool(request.allowed_tokens) and token not in request.allowed_tokens
        is_forbidden = any(answer[-len(run) :] == run for run in request.forbidden)
        if not (is_early or is_other or is_forbidden):
            allowed[token // 32] |= np.uint32(1 << token % 32)
    if masks is None:
        return allowed[None]
    both = masks & allowed
    return both if both.any() else masks


def _finish(model: LanguageModel, request: Request, done: Plain, known: int) -> None:
    ends = () if request.sampling.ignore_eos else model.tokenizer.eos_ids
    last = done.tokens[-1]
    whole = done.tokens[:-1] if last in ends or last in request.stop_token_ids else done.tokens
    text = model.tokenizer.decode(whole)
    found = [text.find(stop) for stop in request.stop if stop in text]
    if len(whole) < len(done.tokens) or found:
        done.finish = "stop"
    elif len(done.tokens) == request.max_new_tokens or known == model.context:
        done.finish = "length"
    done.text = text[: min(found)] if found else text


def gather(outputs: list[Output], request_id: str, index: int = 0) -> Plain:
    """The engine's outputs of one answer, joined."""
    mine = [one for one in outputs if one.request_id == request_id and one.index == index]
    assert [one.finish_reason for one in mine[:-1]] == [None] * (len(mine) - 1)
    return Plain(
        [token for one in mine for token in one.token_ids],
        [logprob for one in mine for logprob in one.logprobs],
        "".join(one.text for one in mine),
        mine[-1].finish_reason,
    )


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    """Byte tokens of the tiny vocabulary, no special ones."""
    return tuple(int(token) for token in np.random.default_rng(seed).integers(97, 122, length))


def finish(engine: Engine, most: int = 3000) -> list[Output]:
    """Steps until nothing is left to do, which must come."""
    outputs: list[Output] = []
    for _ in range(most):
        if not engine.busy:
            return outputs
        outputs += engine.step()
    raise AssertionError("the engine never ends")
