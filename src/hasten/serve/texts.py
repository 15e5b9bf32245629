"""`POST /v1/completions`, `/infill`, `/v1/embeddings`, `/tokenize`, `/detokenize`: for texts as they stand.

Of each: the body, the form of the answer, the way between. The last two are as vLLM has them, `/infill` as
llama.cpp's server has it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from hasten.engine.request import Output, Request
from hasten.serve.body import JsonObject, SamplingFields, SharedFields, Strict, Text, TokenId
from hasten.serve.call import Problem, refused
from hasten.serve.chat import Message, ResponseFormat, Tool
from hasten.serve.generate import Feed, asker_of, respond, texts_of
from hasten.serve.metrics import Tally
from hasten.serve.prepare import Asker, Form, check_ids, form_of
from hasten.serve.shape import (
    News,
    Part,
    Shape,
    TokenNumbers,
    TokenTexts,
    dumped,
    dumps,
    event,
    finite,
    joined,
)
from hasten.serve.spelling import spelled_switches

if TYPE_CHECKING:
    from hasten.runtime.sampling import TokenLogprob
    from hasten.serve.pool import Served
    from hasten.serve.service import Exchange

Vector = npt.NDArray[np.float32]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=500_000, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = Field(None, description="the prompt before the answer, its logprobs too")
    best_of: int | None = Field(None, ge=1, le=128, description="answers made, of which n are given")
    suffix: Text | None = Field(None, description="what follows the answer: for models that fill in")

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """In OpenAI's words of today."""
        found = spelled_switches(document, ignored)
        if isinstance(found.get("n_probs"), int) and found["n_probs"] > 0:  # llama.cpp's
            found.setdefault("logprobs", found.pop("n_probs"))
        found = super().understood(found, ignored)
        if isinstance(found.get("logprobs"), bool):
            found["logprobs"] = 1 if found["logprobs"] else None
        return found


