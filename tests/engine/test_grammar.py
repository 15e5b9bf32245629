"""Answers drawn under masks match their grammar, whatever is drawn; drafts change nothing."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.engine.grammar import Grammar, Thought, answer_grammar
from hasten.errors import MachineError, UsageError
from hasten.models import gguf_tokenizer
from hasten.models.answers import ThoughtMarks
from hasten.models.tokenizer import Tokenizer
from masked_vocabulary import Vocabulary, bits
from tiny_tokenizers import byte_level, byte_level_metadata, sentencepiece_metadata, sentencepiece_model


def _byte_level() -> Tokenizer:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.QWEN2), "qwen2")
    return Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})


def _sentencepiece() -> Tokenizer:
    model = sentencepiece_model(
        "bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in sentencepiece_metadata(model).items()})


@pytest.fixture(scope="module", params=[_byte_level, _sentencepiece], ids=["byte-level", "sentencepiece"])
def vocabulary(request: Any) -> Vocabulary:
    return Vocabulary(request.param())


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "bc", None]},
        "more": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
RULES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def check_schema(text: str) -> None:
    value = json.loads(text)
    assert set(value) >= {"name", "age", "kind"} and set(value) <= set(SCHEMA["properties"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert value["kind"] in ("a", "bc", None)
    assert all(isinstance(flag, bool) for flag in value.get("more", []))


@RULES
@given(seed=st.integers(0, 2**32))
def test_whatever_is_drawn_fits_the_schema(vocabulary: Vocabulary, seed: int) -> None:
    ids = vocabulary.draw(vocabulary.start("json_schema", SCHEMA), random.Random(seed))
    check_schema(vocabulary.text(ids))


@RULES
@given(
    seed=st.integers(0, 2**32),
    pattern=st.sampled_from(
        [
            "[a-z]{3,8} [0-9]+",
            "(ab|c)*d?",
            "ü+|é{2}|",
            r"\d{3}-\d{4}|none",
            r"[^x]y\.z",
            "(a|b(c|d)*)+e",
            "[^0-9]{2}",
        ]
    ),
)
def test_whatever_is_drawn_matches_the_expression(vocabulary: Vocabulary, seed: int, pattern: str) -> None:
    ids = vocabulary.draw(vocabulary.start("regex", pattern), random.Random(seed))
    assert re.fullmatch(pattern.replace(r"\d", "[0-9]"), vocabulary.text(ids), re.DOTALL)


@RULES
@given(
    seed=st.integers(0, 2**32),
    choices=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=9), min_size=1, max_size=5),
)
def test_whatever_is_drawn_is_one_of_the_choices(
    vocabulary: Vocabulary, seed: int, choices: list[str]
) -> None:
    ids = vocabulary.draw(vocabulary.start("choice", choices), random.Random(seed))
    assert vocabulary.text(ids) in choices


def test_any_object_and_lark(vocabulary: Vocabulary) -> None:
    state = vocabulary.start("json_object")
    state.accept(vocabulary.ids('{"a": [1, {}]}'))
    assert state.finished
    state = vocabulary.start("lark", 'start: "x" part\npart: "y" | "(" part ")"')
    state.accept(vocabulary.ids("x((y))"))
    assert state.finished and set(bits(state.masks(())[0])) == vocabulary.ends


@RULES
@given(seed=st.integers(0, 2**32), split=st.integers(0, 30), drafted=st.integers(0, 16))
def test_masks_after_drafts_are_the_masks_after_real_tokens(
    vocabulary: Vocabulary, seed: int, split: int, drafted: int
) -> None:
    ids = vocabulary.draw(vocabulary.start("json_schema", SCHEMA), random.Random(seed))
    drafting, real = (vocabulary.start("json_schema", SCHEMA) for _ in range(2))
    drafting.accept(ids[:split])
    real.accept(ids[:split])
    drafts = ids[split : split + drafted]
    before = drafting.masks(())
    rows = drafting.masks(drafts)
    ends = any(token in vocabulary.ends for token in drafts)
    assert len(rows) == 1 + len(drafts) - ends
    assert (drafting.masks(()) == before).all(), "drafts left a trace"
    for row, token in zip(rows, [*drafts, None], strict=False):
        assert (row == real.masks(())[0]).all()
        if token is not None:
            real.accept([token])


@RULES
@given(seed=st.integers(0, 2**32), drafts=st.lists(st.integers(-5, 2000), max_size=6))
def test_any_drafts_are_taken(vocabulary: Vocabulary, seed: int, drafts: list[int]) -> None:
    state = vocabulary.start("json_schema", SCHEMA)
    rng = random.Random(seed)
    first = rng.choice(bits(state.masks(())[0]))
    before = state.masks(())
    rows = state.masks([first, *drafts])
    assert 2 <= len(rows) <= 2 + len(drafts) and rows.any(axis=1).all()
    assert (state.masks(()) == before).all()
    state.accept([first])
    assert (state.masks(())[0] == rows[1]).all()


def test_the_first_forbidden_draft_cuts_the_rest(vocabulary: Vocabulary) -> None:
    state = vocabulary.start("regex", "abc")
    good = vocabulary.draw(vocabulary.start("regex", "abc"), random.Random(0))
    (wrong,) = vocabulary.ids("x")
    assert len(state.masks([wrong, *good])) == 1
    assert len(state.masks(good)) == len(good)  # the end token has no row after it
    assert len(state.masks([good[0], good[-1], good[0]])) == 2
    assert len(state.masks([*good[:-1], *good])) == len(good)


def test_end_tokens_end(vocabulary: Vocabulary) -> None:
    end = next(iter(vocabulary.ends))
    state = vocabulary.start("regex", "a*")
    assert set(bits(state.masks(())[0])) > vocabulary.ends and not state.finished
    state.accept([end])
    assert state.finished and set(bits(state.masks(())[0])) == vocabulary.ends
    assert set(bits(state.masks([end])[0])) == vocabulary.ends


def test_a_token_that_was_not_allowed_stops_the_answer(vocabulary: Vocabulary) -> None:
    state = vocabulary.start("regex", "abc")
    state.accept(vocabulary.ids("x"))
    rows = state.masks(vocabulary.ids("abc"))
    assert rows.shape[0] == 1 and not rows.any() and not state.finished
    assert state.failure is not None and "regular expression" in state.failure.message


def test_forced_tokens_are_allowed(vocabulary: Vocabulary) -> None:
    state = vocabulary.start("json_schema", {"const": {"color": "red"}})
    forced = state.forced()
    assert len(state.masks(forced)) == 1 + len(forced)


def test_states_do_not_touch_each_other(vocabulary: Vocabulary) -> None:
    compiled = vocabulary.compiler.compile(Grammar("regex", "ab*c"))
    assert compiled is vocabulary.compiler.compile(Grammar("regex", "ab*c"))
    one, two = compiled.start(), compiled.start()
    one.accept(vocabulary.ids("abbc"))
    assert one.finished and not two.finished
    assert all(vocabulary.values[i].startswith(b"a") for i in bits(two.masks(())[0]))


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


_DOUBLING = "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"\n'
_CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
_LINK = {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}}
_LIST = {"$defs": {"t": _LINK}, "$ref": "#/$defs/t"}
_WIDE = {"type": "object", "properties": {f"p{j}": {"type": "integer"} for j in range(10)}}


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("regex", "(a{1000}){1000}", "too much work"),
        ("regex", "(" * 100_000, "cannot be used"),
        ("regex", "[", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("json_schema", {"$ref": "#"}, "cannot be matched"),
        ("json_schema", _CIRCLE, "cannot be matched"),
        ("json_schema", {"$ref": "http://example.com/x.json"}, "cannot be used"),
        ("json_schema", False, "nsatisfiable"),
        ("json_schema", {"not": {"type": "string"}}, '"not"'),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"type": "object", "requierd": ["a"]}, "'requierd'"),
        ("json_schema", {"properties": {"a": {"anyOf": [{"maxLenght": 3}]}}}, "'maxLenght'"),
        ("json_schema", {"type": "strin"}, "strin"),
        ("json_schema", {"type": "string", "format": "nope"}, "nope"),
        ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ("json_schema", {"anyOf": [_WIDE | {"title": str(i)} for i in range(700)]}, "too much work"),
        ("json_schema", _deep(300), "nests deeper"),
        ("json_schema", "[" * 100_000, "no JSON"),
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[]", "object or boolean"),
        ("json_schema", '"' + "x" * 300_000 + '"', "300002 bytes"),
        ("lark", _DOUBLING, "too much work"),
        ("lark", "start: foo", "foo"),
        ("lark", "start: start", "cannot be matched"),
        ("lark", "", "Empty"),
        ("lark", 'start: "\ud800"', "no Unicode"),
        ("choice", [], "list of texts"),
        ("choice", [1], "list of texts"),
        ("choice", "{", "no JSON"),
        ("nothing", "", "unknown kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_soon(vocabulary: Vocabulary, kind: Any, source: Any, says: str) -> None:
    text = source if isinstance(source, str) else json.dumps(source)
    started = time.process_time()
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        vocabulary.compiler.compile(Grammar(kind, text))
    assert time.process_time() - started < 3
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", {"enum": [f"value {i} of many" for i in range(5000)]}),
        ("json_schema", _LIST),
        ("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
        ("json_schema", {"type": "string", "pattern": "^(a|aa)+b{1,900}$"}),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}),
        ("json_schema", _deep(40)),
        ("lark", 'start: a\na: "x" | a a | a a a\n'),
        ("regex", ".*(.*a.{200})"),
    ],
)  # fmt: skip
def test_big_but_fair_is_quick(vocabulary: Vocabulary, kind: Any, source: Any) -> None:
    state = vocabulary.start(kind, source)
    started = time.process_time()
    rng = random.Random(1)
    for _ in range(20):
        allowed = bits(state.masks(())[0])
        state.accept([rng.choice(allowed)])
    assert time.process_time() - started < 3


def test_masks_let_other_threads_run() -> None:
    """A compile of about 0.1 s of work, and a thread that counts meanwhile."""
    vocabulary = Vocabulary(_byte_level(), padding=0)
    vocabulary.start("regex", "a")  # the vocabulary is read
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    before = counted
    with pytest.raises(UsageError):
        vocabulary.compiler.compile(Grammar("regex", "(a{1000}){1000}"))
    after = counted
    stop.set()
    thread.join()
    assert after - before >= 3


def test_a_missing_package_is_named(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError, match="llguidance") as caught:
        vocabulary.start("regex", "never compiled before")
    assert caught.value.hint and "hasten[serve]" in caught.value.hint


def test_a_vocabulary_that_cannot_spell_it_says_so() -> None:
    model = sentencepiece_model("bpe", vocab_size=300, byte_fallback=False)
    metadata = {f"tokenizer.ggml.{k}": v for k, v in sentencepiece_metadata(model).items()}
    with pytest.raises(UsageError, match="no token of this model"):
        Vocabulary(Tokenizer.from_gguf(metadata)).start("regex", "\U0001f980")


@pytest.mark.demo
def test_a_grammar_that_holds_everybody_up_is_refused() -> None:
    from hasten.models.gguf import GgufFile
    from hasten.models.source import demo_file

    vocabulary = Vocabulary(Tokenizer.from_gguf(GgufFile.open(demo_file().path).metadata), padding=0)
    with pytest.raises(UsageError, match="each token takes"):
        vocabulary.start("regex", "b(a{300}){300}")


@pytest.mark.demo
def test_demo_vocabulary() -> None:
    from hasten.models.gguf import GgufFile
    from hasten.models.source import demo_file

    tokenizer = Tokenizer.from_gguf(GgufFile.open(demo_file().path).metadata)
    vocabulary = Vocabulary(tokenizer, padding=0)
    rng = random.Random(0)
    for _ in range(20):
        check_schema(vocabulary.text(vocabulary.draw(vocabulary.start("json_schema", SCHEMA), rng)))
    state = vocabulary.start("regex", "(.|\n)*")
    allowed = set(bits(state.masks(())[0]))
    assert (
        tokenizer.encode("<tool_call>")[0] in allowed and tokenizer.encode("<|im_start|>")[0] not in allowed
    )
    assert not allowed & set(range(151665, 151936)), "padding"
    for text in ("Größe 你好 \U0001f980", "def f(x):\n    return {}\n"):
        ids = tokenizer.encode(text)
        assert b"".join(vocabulary.values[i] for i in ids).decode() == text


def test_a_grammar_of_llama_cpp_is_followed(vocabulary: Vocabulary) -> None:
    source = 'root ::= item+ "."\nitem ::= [ab] | "xy"  # a comment'
    for seed in range(5):
        text = vocabulary.text(vocabulary.draw(vocabulary.start("lark", source), random.Random(seed)))
        assert re.fullmatch(r"([ab]|xy)+\.", text)
    thought = Thought(ThoughtMarks("<think>", "</think>"), inside=True)
    whole = answer_grammar(Grammar("lark", source), None, thought)
    assert whole is not None
    state = vocabulary.compiler.compile(whole).start()
    state.accept(vocabulary.ids("hm</think>\n\nabxy."))
    assert state.finished and not state.failure
    with pytest.raises(UsageError, match="no GBNF"):
        vocabulary.start("lark", "root ::= this is (not valid")


@pytest.mark.parametrize("special", [False, True], ids=["mark of text", "mark of one token"])
def test_a_budget_that_ends_inside_a_character_waits_for_its_end(
    vocabulary: Vocabulary, special: bool
) -> None:
    """\U0001f980 is four tokens here: the mark that ends the thought cannot stand between them."""
    token_of = vocabulary.tokenizer.id_of
    own = "<s>" if token_of("<|im_start|>") is None else "<|im_start|>"
    mark = own if special else "</think>"
    marks = ThoughtMarks("<think>", mark, {own: token_of(own)} if special else {})
    whole = answer_grammar(Grammar("regex", "[ab]+"), None, Thought(marks, inside=True, most_tokens=4))
    assert whole is not None
    for thought in ("hm 🦀", "hm é", "hm a", "hm <"):
        state, told = vocabulary.compiler.compile(whole).start(), vocabulary.ids(thought)
        for token in told:
            assert token in bits(state.masks(())[0])
            state.accept([token])
        while len(told) < 30 and len(allowed := bits(state.masks(told[:3])[0])) == 1:
            told += allowed
            state.accept(allowed)
        assert state.failure is None
        ended = told if not special else told[: told.index(token_of(own))]
        said = vocabulary.text(ended)
        assert said == thought if special else said in (f"{thought}{mark}", f"{thought[:-1]}{mark}")
        state.accept(vocabulary.ids("\nab"))
        assert state.failure is None and set(bits(state.masks(())[0])) > vocabulary.ends


def test_drafts_do_not_move_the_end_of_a_thought(vocabulary: Vocabulary) -> None:
    marks = ThoughtMarks("<think>", "</think>")
    whole = answer_grammar(Grammar("regex", "[ab]+"), None, Thought(marks, inside=True, most_tokens=4))
    assert whole is not None
    compiled, told = vocabulary.compiler.compile(whole), vocabulary.ids("abababab")
    state = compiled.start()
    state.accept(told[:1])
    rows = state.masks(told[1:])
    alone = compiled.start()
    for count, row in enumerate(rows, 1):
        alone.accept(told[count - 1 : count])
        assert bits(row) == bits(alone.masks(())[0])
    assert len(rows) == 3, "the fifth token is the first of the mark, and no draft's"


def test_a_thought_that_was_never_opened_is_not_closed(vocabulary: Vocabulary) -> None:
    marks = ThoughtMarks("<think>", "</think>")
    whole = answer_grammar(Grammar("regex", "[ab<>]+"), None, Thought(marks, most_tokens=2))
    assert whole is not None
    state = vocabulary.compiler.compile(whole).start()
    state.accept(vocabulary.ids("<t"))
    told = b"<t"
    while told != b"<think>":  # the library allows one way to spell what is forced
        (token,) = bits(state.masks(())[0])
        told += vocabulary.values[token]
        assert b"<think>".startswith(told)
        state.accept([token])
    assert bits(state.masks(())[0]) == [vocabulary.compiler._get_vocabulary().tokenize_str("</think>")[0]]
