"""`POST /v1/chat/completions`: the body, the form of the answer, the way between."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from hasten.engine.grammar import Thought, answer_grammar, checked_tools
from hasten.engine.request import Output, Request
from hasten.models.answers import CallStarted, TextDelta, ThoughtDelta, ToolEvent, gathered
from hasten.models.tool_calls import ToolStyle, is_harmony, template_of
from hasten.serve.body import JsonObject, SamplingFields, Strict, Text
from hasten.serve.call import refused
from hasten.serve.generate import asker_of, respond, texts_of
from hasten.serve.metrics import Tally
from hasten.serve.prepare import (
    Asker,
    Form,
    Reading,
    Thinking,
    Tools,
    calls_of,
    form_of,
    is_forced,
    is_one_call,
    marks_of,
    offered,
)
from hasten.serve.shape import News, Part, Shape, TokenTexts, dumps, joined
from hasten.serve.spelling import spelled_chat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.engine.grammar import Grammar
    from hasten.models.answers import ThoughtMarks
    from hasten.serve.service import Exchange

FunctionName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[a-zA-Z0-9_.:/\-]+$")]
SaidName = Annotated[str, Field(max_length=1000)]
"""A function as a model once called it: a wrong name must not end the conversation."""


class TextPart(TypedDict):
    """A part of a message; text is all a text model reads."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=10_000, fail_fast=True)]


class CalledFunction(TypedDict):
    """A call the assistant made."""

    name: SaidName
    arguments: Text  # JSON


class ToolCall(TypedDict):
    """A call and the id its result refers to."""

    id: Text
    type: Literal["function"]
    function: CalledFunction


class PlainMessage(TypedDict):
    """Instructions (`developer` is the newer word for `system`), or what the user says."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: NotRequired[Text | None]


class AssistantMessage(TypedDict):
    """What the assistant thought and said: text, calls, or both."""

    role: Literal["assistant"]
    content: NotRequired[Content | None]
    reasoning_content: NotRequired[Text | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(max_length=1000, fail_fast=True)] | None]
    refusal: NotRequired[None]
    annotations: NotRequired[Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None]
    audio: NotRequired[None]
    function_call: NotRequired[None]
    name: NotRequired[Text | None]


class ToolMessage(TypedDict):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: NotRequired[Text | None]  # of the function, which the call has said already


Message = Annotated[PlainMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(TypedDict):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: NotRequired[Text | None]
    parameters: NotRequired[JsonObject | None]
    strict: NotRequired[bool | None]


class Tool(TypedDict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(TypedDict):
    """The function of a named choice."""

    name: FunctionName


class NamedToolChoice(TypedDict):
    """This function and no other."""

    type: Literal["function"]
    function: NamedFunction


class PlainFormat(TypedDict):
    """Plain text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(TypedDict):
    """A named JSON schema; answers follow it whatever `strict` says, as far as a grammar can."""

    name: NotRequired[Text | None]
    schema: JsonObject
    description: NotRequired[Text | None]
    strict: NotRequired[bool | None]


class JsonSchemaFormat(TypedDict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")]


class ThinkingFields(Strict):
    """What a request says about the model's thoughts, in the words of several APIs."""

    reasoning_effort: str | None = Field(None, max_length=40, description="none, minimal, low, medium, high")
    reasoning: JsonObject | None = Field(None, description="effort, max_tokens, enabled, exclude")
    thinking: JsonObject | bool | None = Field(None, description="type (enabled, disabled), budget_tokens")
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    thinking_budget: int | None = Field(None, ge=-1, lt=2**31, description="most tokens of a thought")


class ChatRequest(SamplingFields, ThinkingFields):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="names the model's template reads")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="go on with the last message")
    echo: bool | None = Field(None, description="a last message by the assistant comes before the answer")
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=16, fail_fast=True)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = Field(
        None, max_length=512, description="one process has one cache: always hit"
    )

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """A chat in OpenAI's words; see `hasten.serve.spelling`."""
        found = spelled_chat(document, ignored)
        count = found.pop("n_probs", None) or found.get("logprobs")  # of llama.cpp; of Together
        if isinstance(count, int) and not isinstance(count, bool):
            found["logprobs"] = count > 0
            if count > 0:
                found.setdefault("top_logprobs", count)
        return super().understood(found, ignored)


