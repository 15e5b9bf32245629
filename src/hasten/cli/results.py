"""`hasten compare` and `hasten report`: what can be made of results that are there."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from hasten.bench.figures import (
    METRICS,
    Change,
    Limit,
    Metric,
    Summary,
    Verdict,
    change,
    interval,
    summary_named,
)
from hasten.cache.reading import read_text
from hasten.cli.console import emit, note, print_table
from hasten.cli.flags import JsonOption, argument, optional
from hasten.core import SCHEMA_VERSION
from hasten.errors import BudgetError, UsageError

Record = Mapping[str, Any]

RESULT = (
    "A result of `hasten bench --json`, `hasten optimize --json`, or a plan.json; FILE#ENGINE for another "
    "engine or recipe of it; or a folder of results, one a run."
)
LIMIT = (
    'What must not be, repeatable: "tpot_ms.p50 > 5%" (rose by more than 5 %), "ttft_ms.p95 > 300" (is above '
    '300 ms), "goodput < 99%".'
)
MAKE_ONE = "make one: hasten bench MODEL --json > FILE"
STRICT = "A limit that the rounds cannot decide fails too."


def compare(
    before: Annotated[str, argument("A", RESULT)],
    after: Annotated[str, argument("B", "The same, later or changed.")],
    fail_if: Annotated[list[str] | None, optional("--fail-if", "LIMIT", LIMIT)] = None,
    strict: Annotated[bool, optional("--strict", None, STRICT)] = False,
    json: JsonOption = False,
) -> None:
    """Compare two results, and fail where a figure crosses a limit.

    Every change has a 95 % interval over rounds; where the rounds of both sides belong together (two engines
    of one file, folders with the same file names, loads with the same arrivals) it is taken over pairs. Exit
    codes: 0 no limit is crossed, 3 one is (with --strict also: undecided), 2 the results cannot be compared
    or a limit cannot be read.
    """
    limits = [Limit.parse(text) for text in fail_if or ()]
    one, other = read_result(before), read_result(after)
    found = Comparison.of(one, other, limits)
    if json:
        emit(found.document())
    else:
        _print(found)
    _judge(found, strict)


# Figures of a result ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One figure of a result. `values` are of its rounds or requests; one value: that is all there is."""

    values: tuple[float, ...] = ()
    known: Mapping[str, float] = field(default_factory=dict)  # summaries, where the rounds were not kept
    own: tuple[float, float] | None = None  # its interval, where it came with one

    def at(self, name: str) -> float | None:
        """A summary of it; None: the rounds that it takes were not kept."""
        summary = summary_named(name)
        if self.values and summary is not None:
            return summary(self.values)
        return self.known.get({"median": "p50"}.get(name, name))

    def spread(self, summary: Summary) -> tuple[float, float] | None:
        return self.own or interval(self.values, summary)


@dataclass(frozen=True)
class Result:
    """One side of a comparison."""

    name: str
    conditions: Mapping[str, Any]  # what must agree for a comparison to mean something
    figures: Mapping[str, Figure]
    pairs: tuple[Any, ...] = ()  # equal on both sides: their rounds belong together; empty: they do not


def read_result(place: str) -> Result:
    """A result by what a user names.

    Raises:
        UsageError: there is none, it is of another kind, or it lacks the engine that was named.
    """
    path, _, engine = place.partition("#")
    folder = Path(path)
    if folder.is_dir() and not (folder / "plan.json").is_file():
        return _several(folder, engine)
    file = folder / "plan.json" if folder.is_dir() else folder
    return _result(file, read_record(file), engine)