class CompletionShape(Shape):
    """`/v1/completions`.

    Args:
        requests: what is asked of the engine, one request a prompt.
        echoed: the prompts' texts, where they come before the answers.
        given: answers of a request that are given: the likeliest of those that are made.
        ranks: alternatives that `logprobs` and `prompt_logprobs` ask for, of an echoed prompt.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    form = Form()  # what the answers must match

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        tally: Tally,
        requests: Sequence[Request],
        echoed: Sequence[str] = (),
        given: int | None = None,
        ranks: tuple[int | None, int | None] = (None, None),
    ) -> None:
        super().__init__(model, texts, tally, requests[0].n, len(requests))
        self._echoed = echoed
        self._given = given
        self._ranks = ranks
        self._scored: dict[int, Any] = {}  # vLLM's `prompt_logprobs` of echoed prompts, by request
        self._firsts = [request.prompt[0] for request in requests]
        self._first: dict[int, list[tuple[str, ...]]] = {}  # entries of the prompts, by request
        self._scores = [[0.0, 0] for _ in self.parts]  # sum of the logprobs, and how many

    def spelled(self, logprobs: Sequence[TokenLogprob | None]) -> Any:
        """The prompt's log-probabilities: as columns where the prompt is echoed, else as vLLM has them."""
        if not self._echoed:
            return super().spelled(logprobs)
        part, (shown, told) = Part(), self._ranks
        entries = [self._entry(part, _best(one, shown or 0)) for one in logprobs if one is not None]
        whole = None
        if told is not None:
            whole = super().spelled([None if one is None else _best(one, told) for one in logprobs])
        return entries if shown is not None else [], whole

    def _entries(self, part: Part, output: Output) -> list[tuple[str, ...]]:
        """Of each token: its name, its logprob, the likeliest ones, where in the text it begins, its text."""
        return [self._entry(part, one) for one in output.logprobs]

    def _entry(self, part: Part, one: TokenLogprob) -> tuple[str, ...]:
        text, name = self.texts.text(one.token), self.texts.name(one.token)
        top = {name: finite(one.logprob)}
        top |= {self.texts.name(token): finite(logprob) for token, logprob in reversed(one.top)}
        at, part.length = part.length, part.length + len(text)
        return dumps(name), dumps(finite(one.logprob)), dumps(top), str(at), text

    def take(self, news: Sequence[News]) -> None:
        """Note outputs; the likeliest are found by their mean."""
        super().take(news)
        for which, output in news:
            score = self._scores[which * self.answers + output.index]
            score[0] += sum(one.logprob for one in output.logprobs)
            score[1] += len(output.logprobs)

    def _begun(self, number: int, part: Part, output: Output) -> tuple[str, list[tuple[str, ...]]]:
        """What an answer begins with: the prompt, where it is echoed, and its entries."""
        if part.opened or not self._echoed:
            return "", []
        part.opened, which = True, number // self.answers
        text, entries = self._echoed[which], self._first.get(which, [])
        if which in self.prompt_logprobs:
            read, self._scored[which] = self.prompt_logprobs.pop(which)
            entries = self._first[which] = self._with_first(which, read) if self._ranks[0] is not None else []
        if entries:
            part.length = len(text)
        return text, entries

    def _with_first(self, which: int, entries: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Entries of a prompt with one for its first token, which nothing predicts."""
        shown = "".join(entry[4] for entry in entries)
        text = self._echoed[which]
        first = text[: -len(shown)] if shown and text.endswith(shown) else ""
        moved = [_moved(entry, len(first)) for entry in entries]
        name = first if not isinstance(self.texts, TokenNumbers) else self.texts.name(self._firsts[which])
        return [(dumps(name), "null", "null", "0", first), *moved]

    def _chunk(self, number: int, part: Part, output: Output) -> str:
        is_first = not part.opened
        before, entries = self._begun(number, part, output)
        part.opened = True
        logprobs = dumps(_columns([*entries, *self._entries(part, output)]))
        end, extra = "null", ""
        if output.finish_reason is not None:
            end = f'"{output.finish_reason}"'
            extra = f',"stop_reason":{dumps(output.stop)}'
            wrong = self.form.violations(part.text + output.text, output.finish_reason)
            extra += f',"schema_violations":{dumps(wrong)}' if wrong else ""
        elif self.form.checked:
            part.texts.append(output.text)
        scored = self._scored if self._echoed else self.prompt_logprobs
        prompt = scored.pop(number // self.answers, None)
        if prompt is not None:
            extra += f',"prompt_logprobs":{dumps(prompt)}'
        if self._prompts is not None and is_first:
            extra += f',"prompt_token_ids":{dumps(self._prompts[number // self.answers])}'
        self._note_ids(part, output)
        extra += self._ids(part)
        text = encode_basestring(before + output.text)
        return (
            f'{self.head}{{"index":{number},"text":{text},"logprobs":{logprobs},'
            f'"finish_reason":{end}{extra}}}{self.tail}'
        )

    def _choice(self, number: int, part: Part) -> dict[str, Any]:
        shown = part.length
        part.length = 0
        before, entries = self._begun(number, part, _NOTHING)
        moved = [_moved(entry, part.length) for entry in part.logprobs]
        part.length += shown
        choice = {
            "index": number,
            "text": before + part.text,
            "logprobs": _columns([*entries, *moved]),
            "finish_reason": part.finish,
            "stop_reason": part.stop,
        }
        scored = self._scored if self._echoed else self.prompt_logprobs
        choice["prompt_logprobs"] = scored.get(number // self.answers)
        choice["prompt_token_ids"] = self._prompts[number // self.answers] if self._prompts else None
        choice["token_ids"] = part.token_ids if self._prompts else None
        wrong = self.form.violations(part.text, part.finish or "stop")
        return {**choice, "schema_violations": list(wrong)} if wrong else choice

    def document(self) -> dict[str, Any]:
        """The response in one piece; of answers made for a choice, the likeliest."""
        document = super().document()
        if self._given is None or self._given == self.answers:
            return document
        kept = []
        for first in range(0, len(self.parts), self.answers):
            mine = range(first, first + self.answers)
            best = sorted(mine, key=lambda n: -self._scores[n][0] / max(1, self._scores[n][1]))
            kept += [document["choices"][number] for number in best[: self._given]]
        return {**document, "choices": [{**one, "index": number} for number, one in enumerate(kept)]}


_NOTHING = Output("", 0)


def _columns(entries: list[tuple[str, ...]]) -> dict[str, Any] | None:
    """Completions have a list a column, not an object a token."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    columns = [*zip(*entries, strict=True)][: len(names)]
    return dict(zip(names, map(joined, columns), strict=True)) if entries else None


def _best(one: TokenLogprob, count: int) -> TokenLogprob:
    """With so many of the likeliest tokens."""
    return replace(one, top=one.top[:count])


def _moved(entry: tuple[str, ...], characters: int) -> tuple[str, ...]:
    """The entry of a token so many characters further on."""
    return (*entry[:3], str(int(entry[3]) + characters), entry[4])


DEFAULT_TOKENS = 16  # OpenAI's


async def completions(exchange: Exchange) -> None:
    spec = await exchange.body(CompletionRequest)
    if spec.stream_options is not None and not spec.stream and exchange.service.options.strict:
        raise refused("stream_options needs stream: true", "stream_options", None)
    made = max(spec.best_of or 1, spec.n or 1)
    if spec.best_of is not None and (
        spec.best_of < (spec.n or 1) or (spec.stream and spec.best_of > (spec.n or 1))
    ):
        raise refused("best_of must be at least n, and n where the answer streams", "best_of")
    async with exchange.service.pool.use(spec.model) as served:
        asked = partial(_to_complete, spec, asker_of(exchange, served), made)
        requests, echoed, form = await exchange.work(asked)
        exchange.note_form(form)
        tally = exchange.tally(served.name)
        ranks = (spec.logprobs, spec.prompt_logprobs)
        shape = CompletionShape(
            served.name, texts_of(spec, served), tally, requests, echoed, spec.n or 1, ranks
        )
        shape.form, shape.is_checked = form, bool(form.checked)
        if spec.return_token_ids:
            shape.show_ids(requests)
        shape.report(spec.stream_options, sum(len(request.prompt) for request in requests))
        await respond(exchange, served, spec, requests, shape)


Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[str | Sequence[int]]


def prompts_of(prompt: Prompts) -> list[str | Sequence[int]]:
    """The four ways to write prompts (or inputs to embed) as one: a list of texts or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _each(
    prompts: Prompts, add_special: bool | None, asker: Asker
) -> Iterator[tuple[Asker, tuple[int, ...]]]:
    """Each prompt's token ids, and who asks for it: each request has an id of its own. In a worker thread."""
    for number, text in enumerate(prompts_of(prompts)):
        one = replace(asker, request_id=f"{asker.request_id}-{number}")
        yield one, one.encode(text, add_special)


def _to_complete(spec: CompletionRequest, asker: Asker, made: int) -> tuple[list[Request], list[str], Form]:
    """The engine's requests, the texts that are echoed, and what the answers must match."""
    form = form_of(spec, spec.response_format, strict=asker.options.strict)
    asked = max(DEFAULT_TOKENS, spec.min_tokens or 0) if spec.max_tokens is None else spec.max_tokens
    prompts: Any = spec.prompt
    special = spec.add_special_tokens
    if spec.suffix:
        prompts, special = [filled_in(asker, text, spec.suffix) for text in prompts_of(prompts)], False
    ranked = spec.logprobs if made == (spec.n or 1) else spec.logprobs or 0
    scored = spec.prompt_logprobs
    if spec.echo and spec.logprobs is not None:
        scored = max(spec.logprobs, scored or 0)
    requests, echoed = [], []
    for (one, whole), text in zip(_each(prompts, special, asker), prompts_of(prompts), strict=True):
        prompt = one.kept(spec, whole)
        most = one.limit(asked, len(prompt))
        asks = spec.model_copy(update={"n": made, "prompt_logprobs": scored})
        request = one.request(asks, prompt, max_new_tokens=most, logprobs=ranked, grammar=form.grammar)
        requests.append(request)
        if spec.echo:
            as_sent = isinstance(text, str) and prompt == whole
            echoed.append(str(text) if as_sent else asker.served.model.tokenizer.decode(prompt, False))
    return requests, echoed, form


_FILLS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)
"""What models of code were taught for a prefix, a suffix and the middle that they write: Qwen and Granite,
StarCoder, SantaCoder, DeepSeek, Code Llama, Codestral (which has the suffix first)."""


