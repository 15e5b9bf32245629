"""Typed reading of a configuration's fields, every mistake an error with the field and what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hasten.errors import ModelError

_REQUIRED: Any = object()


class Fields:
    """A mapping read by type.

    None counts as missing, but keeps the defaults of `defaults` from being used: Mistral's
    `"sliding_window": null` says that there is no window, where a missing key means 4096.

    Args:
        values: the fields.
        where: what errors call them: a file name.
        prefix: put before every key ("llama." for GGUF metadata).
        defaults: used where a key is missing, before the default of the call.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = values
        self.where = where
        self.prefix = prefix
        self._defaults = dict(defaults or {})

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, or the default where it is missing or None."""
        name = self.prefix + key
        value = self.values[name] if name in self.values else self._defaults.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = 1 << 24) -> Any:
        """An integer from low to high (or the default, unchecked).

        Raises:
            ModelError: missing without a default, not an integer, or out of range.
        """
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0) -> Any:
        """A finite number greater than `low` (or the default, unchecked).

        Raises:
            ModelError: missing without a default, no number, not finite or too small.
        """
        value = self._value(key, default)
        if value is default:
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not -1e300 < value < 1e300 or not value > low:  # a NaN fails the first comparison
            raise self.error(key, f"a number greater than {low:g}", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or False.

        Raises:
            ModelError: something else is there.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string (or the default).

        Raises:
            ModelError: missing without a default, or no string.
        """
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def numbers(self, key: str, length: int | None = None) -> tuple[float, ...]:
        """A list of finite numbers, () where it is missing.

        Raises:
            ModelError: no list of numbers, or of another length.
        """
        value = self.get(key)
        if value is None:
            return ()
        is_list = isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e300 for v in value
        )
        if not is_list or (length is not None and len(value) != length):
            wanted = "a list of numbers" if length is None else f"a list of {length} numbers"
            raise self.error(key, wanted, value)
        return tuple(float(v) for v in value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A nested object, empty where it is missing.

        Raises:
            ModelError: something else is there.
        """
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "an object", value)
        return value

    def error(self, key: str, wanted: str, found: Any) -> ModelError:
        """A ModelError: which field, what belongs there, what was found."""
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ModelError(f"{self.where}: {self.prefix}{key} must be {wanted}, got {shown}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.where}: {self.prefix}{key} is missing")
        return value


def bf16_rounded(value: float) -> float:
    """The nearest bfloat16, ties to even; finite positive values only."""
    mantissa, exponent = math.frexp(value)  # 0.5 <= mantissa < 1: eight bits of it are kept
    return math.ldexp(round(math.ldexp(mantissa, 8)), exponent - 8)
