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
from hasten.serve.call import refused

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.models.tool_calls import ToolCallStream, ToolStyle
    from hasten.serve.body import SamplingFields, SharedFields
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served

_MOST_CHARS = 256
"""Characters for which one token stands at most. Few vocabularies have longer tokens (they count then), but
some tokenizers drop blanks, and have one token for any unknown word."""
_USUAL_CHARS = 16  # a text of more characters a token is rare: until then it is encoded without a look
_PART = 1 << 16  # characters
_REMEMBERED = 1_000_000

_TEMPLATE_NAMES = {"messages", "tools", "documents", "add_generation_prompt"}

Tools = Sequence[Mapping[str, Any]]
ToolChoice = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Asker:
    """Who asks which model, the request's own id, and the limits of the server."""

    served: Served
    options: ServeOptions
    client: str
    request_id: str

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Tools | None,
        add_generation_prompt: bool | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        """A conversation through the model's template.

        Raises:
            Problem, UsageError: the template does not take it.
        """
        from hasten.models.chat_template import prepared

        tokenizer = self.served.model.tokenizer
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        chat, named = prepared(plain, tools, tokenizer.fields.chat_templates)
        taken = _TEMPLATE_NAMES & (variables or {}).keys()
        if taken:
            said = f"chat_template_kwargs may not name {min(taken)}: the request has it already"
            raise refused(said, "chat_template_kwargs")
        named = {**named, **(variables or {})}
        try:
            return tokenizer.apply_chat(
                chat, add_generation_prompt is not False, tools=tools, variables=named
            )
        except TokenizerError as error:  # its hint is for the command line
            raise refused(error.message, "messages", "invalid_prompt") from error

    def chat_tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of what `chat_text` gave; turns that were said before are remembered."""
        if len(text) > _REMEMBERED:  # to cut it at its marks would keep other threads waiting
            return tuple(self.served.model.tokenizer.encode(text, add_special=False))
        return tuple(self.served.prompts.get_or_encode(text))

    def encode(self, prompt: str | Sequence[int], add_special: bool | None) -> tuple[int, ...]:
        """Token ids of a prompt that is text or token ids already.

        Raises:
            Problem: an id outside the vocabulary, or a text that cannot fit.
        """
        if isinstance(prompt, str):
            self.check_length(prompt)
            return tuple(self.served.model.tokenizer.encode(prompt, add_special is not False))
        check_ids(self.served, prompt, "prompt")
        return tuple(prompt)

    def check_length(self, text: str) -> None:
        """Refuse a text that cannot fit before all of it is encoded: a million characters take 1.3 s.

        First by its characters: a token stands for so many at most. Then by counting the tokens of one part
        after another. Cutting changes the tokens beside a cut alone: twice the limit is surely too much.

        Raises:
            Problem: 400, as `limit`.
        """
        limit = min(self.served.context, self.options.max_prompt_tokens or self.served.context)
        code = "context_length_exceeded" if limit == self.served.context else "prompt_too_long"
        part = max(_PART, _USUAL_CHARS * limit)
        if len(text) <= part:
            return
        tokenizer = self.served.model.tokenizer
        most = _MOST_CHARS * limit
        if len(text) > most and len(text) > (most := max(most, tokenizer.longest_token * limit)):
            said = f"the prompt has {len(text):,} characters; {limit} tokens hold {most:,} at most"
            raise refused(said, None, code)
        tokens = 0
        for start in range(0, len(text), part):
            tokens += tokenizer.count(text[start : start + part], add_special=False)
            if tokens >= 2 * limit:
                raise refused(f"the prompt has more than {limit} tokens", None, code)

    def limit(self, asked: int | None, prompt: int) -> int:
        """Tokens an answer may have.

        Args:
            asked: what the client wants; None is as many as fit.
            prompt: tokens of the prompt.

        Raises:
            Problem: the prompt, or prompt and answer together, do not fit.
        """
        options, context = self.options, self.served.context
        if options.max_prompt_tokens is not None and prompt > options.max_prompt_tokens:
            said = f"the prompt has {prompt} tokens, this server takes {options.max_prompt_tokens}"
            raise refused(said, None, "prompt_too_long")
        room = context - prompt
        if room < (1 if asked is None else min(1, asked)):
            said = f"the prompt has {prompt} tokens, the context {context}: no room for an answer"
            raise refused(said, None, "context_length_exceeded")
        most = room if options.max_output_tokens is None else min(room, options.max_output_tokens)
        if asked is None:
            return most
        if asked > room:
            said = f"the prompt has {prompt} tokens and {asked} more are asked for; the context is {context}"
            raise refused(said, "max_tokens", "context_length_exceeded")
        if asked > most:
            said = f"{asked} tokens are asked for, this server gives {most}"
            raise refused(said, "max_tokens", "too_many_tokens")
        return asked

    def shared(self, spec: SharedFields) -> dict[str, Any]:
        """What every request of the engine has of its body; `client` is the user of an address or key."""
        return {
            "priority": spec.priority or 0,
            "deadline_ms": spec.deadline_ms,
            "client": f"{self.client}/{spec.user}" if spec.user else self.client,
            "salt": spec.cache_salt or "",
            "id": self.request_id,
        }

    def request(
        self,
        spec: SamplingFields,
        prompt: tuple[int, ...],
        *,
        max_new_tokens: int,
        logprobs: int | None,
        grammar: Grammar | None,
        keep_special: tuple[int, ...] = (),
    ) -> Request:
        if logprobs is not None or spec.prompt_logprobs is not None:
            _ = self.served.texts.values  # read here, not where streams are written
        return Request(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling_of(spec),
            stop=(spec.stop,) if isinstance(spec.stop, str) else tuple(spec.stop or ()),
            stop_token_ids=tuple(spec.stop_token_ids or ()),
            n=spec.n or 1,
            logprobs=logprobs,
            prompt_logprobs=spec.prompt_logprobs,
            grammar=grammar,
            skip_special=spec.skip_special_tokens is not False,
            keep_special=keep_special,
            **self.shared(spec),
        )


def check_ids(served: Served, ids: Sequence[int], param: str) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        Problem: 400.
    """
    vocabulary = served.model.config.vocab
    if any(token >= vocabulary for token in ids):
        raise refused(f"a token id is {max(ids)}; the vocabulary has {vocabulary}", param)


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