def read_record(file: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        UsageError: it cannot be read, or is no JSON object.
    """
    wrong, found = "", None
    try:
        found = json_module.loads(read_text(file), parse_constant=_no_number)
    except (OSError, UnicodeDecodeError) as error:
        wrong = f"cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}"
    except (ValueError, RecursionError) as error:
        wrong = f"is not JSON: {error}"
    if not isinstance(found, dict):
        raise UsageError(f"{file} {wrong or 'holds no JSON object'}", hint=MAKE_ONE)
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _result(file: Path, record: Record, engine: str) -> Result:
    try:
        for key, reader in _READERS.items():
            if key in record:
                return _checked(reader(file, record, engine))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{file} is no whole result: {type(error).__name__}: {error}", hint="make it again"
        ) from None
    raise UsageError(
        f"{file} is no result of bench or optimize: it has {', '.join(sorted(record)[:5]) or 'no keys'}",
        hint=MAKE_ONE,
    )


def _checked(result: Result) -> Result:
    """The result, whose figures are numbers.

    Raises:
        TypeError: one is not.
    """
    for name, figure in result.figures.items():
        for value in (*figure.values, *figure.known.values(), *(figure.own or ())):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is {value!r:.40}")
    return result


def _bench(file: Path, record: Record, engine: str) -> Result:
    entries = {one["name"]: one for one in (record["subject"], *record["peers"])}
    entry = entries[_named(file, engine, list(entries))]
    return Result(
        name=f"{file.name}: {entry['name']}",
        conditions=_conditions(record["machine"], entry),
        figures=_measured(entry),
        pairs=("rounds", str(file.resolve())),
    )


def _search(file: Path, record: Record, engine: str) -> Result:
    """A plan.json, or the document of `optimize --json`."""
    search = record.get("search") or record
    entries = {one["recipe"]: one for one in search["candidates"]}
    start = search["baseline"]
    entries[start["recipe"]] = {"verdict": None, **start}
    entry = entries[_named(file, engine or search["chosen"], list(entries))]
    figures = {} if entry["measurement"] is None else _measured(entry["measurement"])
    return Result(
        name=f"{file.name}: {entry['recipe']}",
        conditions=_conditions(search["machine"], entry["measurement"] or start["measurement"]),
        figures=figures | _judged(entry["verdict"]),
    )


def _load(file: Path, record: Record, engine: str) -> Result:
    from hasten.bench.load import SHARES

    load, requests = record["load"], record["load"]["requests"]
    names = ("ttft_ms", "tpot_ms", "latency_ms")
    timed = {name: tuple(one[name] for one in requests if one[name] is not None) for name in names}
    figures = {name: Figure(values) for name, values in timed.items() if values}
    figures |= {name: Figure(tuple(float(one[key]) for one in requests)) for name, key in SHARES.items()}
    figures["output_tok_per_s"] = Figure((load["output_tok_per_s"],))
    cached = [
        one["cached_tokens"] / one["prompt_tokens"]
        for one in requests
        if one["cached_tokens"] is not None and one["prompt_tokens"]
    ]
    if cached:
        figures["cached"] = Figure(tuple(cached))
    asked = {key: load[key] for key in ("workload", "rate", "seed", "count")}
    conditions = {**_machine(record["machine"]), **asked}
    whole = all(len(values) == len(requests) for values in timed.values())
    return Result(f"{file.name}: {record['model']}", conditions, figures, ("load", whole, *asked.values()))


_READERS: dict[str, Callable[[Path, Record, str], Result]] = {
    "load": _load,
    "subject": _bench,
    "search": _search,
    "candidates": _search,
}


def _named(file: Path, engine: str, there: list[str]) -> str:
    """The entry that was named, whole or by its first part; the first one where none was."""
    if not engine:
        return there[0]
    found = [name for name in there if name == engine or name.partition(":")[0] == engine]
    if not found:
        raise UsageError(
            f"{file} has no engine or recipe {engine!r}", hint=f"take one of it: {file}#{there[0]}"
        )
    return found[0]


def _machine(machine: Record) -> dict[str, Any]:
    return {"cpu": machine["cpu"], "cores": machine["cores"]}


def _conditions(machine: Record, measured: Record) -> dict[str, Any]:
    return {
        **_machine(machine),
        "workload": measured["workload"],
        "threads": measured["threads"],
        "device": measured.get("device", "cpu"),
    }


def _measured(entry: Record) -> dict[str, Figure]:
    """Figures of a Measurement as JSON."""
    found = {}
    for name in ("ttft_ms", "tpot_ms", "decode_tok_per_s", "prefill_tok_per_s"):
        stat = entry[name]
        known = {"p50": stat["median"], "p10": stat["p10"], "p90": stat["p90"]}
        found[name] = Figure(tuple(stat.get("values") or ()), known)
    for name in ("peak_rss_bytes", "weight_bytes"):
        if entry.get(name) is not None:
            found[name] = Figure((float(entry[name]),))
    return found


def _judged(verdict: Record | None) -> dict[str, Figure]:
    if verdict is None:
        return {}
    found = {name: Figure((verdict[name],)) for name in ("kl_mean", "kl_p99", "top1_agreement")}
    own = verdict["ppl_increase_low"], verdict["ppl_increase_high"]
    return {"ppl_increase": Figure((verdict["ppl_increase"],), own=own), **found}


def _several(folder: Path, engine: str) -> Result:
    """A folder of results: each file's figure counts as one round, files of the same name belong together."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UsageError(
            f"{folder} has neither a plan.json nor other results (*.json)",
            hint=f"make one: hasten bench MODEL --json > {folder}/1.json",
        )
    runs = [_result(file, read_record(file), engine) for file in files]
    for file, run in zip(files, runs, strict=True):
        if wrong := _differences(runs[0], run):
            raise UsageError(
                f"{file} is no run of the same as {files[0]}: {wrong[0]}", hint="one folder for each side"
            )
    everywhere = [name for name in runs[0].figures if all(name in run.figures for run in runs)]
    figures = {}
    for name in everywhere:
        each = [run.figures[name].at(METRICS[name].usual) for run in runs]
        figures[name] = Figure(tuple(value for value in each if value is not None))
    name = f"{folder.name}/: {len(runs)} runs"
    return Result(name, runs[0].conditions, figures, ("files", *(file.name for file in files)))


