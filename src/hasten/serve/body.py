"""Request bodies: the base of their models, shared fields, and parsing that ends in OpenAI's error object.

One pass goes from bytes to checked values. A body that does not pass is read once more, tolerantly: other
servers' spellings are understood, numbers may be texts, and fields that cannot change an answer are left out
and noted. With `--strict` there is no second reading. Sources of the fields: the OpenAI API reference, vLLM's
names for what OpenAI has no name for, and the references of llama.cpp's server, Ollama, SGLang and TGI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict

from hasten.serve.call import Problem, refused

# Fields of the OpenAI API that are not served everywhere. Null, which means "as if not there", passes.
_NOT_SERVED = """
    audio background best_of conversation echo function_call functions include max_tool_calls metadata
    moderation prediction prompt prompt_cache_retention reasoning reasoning_effort service_tier store
    suffix truncation verbosity web_search_options dimensions modalities logit_bias top_logprobs
    safety_identifier stream_options
"""
UNSUPPORTED = frozenset(_NOT_SERVED.split())

# What would change an answer and is not served, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": ({},),
    "background": (False,),
    "bad_words": ([],),
    "chat_template": ("",),
    "conversation": ({}, ""),
    "custom_token_bans": ("",),
    "documents": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "echo": (False,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "format": ("",),
    "grammar": ("",),
    "guidance_scale": (1,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "lora": ([],),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"], []),
    "negative_prompt": ("",),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "prompt": ({}, "", []),
    "response_format": (),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": ({},),
    "smoothing_factor": (0,),
    "stop_regex": ("", []),
    "suffix": ("",),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "typical_p": (1, 0),
    "use_beam_search": (False,),
    "web_search_options": ({},),
    "xtc_probability": (0,),
}
# Other servers' names of fields.
_SAME_AS = {
    "repeat_penalty": "repetition_penalty",
    "typ_p": "typical_p",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "ban_eos_token": "ignore_eos",
    "json_schema": "guided_json",
    "regex": "guided_regex",
    "ebnf": "guided_grammar",
    "grammar": "guided_grammar",
    "content": "prompt",
}
_ENVELOPES = ("extra_body", "options")  # fields in one more object: a client's mistake, and Ollama's form
_CAPS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_KNOWN_NAMES = """
    prompt_cache_key keep_alive cache_prompt conversation_id chat_id id trace_id session_id options extra_body
    length_penalty early_stopping return_token_ids client_metadata user tags provider transforms models route
    usage plugins caching timeout mirostat_tau mirostat_eta min_keep penalty_last_n repeat_last_n slot_id
    id_slot n_probs n_keep samplers
"""
KNOWN_NAMES = UNSUPPORTED | _NEUTRAL.keys() | frozenset(_KNOWN_NAMES.split())
"""Names of ignored fields that the metrics may show: a client must not be able to make new ones."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Item = TypeVar("Item", bound="Strict")


