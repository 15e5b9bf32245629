"""Numbers and text as the report shows them: everything that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

UNKNOWN = "unknown"


def text(value: Any) -> str:
    """Any value as HTML text, safe in attributes too."""
    return UNKNOWN if value is None else escape(str(value), quote=True)


def number(value: float | None, digits: int = 1) -> str:
    """1,234.5, or `unknown`."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A signed share: +0.82 %."""
    return UNKNOWN if value is None else f"{100 * value:+.2f} %"


def share(value: float | None) -> str:
    """An unsigned share: 98.7 %."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def small(value: float | None) -> str:
    """Two significant digits, for divergences: 0.0043."""
    return UNKNOWN if value is None else f"{value:.2g}"


def times(value: float | None) -> str:
    """A speedup: 2.9 and a times sign."""
    return UNKNOWN if value is None else f"{value:.2g}&times;" if value < 10 else f"{value:.0f}&times;"


def megabytes(value: float | None) -> str:
    """Bytes as MB of a million."""
    return UNKNOWN if value is None else f"{value / 1e6:,.0f} MB"


def median(measurement: Mapping[str, Any] | None, figure: str) -> float | None:
    """The median of one figure of a measurement, None where there is no measurement."""
    return None if measurement is None else float(measurement[figure]["median"])