def _differences(one: Result, other: Result) -> list[str]:
    """What was not the same, a sentence each."""
    keys = [*one.conditions, *(key for key in other.conditions if key not in one.conditions)]
    return [
        f"{key}: {_said(one.conditions.get(key))} in one, {_said(other.conditions.get(key))} in the other"
        for key in keys
        if one.conditions.get(key) != other.conditions.get(key)
    ]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return "unknown" if value is None else str(value)


@dataclass(frozen=True)
class Decision:
    """What became of a limit."""

    limit: Limit
    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    why: str = ""  # it is unknown


# The comparison ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One figure on both sides."""

    metric: str
    summary: str
    before: float
    after: float
    change: Change | None  # None: the figure before is 0
    rounds: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Two results side by side."""

    before: Result
    after: Result
    paired: bool
    rows: tuple[Row, ...]
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, before: Result, after: Result, limits: Sequence[Limit]) -> Comparison:
        """Every figure that both have, and every limit decided.

        Raises:
            UsageError: they have no figure in common, or were measured on different workloads.
        """
        if before.conditions.get("workload") != after.conditions.get("workload"):
            first, second = (_said(one.conditions.get("workload")) for one in (before, after))
            raise UsageError(
                f"the workloads differ: {first}; and {second}", hint="measure both on the same workload"
            )
        common = [name for name in METRICS if name in before.figures and name in after.figures]
        if not common:
            raise UsageError(
                f"{before.name} and {after.name} have no figure in common",
                hint="compare two results of the same command",
            )
        paired = bool(before.pairs) and before.pairs == after.pairs
        rows = [_row(name, METRICS[name].usual, before, after, paired) for name in common]
        return cls(
            before,
            after,
            paired,
            tuple(row for row in rows if row is not None),
            tuple(_decide(limit, before, after, paired) for limit in limits),
            tuple(f"{one}: part of a change may be that." for one in _differences(before, after)),
        )

    def document(self) -> dict[str, Any]:
        """The record, as `--json` prints it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "before": self.before.name,
            "after": self.after.name,
            "paired": self.paired,
            "figures": {
                row.metric: {
                    "summary": row.summary,
                    "before": row.before,
                    "after": row.after,
                    "change": row.change and row.change.value,
                    "low": row.change and row.change.low,
                    "high": row.change and row.change.high,
                    "rounds_before": row.rounds[0],
                    "rounds_after": row.rounds[1],
                }
                for row in self.rows
            },
            "limits": [
                {
                    "limit": one.limit.text,
                    "verdict": one.verdict,
                    "value": one.value,
                    "low": one.low,
                    "high": one.high,
                    "why": one.why or None,
                }
                for one in self.decisions
            ],
            "notes": list(self.notes),
        }


