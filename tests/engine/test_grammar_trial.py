"""No grammar ends the process: what overflows a stack or takes for ever is found by a trial elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from plain_engine import random_prompt

import hasten
from hasten.core import EngineOptions
from hasten.engine.async_engine import AsyncEngine
from hasten.engine.grammar import Calls, Grammar, answer_grammar, source_of
from hasten.engine.grammar_child import COMPILE_STACK
from hasten.engine.grammar_compiler import GrammarCompiler, with_large_stack
from hasten.engine.grammar_trial import GrammarTrial, shared_trial
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.engine.schema import violations
from hasten.errors import QueueFull, UsageError
from hasten.runtime.sampling import SamplingOptions

FOREVER = SamplingOptions(ignore_eos=True)
ENDLESS = "start: T\nT: " + " & ".join(f"/(.*a.{{{size}}})*/" for size in range(9)) + "\n"


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=256, max_sequences=4, prefill_chunk=64)
    return hasten.load(tiny_folder("qwen3"), "w8", options=options)


@pytest.fixture
def compiler(model: LanguageModel) -> GrammarCompiler:
    return GrammarCompiler(model.tokenizer, model.config.vocab)


def references(links: int, link: Callable[[dict[str, str]], object]) -> str:
    """A chain of definitions, each the next one inside `link`."""
    parts = {f"d{at}": link({"$ref": f"#/$defs/d{at + 1}"}) for at in range(links)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**parts, f"d{links}": {"type": "integer"}}})


def rules(links: int, name: str = "r", before: str = "", after: str = "") -> str:
    """A chain of Lark rules, or of terminals where the name is a capital."""
    lines = [f"{name}{at}: {before}{name}{at + 1}{after}\n" for at in range(links)]
    return f"start: {name}0\n" + "".join(lines) + f'{name}{links}: "x"\n'


def object_of(ref: dict[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": {"a": ref}}


# Each ended the whole process on a stack of 8 MB.
CHAINS: dict[str, Callable[[], Grammar]] = {
    "$ref": lambda: Grammar("json_schema", references(6000, lambda ref: ref)),
    "objects": lambda: Grammar("json_schema", references(2500, object_of)),
    "arrays": lambda: Grammar("json_schema", references(3500, lambda ref: {"type": "array", "items": ref})),
    "anyOf": lambda: Grammar("json_schema", references(3500, lambda ref: {"anyOf": [ref, {"type": "null"}]})),
    "allOf": lambda: Grammar("json_schema", references(4500, lambda ref: {"allOf": [ref]})),
    "rules": lambda: Grammar("lark", rules(15000)),
    "terminals": lambda: Grammar("lark", rules(15000, "T")),
    "terminals, each the next one's complement": lambda: Grammar("lark", rules(14000, "T", "~")),
    "rules in parentheses": lambda: Grammar("lark", rules(5500, "r", "(" * 15, ")" * 15)),
    "terminals in parentheses": lambda: Grammar("lark", rules(5500, "T", "(" * 15, ")" * 15)),
    "a tool's schema": lambda: (
        answer_grammar(None, Calls({"f": json.loads(references(3000, object_of))}, forced=True))
        or Grammar("regex")
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_references_or_rules_is_read_or_refused(compiler: GrammarCompiler, name: str) -> None:
    """A fault here ends this process, and with it the run of the tests."""
    try:
        state = compiler.compile(CHAINS[name]()).start()
    except UsageError as refused:
        assert "too much work" in refused.message and refused.hint
        return
    masks = state.masks([])
    assert masks.any() or state.failure is not None


def test_what_a_trial_passes_has_a_large_margin_here(compiler: GrammarCompiler) -> None:
    """The deepest chain that the trial's stack holds is far from the end of the compiling thread's."""
    trial = shared_trial()

    def passes(links: int) -> bool:
        from llguidance import LLMatcher

        source = LLMatcher.grammar_from_lark(rules(links, "r", "(" * 15, ")" * 15))
        return not trial.reason_against(source)

    low, high = 100, 5500
    assert passes(low) and not passes(high)
    while high - low > 300:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    compiler.compile(Grammar("lark", rules(low, "r", "(" * 15, ")" * 15)))
    assert with_large_stack(lambda: None) is None
    assert COMPILE_STACK >= 8 << 20


def test_one_that_never_ends_is_refused_in_bounded_time(compiler: GrammarCompiler) -> None:
    """150 bytes, whose lexeme llguidance would search for minutes."""
    assert len(ENDLESS) < 200
    spent = time.process_time()
    with pytest.raises(UsageError, match=r"more than 1\.0 s"):
        compiler.compile(Grammar("lark", ENDLESS))
    assert time.process_time() - spent < 1.0, "the work was done here"
    assert compiler.knows(Grammar("lark", ENDLESS))
    with pytest.raises(UsageError, match=r"more than 1\.0 s"):
        compiler.compile(Grammar("lark", ENDLESS))


def test_time_is_in_proportion_to_size(compiler: GrammarCompiler) -> None:
    """240 KB of properties took 13 s. A fast machine meets the library's own limit before the time is up."""
    many = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(8000)}}
    with pytest.raises(UsageError, match=r"more than 3\.\d s|needs too much work"):
        compiler.compile(Grammar("json_schema", json.dumps(many)))
    required = {**many, "properties": {f"p{at}": {"type": "integer"} for at in range(300)}}
    compiler.compile(Grammar("json_schema", json.dumps(required)))