class Ignored(set[str]):
    """Names of fields that were left out: the first fifty of a body, for nobody reads more."""

    most = 50

    def add(self, name: str) -> None:
        if len(self) < self.most:
            super().add(name[:60])

    def update(self, *names: Iterable[str]) -> None:
        for name in chain(*names):
            self.add(name)


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """The parser takes NaN and 1e999, which JSON cannot say again and no schema means."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("holds a number that is not finite") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
"""An object of any form, which can be written as JSON again."""


class Strict(BaseModel):
    """Refuses unknown fields, and text where a number belongs."""

    model_config = STRICT

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """A body in this model's own words, as far as another server's words mean the same.

        Args:
            document: the body; it is not changed.
            ignored: gets the names of fields that are left out because they cannot change the answer.

        Raises:
            Problem: 400, a field that would change the answer and is not served.
        """
        fields = {(item.alias or name) for name, item in cls.model_fields.items()}
        found = _opened(document, fields)
        for name in [name for name in found if name not in fields]:
            value = found.pop(name)
            if value is not None and name in _NEUTRAL and value not in _NEUTRAL[name]:
                said = f"{name} is not supported by this server, and would change the answer; leave it out"
                raise Problem(400, said, param=name, code="unsupported_parameter")
            if value is not None:
                ignored.add(name)
        return {name: value for name, value in found.items() if value is not None}


def _opened(document: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """The fields of a body by their own names; caps that ask for no limit are left out."""
    found = dict(document)
    for envelope in _ENVELOPES:
        inner = found.get(envelope)
        if isinstance(inner, dict):
            del found[envelope]
            for name, value in inner.items():
                found.setdefault(name, value)
    for name, same in _SAME_AS.items():
        if name in found and name not in fields and same in fields:
            found.setdefault(same, found.pop(name))
    for name in _CAPS:
        value = found.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value < 0:
                del found[name]
            elif value >= 2**31:
                found[name] = 2**31 - 1
    return found


MAX_VALUES = 500_000
MAX_PARTS = 100_000
"""What a body may hold: values in all; fields, objects and lists. The parser keeps all other threads waiting,
50 ns for a value and 1 us for a part: at these limits 0.03 to 0.1 s."""
_MANY_FIELDS = 2000  # a body of so many is read tolerantly at once: an error object each takes 0.3 us
_MANY_ERRORS = 100  # to build the list of them costs 5 us each, in one piece
_KEPT_FIELDS = 50
_PIECE = 1 << 18  # bytes looked at in one piece
_TEXTS = re.compile(rb'"[^"]*"?')
_BOM = b"\xef\xbb\xbf"


def parse(model: type[Item], body: bytes | bytearray, ignored: set[str] | None = None) -> Item:
    """A request body as a checked value. The time grows with the body's length, whatever is in it.

    Args:
        model: what it must be.
        body: JSON.
        ignored: gets the names of fields that were left out; None refuses what is not known.

    Raises:
        Problem: 400 that names the first field at fault.
    """
    if body.startswith(_BOM):  # some editors and shells put it before every text
        body = body[len(_BOM) :]
    if body.startswith(b"\x1f\x8b"):
        raise refused("the body is compressed by gzip; send it as plain JSON", None, "invalid_json")
    _check_parts(body)
    if ignored is not None and body.count(b":") > _MANY_FIELDS:
        found = _tolerant(model, body, ignored)
        if found is not None:
            return found
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if ignored is not None:
            found = _tolerant(model, body, ignored)
            if found is not None:
                return found
        if error.error_count() <= _MANY_ERRORS:
            dropped = _nulls(error.errors(include_url=False, include_context=False))
            if dropped is None:
                raise _problem(error, json.loads(body) if _is_json(error) else None) from None
        else:
            dropped = set()
    document = json.loads(body)
    if dropped:
        document = {key: value for key, value in document.items() if key not in dropped}
    else:
        document = _narrowed(document, _names(model))
    text = json.dumps(document).encode()
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _problem(error, document) from None


def _tolerant(model: type[Item], body: bytes | bytearray, ignored: set[str]) -> Item | None:
    """The second reading; None where the body is no JSON object.

    Half of a pair of surrogates, which programs in JavaScript send when they cut a text within an emoji, is
    read as U+FFFD.

    Raises:
        Problem: what is wrong all the same.
    """
    try:
        document = from_json(body)
    except ValueError:
        try:
            document = from_json(_HALVES.sub(_whole, body))
        except ValueError:
            return None
    if not isinstance(document, dict):
        return None
    return checked(model, model.understood(document, ignored))


_HALVES = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _whole(found: re.Match[bytes]) -> bytes:
    return found[0] if len(found[0]) != len(b"\\ud800") else b"\\ufffd"


def checked(model: type[Item], document: dict[str, Any]) -> Item:
    """A document as a checked value; numbers may be texts, and what is not known is left out.

    Raises:
        Problem: 400 that names the first field at fault.
    """
    try:
        return model.model_validate(document, strict=False, extra="ignore")
    except ValidationError as error:
        if error.error_count() <= _MANY_ERRORS:
            raise _problem(error, document) from None
    document = _narrowed(document, _names(model))
    try:
        return model.model_validate(document, strict=False, extra="ignore")
    except ValidationError as error:
        raise _problem(error, document) from None


def _is_json(error: ValidationError) -> bool:
    return error.error_count() > 1 or error.errors(include_url=False)[0]["type"] != "json_invalid"


def _check_parts(body: bytes | bytearray) -> None:
    """Refuse a body of very many parts before the parser makes an object of each.

    Raises:
        Problem: 400, more than `MAX_VALUES` or `MAX_PARTS`.
    """
    if not _exceeds(body.count(b","), _parts(body)):  # more than there are, if texts hold such characters
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    commas = parts = 0
    inside = False  # a text goes on from the piece before
    for start in range(0, len(plain), _PIECE):
        piece = (b'"' if inside else b"") + plain[start : start + _PIECE]
        inside = piece.count(b'"') % 2 == 1
        bare = _TEXTS.sub(b"", piece)
        commas, parts = commas + bare.count(b","), parts + _parts(bare)
        if _exceeds(commas, parts):
            said = f"more than {MAX_VALUES:,} values, or more than {MAX_PARTS:,} fields, objects and lists"
            raise refused(f"the body holds {said}", None, "too_many_values")


def _exceeds(commas: int, parts: int) -> bool:
    return commas >= MAX_VALUES or parts > MAX_PARTS


def _parts(text: bytes | bytearray) -> int:
    return text.count(b":") + text.count(b"{") + text.count(b"[")


def _narrowed(value: Any, names: frozenset[str]) -> Any:
    """A document with some of the fields of its widest objects, those with known names among them.

    Lists end at their first error; what makes errors without number are wrong fields of one object.
    """
    if isinstance(value, list):
        return [_narrowed(one, names) for one in value]
    if not isinstance(value, dict):
        return value
    left = _KEPT_FIELDS
    kept = {}
    for name, one in value.items():
        if name not in names:
            left -= 1
            if left < 0:
                continue
        kept[name] = _narrowed(one, names)
    return kept


@lru_cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    """The names of all fields in a body, those of its objects included."""
    found: set[str] = set()

    def look(schema: Any) -> None:
        if isinstance(schema, dict):
            found.update(schema.get("properties", ()))
            for one in schema.values():
                look(one)
        elif isinstance(schema, list):
            for one in schema:
                look(one)

    look(model.model_json_schema())
    return frozenset(found)


def _nulls(errors: Sequence[Mapping[str, Any]]) -> set[str] | None:
    """The fields at fault where all are known ones with the value null; None otherwise."""
    names = set()
    for error in errors:
        place = error["loc"]
        if error["type"] != "extra_forbidden" or len(place) != 1 or error["input"] is not None:
            return None
        if place[0] not in UNSUPPORTED:
            return None
        names.add(str(place[0]))
    return names


def _problem(error: ValidationError, document: Any) -> Problem:
    """The error nearest to what was meant, told the way OpenAI tells it.

    A wrong value of the right type comes before a wrong type: where a field may be of several types, each
    that it is not gives an error too. Then the deepest place counts.
    """
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        said = errors[0]["msg"].removeprefix("Invalid JSON: ")
        if said.startswith("invalid unicode"):
            said = f"it is not UTF-8 ({said})"
        return Problem(400, f"the body is no valid JSON: {said}", code="invalid_json")
    places = [_path(one, document) for one in errors]
    number = max(range(len(errors)), key=lambda i: (_is_value_error(errors[i]["type"]), len(places[i]), -i))
    kind, place = errors[number]["type"], places[number]
    path = ".".join(map(str, place))[:200] or None
    if kind == "extra_forbidden":
        known = str(place[-1]) in UNSUPPORTED
        said = f"{path} is not supported by this server" if known else f"unknown field {path}"
        code = "unsupported_parameter" if known else "unknown_parameter"
        return Problem(400, f"{said}; leave it out", param=path, code=code)
    if kind == "missing":
        return Problem(400, f"{path} is missing", param=path, code="missing_required_parameter")
    said = _told(errors[number]["msg"])
    if kind.endswith("_type"):  # every type that would do at this place
        also = (
            one["msg"]
            for one, at in zip(errors, places, strict=True)
            if at == place and one["type"].endswith("_type")
        )
        wanted = dict.fromkeys(_told(message).removeprefix("should be ") for message in also)
        said = f"should be {' or '.join(wanted)}"
    beside = [
        str(at[-1])[:60]
        for one, at in zip(errors, places, strict=True)
        if one["type"] == kind
        and one["msg"] == errors[number]["msg"]
        and at != place
        and at[:-1] == place[:-1]
    ]
    if beside and isinstance(place[-1], str):  # fields of one object with the same fault, such as wrong ids
        said += f"; so should {', '.join(beside[:10])}"
    return Problem(400, f"{path or 'the body'}: {said}"[:500], param=path, code="invalid_value")


def _told(message: str) -> str:
    said = message.removeprefix("Value error, ").removeprefix("Input ").replace(" after validation", "")
    return said[:1].lower() + said[1:]


def _is_value_error(kind: str) -> bool:
    """Whether an error says that the type was right: not which of the types, names or tags was missed."""
    return not kind.endswith("_type") and kind not in _MISSED


_MISSED = (
    "missing",
    "extra_forbidden",
    "literal_error",
    "union_tag_invalid",
    "union_tag_not_found",
    "unknown_item",
)


def _path(error: Mapping[str, Any], document: Any) -> list[str | int]:
    """Where in the document an error is: pydantic's place without the names of the alternatives it tried."""
    value, path = document, []
    place = error["loc"]
    for number, step in enumerate(place):
        here = isinstance(value, dict) and step in value
        if here or (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            value = value[step]
        elif not (error["type"] == "missing" and number == len(place) - 1):
            continue
        path.append(step)
    return path


Text = Annotated[str, Field(max_length=16_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class StreamOptions(TypedDict, total=False):
    """What a stream reports besides the answer."""

    include_usage: bool  # a last chunk with the usage of the request
    continuous_usage_stats: bool  # vLLM's: with include_usage, the usage so far in every chunk


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: one of these."""

    json_: JsonObject | Text | None = Field(None, alias="json", description="JSON schema")
    regex: Text | None = None
    choice: Annotated[list[StopText], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    grammar: Text | None = Field(None, description="grammar in Lark or GBNF")
    json_object: bool | None = None


class SharedFields(Strict):
    """What every request to a model may say. `priority`, `deadline_ms` and `cache_salt` are ours."""

    model: str | None = Field(None, max_length=1000, description="a name of /v1/models; default: the first")
    user: str | None = Field(None, max_length=512, description="users share the machine evenly")
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="higher runs first")
    deadline_ms: float | None = Field(None, gt=0, description="from arrival to the last token")
    cache_salt: str | None = Field(
        None, max_length=512, description="shares computed prompts with this salt alone"
    )


class DrawingFields(SharedFields):
    """How tokens are drawn."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1 is all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None


class SamplingFields(DrawingFields):
    """Sampling and limits. Names without an OpenAI meaning are vLLM's."""

    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenName, Bias] | None = Field(None, max_length=10_000)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=256, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = Field(None, description="go on past the end token: for benchmarks")
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="no end and no stop before so many")
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=100_000, fail_fast=True)] | None = Field(
        None, description="no other token is drawn"
    )
    bad_words: Annotated[list[StopText], Field(max_length=1000, fail_fast=True)] | None = Field(
        None, description="texts that no run of the answer's tokens spells"
    )
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = Field(None, description="ids of prompt and answer beside the texts")
    return_tokens_as_token_ids: bool | None = Field(None, description="logprobs name tokens token_id:7")
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=2**31, description="keeps so many of a longer prompt; -1: as many as fit"
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="what is cut off: left")
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    guided_json: JsonObject | Text | None = Field(None, description="JSON schema")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[StopText], Field(min_length=1, max_length=1000, fail_fast=True)] | None = (
        None
    )
    guided_grammar: Text | None = Field(None, description="grammar in Lark or GBNF")
    structured_outputs: StructuredOutputs | None = None