def filled_in(asker: Asker, before: str | Sequence[int], after: str) -> list[int]:
    """Token ids of a prompt whose answer stands between two texts.

    Raises:
        Problem: 400, the model has no tokens for that.
    """
    tokenizer = asker.served.model.tokenizer
    for marks in _FILLS:
        ids = [tokenizer.id_of(mark) for mark in marks[:2]]
        middle = tokenizer.id_of(marks[2])
        if None in ids or (middle is None and marks[0] != "[PREFIX]"):
            continue
        asker.check_length(after)
        head = list(tokenizer.encode(before, False)) if isinstance(before, str) else list(before)
        tail = list(tokenizer.encode(after, False))
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prefix, suffix = (int(one) for one in ids if one is not None)
        if middle is None:
            return [*first, suffix, *tail, prefix, *head]
        return [*first, prefix, *head, suffix, *tail, middle]
    raise refused("this model has no tokens for filling in (suffix); send the prompt alone", "suffix")


class InfillRequest(SamplingFields):
    """The body of `/infill`."""

    input_prefix: Text
    input_suffix: Text
    input_extra: list[JsonObject] | None = Field(None, description="other files: text, filename")
    prompt: Text | None = Field(None, description="what the middle begins with")
    max_tokens: int | None = Field(None, ge=0, lt=2**31)

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """In the words of every other route."""
        return super().understood(spelled_switches(document, ignored), ignored)