def test_values_that_nest_deeply_are_refused_wherever_they_stand(compiler: GrammarCompiler) -> None:
    """Python's own reader and writer of JSON call themselves for every level."""
    for key in ("default", "const", "examples", "x-note"):
        deep = f'{{"type": "object", "{key}": {"[" * 900}{"]" * 900}}}'
        with pytest.raises(UsageError, match=r"nests deeper|no JSON"):
            compiler.compile(Grammar("json_schema", deep))
        schema: dict[str, object] = {"type": "object", key: json.loads("[" * 900 + "]" * 900)}
        with pytest.raises(UsageError, match="nests deeper"):
            answer_grammar(None, Calls({"f": schema}, forced=True))


def test_a_process_that_ended_is_replaced() -> None:
    trial = GrammarTrial()
    from llguidance import LLMatcher

    source = LLMatcher.grammar_from_lark('start: "x"')
    try:
        assert trial.reason_against(source) == ""
        assert trial._process is not None
        first = trial._process.pid
        assert trial.reason_against(source) == ""
        assert trial._process.pid == first
        os.kill(first, signal.SIGKILL)
        trial._process.wait()
        assert trial.reason_against(source) == ""
        trial._process.stdin.close()  # type: ignore[union-attr]  # as if it had been idle: it ends by itself
        assert trial._process.wait() == 0
        assert trial.reason_against(source) == ""
    finally:
        trial.close()
    assert trial._process is None


