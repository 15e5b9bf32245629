"""What a record of `benchmarks/results` says, as text and tables: the pages of figures are made of these.

A figure that a record does not hold is `unknown`, never a guess. A goal that was missed, or not decided, is
shown as such in every table that it stands in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FOLDERS = re.compile(r"(?<![\w./])/(?:[\w.+-]+/)+")
UNKNOWN = "unknown"
Record = Mapping[str, Any]


def read(name: str) -> dict[str, Any]:
    """The record of that name, without ending."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def names() -> list[str]:
    """All records, in the order of the alphabet."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def figure(value: float | None) -> str:
    """Three digits, or all before the point: 0.0969, 98.6, 1,390; less than 0.0001 as 2.9e-9."""
    if value is None:
        return UNKNOWN
    if value == int(value) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return re.sub(r"e-0?", "e-", f"{value:.2g}")
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{places}f}"


def percent(share: float | None, *, signed: bool = True) -> str:
    """A share of one in percent: `+12.0 %`."""
    if share is None:
        return UNKNOWN
    if not signed:
        return f"{round(share * 100, 1):g} %"
    text = f"{share * 100:+.1f}" if abs(share) >= 0.0995 else f"{share * 100:+.2f}"
    return text.replace("-0.00", "0.00").replace("+0.00", "0.00") + " %"


def spread(rounds: Mapping[str, float] | None) -> str:
    """A median, and the 10th and 90th percentile of the rounds: `129 (126 to 131)`."""
    if rounds is None:
        return UNKNOWN
    return f"{figure(rounds['median'])} ({figure(rounds['p10'])} to {figure(rounds['p90'])})"


def interval(ratio: Mapping[str, float]) -> str:
    """A ratio with its interval: `2.31 [2.24, 2.35]`."""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def ratio_of(record: Record, peer: str, what: str) -> str:
    """Ours over a peer's, of a comparison of engines, with its interval."""
    ratios = record["ratios"][peer]
    low, high = ratios[f"{what}_interval"]
    return interval({"median": ratios[what], "low": low, "high": high})


def engine(run: Mapping[str, Any]) -> str:
    """An engine of a comparison, with its version."""
    title = {"openvino": "OpenVINO GenAI"}.get(run["engine"], run["engine"])
    return f"{title} {run['version'].split('-')[0]}"


