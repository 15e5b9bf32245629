"""From what a client asks to what the engine is asked: prompts, limits, sampling, grammars, tools.

Runs in a worker thread: templates and tokenizers are slow.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.engine.request import Request
from hasten.errors import TokenizerError
from hasten.runtime.sampling import SamplingOptions
from hasten.serve.problem import Problem

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.models.tool_calls import ToolCallStream, ToolStyle
    from hasten.serve.body import SamplingFields
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served


_GRAMMAR_HINT = (
    "give one of response_format, structured_outputs, guided_json, guided_regex, guided_choice, "
    "guided_grammar"
)

_MOST_CHARS = 256
"""Characters for which one token stands at most. Few vocabularies have longer tokens (they count then), but
some tokenizers drop blanks, and have one token for any unknown word."""
_USUAL_CHARS = 16  # a text of more characters a token is rare: until then it is encoded without a look
_PART = 1 << 16  # characters
_REMEMBERED = 1_000_000

_TEMPLATE_NAMES = {"messages", "tools", "documents", "add_generation_prompt"}


@dataclass(frozen=True)
class Asker:
    """Who asks, and the request's own id."""

    client: str
    request_id: str


def chat_text(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None,
) -> str:
    """A conversation through the model's template. In a worker thread.

    Raises:
        Problem, UsageError: the template does not take it.
    """
    from hasten.models.chat_template import prepared

    tokenizer = served.model.tokenizer
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    chat, named = prepared(plain, tools, tokenizer.fields.chat_templates)
    taken = _TEMPLATE_NAMES & (variables or {}).keys()
    if taken:
        said = f"chat_template_kwargs may not name {min(taken)}: the request has it already"
        raise Problem(400, said, param="chat_template_kwargs", code="invalid_value")
    try:
        return tokenizer.apply_chat(
            chat, add_generation_prompt, tools=tools, variables={**named, **(variables or {})}
        )
    except TokenizerError as error:  # its hint is for the command line
        raise Problem(400, error.message, param="messages", code="invalid_prompt") from error


def chat_tokens(served: Served, text: str) -> tuple[int, ...]:
    """Token ids of what `chat_text` gave; turns that were said before are remembered. In a worker thread."""
    if len(text) > _REMEMBERED:  # to cut it at its marks would keep other threads waiting
        return tuple(served.model.tokenizer.encode(text, add_special=False))
    return tuple(served.prompts.get_or_encode(text))


def encode(
    served: Served, prompt: str | Sequence[int], options: ServeOptions, add_special: bool = True
) -> tuple[int, ...]:
    """Token ids of a prompt that is text or token ids already.

    Raises:
        Problem: an id outside the vocabulary, or a text that cannot fit.
    """
    if isinstance(prompt, str):
        check_length(served, prompt, options)
        return tuple(served.model.tokenizer.encode(prompt, add_special))
    check_ids(served, prompt, "prompt")
    return tuple(prompt)


def check_ids(served: Served, ids: Sequence[int], param: str) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        Problem: 400.
    """
    vocabulary = served.model.config.vocab_size
    if any(token >= vocabulary for token in ids):
        said = f"a token id is {max(ids)}; the vocabulary has {vocabulary}"
        raise Problem(400, said, param=param, code="invalid_value")


def check_length(served: Served, text: str, options: ServeOptions) -> None:
    """Refuse a text that cannot fit before all of it is encoded: a million characters take 1.3 s.

    First by its characters: a token stands for so many at most. Then by counting the tokens of one part after
    another. Cutting changes the tokens beside a cut alone, so that twice the limit is surely too much.

    Raises:
        Problem: 400, as `limit_of`.
    """
    limit = served.context
    if options.max_prompt_tokens is not None:
        limit = min(limit, options.max_prompt_tokens)
    part = max(_PART, _USUAL_CHARS * limit)
    if len(text) <= part:
        return
    tokenizer = served.model.tokenizer
    most = _MOST_CHARS * limit
    if len(text) > most and len(text) > (most := max(most, tokenizer.longest_token * limit)):
        said = f"the prompt has {len(text):,} characters; {limit} tokens hold {most:,} at most"
        raise Problem(400, said, code=_too_long_code(served, limit))
    tokens = 0
    for start in range(0, len(text), part):
        tokens += tokenizer.count(text[start : start + part], add_special=False)
        if tokens >= 2 * limit:
            raise Problem(400, f"the prompt has more than {limit} tokens", code=_too_long_code(served, limit))


def _too_long_code(served: Served, limit: int) -> str:
    return "context_length_exceeded" if limit == served.context else "prompt_too_long"


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
        _ = served.texts.values  # read here, not where streams are written
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


Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolPlan:
    """How a request's tools are served."""

    style: ToolStyle
    grammar: Grammar | None  # None: the model decides freely
    names: tuple[str, ...] = ()  # of the functions offered: a call without its marks counts if it names one

    def reader(self) -> ToolCallStream:
        """Reads one answer."""
        from hasten.models.tool_calls import ToolCallStream

        return ToolCallStream(self.style, self.names)


def offered(tools: Tools | None, choice: str | Mapping[str, Any] | None) -> Tools | None:
    """The tools the model is told of: none where it must not call any.

    Raises:
        Problem: a choice without tools, or of a tool that is not there.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise Problem(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
        return None
    if isinstance(choice, Mapping):
        names = [tool["function"]["name"] for tool in tools]
        wanted = choice["function"]["name"]
        if wanted not in names:
            said = f"tool_choice names {wanted!r}; the tools are {', '.join(names)}"
            raise Problem(400, said[:500], param="tool_choice", code="invalid_value")
    return None if choice == "none" else tools


def plan_of(served: Served, tools: Tools, choice: str | Mapping[str, Any] | None, parallel: bool) -> ToolPlan:
    """The plan for tools that are offered. In a worker thread."""
    from hasten.engine.tool_grammar import tool_grammar

    model = served.model
    style = model.tokenizer.tool_style(model.config.architecture)
    grammar = tool_grammar(tools, choice or "auto", parallel, style)  # type: ignore[arg-type]
    return ToolPlan(style, grammar, tuple(tool["function"]["name"] for tool in tools))