class ChatShape(Shape):
    """`/v1/chat/completions`.

    Args:
        request: what is asked of the engine.
        reading: how its answers are read.
        streamed: they go out as they come.
        echoed: what each answer's content begins with: words of the client's own.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opens = True

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        tally: Tally,
        request: Request,
        reading: Reading,
        streamed: bool = False,
        echoed: str = "",
    ) -> None:
        super().__init__(model, texts, tally, request.n, is_checked=bool(reading.form.checked))
        self._echoed = echoed
        self._reading = reading
        self._readers = [] if reading.is_plain else [reading.reader(streamed) for _ in range(request.n)]
        self._with_logprobs = request.logprobs is not None
        self._thinkers = [reading.reader(False) for _ in range(request.n)] if reading.thinks else []
        self._thought_tokens = 0  # those whose step gave nothing but a thought

    def take(self, news: Sequence[News]) -> None:
        """Note outputs, and how many of their tokens are thoughts."""
        super().take(news)
        for _, output in news if self._thinkers else ():
            self._count(self._thinkers[output.index].read(output.text, output.finish_reason), output)

    def _count(self, said: Sequence[ToolEvent], output: Output) -> None:
        if said and all(isinstance(one, ThoughtDelta) for one in said):
            self._thought_tokens += len(output.token_ids)

    def _usage(self) -> dict[str, Any]:
        usage = super()._usage()
        if self._thinkers:
            usage["completion_tokens_details"] = {"reasoning_tokens": self._thought_tokens}
        return usage

    def _entries(self, part: Part, output: Output) -> list[str]:
        return [self.texts.chat(one) for one in output.logprobs]

    def _chunk(self, number: int, part: Part, output: Output) -> str:
        events = ""
        if not part.opened:
            part.opened = True
            events = self._opening(number, part)
        self._note_ids(part, output)
        if self._readers:
            return events + self._read(number, part, output)
        if output.text or output.logprobs:
            content = f'"content":{encode_basestring(output.text)}'
            events += self._delta(number, content, self._logprobs(part, output))
            self._note(part, output.text)
        if output.finish_reason is not None:
            events += self._finish(number, part, output.finish_reason, output.stop)
        return events

    def _opening(self, number: int, part: Part) -> str:
        """The chunk that says who speaks, and what is known of the prompt; what is echoed behind it."""
        events = self._delta(number, '"role":"assistant","content":""')
        if 0 in self.prompt_logprobs:
            head = events[: -len(self.tail)]
            events = f'{head[:-1]},"prompt_logprobs":{dumps(self.prompt_logprobs.pop(0))}}}{self.tail}'
        if self._prompts is not None:
            ids = f'{{"prompt_token_ids":{dumps(self._prompts[0])},'
            events = events.replace("{", ids, 1)
        if self._echoed:
            events += self._delta(number, f'"content":{encode_basestring(self._echoed)}')
        return events

    def _read(self, number: int, part: Part, output: Output) -> str:
        """Events of an answer that may think or call tools."""
        events, logprobs = [], self._logprobs(part, output)
        said = self._readers[number].read(output.text, output.finish_reason)
        self._count(said, output)
        for one in said:
            if isinstance(one, ThoughtDelta) and not self._reading.thoughts:
                continue
            if isinstance(one, TextDelta):
                self._note(part, one.text)
            events.append(self._delta(number, _delta_of(one), logprobs))
            logprobs = "null"
            part.called = part.called or isinstance(one, CallStarted)
        if logprobs != "null":
            events.append(self._delta(number, '"content":""', logprobs))
        if output.finish_reason is not None:
            called = part.called and output.finish_reason == "stop"
            reason = "tool_calls" if called else output.finish_reason
            events.append(self._finish(number, part, reason, output.stop))
        return "".join(events)

    def _note(self, part: Part, text: str) -> None:
        """Keep the content where it is checked at its end."""
        if self._reading.form.checked:
            part.texts.append(text)

    def _logprobs(self, part: Part, output: Output) -> str:
        entries = self._entries(part, output)
        return f'{{"content":[{",".join(entries)}],"refusal":null}}' if entries else "null"

    def _delta(self, number: int, delta: str, logprobs: str = "null") -> str:
        ids = self._ids(self.parts[number])
        choice = f'"index":{number},"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":null{ids}'
        return f"{self.head}{{{choice}}}{self.tail}"

    def _finish(self, number: int, part: Part, reason: str, stop: str | int | None) -> str:
        wrong = () if part.called else self._reading.form.violations(part.text, reason)
        more = f',"schema_violations":{dumps(wrong)}' if wrong else ""
        more += self._ids(part) if part.token_ids else ""
        return (
            f'{self.head}{{"index":{number},"delta":{{}},"logprobs":null,"finish_reason":"{reason}",'
            f'"stop_reason":{dumps(self._stop(stop))}{more}}}{self.tail}'
        )

    def _stop(self, stop: str | int | None) -> str | int | None:
        return None if stop is not None and stop == self._reading.stop else stop

    def _choice(self, number: int, part: Part) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": part.text,
            "refusal": None,
            "annotations": [],
        }
        reason = part.finish or "stop"
        calls: list[dict[str, Any]] = []
        if self._readers:
            thought, text, made = gathered(self._readers[number].read(part.text, reason))
            calls = [_whole(call, arguments) for call, arguments in made]
            message["content"] = text or (None if calls else "")
            if thought and self._reading.thoughts:
                message["reasoning_content"] = message["reasoning"] = thought
            if calls:
                message["tool_calls"] = calls
                reason = "tool_calls" if reason == "stop" else reason
        choice = {
            "index": number,
            "message": message,
            "logprobs": {"content": joined(part.logprobs), "refusal": None} if self._with_logprobs else None,
            "finish_reason": reason,
            "stop_reason": self._stop(part.stop),
        }
        wrong = () if calls else self._reading.form.violations(message["content"] or "", reason)
        if self._echoed:
            message["content"] = self._echoed + (message["content"] or "")
        if self._prompts is not None:
            choice["token_ids"] = part.token_ids
        return {**choice, "schema_violations": list(wrong)} if wrong else choice

    def document(self) -> dict[str, Any]:
        """The response in one piece; vLLM puts the prompt's logprobs beside the choices."""
        document = super().document()
        document["prompt_logprobs"] = self.prompt_logprobs.get(0)
        if self._prompts is not None:
            document["prompt_token_ids"] = self._prompts[0]
        return document


