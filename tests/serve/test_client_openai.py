"""The official openai client against `hasten serve`: it understands what comes, and is understood."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import client_server
import openai
import pytest
from client_server import NAME, Server
from pydantic import BaseModel

from tiny_tokenizers import vocabulary

QUESTION: list[Any] = [{"role": "user", "content": "What is a mutex?"}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rom"]}, "metric": {"type": "boolean"}},
    "required": ["city", "metric"],
    "additionalProperties": False,
}


BLANKS = {
    str(number): -100
    for number, token in enumerate(vocabulary()[0])
    if token[0]
    in "\u0120\u010a\u0109\u010d"  # space, new line, tab, return, as byte-level vocabularies write them
}
"""A random model loves the blanks that JSON allows between its parts, and would never come to the end."""


class Verdict(BaseModel):
    """What a structured answer is read into."""

    answer: Literal["yes", "no"]
    sure: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = client_server.tiny_folder(tmp_path_factory.mktemp("openai"))
    with client_server.running(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


def ask(client: Any, **fields: Any) -> Any:
    """A greedy chat completion of few tokens, unless `fields` say otherwise."""
    return client.chat.completions.create(
        **{"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 16, **fields}
    )


def test_a_chat_is_what_the_engine_gives(server: Server, client: Any) -> None:
    import hasten

    with_chat = ask(client)
    model = hasten.load(server.folder, threads=1, context=1024)
    expected = model.generate(["What is a mutex?"], 16)[0]
    model.close()
    assert with_chat.choices[0].message.content == expected.text
    assert with_chat.choices[0].finish_reason == expected.finish_reason
    assert with_chat.usage.prompt_tokens == expected.prompt_tokens
    assert with_chat.usage.completion_tokens == len(expected.token_ids)
    assert with_chat.model == NAME


def test_a_stream_is_the_whole_answer_in_pieces(client: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("plain", [False, True])
def test_usage_so_far_comes_with_every_chunk_if_asked_for(client: Any, plain: bool) -> None:
    """vLLM's extension, which guidellm always asks for."""
    reports = {"include_usage": True, "continuous_usage_stats": True}
    if plain:
        chunks = list(
            client.completions.create(
                model=NAME, prompt="mutex", temperature=0, max_tokens=300, stream=True, stream_options=reports
            )
        )
    else:
        chunks = list(ask(client, max_tokens=300, stream=True, stream_options=reports))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert counts[-1] == counts[-2] == 300  # long: what waits to be sent is sent together
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}


def test_several_answers_and_seeds(client: Any) -> None:
    first = ask(client, n=3, temperature=1.5, seed=7)
    again = ask(client, n=3, temperature=1.5, seed=7)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]


