"""What an answer must match, as the text that llguidance compiles: `Grammar`, and `answer_grammar`.

Sources are checked here: their size, their nesting, and keywords that llguidance would pass over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hasten.engine.schema import CHECKED, FOLLOWED, SCHEMA_LISTS, SCHEMA_MAPS, SCHEMAS
from hasten.errors import UsageError
from hasten.models.answers import ThoughtMarks
from hasten.models.tool_calls import ToolStyle

if TYPE_CHECKING:
    from llguidance import LLTokenizer

GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice", "structural"]

MAX_BYTES = 256 << 10
MAX_NESTING = 100  # levels of JSON; llguidance reads 128 with its own around them
# A small model left to itself can write blanks for ever: one, or a new line that is indented somewhat.
WHITESPACE = r"(\x20|\x0D?\x0A[\x20\x09]{0,8})"
_IN_CALLS = r"\x20"  # arguments are written on one line, as models were taught
ANY_OBJECT = {"type": "object"}

_SCHEMAS = SCHEMAS | {"propertyNames", "contains", "not", "if", "then", "else"}
_SCHEMAS |= {"unevaluatedItems", "unevaluatedProperties", "contentSchema"}
_SCHEMA_MAPS = SCHEMA_MAPS | {"dependentSchemas"}
_NOTES = {"$dynamicAnchor", "$vocabulary", "$comment", "title"}
_NOTES |= {"description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"}
_NOTES |= {"contentEncoding", "contentMediaType", "discriminator", "externalDocs", "xml"}
_KNOWN = FOLLOWED | CHECKED | _SCHEMAS | _NOTES

MAX_TOOLS = 256
MOST_CALLS = 8  # in one answer that is held to a grammar: a small model goes on for ever
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Grammar:
    """What an answer must match.

    `source` is a JSON schema as JSON text, nothing for `json_object`, a regular expression (Rust's syntax,
    digits are 0 to 9; the whole answer must match), a grammar in llguidance's Lark dialect, or a JSON list of
    texts for `choice`. `structural` is a Lark grammar that `answer_grammar` wrote; with `thought`, the mark
    that ends the thought is forced behind so many tokens.
    """

    kind: GrammarKind
    source: str = ""
    thought: Thought | None = None


@dataclass(frozen=True)
class Thought:
    """What comes before the answer of a model that reasons.

    Args:
        marks: of its family.
        inside: the prompt has opened it.
        most_tokens: it is ended then; None: the model ends it.
    """

    marks: ThoughtMarks
    inside: bool = False
    most_tokens: int | None = None


def source_of(grammar: Grammar) -> str:
    """The text that llguidance compiles.

    Raises:
        UsageError: the source is too long, too deep, no Unicode or JSON, or a schema has an unknown keyword.
    """
    from llguidance import LLMatcher, regex_to_lark

    _check_text(grammar.source)
    match grammar.kind:
        case "json_schema":
            schema = _parsed(grammar.source)
            _check_schema(schema)
            return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(schema)))
        case "json_object":
            return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(ANY_OBJECT)))
        case "choice":
            return LLMatcher.grammar_from_lark(_choice(grammar.source))
        case "regex":
            # \d means 0 to 9, as in JSON schemas, not the digits of all scripts
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.source, 'd')}/")
        case "lark":
            return LLMatcher.grammar_from_lark(lark_of(grammar.source))
        case "structural":
            return LLMatcher.grammar_from_lark(grammar.source)
    raise UsageError(
        f"unknown kind of grammar {grammar.kind!r}", hint="use json_schema, regex, lark or choice"
    )


_GBNF_RULE = re.compile(r"^\s*[A-Za-z][\w-]*\s*::=", re.MULTILINE)


def lark_of(source: str) -> str:
    """A grammar in Lark's form; one in llama.cpp's (GBNF, rules with `::=`) is rewritten by llguidance.

    Raises:
        UsageError: it is no GBNF.
    """
    if not _GBNF_RULE.search(source):
        return source
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(source).removeprefix("%llguidance {}").strip()
    except Exception as error:  # noqa: BLE001  its own error, and what odd texts bring up
        said = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the grammar cannot be used: it has rules with ::=, and is no GBNF: {said}",
            hint="write GBNF (root ::= ...) as llama.cpp takes it, or Lark (start: ...)",
        ) from None


def _check_text(source: str) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"the grammar is no Unicode: {error.reason} at character {error.start}") from None
    if size > MAX_BYTES:
        raise UsageError(
            f"the grammar has {size} bytes, the limit is {MAX_BYTES}",
            hint="send a shorter one: leave out descriptions and examples",
        )


def _parsed(source: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the schema is no JSON: {error}", hint='send a JSON schema such as {"type": "object"}'
        ) from None


def _check_schema(schema: Any) -> None:
    """Walk a JSON schema's nested schemas.

    llguidance refuses what it knows and lacks (`not`, `uniqueItems`); what it does not know it would pass
    over, as the standard wants of annotations. A misspelt `requierd` is none: both are refused by name.
    """
    _check_depth(schema)
    waiting = [(schema, 1)]
    while waiting:
        here, depth = waiting.pop()
        if depth > MAX_NESTING // 2:
            raise UsageError(
                f"the JSON schema nests deeper than {MAX_NESTING // 2} schemas",
                hint="name parts with $defs and $ref",
            )
        if not isinstance(here, Mapping):
            continue  # true, false, or what llguidance names as wrong
        for key, value in here.items():
            if key not in _KNOWN and not key.startswith("x-"):
                raise UsageError(
                    f"the JSON schema has the keyword {key[:80]!r}, which is not supported",
                    hint="leave it out, or begin it with x- if it is a remark",
                )
            waiting.extend((inner, depth + 1) for inner in _nested(key, value))


def _check_depth(value: Any) -> None:
    """Of any JSON, constants and examples too: what reads and writes it calls itself level by level."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise UsageError(
                f"the JSON schema nests deeper than {MAX_NESTING} levels",
                hint="name parts with $defs and $ref",
            )
        lists = [one.values() if isinstance(one, Mapping) else one for one in level if _holds(one)]
        level = [inner for held in lists for inner in held if _holds(inner)]


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _nested(key: str, value: Any) -> Iterable[Any]:
    if key in SCHEMA_LISTS and isinstance(value, list):
        return value
    if key in _SCHEMA_MAPS and isinstance(value, Mapping):
        return value.values()
    return (value,) if key in _SCHEMAS else ()