def _delta_of(one: ToolEvent) -> str:
    """A piece of an answer as the inside of a `delta`."""
    if isinstance(one, TextDelta):
        return f'"content":{encode_basestring(one.text)}'
    if isinstance(one, ThoughtDelta):
        text = encode_basestring(one.text)
        return f'"reasoning_content":{text},"reasoning":{text}'  # the older name, and vLLM's of today
    call = _begun(one) if isinstance(one, CallStarted) else {"function": {"arguments": one.text}}
    return f'"tool_calls":[{dumps({"index": one.index, **call})}]'


def _begun(one: CallStarted) -> dict[str, Any]:
    return {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}}


def _whole(one: CallStarted, arguments: str) -> dict[str, Any]:
    call = _begun(one)
    call["function"]["arguments"] = arguments
    return call


async def chat(exchange: Exchange) -> None:
    spec = await exchange.body(ChatRequest)
    check(spec, exchange.service.options.strict)
    async with exchange.service.pool.use(spec.model) as served:
        request, reading = await exchange.work(partial(prepare_chat, spec, asker_of(exchange, served)))
        exchange.note_form(reading.form)
        tally = exchange.tally(served.name)
        texts = texts_of(spec, served)
        shape = ChatShape(served.name, texts, tally, request, reading, bool(spec.stream), echoed_of(spec))
        shape.report(spec.stream_options, len(request.prompt))
        if spec.return_token_ids:
            shape.show_ids([request])
        await respond(exchange, served, spec, [request], shape)


async def chat_tokens(exchange: Exchange) -> None:
    """Tokens of a conversation, tools included, as llama.cpp's server counts them."""
    spec = await exchange.body(ChatRequest)
    count = await counted(exchange, spec)
    await exchange.json({"object": "response.input_tokens", "input_tokens": count})


async def counted(exchange: Exchange, spec: ChatRequest) -> int:
    """Tokens of the prompt that a conversation becomes; nothing is generated."""
    asked = spec.model_copy(update={"max_tokens": 0, "max_completion_tokens": None, "min_tokens": None})
    async with exchange.service.pool.use(spec.model) as served:
        request, _ = await exchange.work(partial(prepare_chat, asked, asker_of(exchange, served)))
    return len(request.prompt)


def echoed_of(spec: ChatRequest) -> str:
    """What an answer begins with: vLLM's `echo` repeats a last message by the assistant."""
    last = spec.messages[-1]
    if not spec.echo or last["role"] != "assistant":
        return ""
    content = last.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check(spec: ChatRequest, strict: bool) -> None:
    """What one field alone cannot tell; what two fields say of one thing is no fault where both can be heard.

    Raises:
        Problem: fields contradict each other.
    """
    if spec.top_logprobs is not None and not spec.logprobs and (strict or spec.top_logprobs):
        raise refused("top_logprobs needs logprobs: true", "top_logprobs", None)
    if not strict:
        return
    if spec.max_tokens is not None and spec.max_completion_tokens is not None:
        raise refused("max_tokens and max_completion_tokens are both given", "max_tokens", None)
    if spec.stream_options is not None and not spec.stream:
        raise refused("stream_options needs stream: true", "stream_options", None)


