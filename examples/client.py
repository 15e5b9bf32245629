"""A client of servers with OpenAI's API, of the standard library alone: answers, times, cached tokens."""

import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


@dataclass
class Answer:
    status: int  # 200; 429 and 503 say early that there will be no answer
    text: str = ""
    ttft_ms: float = 0.0  # from asking to the first token
    whole_ms: float = 0.0
    prompt: int = 0  # tokens
    cached: int = 0  # of them, those that the server had computed before
    output: int = 0

    @property
    def tpot_ms(self) -> float:
        return (self.whole_ms - self.ttft_ms) / max(1, self.output - 1)

    def line(self) -> str:
        times = f"first token {self.ttft_ms:5.0f} ms, then {self.tpot_ms:5.1f} ms a token"
        return f"{times}; {self.prompt} tokens in, {self.cached} of them cached, {self.output} out"


def ask(messages: list[dict[str, str]], max_tokens: int, **more: object) -> Answer:
    """One streamed chat completion, the likeliest token each time."""
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), head)
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(request) as events:
            return _read(events, began)
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(), whole_ms=1000 * (time.perf_counter() - began))
    except urllib.error.URLError as error:
        sys.exit(f"no server at {URL} ({error.reason}): start one with hasten serve demo")


def _read(events, began: float) -> Answer:
    answer = Answer(200)
    for line in events:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:  # the deadline passed in the middle, or the server ends
            answer.status, answer.text = 504, event["error"]["message"]
        for choice in event.get("choices", ()):
            answer.text += choice["delta"].get("content") or ""
            answer.ttft_ms = answer.ttft_ms or 1000 * (time.perf_counter() - began) * bool(answer.text)
        usage = event.get("usage") or {}
        answer.prompt = usage.get("prompt_tokens", answer.prompt)
        answer.output = usage.get("completion_tokens", answer.output)
        answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or answer.cached
    answer.whole_ms = 1000 * (time.perf_counter() - began)
    return answer