def _with_options(schema: Any, whitespace: str = WHITESPACE) -> Any:
    """A schema with the options that llguidance reads from the schema itself."""
    if not isinstance(schema, Mapping):
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": whitespace}}


def _choice(source: str) -> str:
    choices = _parsed(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise UsageError("a choice must be a JSON list of texts", hint='for example ["yes", "no"]')
    texts = [text for text in dict.fromkeys(choices) if text]
    alternatives = " | ".join(_quoted(text) for text in texts)
    if not texts:
        return 'start: ""\n'
    return f"start: CHOICE{'?' * ('' in choices)}\nCHOICE: {alternatives}\n"


def _quoted(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The functions' argument schemas by name.

    Raises:
        UsageError: a tool is not a described function, has no proper name, or the name of another.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)) or len(tools) > MAX_TOOLS:
        raise UsageError(f"tools must be a list of at most {MAX_TOOLS} functions", hint=_EXAMPLE)
    functions: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
            raise UsageError(f"a tool of type {str(kind)[:40]!r} is not supported", hint=_EXAMPLE)
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"a function has the name {str(name)[:80]!r}",
                hint="use 1 to 128 letters, digits and any of _ . : / -",
            )
        if schema is not None and not isinstance(schema, Mapping):
            raise UsageError(f"the parameters of {name!r} are no JSON schema", hint=_EXAMPLE)
        wanted = _of_object(name, schema) if schema else _NO_ARGUMENTS
        if functions.get(name, wanted) != wanted:  # one that is sent twice is one
            raise UsageError(f"two functions are named {name!r}", hint="give each function its own name")
        functions[name] = wanted
    return functions