def thinking_of(spec: ThinkingFields) -> Thinking:
    """What a request says about thoughts, whatever words it uses."""
    told = spec.reasoning or {}
    effort = spec.reasoning_effort or told.get("effort")
    enabled = spec.enable_thinking
    budget: Any = spec.thinking_budget if spec.thinking_budget is not None else told.get("max_tokens")
    if isinstance(spec.thinking, bool):
        enabled = spec.thinking if enabled is None else enabled
    elif spec.thinking is not None:
        kind = spec.thinking.get("type")
        if enabled is None and kind in ("enabled", "disabled"):
            enabled = kind == "enabled"
        budget = spec.thinking.get("budget_tokens", budget)
    if enabled is None and isinstance(told.get("enabled"), bool):
        enabled = told["enabled"]
    if effort == "none" or budget == 0:
        enabled = False
    is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
    return Thinking(
        enabled,
        effort if isinstance(effort, str) and effort != "none" else None,
        budget if is_count else None,
        spec.include_reasoning is not False and told.get("exclude") is not True,
    )


def prepare_chat(spec: ChatRequest, asker: Asker) -> tuple[Request, Reading]:
    """The engine's request for a conversation, and how its answer is read. In a worker thread."""
    served, strict = asker.served, asker.options.strict
    tools = offered(spec.tools, spec.tool_choice)
    thinking = thinking_of(spec)
    text = _prompt(spec, asker, tools, thinking)
    marks = marks_of(served)
    if marks is not None and thinking.enabled is False and marks.is_open(text):
        text = f"{text.rstrip()}\n\n{marks.closing}\n\n"  # the template cannot leave the thought out
    asker.check_length(text)
    prompt = asker.kept(spec, asker.chat_tokens(text))
    asked = spec.max_tokens if spec.max_completion_tokens is None else spec.max_completion_tokens
    most = asker.limit(asked, len(prompt))
    form = form_of(spec, spec.response_format, strict=strict)
    style = None
    if tools:
        style = served.model.tokenizer.tool_style(served.model.config.architecture)
        style = replace(style, schemas=checked_tools(tools))
    one_call = style is not None and is_one_call(spec.tool_choice, spec.parallel_tool_calls)
    inside = marks is not None and marks.is_open(text)
    grammar = _grammar(spec, style, form, _thought(thinking, marks, inside, most, form), strict)
    reading = Reading(
        style=style,
        names=tuple(style.schemas) if style is not None else (),
        marks=marks,
        inside=inside,
        most_calls=1 if one_call else None,
        harmony=is_harmony(template_of(served.model.tokenizer.fields.chat_templates)),
        thoughts=thinking.shown,
        form=form,
        stop=style.closing if style is not None and one_call and grammar is None else None,
    )
    request = asker.request(
        spec,
        prompt,
        max_new_tokens=most,
        logprobs=(spec.top_logprobs or 0) if spec.logprobs else None,
        grammar=grammar,
        keep_special=tuple({*(style.keep_ids if style else ()), *(marks.keep_ids if marks else ())}),
        more_stops=(reading.stop,) if reading.stop else (),
    )
    return request, reading


def _prompt(spec: ChatRequest, asker: Asker, tools: Tools | None, thinking: Thinking) -> str:
    variables = {**thinking.variables, **(spec.chat_template_kwargs or {})}
    if spec.continue_final_message:
        if spec.add_generation_prompt:
            said = "continue_final_message and add_generation_prompt cannot both be true"
            raise refused(said, "continue_final_message", None)
        return asker.continued_text(spec.messages, tools, variables)
    return asker.chat_text(spec.messages, tools, spec.add_generation_prompt, variables)


_FOR_THE_ANSWER = 1024
"""Tokens that a thought leaves to the form behind it, or three quarters of a small limit: a model that thinks
up to the limit would give no answer."""


def _thought(
    thinking: Thinking, marks: ThoughtMarks | None, inside: bool, most: int, form: Form
) -> Thought | None:
    """What the grammar must let come first; None where no thought can come."""
    if marks is None or (thinking.enabled is False and not inside):
        return None
    budget = thinking.most_tokens
    if form.grammar is not None:
        left = most - min(3 * most // 4, _FOR_THE_ANSWER)
        budget = left if budget is None else min(budget, left)
    return Thought(marks, inside, None if budget is None else _rounded(budget))


def _rounded(count: int) -> int:
    """At most the count, with two leading bits: a grammar is compiled for each, and few are kept."""
    size = max(0, count.bit_length() - 2)
    return max(1, count >> size << size)


def _grammar(
    spec: ChatRequest, style: ToolStyle | None, form: Form, thought: Thought | None, strict: bool
) -> Grammar | None:
    """What the whole answer must match: the thought, then a call or the form; a forced call has no form.

    Calls that a model makes as it likes are free, unless a tool is strict.
    """
    calls = None
    is_strict = any(tool["function"].get("strict") is True for tool in spec.tools or ())
    free = not is_strict or (style is not None and style.name == "harmony")  # its text is made of marks
    if style is not None and (form.grammar is not None or is_forced(spec.tool_choice) or not free):
        calls = calls_of(style, spec.tool_choice, spec.parallel_tool_calls, strict=strict)
    return answer_grammar(form.grammar, calls, thought)