def grammar_of(spec: SamplingFields, response_format: Mapping[str, Any] | None) -> Grammar | None:
    """What the answer must match, None if anything goes.

    Raises:
        Problem: more than one thing is asked for.
    """
    wanted: list[tuple[str, Any]] = []
    match response_format:
        case {"type": "json_object"}:
            wanted.append(("json_object", ""))
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            wanted.append(("json_schema", schema))
    guided = spec.structured_outputs
    if guided is not None:
        wanted += _guided(guided.json_, guided.regex, guided.choice, guided.grammar)
        wanted += [("json_object", "")] if guided.json_object else []
    wanted += _guided(spec.guided_json, spec.guided_regex, spec.guided_choice, spec.guided_grammar)
    if len(wanted) > 1:
        hint = "response_format, structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar"
        said = f"an answer can follow one grammar, {len(wanted)} are given; give one of {hint}"
        raise refused(said, None, None)
    if not wanted:
        return None
    from hasten.engine.grammar import Grammar

    kind, source = wanted[0]
    return Grammar(kind, source if isinstance(source, str) else json.dumps(source))  # type: ignore[arg-type]


def _guided(*sources: Any) -> list[tuple[str, Any]]:
    kinds = ("json_schema", "regex", "choice", "lark")
    return [(kind, one) for kind, one in zip(kinds, sources, strict=True) if one is not None]


@dataclass(frozen=True)
class ToolPlan:
    """How a request's tools are served: what the model must write, and what reads its answer."""

    style: ToolStyle
    grammar: Grammar | None  # None: the model decides freely
    names: tuple[str, ...] = ()  # of the functions offered: a call without its marks counts if it names one

    def reader(self) -> ToolCallStream:
        from hasten.models.tool_calls import ToolCallStream

        return ToolCallStream(self.style, self.names)


def offered(tools: Tools | None, choice: ToolChoice) -> Tools | None:
    """The tools the model is told of: none where it must not call any.

    Raises:
        Problem: a choice without tools, or of a tool that is not there.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise refused("tool_choice needs tools", "tool_choice")
        return None
    if isinstance(choice, Mapping):
        names = [tool["function"]["name"] for tool in tools]
        wanted = choice["function"]["name"]
        if wanted not in names:
            said = f"tool_choice names {wanted!r}; the tools are {', '.join(names)}"
            raise refused(said[:500], "tool_choice")
    return None if choice == "none" else tools


def plan_of(served: Served, tools: Tools, choice: ToolChoice, parallel: bool) -> ToolPlan:
    from hasten.engine.grammar import tool_grammar

    model = served.model
    style = model.tokenizer.tool_style(model.config.architecture)
    grammar = tool_grammar(tools, choice or "auto", parallel, style)  # type: ignore[arg-type]
    return ToolPlan(style, grammar, tuple(tool["function"]["name"] for tool in tools))