def test_a_stop_text_ends_the_answer_and_is_left_out(client: Any) -> None:
    whole = ask(client, max_tokens=64).choices[0].message.content
    stop = whole[6:8]
    cut = ask(client, max_tokens=64, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_tool_is_called_and_its_result_taken(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    first = ask(
        client,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
        logit_bias=BLANKS,
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    call = first.message.tool_calls[0]
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Bern", "Rom")
    assert isinstance(arguments["metric"], bool)
    told = [*QUESTION, first.message, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
    after = ask(client, messages=told, tools=[tool], tool_choice="none")
    assert after.choices[0].message.tool_calls is None
    assert after.usage.prompt_tokens > ask(client, tools=[tool], tool_choice="none").usage.prompt_tokens


def test_a_tool_call_in_a_stream_adds_up(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    choice = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model=NAME,
        messages=QUESTION,
        tools=[tool],
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=300,
        logit_bias=BLANKS,
    ) as stream:
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather"]
    assert json.loads(calls[0].function.arguments)["city"] in ("Bern", "Rom")


def test_an_answer_follows_a_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    choice = ask(client, response_format=form, max_tokens=200, logit_bias=BLANKS).choices[0]
    assert choice.finish_reason == "stop"
    assert set(json.loads(choice.message.content)) == {"city", "metric"}


def test_parse_gives_an_object(client: Any) -> None:
    parsed = client.chat.completions.parse(
        model=NAME, messages=QUESTION, response_format=Verdict, max_tokens=200, logit_bias=BLANKS
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict)


def test_logprobs_are_those_of_the_tokens(client: Any) -> None:
    choice = ask(client, logprobs=True, top_logprobs=4).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 16
    written = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert written == choice.message.content
    for token in tokens:
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 4
        assert tops == sorted(tops, reverse=True)
        assert token.logprob == pytest.approx(tops[0])
        assert sum(map(math.exp, tops)) <= 1.0 + 1e-6


def test_plain_completions(client: Any) -> None:
    given = client.completions.create(model=NAME, prompt="mutex", max_tokens=8, temperature=0, logprobs=2)
    assert given.usage.prompt_tokens == 5
    assert len(given.choices[0].logprobs.tokens) == 8
    streamed = client.completions.create(model=NAME, prompt="mutex", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == given.choices[0].text


def test_embeddings_in_both_encodings(client: Any) -> None:
    texts = ["a mutex", "a lock", "a mutex"]
    packed = client.embeddings.create(model=NAME, input=texts)  # the client asks for base64
    plain = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
    vectors = [item.embedding for item in packed.data]
    assert [len(vector) for vector in vectors] == [64, 64, 64]
    for ours, theirs in zip(packed.data, plain.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding, rel=1e-5, abs=1e-6)
    assert vectors[0] == vectors[2] != vectors[1]


def test_responses_whole_streamed_and_continued(client: Any) -> None:
    first = client.responses.create(model=NAME, input="What is a mutex?", temperature=0, max_output_tokens=16)
    assert first.output_text == ask(client).choices[0].message.content
    events = list(
        client.responses.create(
            model=NAME, input="What is a mutex?", temperature=0, max_output_tokens=16, stream=True
        )
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert events[-1].type == "response.incomplete"  # the tokens ended before the answer
    assert "".join(deltas) == events[-1].response.output_text == first.output_text
    second = client.responses.create(
        model=NAME, input="And?", previous_response_id=first.id, temperature=0, max_output_tokens=16
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_responses_parse_gives_an_object(client: Any) -> None:
    parsed = client.responses.parse(
        model=NAME, input="Is it?", text_format=Verdict, temperature=0, max_output_tokens=200
    )
    assert isinstance(parsed.output_parsed, Verdict)


def test_responses_stream_to_an_object(client: Any) -> None:
    with client.responses.stream(
        model=NAME, input="Is it?", text_format=Verdict, temperature=0, max_output_tokens=200
    ) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert isinstance(final.output_parsed, Verdict)


def test_a_closed_stream_is_cancelled(server: Server, client: Any) -> None:
    before = server.settled()
    stream = ask(client, stream=True, max_tokens=3500, extra_body={"ignore_eos": True})
    for _, _ in zip(range(4), stream, strict=False):
        pass
    stream.close()
    after = server.settled()
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["output_tokens"] - before["output_tokens"] < 3000
    assert after["kv_pages_used"] == after["kv_pages_cached"]


def test_faults_have_the_types_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, temperature=-1)
    assert "temperature" in str(wrong.value.body["param"])
    with pytest.raises(openai.BadRequestError) as unknown:
        ask(client, extra_body={"use_beam_search": True})
    assert "use_beam_search" in wrong_text(unknown)
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="no-such-model")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"


def wrong_text(error: Any) -> str:
    return json.dumps(error.value.body)


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_many_at_once_get_what_one_alone_gets(server: Server, client: Any) -> None:
    questions = [f"Question {number}: what is {number * 7}?" for number in range(12)]

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as many:
            answers = await asyncio.gather(*(ask(many, messages=_user(q)) for q in questions))
        return [answer.choices[0].message.content for answer in answers]

    together = asyncio.run(all_at_once())
    alone = [ask(client, messages=_user(question)).choices[0].message.content for question in questions]
    assert together == alone


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
