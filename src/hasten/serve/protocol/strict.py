"""The base of all request models, and parsing that ends in OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from hasten.serve.problem import Problem

# Fields of the OpenAI API that are not served. Null, which means "as if not there", passes; values do not.
UNSUPPORTED = frozenset(
    (
        "audio",
        "background",
        "best_of",
        "conversation",
        "echo",
        "function_call",
        "functions",
        "include",
        "max_tool_calls",
        "metadata",
        "moderation",
        "prediction",
        "prompt",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "service_tier",
        "store",
        "suffix",
        "truncation",
        "verbosity",
        "web_search_options",
        "dimensions",
        "modalities",
        "logit_bias",
        "top_logprobs",
        "safety_identifier",
        "stream_options",
    )
)
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Item = TypeVar("Item", bound="Strict")


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


def parse(model: type[Item], body: bytes | bytearray | str) -> Item:
    """A request body as a checked value.

    Raises:
        Problem: 400 that names the first field at fault.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        dropped = _nulls(error.errors(include_url=False, include_context=False))
        if dropped is None:
            raise _problem(error, body) from None
    document = {key: value for key, value in json.loads(body).items() if key not in dropped}
    try:
        return model.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise _problem(error, body) from None


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


def _problem(error: ValidationError, body: bytes | bytearray | str) -> Problem:
    """The error at the deepest place, the nearest to what was meant, told the way OpenAI tells it."""
    errors = error.errors(include_url=False, include_context=False)
    first = max(errors, key=lambda e: len(_path(e, body)) if e["type"] != "json_invalid" else 0)
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return Problem(
            400, f"the body is no valid JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    place = _path(first, body)
    path = ".".join(map(str, place))[:200] or None
    if kind == "extra_forbidden":
        known = str(place[-1]) in UNSUPPORTED
        said = f"{path} is not supported by this server" if known else f"unknown field {path}"
        code = "unsupported_parameter" if known else "unknown_parameter"
        return Problem(400, f"{said}; leave it out", param=path, code=code)
    if kind == "missing":
        return Problem(400, f"{path} is missing", param=path, code="missing_required_parameter")
    said = message.removeprefix("Value error, ").removeprefix("Input ")
    return Problem(400, f"{path or 'the body'}: {said}"[:500], param=path, code="invalid_value")


def _path(error: Mapping[str, Any], body: bytes | bytearray | str) -> list[str | int]:
    """Where in the body an error is: pydantic's place without the names of the alternatives it tried."""
    value, path = json.loads(body), []
    place = error["loc"]
    for number, step in enumerate(place):
        here = isinstance(value, dict) and step in value
        if here or (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            value = value[step]
        elif not (error["type"] == "missing" and number == len(place) - 1):
            continue
        path.append(step)
    return path