def _row(metric: str, summary: str, before: Result, after: Result, paired: bool) -> Row | None:
    one, other = before.figures[metric], after.figures[metric]
    first, second = one.at(summary), other.at(summary)
    if first is None or second is None:
        return None
    rounds = len(one.values), len(other.values)
    return Row(metric, summary, first, second, _change(metric, summary, one, other, paired), rounds)


def _change(metric: str, summary: str, one: Figure, other: Figure, paired: bool) -> Change | None:
    """With an interval where both kept their rounds."""
    is_share, how = METRICS[metric].is_share, summary_named(summary)
    first, second = one.at(summary), other.at(summary)
    assert how is not None and first is not None and second is not None
    if first <= 0 and not is_share:
        return None
    both = paired and len(one.values) == len(other.values)
    if one.values and other.values:
        return change(one.values, other.values, how, paired=both, is_share=is_share)
    return Change(second - first if is_share else second / first - 1, None, None, False)


def _decide(limit: Limit, before: Result, after: Result, paired: bool) -> Decision:
    one, other = before.figures.get(limit.metric), after.figures.get(limit.metric)
    value = None if other is None else other.at(limit.summary)
    if other is None or value is None:
        return _unknown(limit, f"{after.name} has no {limit.metric}.{limit.summary}")
    if not limit.of_change:
        how = summary_named(limit.summary)
        spread = other.spread(how) if how is not None else None
        low, high = spread or (None, None)
        return Decision(limit, limit.decide(value, spread), value, low, high)
    if one is None or one.at(limit.summary) is None:
        return _unknown(limit, f"{before.name} has no {limit.metric}.{limit.summary}")
    found = _change(limit.metric, limit.summary, one, other, paired)
    if found is None:
        return _unknown(limit, f"{limit.metric} of {before.name} is 0")
    spread = None if found.low is None or found.high is None else (found.low, found.high)
    return Decision(limit, limit.decide(found.value, spread), found.value, found.low, found.high)


def _unknown(limit: Limit, why: str) -> Decision:
    return Decision(limit, "unknown", None, None, None, why)


def _judge(found: Comparison, strict: bool) -> None:
    """Ends with exit code 3 where a limit is crossed.

    Raises:
        BudgetError: one is. UsageError: a limit names a figure that a side does not have.
    """
    for one in found.decisions:
        if one.verdict == "unknown":
            raise UsageError(
                f"--fail-if {one.limit.text!r} cannot be decided: {one.why}",
                hint=f"take one of {', '.join(row.metric for row in found.rows)}",
            )
    bad = ("crossed", "undecided") if strict else ("crossed",)
    crossed = [one for one in found.decisions if one.verdict in bad]
    if crossed:
        many = f"{len(crossed)} of {len(found.decisions)} limits: " if len(found.decisions) > 1 else ""
        raise BudgetError(many + "; ".join(_decided(one) for one in crossed))


def _decided(one: Decision) -> str:
    kind = METRICS[one.limit.metric]
    show = _percent if one.limit.of_change else (lambda value: _value(value, kind))
    spread = "" if one.low is None or one.high is None else f" ({show(one.low)} to {show(one.high)})"
    value = "unknown" if one.value is None else show(one.value)
    return f'"{one.limit.text}" is {one.verdict}: {value}{spread}'


def _print(found: Comparison) -> None:
    rows = []
    for row in found.rows:
        kind = METRICS[row.metric]
        name = row.metric if max(row.rounds) < 2 else f"{row.metric}.{row.summary}"
        values = (_value(row.before, kind), _value(row.after, kind))
        rows.append([name, *values, *_shown_change(row.change, kind), _reading(row.change, kind)])
    how = "over pairs of rounds" if found.paired else "each side's rounds for themselves"
    print_table(
        f"A {found.before.name}; B {found.after.name}; intervals {how}",
        ("figure", "A", "B", "change", "95 %", ""),
        rows,
        out=True,
    )
    for text in found.notes:
        note(text)
    for one in found.decisions:
        if one.verdict in ("kept", "undecided"):
            sys.stdout.write(_decided(one) + "\n")
    if any(one.verdict == "undecided" for one in found.decisions):
        note("undecided: the limit lies inside the interval. More rounds narrow it: --runs 15 on both sides")


