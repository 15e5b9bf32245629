"""The page at `/`: plain files, no build step, nothing fetched from elsewhere; and their headers.

The whole site is a dictionary from URL path to bytes: a path that is not a key does not exist, so there is no
file name for a request to escape from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # innerHTML and its like throw: what a model writes stays text
        "trusted-types 'none'",
    )
)
"""No inline script or style, no other origin, no markup made of strings."""

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",  # asked again each time, answered 304 by the entity tag
    }
)
"""Sent with every file of the page."""

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str  # quoted, as the header wants it


@cache
def assets() -> Mapping[str, Asset]:
    """URL path -> file: `/` is index.html, everything else is `/web/NAME`. Read once, 67 KB in all."""
    found: dict[str, Asset] = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in MEDIA_TYPES:
            body = path.read_bytes()
            url = "/" if path.name == "index.html" else f"/web/{path.name}"
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            found[url] = Asset(body, MEDIA_TYPES[path.suffix], etag)
    return MappingProxyType(found)
