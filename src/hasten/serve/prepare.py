"""From what a client asks to what the engine is asked.

Runs in a worker thread: templates and tokenizers are slow.
."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.engine.request import Request
from hasten.engine.sampling import SamplingOptions
from hasten.errors import TokenizerError
from hasten.serve.problem import Problem
from hasten.serve.tools import Tools, offered, plan_of

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served
    from hasten.serve.protocol.chat import ChatRequest
    from hasten.serve.protocol.sampling import SamplingFields
    from hasten.serve.tools import ToolPlan

_GRAMMAR_HINT = (
    "give one of response_format, structured_outputs, guided_json, guided_regex, guided_choice, "
    "guided_grammar"
)

_TEMPLATE_NAMES = {"messages", "tools", "documents", "add_generation_prompt"}


@dataclass(frozen=True)
class Asker:
    """Who asks, and the request's own id."""

    client: str
    request_id: str


def prepare_chat(
    spec: ChatRequest, served: Served, asker: Asker, options: ServeOptions
) -> tuple[Request, ToolPlan | None]:
    """The engine's request for a conversation, and what reads calls from its answer. In a worker thread."""
    tools = offered(spec.tools, spec.tool_choice)
    plan = plan_of(served, tools, spec.tool_choice, spec.parallel_tool_calls is not False) if tools else None
    grammar = grammar_of(spec, spec.response_format)
    if plan is not None and plan.grammar is not None:
        if grammar is not None:
            raise Problem(
                400, "an answer that must call a tool can follow no other format", param="tool_choice"
            )
        grammar = plan.grammar
    prompt = chat_tokens(
        served, spec.messages, tools, spec.add_generation_prompt is not False, spec.chat_template_kwargs
    )
    asked = spec.max_tokens if spec.max_completion_tokens is None else spec.max_completion_tokens
    request = request_of(
        served,
        spec,
        prompt,
        asker,
        max_new_tokens=limit_of(asked, len(prompt), served, options),
        logprobs=(spec.top_logprobs or 0) if spec.logprobs else None,
        grammar=grammar,
        keep_special=plan.style.keep_ids if plan is not None else (),
    )
    return request, plan


def chat_tokens(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None,
) -> tuple[int, ...]:
    """A conversation through the model's template. In a worker thread.

    Raises:
        Problem, UsageError: the template does not take it.
    """
    from hasten.models.tools.messages import prepared

    tokenizer = served.model.tokenizer
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    chat, named = prepared(plain, tools, tokenizer.fields.chat_templates)
    taken = _TEMPLATE_NAMES & (variables or {}).keys()
    if taken:
        said = f"chat_template_kwargs may not name {min(taken)}: the request has it already"
        raise Problem(400, said, param="chat_template_kwargs", code="invalid_value")
    try:
        text = tokenizer.apply_chat(
            chat, add_generation_prompt, tools=tools, variables={**named, **(variables or {})}
        )
    except TokenizerError as error:  # its hint is for the command line
        raise Problem(400, error.message, param="messages", code="invalid_prompt") from error
    return tuple(served.prompts.get_or_encode(text))


