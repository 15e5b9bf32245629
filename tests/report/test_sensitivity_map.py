"""The map in the report: every width of every group, the chosen one framed."""

from __future__ import annotations

import re
from typing import Any

from hasten.report.pages import sensitivity_map


def group(name: str, layout: str, at_4: float) -> dict[str, Any]:
    kl = {
        "w4": at_4,
        "w4-asym": at_4 / 2,
        "w5": at_4 / 4,
        "w6": at_4 / 20,
        "w8": at_4 / 1000,
        "w4-g64": at_4 * 2,
    }
    return {"group": name, "kl_at_4_bits": at_4, "kl": kl, "layout": layout}


GROUPS = [
    group("layers.0.qkv", "w6", 0.02),
    group("layers.0.o", "source", 0.0012),
    group("layers.0.gate_up", "w4-g64", 0.0003),
    group("layers.0.down", "w5", 0.004),
    group("head", "w8", 0.0144),
]


def cells(html: str) -> list[tuple[str, str, float]]:
    """(title, text, heat) of every cell."""
    found = re.findall(r'--a:([\d.]+)" title="([^"]*)">([^<]*)</td>', html)
    return [(title, text, float(heat)) for heat, title, text in found]


def test_every_group_has_every_width() -> None:
    titles = [title for title, _, _ in cells(sensitivity_map(GROUPS))]
    for name in ("layers.0.qkv", "layers.0.down", "head"):
        assert [t for t in titles if t.startswith(f"{name} ")] == [
            f"{name} at {width}" for width in ("w4", "w5", "w6", "w8", "kept")
        ]


def test_what_hurts_more_is_darker_and_what_hurts_nothing_is_blank() -> None:
    by_title = {title: (text, heat) for title, text, heat in cells(sensitivity_map(GROUPS))}
    heats = [by_title[f"layers.0.qkv at {width}"][1] for width in ("w4", "w5", "w6", "w8")]
    assert heats == sorted(heats, reverse=True)
    assert by_title["layers.0.qkv at w4"] == ("20", 0.75)
    assert by_title["layers.0.gate_up at w8"] == ("", 0.0)
    assert by_title["head at w5"][0] == "w5 3.6"


def test_the_chosen_width_is_framed() -> None:
    html = sensitivity_map(GROUPS)
    framed = re.findall(r' own" style="[^"]*" title="([^"]*)">([^<]*)<', html)
    assert framed == [
        ("layers.0.qkv at w6", "1.0"),
        ("layers.0.o at kept", "kept"),
        ("layers.0.gate_up at w4", "0.60 g64"),
        ("layers.0.down at w5", "1.0"),
        ("head at w8", "w8 0.01"),
    ]


def test_method_and_error_are_said() -> None:
    html = sensitivity_map(GROUPS, "gptq", 0.23)
    assert "GPTQ" in html
    assert "23% off" in html
    assert "off" not in sensitivity_map(GROUPS).split("</caption>")[0]


def test_plans_from_before_have_one_width() -> None:
    old = [{"group": "layers.0.o", "kl_at_4_bits": 0.01, "layout": "w4"}]
    assert [title for title, _, _ in cells(sensitivity_map(old))] == [
        "layers.0.o at w4",
        "layers.0.o at kept",
    ]


def test_every_row_is_as_wide_as_the_table() -> None:
    html = sensitivity_map(GROUPS)
    widths = []
    for row in re.findall(r"<tr>(.*?)</tr>", html):
        spans = [int(n or 1) for n in re.findall(r'<t[hd](?: scope="\w+")?(?: colspan="(\d+)")?', row)]
        widths.append(sum(spans))
    assert len(set(widths)) == 1