def test_several_threads_may_try_at_once() -> None:
    from llguidance import LLMatcher

    reasons: list[str] = []
    sources = [LLMatcher.grammar_from_lark(f'start: "x{at}"') for at in range(6)]
    threads = [
        threading.Thread(target=lambda: reasons.extend(map(shared_trial().reason_against, sources)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 18


def doubled(links: int) -> dict[str, object]:
    """Definitions, each with two references to the next one: 2^links evaluations."""
    parts = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(links)}
    return {"not": {"not": {"$ref": "#/$defs/d0"}}, "$defs": {**parts, f"d{links}": {"type": "object"}}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (doubled(60), "takes more than 1.0 s"),
        ({"not": {"$ref": "file:///etc/hostname"}}, "schemas are not fetched"),
        ({"$id": "http://127.0.0.1:9/a", "not": {"$ref": "b"}}, "schemas are not fetched"),
        ({"properties": {"a": {"pattern": "^(?=(a|a)+$)(a|a)+$"}}}, "does not match"),
        (json.loads(references(20_000, lambda ref: {"not": ref})), ""),
        ({"uniqueItems": True, "required": ["b"]}, "required"),
    ],
)
def test_an_answer_is_checked_in_a_process_that_may_die(schema: Any, said: str) -> None:
    """On the event loop the first never ended, and the next two had a server fetch what a client names."""
    began = time.monotonic()
    found = violations(schema, json.dumps({"a": "a" * 200 + "b"}))
    assert time.monotonic() - began < 20
    assert said in " ".join(found)
    assert violations({"type": "object"}, "{}") == ()


def test_nothing_is_fetched_for_a_check() -> None:
    asked: list[str] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        schema = {"type": "object", "not": {"$ref": f"http://127.0.0.1:{server.server_port}/x"}}
        assert "not fetched" in violations(schema, "{}")[0]
        source = source_of(Grammar("json_schema", json.dumps(schema["not"])))
        assert not shared_trial().reason_against(source)
        assert LLMatcher(LLTokenizer("byte"), source, log_level=0).is_error()
        server.shutdown()
    assert asked == []


def test_the_child_ends_with_its_parent() -> None:
    program = (
        "from hasten.engine.grammar_trial import shared_trial\n"
        "from llguidance import LLMatcher\n"
        "shared_trial().reason_against(LLMatcher.grammar_from_lark('start: \"x\"'))\n"
        "print(shared_trial()._process.pid, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    child, until = int(done.stdout), time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in _state(child):
        assert time.monotonic() < until, "it outlives its parent"
        time.sleep(0.01)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1][:3]
    except OSError:
        return "Z"


def test_others_are_answered_while_one_is_read(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a known grammar too; and so many grammars may wait, not more."""
    entered, leave = threading.Event(), threading.Event()
    compile_ = GrammarCompiler._compile

    def waits(compiler: GrammarCompiler, grammar: Grammar) -> object:
        if grammar.source.startswith("slow"):
            entered.set()
            assert leave.wait(20)
        return compile_(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", waits)

    def asked(seed: int, source: str | None) -> Request:
        grammar = None if source is None else Grammar("regex", source)
        return Request(
            random_prompt(seed, 30), 6, FOREVER if source is None else SamplingOptions(), grammar=grammar
        )

    async def body() -> None:
        engine = AsyncEngine(model)

        async def ends(request: Request) -> str:
            outputs = [output async for output in engine.stream(request)]
            return str(outputs[-1].finish_reason)

        try:
            assert await ends(asked(1, "[ab]{3}")) == "stop"
            slow = [asyncio.create_task(ends(asked(at, f"slow{at}"))) for at in range(34)]
            await asyncio.to_thread(entered.wait)
            assert await ends(asked(2, None)) == "length"
            assert await ends(asked(3, "[ab]{3}")) == "stop"
            refused = [task for task in slow if task.done()]
            assert len(refused) == 2
            assert all(isinstance(task.exception(), QueueFull) for task in refused)
            for task in slow[1:]:
                task.cancel()
            leave.set()
            assert await slow[0] == "stop"
        finally:
            leave.set()
            await engine.close(drain=False)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_grammar_whose_library_panics_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llguidance

    class Panic(BaseException):
        pass

    def panics(*_: object, **__: object) -> object:
        raise Panic("index out of bounds")

    monkeypatch.setattr(
        llguidance,
        "LLMatcher",
        type(
            "LLMatcher",
            (),
            {
                "__new__": panics,
                "grammar_from_lark": staticmethod(llguidance.LLMatcher.grammar_from_lark),
            },
        ),
    )
    with pytest.raises(UsageError, match="fails on it"):
        compiler.compile(Grammar("lark", 'start: "abc"'))