def each(values: Sequence[float]) -> str:
    """Runs one by one: the middle one, the least and the most."""
    middle = sorted(values)[len(values) // 2] if len(values) % 2 else sum(sorted(values)[_mid(values)]) / 2
    return f"{figure(middle)} ({figure(min(values))} to {figure(max(values))})"


def _mid(values: Sequence[float]) -> slice:
    return slice(len(values) // 2 - 1, len(values) // 2 + 1)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def machine(record: Record) -> str:
    """The machine in words: processor, instruction sets, cores; or the GPU.

    Virtual machines call every EPYC "AMD EPYC". The sizes of their first-level data caches and instruction
    sets tell generations apart: 48 KB is Zen 5; 32 KB is Zen 4 with AVX-512 and Zen 3 or older without.
    """
    said = record.get("machine", record.get("device"))
    if not isinstance(said, Mapping):
        return str(said or UNKNOWN)
    cpu = re.sub(r"\(R\)| Processor", "", said["cpu"])
    wide = "avx512" in said["isa"]
    if "EPYC" in cpu:
        cpu += ", Zen 5" if said["l1d_bytes"] > 40_000 else ", Zen 4" if wide else ", Zen 3 or older"
    best = "AMX" if "amx" in said["isa"] else "AVX-512" if wide else "AVX2"
    return f"{cpu}, {best}, {said['cores']} cores"


def command(record: Record) -> str:
    """The command line, without folders of the machine that it ran on; empty where the record has none."""
    said = FOLDERS.sub("", record.get("command", ""))
    first = said.split(" ")[0]
    if first.endswith(".py") and not said.startswith("python"):
        said = "python benchmarks/" + said
    return said


def about(name: str, record: Record, made_by: str = "") -> str:
    """Where a table comes from, in one line: the record, the machine, the command, the commit and the day."""
    said = [f"Record `benchmarks/results/{name}.json`", machine(record)]
    line = command(record) or made_by
    if line:
        said.append(f"`{line}`")
    if "date" in record:
        said.append(f"{record['date']}, commit `{record['commit'][:7]}`")
    return "*" + "; ".join(part for part in said if part != UNKNOWN) + ".*\n"


@dataclass(frozen=True)
class Goal:
    """One figure of a record and what it had to reach."""

    name: str
    shown: str
    limit: str
    verdict: str
    rounds: str  # how many, and how many of them another process disturbed
    commit: str = ""  # where rows of one record are of several

    @property
    def reached(self) -> bool:
        """Reached, or there was nothing to reach."""
        return self.verdict in ("reached", BY_MEDIAN, "no goal")


BY_MEDIAN = "reached by the median"
VERDICTS = {"PASS": "reached", "MISS": "**missed**", "UNDECIDED": "**undecided**", "-": "no goal"}


def goals(record: Record) -> list[Goal]:
    """The bars of a record, whichever script wrote them."""
    known = dict(_intervals(record))
    return [_goal(bar, known.get(bar["name"])) for bar in record.get("bars", ())]


def _intervals(record: Record) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Bar -> the ratio with its interval, of records that keep the two apart."""
    details = record.get("details", {})
    for name, one in details.items():
        ratios = one.get("ratios", {}) if isinstance(one, Mapping) else {}
        for peer, ratio in ratios.items():
            for what in ("decode", "prefill"):
                low, high = ratio[f"{what}_interval"]
                n = one["subject"][f"{what}_tok_per_s"]["n"]
                median = ratio[what]
                yield f"{name} / {peer}: {what}", {"median": median, "low": low, "high": high, "n": n}
        if isinstance(one, Mapping) and "measurements" in one:
            yield (
                next(bar["name"] for bar in record["bars"] if bar["name"].startswith(f"{name}:")),
                one["ratio"],
            )
    for name, ratio in details.get("speed_ratios", {}).items():
        pair, _, case = name.rpartition(", ")
        yield f"8 chats, {case}: {pair}: tokens a second", ratio
    if "budget" in details:
        yield "mix:1%: decode over uniform int8", details["budget"]["ratio"]
    if record.get("benchmark") == "serving-zero-hit":
        yield record["bars"][0]["name"], details["ratio"]


def _goal(bar: Mapping[str, Any], known: Mapping[str, float] | None) -> Goal:
    ratio = bar.get("ratio", known)
    value = ratio["median"] if ratio else bar.get("figure", bar.get("value"))
    limit, passed = bar.get("limit", bar.get("bar")), bar.get("passed", bar.get("pass"))
    unit = "x" if ratio and (bar["unit"] == "tok/s" or bar["name"].endswith("new / old")) else bar["unit"]
    shown = _with_unit(interval(ratio) if ratio else figure(value), unit) if value is not None else UNKNOWN
    least = ""
    if limit is not None:
        sign = (
            ""
            if value is None
            else "at least "
            if bar.get("at_least", (value >= limit) == passed)
            else "at most "
        )
        least = _with_unit(f"{sign}{limit:,g}", unit)
    rounds = f"{ratio['n']}" if ratio else ""
    if bar.get("disturbed"):
        rounds += f", {bar['disturbed']} disturbed"
    return Goal(
        bar["name"].strip(), shown, least, _verdict(bar, ratio, limit), rounds, bar.get("commit", "")[:7]
    )


def _verdict(bar: Mapping[str, Any], ratio: Mapping[str, float] | None, limit: float | None) -> str:
    passed = bar.get("passed", bar.get("pass"))
    if limit is None:
        return "no goal"
    if not ratio and bar.get("figure", bar.get("value")) is None:
        return "**not measured**" + (f": {bar['why']}" if "why" in bar else "")
    if "verdict" in bar:
        return VERDICTS[bar["verdict"]]
    if passed and ratio and ratio["low"] < limit < ratio["high"]:
        return BY_MEDIAN
    return VERDICTS["PASS" if passed else "MISS"]


def _with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}".strip()


def goals_table(record: Record) -> str:
    """The bars of a record as a table."""
    found = goals(record)
    columns = {
        "what": [goal.name for goal in found],
        "figure": [goal.shown for goal in found],
        "rounds": [goal.rounds for goal in found],
        "goal": [goal.limit for goal in found],
        "verdict": [goal.verdict for goal in found],
        "commit": [goal.commit for goal in found],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return table(list(shown), list(zip(*shown.values(), strict=True)))


def quality(verdict: Mapping[str, Any]) -> tuple[str, str, str]:
    """(mean KL divergence in nats, perplexity with its interval, the same likeliest token) of a judgement."""
    low, high = verdict["ppl_increase_low"], verdict["ppl_increase_high"]
    increase = f"{percent(verdict['ppl_increase'])} [{percent(low)[:-2]}, {percent(high)[:-2]}]"
    return figure(verdict["kl_mean"]), increase, f"{verdict['top1_agreement'] * 100:.1f} %"