def _of_object(name: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments are an object, whether or not the schema says so."""
    if schema.get("type", "object") != "object":
        raise UsageError(f"the parameters of {name!r} are no object", hint=_EXAMPLE)
    return schema if "$ref" in schema else {"type": "object", **schema}


_EXAMPLE = 'send tools like {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'


def _call_rules(functions: Mapping[str, Any], most: int, style: ToolStyle) -> list[str]:
    """Lark rules in which `calls` is one call of these functions, up to `most` of them.

    Where exactly one is made, nothing need follow its arguments: a closing mark would only cost tokens.
    """
    opening, closing = _mark(style.opening, style), _mark(style.closing or "", style)
    more = "" if most == 1 else f"{{0,{most - 1}}}"
    end = "" if most == 1 else f' "\\n" {closing}'
    shape, several = {
        "hermes": (f'{opening} "\\n" call{end}', f'("\\n" {opening} "\\n" call "\\n" {closing})'),
        "hermes_list": (f'{opening} "[" call', f'(", " call){more} "]" {closing}'),
        "phi": (f'{opening} "[" call', f'(", " call){more} "]" {closing}'),
        "llama": ("call", ""),
        "mistral": (f"{opening} {_quoted(' [' if style.spaced else '[')} call", f'(", " call){more} "]"'),
        "mistral_args": (f"{opening} call", f"({opening} call)"),
        "qwen_xml": (f'{opening} "\\n" call{end}', f'("\\n" {opening} "\\n" call "\\n" {closing})'),
        "pythonic": ('"[" call', f'(", " call){more} "]"'),
        "harmony": ("call", ""),
    }[style.name]
    listed = style.name in ("hermes_list", "phi", "mistral", "pythonic")
    if most == 1:
        several = re.sub(r"\(.*call\)", "", several) if listed else ""
    elif not listed and several:
        several += more
    rules = [f"calls: {shape} {several}".rstrip()]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, (name, schema) in enumerate(functions.items()):
        try:
            _check_schema(schema)
        except UsageError as error:
            raise UsageError(f"the function {name!r}: {error.message}", hint=error.hint) from None
        rules += _call_rule(index, name, schema, style)
    return rules


def _call_rule(index: int, name: str, schema: Any, style: ToolStyle) -> list[str]:
    """The rules of one function's call, `call_INDEX` first."""
    if style.name == "qwen_xml":
        return _xml_rule(index, name, schema)
    if style.name == "pythonic":
        return _python_rule(index, name, schema)
    arguments = f"%json {json.dumps(_with_options(schema, _IN_CALLS))}"
    if style.name == "mistral_args":
        return [f"call_{index}: {_quoted(name)} {_mark('[ARGS]', style)} {arguments}"]
    if style.name == "harmony":
        head = f"{_mark('<|channel|>', style)} {_quoted(f'commentary to=functions.{name} ')}"
        told = f"{_mark('<|constrain|>', style)} {_quoted('json')} {_mark('<|message|>', style)}"
        return [f"call_{index}: {head} {told} {arguments}"]
    before = f'{{"name": {json.dumps(name)}, "{style.arguments_key}": '
    return [f'call_{index}: {_quoted(before)} {arguments} "}}"']


def _parameters(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Name, schema with the definitions it may refer to, and whether it is needed: the needed ones first."""
    needed = set(schema.get("required") or ())
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [
        (name, {**rule, **shared} if isinstance(rule, Mapping) else rule, name in needed)
        for name, rule in (schema.get("properties") or {}).items()
    ]
    return sorted(rules, key=lambda rule: not rule[2])


def _xml_rule(index: int, name: str, schema: Any) -> list[str]:
    """Qwen3-Coder's tags; a text ends where its closing tag begins."""
    parts, rules = [], []
    for number, (key, rule, needed) in enumerate(_parameters(schema)):
        value = f"value_{index}_{number}"
        begins, ends = _quoted(f"<parameter={key}>\n"), _quoted("\n</parameter>\n")
        parts.append(f"({begins} {value})" + ("" if needed else "?"))
        if isinstance(rule, Mapping) and rule.get("type") == "string" and "enum" not in rule:
            rules.append(f"{value}[lazy]: /(.|\\n)*\\n<\\/parameter>\\n/")
        elif isinstance(rule, Mapping) and all(isinstance(one, str) for one in rule.get("enum", (0,))):
            rules.append(f"{value}: ({' | '.join(map(_quoted, rule['enum']))}) {ends}")
        else:
            rules.append(f"{value}: %json {json.dumps(_with_options(rule, _IN_CALLS))} {ends}")
    head = _quoted(f"<function={name}>\n")
    return [f'call_{index}: {head} {" ".join(parts)} "</function>"', *rules]


def _python_rule(index: int, name: str, schema: Any) -> list[str]:
    """A Python call with named arguments; its values are JSON, which is read as well."""
    text, rules, seen = "", [], False
    closing = ""
    for number, (key, rule, needed) in enumerate(_parameters(schema)):
        value = f"value_{index}_{number}"
        part = f"{_quoted((', ' if seen else '') + key + '=')} {value}"
        text += f" {part}" if needed else f" ({part}"
        closing += "" if needed else ")?"
        rules.append(f"{value}: %json {json.dumps(_with_options(rule, _IN_CALLS))}")
        seen = True
    return [f'call_{index}: {_quoted(name + "(")}{text}{closing} ")"', *rules]


class ThoughtLimit:
    """When a thought must end, and by which tokens."""

    def __init__(self, thought: Thought, vocabulary: LLTokenizer, values: Sequence[bytes]) -> None:
        marks = thought.marks
        own = marks.special.get(marks.closing)
        self.most = thought.most_tokens or 1
        self.inside = thought.inside
        self.closing = marks.closing.encode()
        self.closing_ids = vocabulary.tokenize_str(marks.closing) if own is None else [own]
        self._opening = marks.opening.encode()
        self._opening_id = marks.special.get(marks.opening)
        self._values = values

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether an answer so far has ended its thought, or has none."""
        if not tokens:
            return False
        if self.closing_ids[-1] in tokens[-1:] and len(self.closing_ids) == 1:
            return True
        told = b"".join(
            self._values[one] for one in tokens[-2 * len(self.closing) :] if one < len(self._values)
        )
        if self.closing in told:
            return True
        return not (self._has_begun(tokens) or self._opening.startswith(self._begins(tokens)))

    def is_due(self, tokens: Sequence[int]) -> bool:
        """Whether an answer that is in its thought, or before it, has used up what a thought may take.

        A thought that was never opened cannot be closed: half an opening mark is waited for.
        """
        return len(tokens) >= self.most and self._has_begun(tokens)

    def next_closing(self, tokens: Sequence[int]) -> int:
        """The token that the closing mark goes on with, or begins with."""
        ids = self.closing_ids
        for count in range(min(len(ids) - 1, len(tokens)), 0, -1):
            if list(tokens[-count:]) == ids[:count]:
                return ids[count]
        return ids[0]

    def _has_begun(self, tokens: Sequence[int]) -> bool:
        return self.inside or self._opening_id in tokens[:4] or self._begins(tokens).startswith(self._opening)

    def _begins(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._values[one] for one in tokens[:32] if one < len(self._values)).lstrip()


@dataclass(frozen=True)
class Calls:
    """The calls an answer may make, checked functions by name.

    Args:
        functions: argument schemas.
        forced: the answer is a call; else it may be one.
        most: calls in one answer.
        style: the model's way.
    """

    functions: Mapping[str, Any]
    forced: bool
    most: int = MOST_CALLS
    style: ToolStyle = field(default_factory=ToolStyle)


def answer_grammar(
    form: Grammar | None, calls: Calls | None = None, thought: Thought | None = None
) -> Grammar | None:
    """A whole answer: a thought, then the form or calls.

    Args:
        form: what the text must match; None: it is free.
        calls: None: none are made, or the model makes them freely.
        thought: None: the model does not think first.

    Returns:
        None where nothing is asked for. A form alone comes back as it is.

    Raises:
        UsageError: a source is not what it must be.
    """
    if calls is None and (thought is None or (form is None and thought.most_tokens is None)):
        return form
    rules: list[str] = []
    ways = []
    if calls is not None:
        rules += _call_rules(calls.functions, calls.most, calls.style)
        ways.append("calls")
        may_be_bare = form is not None and calls.style.name in ("hermes", "hermes_list", "phi")
        if may_be_bare and not calls.forced:
            rules.append(f"bare: {_bare_calls(calls)}")
            ways.append("bare")
    if form is not None and not (calls is not None and calls.forced):
        rules += _form_rules(form)
        ways.append("form")
    elif calls is None:
        rules.append("form: /(.|\\n)*/")
        ways.append("form")
    elif not calls.forced:
        rules += _free_rules(calls.style, rules)
        ways.append("form")
        if not calls.style.bare:
            rules += _unmarked_rules(calls)
            ways.append("unmarked")
    before = ""
    if thought is not None:
        rules += _thought_rules(thought)
        before = "thought GAP? " if thought.inside else "(thought GAP?)? "
    source = "\n".join([f"start: {before}({' | '.join(ways)})", *rules]) + "\n"
    limited = thought if thought is not None and thought.most_tokens is not None else None
    return Grammar("structural", source, limited)


_ANY, _BLANK = r"(.|\n)*", r" \t\r\n"
_NO_NAME = rf'\{{[{_BLANK}]*([^"{_BLANK}]|"([^n]|n[^a]|na[^m]|nam[^e]|name[^"])){_ANY}'
"""A JSON object whose first key is not "name"."""


def _no_call(style: ToolStyle) -> str:
    """An expression of the texts that no reader takes for a call without its mark (`hasten.models.answers`):
    blanks and the fence of a block of code may stand before one."""
    if style.name == "pythonic":
        return rf"([{_BLANK}]*[^\[{_BLANK}]{_ANY})?"
    other = "" if style.bare else f"|{_NO_NAME}"
    some = rf"([^{{{_BLANK}]{_ANY}{other})?"
    half = "|".join(rf"{'json'[:n]}([^{'json'[n]}]{_ANY})?" for n in (1, 2, 3))
    fenced = rf"[{_BLANK}]+{some}|[^{{j{_BLANK}]{_ANY}{other}|{half}|json[{_BLANK}]*{some}"
    return rf"[{_BLANK}]*([^{{`{_BLANK}]{_ANY}{other}|``?([^`]{_ANY})?|```({fenced})?)?"


def _free_rules(style: ToolStyle, rules: list[str]) -> list[str]:
    """`form` is a free text, with calls behind it where a mark begins one: every call is one of the rules'.

    The mark is a token of its own, which no text holds, or a text itself: the first place where it stands
    then ends the free text, because a lazy lexeme is over as soon as it may be.

    Args:
        style: the model's way.
        rules: those of the calls; the mark goes from the first of them to the end of the text.
    """
    free = _no_call(style).replace("/", "\\/")
    if style.bare:
        return [f"form: /{free}/"]
    if style.opening in style.special:
        return [f"form: free calls?\nfree: /{free}/"]
    mark = re.escape(style.opening).replace("/", "\\/")
    opening = _mark(style.opening, style)
    head, _, rest = rules[0].partition(opening)
    later = rules[0].replace(opening, "", 1)
    assert head == "calls: " and rest
    return [
        f"form: free | before {later.removeprefix('calls: ')}",
        f"free: /{free}/",
        f"before[lazy]: /({free}){mark}/",
    ]


def _unmarked_rules(calls: Calls) -> list[str]:
    """`unmarked`: one call that has no mark, perhaps as a block of code: what `_no_call` leaves out."""
    begins = rf'[{_BLANK}]*(```(json)?[{_BLANK}]*)?\{{[{_BLANK}]*"name"'
    rules = [f"unmarked_name[lazy]: /{begins}/", "BLANK: /[ \\n]+/"]
    ways = []
    for index, (name, schema) in enumerate(calls.functions.items()):
        parts = [
            '":"',
            _quoted(json.dumps(name)),
            '","',
            _quoted(json.dumps(calls.style.arguments_key)),
            '":"',
        ]
        value = f"%json {json.dumps(_with_options(schema))}"
        rules.append(f"unmarked_{index}: BLANK? " + " BLANK? ".join([*parts, value, '"}"']))
        ways.append(f"unmarked_{index}")
    return [f"unmarked: unmarked_name ({' | '.join(ways)}) (BLANK? {_quoted('```')})?", *rules]


def _bare_calls(calls: Calls) -> str:
    """A call without its marks: small models forget them, and readers take it all the same. It is written as
    a schema, so that its first signs are those of a form and both stay possible."""
    defs: dict[str, Any] = {}
    ways = []
    for name, schema in calls.functions.items():
        for key in ("$defs", "definitions"):
            defs.setdefault(key, {}).update(schema.get(key) or {})
        said = {"name": {"const": name}, calls.style.arguments_key: schema}
        ways.append(
            {"type": "object", "properties": said, "required": list(said), "additionalProperties": False}
        )
    shared = {key: value for key, value in defs.items() if value}
    return f"%json {json.dumps(_with_options({'anyOf': ways, **shared}, _IN_CALLS))}"


def _form_rules(form: Grammar) -> list[str]:
    _check_text(form.source)
    match form.kind:
        case "json_schema" | "json_object":
            schema = _parsed(form.source) if form.kind == "json_schema" else ANY_OBJECT
            _check_schema(schema)
            return [f"form: %json {json.dumps(_with_options(schema))}"]
        case "regex":
            from llguidance import regex_to_lark

            return [f"form: /{regex_to_lark(form.source, 'd')}/"]
        case "choice":
            return [_choice(form.source).replace("start:", "form:", 1).rstrip()]
    source = lark_of(form.source) if form.kind == "lark" else form.source
    return [f"form: %lark {{\n{source}\n}}"]


def _thought_rules(thought: Thought) -> list[str]:
    """A text up to the closing mark."""
    marks = thought.marks
    style = ToolStyle(special=marks.special)
    opening = "" if thought.inside else _mark(marks.opening, style) + " "
    closing = _mark(marks.closing, style)
    rules = ["GAP: /[ \\n]{1,3}/"]
    if marks.closing in marks.special:
        return [*rules, f"thought: {opening}thinking {closing}", "thinking: /(.|\\n)*/"]
    free = re.escape(marks.closing).replace("/", "\\/")
    return [*rules, f"thought: {opening}thought_free", f"thought_free[lazy]: /(.|\\n)*{free}/"]


def _mark(mark: str, style: ToolStyle) -> str:
    """A mark in Lark: special tokens by id, others by spelling."""
    if mark in style.special:
        return f"<[{style.special[mark]}]>"
    return _quoted(mark) if mark else ""