class InfillShape(CompletionShape):
    """`/infill`: `content`, and numbers at its end."""

    def _chunk(self, number: int, part: Part, output: Output) -> str:
        ends = output.finish_reason is not None
        more = self._numbers() if ends else {}
        return event(dumps({"content": output.text, "stop": ends, "index": number, **more}))

    def last(self) -> bytes:
        """Nothing: the last piece says that it is the last."""
        return b""

    def document(self) -> dict[str, Any]:
        """The middle in one piece."""
        return {
            "content": self.parts[0].text,
            "stop": True,
            "index": 0,
            "model": self.model,
            **self._numbers(),
        }

    def _numbers(self) -> dict[str, Any]:
        return {"tokens_predicted": self.tally.output_tokens, "tokens_evaluated": self.tally.prompt_tokens}


async def infill(exchange: Exchange) -> None:
    """What stands between two texts."""
    spec = await exchange.body(InfillRequest)
    async with exchange.service.pool.use(spec.model) as served:
        asker = asker_of(exchange, served)

        def prepare() -> Request:
            extra = "".join(f"{one.get('text', '')}\n" for one in spec.input_extra or ())
            before = f"{extra}{spec.input_prefix}{spec.prompt or ''}"
            asker.check_length(before)
            prompt = asker.kept(spec, tuple(filled_in(asker, before, spec.input_suffix)))
            most = asker.limit(spec.max_tokens, len(prompt))
            grammar = form_of(spec, None, strict=asker.options.strict).grammar
            return asker.request(spec, prompt, max_new_tokens=most, logprobs=None, grammar=grammar)

        request = await exchange.work(prepare)
        tally = exchange.tally(served.name)
        shape = InfillShape(served.name, served.texts, tally, [request])
        await respond(exchange, served, spec, [request], shape)


class EmbeddingRequest(SharedFields):
    """The body of `/v1/embeddings`; `pooling` and `add_special_tokens` are extensions."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
        | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=100_000, description="the first so many, of length 1")
    pooling: Literal["mean", "last"] | None = None
    add_special_tokens: bool | None = None

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """Inputs as texts or ids, also where llama.cpp's server takes objects that hold a text."""
        found = super().understood(document, ignored)
        given = found.get("input")
        if isinstance(given, Mapping):
            found["input"] = _words(given)
        elif isinstance(given, list):
            found["input"] = [_words(one) if isinstance(one, Mapping) else one for one in given]
        return found


def _words(entry: Mapping[str, Any]) -> Any:
    """The text of an object; the object itself where it holds something else, for the check to name."""
    content = entry.get("prompt_string", entry.get("content"))
    if isinstance(content, str) and "prompt_string" in entry:
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return entry


async def embeddings(exchange: Exchange) -> None:
    """Texts as vectors of length 1: hidden states of the last layer, their mean or that of the last token."""
    spec = await exchange.body(EmbeddingRequest)
    async with exchange.service.pool.use(spec.model) as served:
        requests = await exchange.work(partial(_to_embed, spec, asker_of(exchange, served)))
        tally = exchange.tally(served.name)
        vectors: dict[int, Vector] = {}
        async with Feed(served.engine, requests) as feed:
            async for news in feed.batches():
                for which, output in news:
                    tally.take(which, output)
                    if output.embedding is not None:
                        vectors[which] = output.embedding
        plain = spec.encoding_format != "base64"
        found = [vectors[which] for which in range(len(requests))]
        if spec.dimensions is not None:
            found = [_cut(vector, spec.dimensions) for vector in found]
        body = await exchange.work(lambda: _body(found, plain, served.name, tally.prompt_tokens))
        await exchange.raw(body, "application/json")