def _value(value: float, kind: Metric) -> str:
    if kind.is_share or kind.unit == "bytes":
        return f"{100 * value:.2f} %" if kind.is_share else f"{value / 1e6:,.1f} MB"
    digits = 4 if abs(value) < 1 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _shown_change(found: Change | None, kind: Metric) -> tuple[str, str]:
    if found is None:
        return "", ""
    show = (lambda value: f"{100 * value:+.2f} points") if kind.is_share else _percent
    if found.low is None or found.high is None:
        return show(found.value), ""
    return show(found.value), f"{show(found.low)} to {show(found.high)}"


def _reading(found: Change | None, kind: Metric) -> str:
    """A word for it; none where no interval says whether it is more than chance."""
    if found is None or found.low is None or found.high is None:
        return ""
    if found.low <= 0 <= found.high:
        return "no difference shown"
    return "better" if (found.value > 0) == kind.more_is_better else "worse"


# The report -------------------------------------------------------------------------------------------------

RUN = "An artifact, its plan.json, or a result of `hasten optimize --json` or `hasten bench --json`."
PEERS = "Other engines beside a search's recipes: what `hasten bench --against ENGINE --json` printed."
JUDGED = (
    "How near such an engine's file is to the source: what `hasten eval --json` printed of it; repeatable."
)
OUT = "Where the report goes. Default: report.html in the artifact, else NAME.html beside the result."


def report(
    run: Annotated[str, argument("RUN", RUN)],
    peers: Annotated[Path | None, optional("--peers", "FILE", PEERS)] = None,
    judged: Annotated[list[str] | None, optional("--judged", "ENGINE=FILE", JUDGED)] = None,
    out: Annotated[Path | None, optional("--out", "FILE", OUT)] = None,
) -> None:
    """Write the report of a search or a benchmark as one HTML file.

    The file needs no network and no script; it is drawn from the record alone, so the report of an older run
    is made anew with everything that this version can draw of it. What was not measured is unknown there.
    """
    from hasten.cache.store import write_atomic

    folder = Path(run)
    file = folder / "plan.json" if folder.is_dir() else folder
    record: Record = read_record(file)
    if peers is not None:
        record = _with_peers(file, record, peers, judged or [])
    elif judged:
        raise UsageError(
            "--judged rates an engine of --peers, and --peers was not given", hint="add --peers FILE"
        )
    page = _page(file, record)
    place = out or file.with_name("report.html" if file.name == "plan.json" else f"{file.stem}.html")
    sys.stdout.write(f"{write_atomic(place, page.encode())}\n")


def _with_peers(file: Path, record: Record, peers: Path, judged: Sequence[str]) -> Record:
    from hasten.report.optimized import with_peers

    pairs = [one.partition("=") for one in judged]
    if wrong := next((name for name, sign, _ in pairs if not sign), None):
        raise UsageError(f"--judged {wrong} names no file", hint="write --judged llama.cpp:q4_0=FILE")
    verdicts = {name: read_record(Path(place)) for name, _, place in pairs}
    try:
        return with_peers(record, read_record(peers), verdicts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        both = f"{file} and {peers} cannot stand in one report"
        raise UsageError(f"{both}: {type(error).__name__}: {error}", hint=MAKE_ONE) from None


def _page(file: Path, record: Record) -> str:
    from hasten.report.optimized import optimized_page
    from hasten.report.pages import bench_page, compressed_page, load_page

    pages = {"search": optimized_page, "compress": compressed_page, "load": load_page, "subject": bench_page}
    try:
        for key, page in pages.items():
            if key in record:
                return page(record)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(
            f"{file} is no whole result: {type(error).__name__}: {error}", hint="make it again"
        ) from None
    if "candidates" in record:
        raise UsageError(
            f"{file} holds only a part of a search's record", hint=f"hasten report {record.get('artifact')}"
        )
    raise UsageError(
        f"{file} is no result to report: it has {', '.join(sorted(record)[:5]) or 'no keys'}", hint=MAKE_ONE
    )
