"""From what a client asks to what the engine is asked: prompts, limits, sampling, grammars, tools.

Runs in a worker thread: templates and tokenizers are slow.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hasten.engine.request import Request
from hasten.errors import TokenizerError
from hasten.runtime.sampling import SamplingOptions
from hasten.serve.call import Problem, refused

if TYPE_CHECKING:
    from hasten.engine.grammar import Calls, Grammar
    from hasten.models.answers import Reader, ThoughtMarks
    from hasten.models.tool_calls import ToolStyle
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
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if not self.options.strict:
            plain = [dict(_mended(message)) for message in plain]
        taken = _TEMPLATE_NAMES & (variables or {}).keys()
        if taken:
            said = f"chat_template_kwargs may not name {min(taken)}: the request has it already"
            raise refused(said, "chat_template_kwargs")
        try:
            return self.served.model.tokenizer.apply_chat(
                plain, add_generation_prompt is not False, tools=tools, variables=variables
            )
        except TokenizerError as error:  # its hint is for the command line
            raise refused(error.message, "messages", "invalid_prompt") from error

    def continued_text(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools | None, variables: Mapping[str, Any] | None
    ) -> str:
        """A conversation whose last message the answer goes on with.

        Raises:
            Problem: 400, the template writes the last message in a way that has no end to go on from.
        """
        last = messages[-1]
        content = last.get("content") or ""
        words = content if isinstance(content, str) else "".join(part["text"] for part in content)
        marked = [*messages[:-1], {**last, "content": words + _HERE}]
        text, found, _ = self.chat_text(marked, tools, False, variables).rpartition(_HERE)
        if not found:
            said = (
                "the model's template does not let a message be continued; leave continue_final_message out"
            )
            raise refused(said, "continue_final_message")
        return text

    def chat_tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of what `chat_text` gave; turns that were said before are remembered."""
        tokenizer = self.served.model.tokenizer
        if len(text) > _REMEMBERED:  # to cut it at its marks would keep other threads waiting
            return tuple(tokenizer.opened(tokenizer.encode(text, add_special=False)))
        return tuple(tokenizer.opened(self.served.prompts.get_or_encode(text)))

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

    def kept(self, spec: SamplingFields, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """As much of a prompt as the request wants (vLLM's `truncate_prompt_tokens`): its end, unless told.

        Raises:
            Problem: 400, nothing would be left.
        """
        most = spec.truncate_prompt_tokens
        if most is None:
            return prompt
        context = self.served.context
        most = context - (spec.min_tokens or 1) if most == -1 else min(most, context)
        if most < 1:
            raise refused("truncate_prompt_tokens leaves nothing of the prompt", "truncate_prompt_tokens")
        return prompt[:most] if spec.truncation_side == "right" else prompt[-most:]

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
            raise refused(f"{said}; {self._context_words()}", None, code)
        tokens = 0
        for start in range(0, len(text), part):
            tokens += tokenizer.count(text[start : start + part], add_special=False)
            if tokens >= 2 * limit:
                said = f"the prompt has more than {limit} tokens; {self._context_words()}"
                raise refused(said, None, code)

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
            said = f"the prompt has {prompt} tokens: no room for an answer; {self._context_words()}"
            raise refused(said, None, "context_length_exceeded")
        most = room if options.max_output_tokens is None else min(room, options.max_output_tokens)
        if asked is None:
            return most
        if not options.strict:  # a cap, not a demand: editors send a fixed large one
            return min(asked, most)
        if asked > room:
            said = f"the prompt has {prompt} tokens and {asked} more are asked for; {self._context_words()}"
            raise refused(said, "max_tokens", "context_length_exceeded")
        if asked > most:
            said = f"{asked} tokens are asked for, this server gives {most}"
            raise refused(said, "max_tokens", "too_many_tokens")
        return asked

    def _context_words(self) -> str:
        """Programs look for the first words; people need the flag."""
        context = self.served.context
        able = self.served.model.config.context
        if able <= context:
            return f"this model's maximum context length is {context} tokens, all that it was made for"
        said = f"this model's maximum context length is {context} tokens here"
        return f"{said}; more with --context (the model can {able})"

    def shared(self, spec: SharedFields) -> dict[str, Any]:
        """What every request of the engine has of its body; `client` is the user of an address or key."""
        return {
            "priority": self.options.priority_of(spec.priority or 0, self.client),
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
        more_stops: tuple[str, ...] = (),
    ) -> Request:
        check_ids(self.served, spec.allowed_token_ids or (), "allowed_token_ids")
        if logprobs is not None or spec.prompt_logprobs is not None:
            _ = self.served.texts.values  # read here, not where streams are written
        return Request(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling_of(spec, self.served.model.sampling),
            stop=((spec.stop,) if isinstance(spec.stop, str) else tuple(spec.stop or ())) + more_stops,
            stop_token_ids=tuple(spec.stop_token_ids or ()),
            shows_stop=bool(spec.include_stop_str_in_output),
            min_new_tokens=_least(spec, max_new_tokens),
            allowed_tokens=tuple(spec.allowed_token_ids or ()),
            forbidden=_runs(self.served, spec.bad_words or ()),
            n=spec.n or 1,
            logprobs=logprobs,
            prompt_logprobs=spec.prompt_logprobs,
            grammar=grammar,
            skip_special=spec.skip_special_tokens is not False,
            keep_special=keep_special,
            **self.shared(spec),
        )


def _least(spec: SamplingFields, most: int) -> int:
    """Tokens an answer must have: at most as many as it may have.

    Raises:
        Problem: 400, more are asked for than the request itself allows.
    """
    least = spec.min_tokens or 0
    caps = [getattr(spec, name, None) for name in ("max_completion_tokens", "max_tokens")]
    cap = next((cap for cap in caps if cap is not None), None)
    if cap is not None and least > cap:
        raise refused(f"min_tokens is {least}, and max_tokens is {cap}; ask for at most that", "min_tokens")
    return min(least, most)


_MOST_RULED = 10_000  # tokens of all forbidden words: some of them are compared at every step


def _runs(served: Served, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Words as the tokens that spell them, at the start of a text and behind a blank.

    Raises:
        Problem: 400, they have very many tokens.
    """
    encode = served.model.tokenizer.encode
    runs = (tuple(encode(text, False)) for word in words for text in (word, f" {word.lstrip()}"))
    found = tuple(dict.fromkeys(run for run in runs if run))
    if sum(map(len, found)) > _MOST_RULED:
        raise refused(f"bad_words have more than {_MOST_RULED:,} tokens; give fewer or shorter", "bad_words")
    return found


def check_ids(served: Served, ids: Sequence[int], param: str) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        Problem: 400.
    """
    vocabulary = served.model.config.vocab
    if any(token >= vocabulary for token in ids):
        raise refused(f"token id {max(ids)} is out of vocabulary: it has {vocabulary}", param)


def sampling_of(spec: SamplingFields, usual: Mapping[str, float] | None = None) -> SamplingOptions:
    """Sampling as asked, else as the model's authors advise, else OpenAI's: temperature 1, another seed each
    time.

    Args:
        spec: the request.
        usual: temperature, top_p, top_k ... of the model's generation_config.json.
    """
    values: dict[str, Any] = {"temperature": 1.0, **(usual or {})}
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in (*names, "top_k"):
        if (value := getattr(spec, name)) is not None:
            values[name] = value
    values["top_k"] = max(0, int(values.get("top_k", 0)))
    values["seed"] = secrets.randbits(63) if spec.seed is None else spec.seed % 2**64
    values["ignore_eos"] = bool(spec.ignore_eos)
    values["logit_bias"] = {int(token): bias for token, bias in (spec.logit_bias or {}).items()}
    return SamplingOptions(**values)


_HERE = "\x1dthe answer goes on here\x1d"


def _mended(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls have arguments that are objects: what a model once wrote wrong must not end a
    conversation."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_mended_call(call) for call in calls]}


def _mended_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    try:
        if isinstance(json.loads(arguments or "{}") if isinstance(arguments, str) else arguments, Mapping):
            return call
    except (ValueError, RecursionError):
        pass
    return {**call, "function": {**function, "arguments": {"malformed": str(arguments)}}}


@dataclass(frozen=True)
class Form:
    """What an answer's text must match, and what is left to check when it is there."""

    grammar: Grammar | None = None
    schema: Any = None  # as it was sent, where the grammar does not follow all of it
    checked: tuple[str, ...] = ()  # the keywords that it does not follow
    strict: bool = False  # an answer that does not match is an error

    def violations(self, text: str, finish: str) -> tuple[str, ...]:
        """What of a whole answer does not match; nothing of one that was cut. In a worker thread.

        Raises:
            Problem: it does not match a schema that the client called strict.
        """
        if not self.checked or finish != "stop":
            return ()
        from hasten.engine.schema import violations

        found = violations(self.schema, text)
        if found and self.strict:
            said = f"the answer does not follow the strict schema: {'; '.join(found)}; ask again"
            raise Problem(500, said, param="response_format", code="schema_not_followed")
        return found


def form_of(spec: SamplingFields, response_format: Mapping[str, Any] | None, *, strict: bool) -> Form:
    """The form that an answer must have.

    Args:
        strict: schemas are used as they are, and refused where a grammar cannot follow them.

    Raises:
        Problem: more than one thing is asked for.
    """
    wanted: list[tuple[str, Any]] = []
    must = False
    match response_format:
        case {"type": "json_object"}:
            wanted.append(("json_object", ""))
        case {"type": "json_schema", "json_schema": {"schema": schema, **more}}:
            wanted.append(("json_schema", schema))
            must = more.get("strict") is True
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
        return Form()
    from hasten.engine.grammar import Grammar

    kind, source = wanted[0]
    if kind == "json_schema" and not strict:
        return _of_schema(source, must)
    return Form(Grammar(kind, source if isinstance(source, str) else json.dumps(source)))  # type: ignore[arg-type]


def _of_schema(source: Any, must: bool) -> Form:
    from hasten.engine.grammar import MAX_BYTES, Grammar
    from hasten.engine.schema import followed

    try:
        schema = json.loads(source) if isinstance(source, str) else source
    except (ValueError, RecursionError):  # the engine says what is wrong
        return Form(Grammar("json_schema", source))
    kept = followed(schema)
    form = Grammar("json_schema", json.dumps(kept.schema))
    if kept.checked and len(json.dumps(schema)) > MAX_BYTES:
        said = f"the JSON schema has more than {MAX_BYTES:,} bytes, and no grammar can follow its "
        raise refused(f"{said}{kept.checked[0]}; leave that out, or send a shorter one", None)
    return Form(form, schema, kept.checked, must) if kept.checked else Form(form)


def _guided(*sources: Any) -> list[tuple[str, Any]]:
    kinds = ("json_schema", "regex", "choice", "lark")
    return [(kind, one) for kind, one in zip(kinds, sources, strict=True) if one is not None]


@dataclass(frozen=True)
class Thinking:
    """What a request says about thoughts. None: the model's own way."""

    enabled: bool | None = None
    effort: str | None = None
    most_tokens: int | None = None
    shown: bool = True

    @property
    def variables(self) -> dict[str, Any]:
        """The names by which templates ask."""
        found: dict[str, Any] = {}
        if self.enabled is not None:
            found |= {"enable_thinking": self.enabled, "thinking": self.enabled}
        if self.effort is not None:
            found["reasoning_effort"] = self.effort
        return found


@dataclass(frozen=True)
class Reading:
    """How an answer is read: thoughts, calls, content; and what of it is checked at its end."""

    style: ToolStyle | None = None  # None: there are no tools
    names: tuple[str, ...] = ()  # of the functions offered: a call without its marks counts if it names one
    marks: ThoughtMarks | None = None
    inside: bool = False  # the prompt has opened a thought
    most_calls: int | None = None
    harmony: bool = False
    thoughts: bool = True  # they are shown
    form: Form = Form()
    stop: str | None = None  # a mark of ours that ends the answer: nobody asked for it

    @property
    def is_plain(self) -> bool:
        """Whether all of the answer is content."""
        return self.style is None and self.marks is None and not self.harmony

    @property
    def thinks(self) -> bool:
        """Whether a thought may come before the content."""
        return self.marks is not None or self.harmony

    def reader(self, streamed: bool) -> Reader:
        from hasten.models.answers import AnswerReader, HarmonyReader, ToolCallStream

        if self.harmony:
            return HarmonyReader(self.style, self.most_calls)
        calls = None
        if self.style is not None:
            calls = ToolCallStream(self.style, self.names, streamed=streamed)
        return AnswerReader(self.marks, self.inside, calls, self.most_calls)


def marks_of(served: Served) -> ThoughtMarks | None:
    """How the served model marks its thoughts; None: it does not."""
    from hasten.models.answers import thought_marks
    from hasten.models.tool_calls import template_of

    tokenizer = served.model.tokenizer
    found = thought_marks(template_of(tokenizer.fields.chat_templates), {})
    if found is None:
        return None
    ids = {mark: tokenizer.id_of(mark) for mark in (found.opening, found.closing)}
    special = {mark: one for mark, one in ids.items() if one is not None and one in tokenizer.special_ids}
    return replace(found, special=special)


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


def is_forced(choice: ToolChoice) -> bool:
    """Whether the answer must be a call."""
    return choice == "required" or isinstance(choice, Mapping)


def is_one_call(choice: ToolChoice, parallel: bool | None) -> bool:
    """Whether an answer makes one call at most: a forced call is one, unless several are asked for."""
    return parallel is False or isinstance(choice, Mapping) or (is_forced(choice) and parallel is not True)


def calls_of(style: ToolStyle, choice: ToolChoice, parallel: bool | None, *, strict: bool) -> Calls:
    """The calls that a grammar lets an answer make.

    Args:
        style: the model's way, with the schemas of the functions offered.
        choice: `tool_choice`; a function it names is one of them.
        parallel: `parallel_tool_calls`.
        strict: schemas are followed whole; else what a grammar cannot follow of them is left out.

    Raises:
        Problem: a strict server, and a grammar cannot follow a schema.
    """
    from hasten.engine.grammar import MOST_CALLS, Calls
    from hasten.engine.schema import followed

    names = [choice["function"]["name"]] if isinstance(choice, Mapping) else [*style.schemas]
    functions = {}
    for name in names:
        kept = followed(style.schemas[name])
        if strict and kept.checked:
            said = f"the parameters of {name!r} use what no grammar can follow: {', '.join(kept.checked)}"
            raise refused(f"{said}; leave it out, or set tool_choice to auto"[:500], "tools")
        functions[name] = kept.schema
    return Calls(functions, is_forced(choice), 1 if is_one_call(choice, parallel) else MOST_CALLS, style)
