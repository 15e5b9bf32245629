"""Other people's clients against `hasten serve`, where they are installed: they understand what comes.

pip install anthropic litellm langchain-openai instructor openai-agents 'pydantic-ai-slim[openai]'
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import client_server
import openai
import pytest
from client_server import NAME, Server
from pydantic import BaseModel

pytestmark = pytest.mark.slow

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
FUNCTION = {
    "name": "get_weather",
    "description": "Weather",
    "parameters": {**CITY, "additionalProperties": False},
}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
ASKED: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]


class City(BaseModel):
    """What a structured answer is read into."""

    city: Literal["Rome", "Oslo"]
    sunny: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = client_server.tiny_folder(tmp_path_factory.mktemp("others"))
    with client_server.running(folder) as running:
        yield running


def test_anthropic(server: Server) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0, timeout=60)
    tool = {"name": "get_weather", "description": "Weather", "input_schema": FUNCTION["parameters"]}
    plain = client.messages.create(
        model=NAME, max_tokens=8, system="Be terse.", messages=ASKED, thinking={"type": "disabled"}
    )
    assert plain.content[0].type == "text" and plain.usage.output_tokens > 0
    with client.messages.stream(
        model=NAME, max_tokens=200, messages=ASKED, tools=[tool], tool_choice={"type": "any"}
    ) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert message.stop_reason == "tool_use" and call.input["city"] in ("Rome", "Oslo")
    turns = [
        *ASKED,
        {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    assert client.messages.create(model=NAME, max_tokens=4, messages=turns, tools=[tool]).content
    counted = client.messages.count_tokens(model=NAME, messages=turns, tools=[tool]).input_tokens
    assert counted > client.messages.count_tokens(model=NAME, messages=ASKED).input_tokens
    with pytest.raises(anthropic.BadRequestError, match="maximum context length is"):
        client.messages.create(
            model=NAME, max_tokens=4, messages=[{"role": "user", "content": "x " * 50_000}]
        )


def test_litellm(server: Server) -> None:
    litellm = pytest.importorskip("litellm")
    there = {"model": f"openai/{NAME}", "api_base": f"{server.url}/v1", "api_key": "x", "max_tokens": 4}
    history = [*ASKED, {"role": "assistant", "content": "a", "reasoning_content": "b"}, *ASKED]
    assert litellm.completion(messages=history, reasoning_effort="low", **there).choices
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "x " * 50_000}], **there)
    asked = {"model": f"anthropic/{NAME}", "api_base": server.url, "api_key": "x", "max_tokens": 4}
    assert litellm.completion(messages=ASKED, **asked).choices[0].finish_reason == "length"


def test_langchain(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    there: dict[str, Any] = {"model": NAME, "base_url": f"{server.url}/v1", "api_key": "x", "max_tokens": 300}
    assert langchain.ChatOpenAI(**{**there, "max_tokens": 4}, reasoning_effort="low").invoke("hi") is not None
    for method in ("json_schema", "function_calling"):
        model = langchain.ChatOpenAI(**there, temperature=0).with_structured_output(City, method=method)
        assert model.invoke("Rome").city in ("Rome", "Oslo")


def test_instructor(server: Server) -> None:
    instructor = pytest.importorskip("instructor")
    plain = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        made = client.chat.completions.create(
            model=NAME, messages=ASKED, response_model=City, max_retries=0, max_tokens=300
        )
        assert made.city in ("Rome", "Oslo")


def test_openai_agents(server: Server) -> None:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    async def run(kind: Any) -> Any:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        settings = agents.ModelSettings(
            max_tokens=8, store=True, metadata={"a": "b"}, verbosity="low", truncation="auto"
        )
        agent = agents.Agent(name="a", model=kind(NAME, client), model_settings=settings)
        return await agents.Runner.run(agent, "hi", max_turns=2)

    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        assert asyncio.run(run(kind)).final_output is not None


def test_pydantic_ai(server: Server) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def run(kind: Any) -> Any:
        model = kind(NAME, provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key="x"))
        agent = pydantic_ai.Agent(model, output_type=City, model_settings={"max_tokens": 300}, retries=0)
        return (await agent.run("Rome")).output

    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        assert asyncio.run(run(kind)).city in ("Rome", "Oslo")
