"""`/v1/completions`, `/v1/embeddings`, `/tokenize`, `/detokenize` and what the server says about itself."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from running_server import Running, chat


def test_completes_a_text(server: Running) -> None:
    document = server.ask("/v1/completions", {"prompt": "abc", "max_tokens": 2}).json
    assert document["object"] == "text_completion"
    (choice,) = document["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")


def test_sixteen_tokens_are_the_default(server: Running) -> None:
    server.ask("/v1/completions", {"prompt": "abc"})
    assert server.engine.asked[-1].max_new_tokens == 16


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_text_or_token_ids(server: Running, prompt: object) -> None:
    (choice,) = server.ask("/v1/completions", {"prompt": prompt}).json["choices"]
    assert choice["text"] == "ab"


@pytest.mark.parametrize("prompt", [["ab", "cd"], [[97, 98], [99, 100]]])
def test_several_prompts_in_order(server: Running, prompt: object) -> None:
    document = server.ask("/v1/completions", {"prompt": prompt, "n": 2}).json
    assert [c["text"] for c in document["choices"]] == ["ab", "ab", "cd", "cd"]
    assert [c["index"] for c in document["choices"]] == [0, 1, 2, 3]
    assert document["usage"]["prompt_tokens"] == 4  # a prompt with two answers counts once
    texts = [""] * 4
    for event in server.ask("/v1/completions", {"prompt": prompt, "n": 2, "stream": True}).events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["ab", "ab", "cd", "cd"]


def test_logprobs_with_offsets(server: Running) -> None:
    body = {"prompt": "abc", "logprobs": 1}
    whole = server.ask("/v1/completions", body).json["choices"][0]["logprobs"]
    assert whole["tokens"] == ["a", "b", "c"]
    assert whole["text_offset"] == [0, 1, 2]
    assert whole["top_logprobs"][0] == {"a": -0.5}
    events = server.ask("/v1/completions", {**body, "stream": True}).events
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in events] == [[0], [1], [2]]


def test_a_token_outside_the_vocabulary_is_refused(server: Running) -> None:
    assert server.ask("/v1/completions", {"prompt": [1, 300]}).error["param"] == "prompt"


def test_embeddings_have_length_one(server: Running) -> None:
    body = {"input": ["abc", "xyz"], "model": "echo"}
    document = server.ask("/v1/embeddings", body).json
    assert [entry["index"] for entry in document["data"]] == [0, 1]
    vectors = np.array([entry["embedding"] for entry in document["data"]], np.float32)
    expected = np.array([list(b"abc"), list(b"xyz")], np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert document["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    packed = server.ask("/v1/embeddings", {**body, "encoding_format": "base64"}).json
    raw = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in packed["data"]]
    np.testing.assert_array_equal(raw, vectors)


def test_pooling_is_the_servers_or_the_requests(server: Running) -> None:
    server.ask("/v1/embeddings", {"input": "abc"})
    assert server.engine.asked[-1].pooling == "mean"
    server.ask("/v1/embeddings", {"input": [97, 98, 99], "pooling": "last"})
    assert server.engine.asked[-1].pooling == "last"
    assert server.engine.asked[-1].max_new_tokens == 0


def test_tokenize_and_back(server: Running) -> None:
    document = server.ask("/tokenize", {"prompt": "ab", "return_token_strs": True}).json
    assert document == {"count": 2, "max_model_len": 4096, "tokens": [97, 98], "token_strs": ["<61>", "<62>"]}
    assert server.ask("/detokenize", {"tokens": [97, 98]}).json == {"prompt": "ab"}
    told = server.ask("/tokenize", {"messages": chat("x")["messages"]}).json
    assert bytes(told["tokens"]) == b"<user>x"
    assert server.ask("/tokenize", {}).status == 400
    assert server.ask("/tokenize", {"prompt": "a", "messages": chat()["messages"]}).status == 400


def test_models_are_listed_by_their_names_alone(server: Running) -> None:
    (entry,) = server.ask("/v1/models").json["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("echo", "model", 4096)
    assert server.ask("/v1/models/echo").json == entry
    assert server.ask("/v1/models/other").status == 404


@pytest.mark.parametrize(
    "name", ["../echo", "/etc/passwd", "echo/", "ECHO", "echo\0", "./echo", "%65cho", "e" * 900]
)
def test_no_name_is_taken_for_a_path(server: Running, name: str) -> None:
    reply = server.ask("/v1/chat/completions", chat(model=name))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


def test_health_and_readiness(server: Running) -> None:
    assert server.ask("/health").json == {"status": "ok"}
    assert server.ask("/ready").json == {"status": "ready"}
    for path in ("/health", "/"):
        reply = server.ask(path, method="HEAD")
        assert (reply.status, reply.body) == (200, b"")


def test_what_is_not_there(server: Running) -> None:
    assert server.ask("/nothing").error["code"] == "not_found"
    reply = server.ask("/v1/models", {})
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD"}  # in any order


def test_the_page_is_served_with_its_headers(server: Running) -> None:
    reply = server.ask("/")
    assert reply.status == 200
    assert b"<!doctype html>" in reply.body[:100].lower()
    assert "content-security-policy" in reply.headers
    again = server.ask("/", headers={"if-none-match": reply.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


def test_metrics_count_what_happened(server: Running) -> None:
    def value(name: str) -> float:
        lines = server.ask("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = (
        "hasten_time_to_first_token_seconds_count",
        "hasten_e2e_request_latency_seconds_count",
        "hasten_time_per_output_token_seconds_count",
        'hasten_request_success_total{finished_reason="stop"',
    )
    before = [value(name) for name in names]
    server.ask("/v1/chat/completions", chat())
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 1, 1]
    assert value("hasten_kv_cache_usage_perc") == pytest.approx(0.3)
    assert value("hasten_num_requests_running") == 0
    server.ask("/made-up-by-a-client")
    assert b"made-up" not in server.ask("/metrics").body


def test_stats_for_the_page(server: Running) -> None:
    document = server.ask("/stats").json
    assert document["uptime_s"] > 0
    assert document["models"]["echo"]["kv_pages"] == 10
    assert document["models"]["echo"]["ttft_count"] >= 0


def test_the_openapi_document_names_every_route(server: Running) -> None:
    from hasten.serve.app import ROUTES

    document = server.ask("/openapi.json").json
    assert {route.path for route in ROUTES} == set(document["paths"])
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    for path, methods in document["paths"].items():
        wanted = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        for operation in methods.values():
            assert [one["name"] for one in operation.get("parameters", ())] == wanted, path