def encode(
    served: Served, prompt: str | Sequence[int], add_special: bool = True, param: str = "prompt"
) -> tuple[int, ...]:
    """Token ids of a prompt that is text or token ids already.

    Raises:
        Problem: an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        return tuple(served.model.tokenizer.encode(prompt, add_special))
    vocabulary = served.model.config.vocab_size
    if any(token >= vocabulary for token in prompt):
        raise Problem(
            400,
            f"a token id is {max(prompt)}; the vocabulary has {vocabulary}",
            param=param,
            code="invalid_value",
        )
    return tuple(prompt)


def limit_of(asked: int | None, prompt: int, served: Served, options: ServeOptions) -> int:
    """Tokens an answer may have.

    Args:
        asked: what the client wants; None is as many as fit.
        prompt: tokens of the prompt.

    Raises:
        Problem: the prompt, or prompt and answer together, do not fit.
    """
    if options.max_prompt_tokens is not None and prompt > options.max_prompt_tokens:
        raise Problem(
            400,
            f"the prompt has {prompt} tokens, this server takes {options.max_prompt_tokens}",
            code="prompt_too_long",
        )
    room = served.context - prompt
    if room < (1 if asked is None else min(1, asked)):
        raise Problem(
            400,
            f"the prompt has {prompt} tokens, the context {served.context}: no room for an answer",
            code="context_length_exceeded",
        )
    most = room if options.max_output_tokens is None else min(room, options.max_output_tokens)
    if asked is None:
        return most
    if asked > room:
        raise Problem(
            400,
            f"the prompt has {prompt} tokens and {asked} more are asked for; the context is {served.context}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if asked > most:
        raise Problem(
            400,
            f"{asked} tokens are asked for, this server gives {most}",
            param="max_tokens",
            code="too_many_tokens",
        )
    return asked


def sampling_of(spec: SamplingFields) -> SamplingOptions:
    """Sampling with OpenAI's defaults: temperature 1, another seed each time."""
    values: dict[str, Any] = {
        "temperature": 1.0 if spec.temperature is None else spec.temperature,
        "top_k": max(0, spec.top_k or 0),
        "seed": secrets.randbits(63) if spec.seed is None else spec.seed % 2**64,
        "ignore_eos": bool(spec.ignore_eos),
        "logit_bias": {int(token): bias for token, bias in (spec.logit_bias or {}).items()},
    }
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if (value := getattr(spec, name)) is not None:
            values[name] = value
    return SamplingOptions(**values)


def request_of(
    served: Served,
    spec: SamplingFields,
    prompt: tuple[int, ...],
    asker: Asker,
    *,
    max_new_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None,
    keep_special: tuple[int, ...] = (),
) -> Request:
    """The engine's request; `client` is the user of an address or key. In a worker thread."""
    if logprobs is not None or spec.prompt_logprobs is not None:
        _ = served.token_bytes  # read here, not where streams are written
    stop = (spec.stop,) if isinstance(spec.stop, str) else tuple(spec.stop or ())
    return Request(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling_of(spec),
        stop=stop,
        stop_token_ids=tuple(spec.stop_token_ids or ()),
        n=spec.n or 1,
        logprobs=logprobs,
        prompt_logprobs=spec.prompt_logprobs,
        grammar=grammar,
        skip_special=spec.skip_special_tokens is not False,
        keep_special=keep_special,
        priority=spec.priority or 0,
        deadline_ms=spec.deadline_ms,
        client=f"{asker.client}/{spec.user}" if spec.user else asker.client,
        salt=spec.cache_salt or "",
        id=asker.request_id,
    )


def grammar_of(spec: SamplingFields, response_format: Mapping[str, Any] | None) -> Grammar | None:
    """What the answer must match, None if anything goes.

    Raises:
        Problem: more than one thing is asked for.
    """
    wanted = _formats(response_format)
    guided = spec.structured_outputs
    if guided is not None:
        wanted += _guided(guided.json_, guided.regex, guided.choice, guided.grammar)
        wanted += [("json_object", "")] if guided.json_object else []
    wanted += _guided(spec.guided_json, spec.guided_regex, spec.guided_choice, spec.guided_grammar)
    if len(wanted) > 1:
        raise Problem(400, f"an answer can follow one grammar, {len(wanted)} are given; {_GRAMMAR_HINT}")
    if not wanted:
        return None
    from hasten.engine.grammar import Grammar

    kind, source = wanted[0]
    return Grammar(kind, source)  # type: ignore[arg-type]


def _formats(response_format: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    match response_format:
        case {"type": "json_object"}:
            return [("json_object", "")]
        case {"type": "json_schema", "json_schema": {"schema": schema}} | {
            "type": "json_schema",
            "schema": schema,
        }:
            return [("json_schema", json.dumps(schema))]
    return []


def _guided(
    schema: Mapping[str, Any] | str | None, regex: str | None, choice: Sequence[str] | None, lark: str | None
) -> list[tuple[str, str]]:
    found = []
    if schema is not None:
        found.append(("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))
    if regex is not None:
        found.append(("regex", regex))
    if choice is not None:
        found.append(("choice", json.dumps(list(choice))))
    if lark is not None:
        found.append(("lark", lark))
    return found