def _cut(vector: Vector, dimensions: int) -> Vector:
    if dimensions > len(vector):
        raise refused(f"dimensions is {dimensions}; this model's vectors have {len(vector)}", "dimensions")
    return vector[:dimensions]


def _body(vectors: Sequence[Vector], plain: bool, model: str, tokens: int) -> list[bytes]:
    """The document in pieces, encoded one by one: the encoder keeps other threads waiting while it runs."""
    entries = [
        b","[: number > 0]
        + dumped({"object": "embedding", "index": number, "embedding": written(vector, plain)})
        for number, vector in enumerate(vectors)
    ]
    about = dumped({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return [b'{"object":"list","data":[', *entries, b"],", about[1:]]


def written(vector: Vector, plain: bool) -> Any:
    """A vector scaled to length 1, as numbers or as base64 of little-endian float32.

    Raises:
        Problem: it holds a number that is not finite.
    """
    length = float(np.linalg.norm(vector))
    if not math.isfinite(length):
        raise Problem(500, "the model computed an embedding that is not finite", code="engine_error")
    unit = (vector / length if length > 0 else vector).astype("<f4")
    return unit.tolist() if plain else base64.b64encode(unit.tobytes()).decode()


def _to_embed(spec: EmbeddingRequest, asker: Asker) -> list[Request]:
    requests = []
    for one, prompt in _each(spec.input, spec.add_special_tokens, asker):
        one.limit(0, len(prompt))
        pooling = spec.pooling or asker.options.pooling
        requests.append(Request(prompt, 0, pooling=pooling, **one.shared(spec)))
    return requests


class TokenizeRequest(Strict):
    """A text (`prompt`) or a chat (`messages`)."""

    model: str | None = Field(None, max_length=1000)
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = Field(None, description="the tokens as the vocabulary spells them")


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = Field(None, max_length=1000)
    tokens: Annotated[list[TokenId], Field(max_length=500_000, fail_fast=True)]


MAX_BYTES = 1_000_000
"""Of a text to encode, in UTF-8: more than any context holds, and its ids are made in less than 0.1 s."""


async def tokenize(exchange: Exchange) -> None:
    spec = await exchange.body(TokenizeRequest)
    if (spec.prompt is None) == (spec.messages is None):
        raise refused("give either prompt or messages", "prompt")
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(partial(_tokens, spec, asker_of(exchange, served)))
    await exchange.raw([body], "application/json")


def _tokens(spec: TokenizeRequest, asker: Asker) -> bytes:
    tokenizer = asker.served.model.tokenizer
    ids: Sequence[int]
    if spec.prompt is not None:
        _check_size(spec.prompt, "prompt")
        ids = tokenizer.encode(spec.prompt, spec.add_special_tokens is not False)
    else:
        generation, variables = spec.add_generation_prompt, spec.chat_template_kwargs
        messages = spec.messages or ()
        if spec.continue_final_message:
            text = asker.continued_text(messages, spec.tools or None, variables)
        else:
            text = asker.chat_text(messages, spec.tools or None, generation, variables)
        _check_size(text, "messages")
        ids = asker.chat_tokens(text)
    texts = [tokenizer.spelling(one) for one in ids] if spec.return_token_strs else None
    about = {"count": len(ids), "max_model_len": asker.served.context}
    return dumped({**about, "tokens": ids, "token_strs": texts})


def _check_size(text: str, param: str) -> None:
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        said = f"the text has {size:,} bytes; /tokenize takes {MAX_BYTES:,} at most, split it"
        raise refused(said, param, "text_too_long")


async def tokenizer_info(exchange: Exchange) -> None:
    """What lm-eval and others ask before they send token ids: special tokens and the chat template."""
    async with exchange.service.pool.use(None) as served:
        fields = served.model.tokenizer.fields
        template = fields.chat_templates.get("default") or next(iter(fields.chat_templates.values()), None)
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": fields.vocab_size,
            "model_max_length": served.context,
            **dict(fields.special_tokens),
            "chat_template": template,
        }
    await exchange.json(about)


async def detokenize(exchange: Exchange) -> None:
    spec = await exchange.body(DetokenizeRequest)
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(partial(_text, spec.tokens, served))
    await exchange.raw([body], "application/json")


def _text(tokens: Sequence[int], served: Served) -> bytes:
    check_ids(served, tokens, "tokens")
    return dumped({"prompt": served.model.tokenizer.decode(tokens, skip_special=False)})
