"""report.html of a search: one file without script, nothing fetched, drawn from plan.json alone.

What a plan does not hold is called unknown, or its chart is left out; nothing is computed here but what
follows from the record by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError
from hasten.report import (
    document,
    facts,
    headings,
    median,
    megabytes,
    number,
    percent,
    share,
    small,
    table,
    text,
    tiles,
    times,
)
from hasten.report.charts import (
    Bar,
    Foretold,
    bars,
    foretold,
    frontier,
    latencies,
    reached,
    roof_of,
    roofline,
)
from hasten.report.pages import sensitivity_map

Record = Mapping[str, Any]

_GOALS = {
    "latency": "The fastest answer",
    "throughput": "The most tokens of a batch",
    "memory": "The least memory",
    "cost": "The lowest cost",
    "energy": "The least energy",
}


def optimized_page(plan: Record) -> str:
    """The report of a search.

    Args:
        plan: what plan.json holds, as `hasten.optimize` writes it. Every string in it is escaped.
    """
    search = plan["search"]
    name = text(plan["model"])
    parts = [
        _head(plan, search),
        _part("What was asked", facts(_asked(plan, search))),
        _part("What was chosen, and why", _chosen(plan, search)),
        _part("Speed against quality", frontier(search), _key(search)),
        _part("Where the speed comes from", *_waterfall(search)),
        _part("How near to what the machine can do", *_roofline(plan, search)),
        _part("Predicted and measured", *_foretold(plan, search)),
        _part("How long tokens take", *_latencies(search)),
        _part("Memory", *_memory(plan, search)),
        _part("Cost and energy", facts(_costs(plan, search))),
        _part("Everything that was tried", _table(search), _losers(search)),
        sensitivity_map(
            plan.get("sensitivity") or [],
            plan.get("sensitivity_method", "rtn"),
            plan.get("sensitivity_error"),
        ),
        _part("How this was measured", _facts(plan, search)),
        _part("How to repeat it", facts(_repeated(plan, search))),
    ]
    return document(f"{name}: {text(search['chosen'])}", "".join(parts))


def _part(title: str, figure: str, *more: str) -> str:
    """A section; none where its figure is empty."""
    return f"<section><h2>{title}</h2>{figure}{''.join(more)}</section>" if figure else ""


def _key(search: Record) -> str:
    peers = (
        '<span><i class="k-peer"></i>another engine, of a run of its own</span>'
        if search.get("peers")
        else ""
    )
    return (
        '<p class="key"><span><i class="round k-pick"></i>chosen</span>'
        '<span><i class="round k-good"></i>within the budget</span>'
        f'<span><i class="turned k-bad"></i>not within the budget</span>{peers}'
        "Hollow: not timed, speed predicted from its bytes.</p>"
    )


def _head(plan: Record, search: Record) -> str:
    verdict, speedup = plan["verdict"], search["speedup"]
    chosen = _picked(search)
    measured = chosen["measurement"]
    figures = [
        (times(speedup["decode"]), f"decode: {number(median(measured, 'decode_tok_per_s'))} tok/s"),
        (times(speedup["prefill"]), f"prefill: {number(median(measured, 'prefill_tok_per_s'), 0)} tok/s"),
        (times(speedup["ttft"]), f"first token: {number(median(measured, 'ttft_ms'), 0)} ms"),
        (percent(verdict["ppl_increase"]), f"perplexity; 95 %: {_interval(verdict)}"),
        (
            number(chosen["bits_per_weight"], 2),
            f"bits a weight: {megabytes(chosen['weight_bytes'])} read a token",
        ),
    ]
    limit = percent(plan["budget"]["max_ppl_increase"])
    return (
        f"<h1>{text(plan['model'])} as {text(search['chosen'])}</h1>"
        f'<p class="lead">{text(_GOALS[plan["goal"]])} within a perplexity increase of {limit}, on '
        f"{text(plan['machine']['cpu'])}. Factors are against the same model in bf16 on the same engine.</p>"
        f"{tiles(figures)}"
    )


_COLUMNS = (
    "recipe",
    "verdict",
    "bits",
    "MB a token",
    "decode tok/s",
    "prefill tok/s",
    "first token ms",
    "perplexity",
    "mean KL",
    "p99 KL",
    "same top token",
    "tokens",
)


def _table(search: Record) -> str:
    start = search["baseline"]
    first = _row("bf16 (start)", 16.0, start["measurement"])
    rows = "".join(
        _row(**{k: c[k] for k in _ROW}, chosen=c["recipe"] == search["chosen"]) for c in search["candidates"]
    )
    about = (
        "Medians. A recipe out of the budget is not timed. One that clearly fails is judged on fewer tokens. "
        f"Perplexity of the start: {number(start['ppl'], 3)}."
    )
    return table("Recipes tried", about, headings(_COLUMNS), first + rows)


_ROW = ("recipe", "bits_per_weight", "measurement", "verdict", "weight_bytes")


def _row(
    recipe: str,
    bits_per_weight: float | None,
    measurement: Record | None,
    verdict: Record | None = None,
    weight_bytes: int | None = None,
    chosen: bool = False,
) -> str:
    size = weight_bytes or (measurement or {}).get("weight_bytes")
    status = "" if verdict is None else text(verdict["status"])
    cells = [
        f'<span class="{status}">{status}</span>',
        number(bits_per_weight, 2),
        number(size / 1e6 if size else None, 0),
        *(_timed(measurement, figure) for figure in ("decode_tok_per_s", "prefill_tok_per_s", "ttft_ms")),
    ]
    if verdict is None:
        cells += [""] * 5
    else:
        cells += [
            f'{percent(verdict["ppl_increase"])}<br><span class="small">{_interval(verdict)}</span>',
            small(verdict["kl_mean"]),
            small(verdict["kl_p99"]),
            share(verdict["top1_agreement"]),
            number(verdict["tokens"], 0),
        ]
    mark = ' class="chosen"' if chosen else ""
    return (
        f'<tr{mark}><th scope="row">{text(recipe)}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    )


def _interval(verdict: Record) -> str:
    return f"{percent(verdict['ppl_increase_low'])} to {percent(verdict['ppl_increase_high'])}"


def _timed(measured: Record | None, figure: str) -> str:
    if measured is None:
        return '<span class="small">not timed</span>'
    stat = measured[figure]
    digits = 0 if stat["median"] >= 1000 else 1
    spread = f"{number(stat['p10'], digits)} to {number(stat['p90'], digits)}"
    return f'<span title="p10 to p90: {spread}, n {stat["n"]}">{number(stat["median"], digits)}</span>'


def _losers(search: Record) -> str:
    """Every recipe that was not chosen, and every engine, with its reason."""
    others = [c for c in search["candidates"] if c["recipe"] != search["chosen"]]
    others += search.get("untried") or []
    said = [(text(c["recipe"]), text(c["because"])) for c in others]
    said += [(text(peer["name"]), text(peer.get("because"))) for peer in search.get("peers") or ()]
    return f"<h3>Why not the others</h3>{facts(said, 'reasons')}" if said else ""


def _ceilings(machine: Record, measured: Record) -> list[tuple[str, str]]:
    """What was measured of what computed, and how near the chosen recipe comes."""
    read = share(measured["fraction_of_read_ceiling"])
    gpus = machine.get("accelerators") or []
    if measured.get("device") == "cuda" and gpus:
        gpu, compute = gpus[0], share(measured["fraction_of_gpu_ceiling"])
        return [
            ("GPU", f"{text(gpu['name'])}, {gpu['memory_bytes'] / 2**30:.1f} GiB"),
            (
                "Ceilings",
                f"copy {number(gpu['copy_gb_per_s'], 0)} GB/s, bf16 {number(gpu['bf16_tflops'], 0)} TFLOP/s, "
                f"fp8 {number(gpu['fp8_tflops'], 0)} TFLOP/s, measured",
            ),
            ("Of the ceilings", f"decode {read} of the copy's rate, prefill {compute} of the products'"),
        ]
    return [
        (
            "Ceilings",
            f"read {number(machine['read_gb_per_s'])} GB/s, int8 {number(machine['int8_tops'], 2)} TOPS, "
            f"bf16 {number(machine['bf16_tflops'], 2)} TFLOP/s, measured",
        ),
        (
            "Of the ceilings",
            f"decode {read} of the read rate, prefill {share(measured['fraction_of_int8_ceiling'])} "
            "of the int8 rate",
        ),
    ]


def _facts(plan: Record, search: Record) -> str:
    machine, judged = plan["machine"], plan["text"]
    measured = plan["measurement"] or search["baseline"]["measurement"]
    workload = measured["workload"]
    memory = machine["memory_bytes"]
    found = [
        (
            "Machine",
            f"{text(machine['cpu'])}, {machine['cores']} cores, {', '.join(map(text, machine['isa']))}",
        ),
        ("Memory", text(None) if memory is None else f"{memory / 2**30:.1f} GiB"),
        *_ceilings(machine, measured),
        (
            "Speed",
            f"{workload['prompt']} tokens in, {workload['output']} out, {workload['batch']} at once, "
            f"{measured['threads']} threads; medians of {plan['runs']} runs after a warm-up, in one process",
        ),
        (
            "Quality",
            f"up to {number(judged['tokens'], 0)} tokens of {text(judged['name'])} in windows of 512, each "
            "from an empty cache; the source in bf16 on the same engine reads the same. KL over the whole "
            "vocabulary. Interval: paired bootstrap over blocks of 256 tokens, 95 %, seeded. A recipe passes "
            "when the whole interval is within the budget. Widths were chosen on other text than judged.",
        ),
        ("Text", f"sha256 <code>{text(judged['sha256'])}</code>"),
        (
            "Versions",
            ", ".join(f"{text(k)} {text(v)}" for k, v in plan["versions"].items())
            + f"; {text(machine['os'])}",
        ),
    ]
    return facts(found)


_LIMITS: Mapping[str, Callable[[Any], str]] = {
    "max_ppl_increase": lambda value: f"perplexity may rise by {percent(value)}",
    "max_kl": lambda value: f"KL divergence at most {small(value)} nats",
    "min_tasks": lambda value: ", ".join(f"{task}: at least {share:.3g} right" for task, share in value),
    "ttft_ms": lambda value: f"first token within {value:g} ms",
    "tpot_ms": lambda value: f"{value:g} ms a token",
    "memory_bytes": lambda value: f"{megabytes(value)} of memory",
    "rate": lambda value: f"{value:g} requests a second",
}
"""What may be asked of a search beside its goal, in words."""


def _picked(search: Record) -> Record:
    found: Record = next(c for c in search["candidates"] if c["recipe"] == search["chosen"])
    return found


def _asked(plan: Record, search: Record) -> Iterator[tuple[str, str]]:
    yield "Goal", text(_GOALS[plan["goal"]])
    aims = _aims(plan)
    asked = {**plan["budget"], **aims}
    limits = [show(asked[name]) for name, show in _LIMITS.items() if asked.get(name) is not None]
    yield "Within", "; ".join(limits)
    if aims.get("traffic"):
        yield "Workload", f"{text(aims['traffic']['name'])}: {text(aims['traffic']['about'])}"
    yield "Load", _load(search["baseline"]["measurement"]["workload"])
    yield "Judged on", f"{text(plan['text']['name'])}, up to {number(plan['text']['tokens'], 0)} tokens"
    yield (
        "On",
        f"{text(plan['machine']['cpu'])}, {text(search['baseline']['measurement'].get('device', 'cpu'))}",
    )


def _load(workload: Record) -> str:
    together = "one request at a time" if workload["batch"] == 1 else f"{workload['batch']} at once"
    shared = workload.get("shared")
    known = f", {number(shared, 0)} of them the same in all" if shared else ""
    return (
        f"{number(workload['prompt'], 0)} tokens in{known}, {number(workload['output'], 0)} out, {together}"
    )


def _chosen(plan: Record, search: Record) -> str:
    """In words: the winner, what it was better than, and what the search learned on the way."""
    candidate = _picked(search)
    passing = [c for c in search["candidates"] if (c["verdict"] or {}).get("status") == "pass"]
    said = (
        f"<p><b>{text(search['chosen'])}</b>, {number(candidate['bits_per_weight'], 2)} bits a weight. "
        f"{len(search['candidates'])} recipes were tried and {len(passing)} kept the quality budget"
    )
    untried, spent = search.get("untried"), plan.get("seconds")
    said += f"; {len(untried)} more could not win and were not tried" if untried else ""
    said += "." if spent is None else f". The search took {spent / 60:.1f} minutes."
    said += "</p>"
    reasons = [candidate["because"], *plan["because"][1:]]
    return said + "".join(f"<p>{text(reason)}</p>" for reason in reasons)


# Where the speed comes from ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """A request's time taken apart, milliseconds.

    Algorithm: the recipe's fewer bytes and operations, at the rate that the start reached. Hardware: the
    same work at another rate, by integer instructions and kernels that keep memory busier. Cache: work that
    was done before.
    """

    start_ms: float
    after_algorithm_ms: float
    end_ms: float

    @property
    def algorithm(self) -> float:
        return self.start_ms / self.after_algorithm_ms

    @property
    def hardware(self) -> float:
        return self.after_algorithm_ms / self.end_ms

    @property
    def whole(self) -> float:
        return self.start_ms / self.end_ms


def factors(start: Record, chosen: Record) -> Factors | None:
    """How much of a speed-up is whose; None: how much the two read is unknown."""
    less_read = _shrunk("decode_bytes", start, chosen) or _shrunk("weight_bytes", start, chosen)
    if less_read is None:
        return None
    less_computed = _shrunk("prompt_ops", start, chosen) or 1.0
    steps = start["workload"]["output"] - 1
    tpot, ttft = start["tpot_ms"]["median"], start["ttft_ms"]["median"]
    return Factors(
        start_ms=_request_ms(start),
        after_algorithm_ms=ttft * less_computed + steps * tpot * less_read,
        end_ms=_request_ms(chosen),
    )


def _shrunk(figure: str, start: Record, chosen: Record) -> float | None:
    """How much of something is left; None: one of them does not know."""
    before, after = start.get(figure), chosen.get(figure)
    return float(after / before) if before and after else None


def _request_ms(measured: Record) -> float:
    steps = measured["workload"]["output"] - 1
    return float(measured["ttft_ms"]["median"] + steps * measured["tpot_ms"]["median"])


def _waterfall(search: Record) -> tuple[str, str]:
    start, chosen = search["baseline"]["measurement"], _picked(search)["measurement"]
    found = None if chosen is None else factors(start, chosen)
    if found is None:
        return "", ""
    middle, end = found.after_algorithm_ms, found.end_ms
    rows = [
        Bar("start: bf16", _ms(found.start_ms), 0.0, found.start_ms, "before"),
        Bar("algorithm: fewer bytes", _less(middle - found.start_ms), middle, found.start_ms, "algorithm"),
        Bar("hardware: a higher rate", _less(end - middle), middle, end, "hardware"),
        Bar("cache: nothing was kept", _less(0.0), end, end, "cache"),
        Bar(str(search["chosen"]), _ms(end), 0.0, end, "chosen", strong=True),
    ]
    about = (
        f"<p>A request of {_load(chosen['workload'])} became {times(found.whole)} as fast: "
        f"{times(found.algorithm)} by algorithm &middot; {times(found.hardware)} by hardware &middot; "
        "1&times; by cache. Algorithm is what the recipe spares, at the rate that the start reached; "
        "hardware is the rate, by integer instructions and kernels that read faster; while recipes are timed "
        "nothing is cached and nothing drafted, so that what they are themselves is seen.</p>"
    )
    return bars("waterfall", "The time of a request, by what made it shorter", rows, "milliseconds"), about


def _ms(value: float) -> str:
    return f"{value:,.0f} ms"


def _less(value: float) -> str:
    return f"{value:+,.0f} ms"


# How near to the ceilings -----------------------------------------------------------------------------------


def _roofline(plan: Record, search: Record) -> tuple[str, str]:
    chosen = str(search["chosen"])
    timed = [("bf16", search["baseline"]["measurement"])]
    timed += [(c["recipe"], c["measurement"]) for c in search["candidates"] if c["measurement"] is not None]
    points = [p for name, measured in timed for p in reached(str(name), measured, strong=name == chosen)]
    bytes_per_s, ceilings = roof_of(plan["machine"], search["baseline"]["measurement"].get("device", "cpu"))
    figure = roofline(bytes_per_s, ceilings, points)
    about = (
        '<p class="key"><span><i class="round k-pick"></i>answers of the chosen recipe</span>'
        '<span><i class="k-pick"></i>its prompts</span>Hollow: the other recipes. Under the slope a run is '
        "bound by reading memory, under a flat line by arithmetic; the lines were measured here.</p>"
    )
    return figure, about


# Predictions, distributions, memory, money ------------------------------------------------------------------


_PREDICTED = {
    "decode_tok_per_s": ("answers", "tok/s"),
    "prefill_tok_per_s": ("prompts", "tok/s"),
    "ttft_ms": ("first token", "ms"),
}


def _foretold(plan: Record, search: Record) -> tuple[str, str]:
    rows = []
    for candidate in search["candidates"]:
        own = plan["estimate"] if candidate["recipe"] == search["chosen"] else None
        guess, found = candidate.get("estimate") or own, candidate["measurement"]
        if guess is None or found is None:
            continue
        for figure, (name, unit) in _PREDICTED.items():
            stat, strong = found[figure], candidate["recipe"] == search["chosen"]
            measured = stat["median"], stat["p10"], stat["p90"]
            rows.append(Foretold(f"{candidate['recipe']}, {name}", unit, guess[figure], *measured, strong))
    about = (
        '<p class="key"><span><i class="turned k-pick-line"></i>predicted before it ran</span>'
        '<span><i class="round k-good"></i>measured, 10 to 90 % of the rounds</span></p>'
    )
    return foretold("foretold", "Predicted and measured", rows), about


def _latencies(search: Record) -> tuple[str, str]:
    timed = [("bf16 (start)", search["baseline"]["measurement"], False)]
    for candidate in search["candidates"]:
        if candidate["measurement"] is not None:
            strong = candidate["recipe"] == search["chosen"]
            timed.append((str(candidate["recipe"]), candidate["measurement"], strong))
    return latencies(timed)


def _memory(plan: Record, search: Record) -> tuple[str, str]:
    rows = []
    for candidate in search["candidates"]:
        read = candidate["weight_bytes"]
        stored = candidate.get("stored_bytes") or read
        strong = candidate["recipe"] == search["chosen"]
        peak = candidate.get("memory_bytes")
        whole = "" if peak is None else f"; {peak / 1e6:,.0f} in all"
        said = f"{stored / 1e6:,.0f} MB, {read / 1e6:,.0f} read a token{whole}"
        kind = "chosen" if strong else "before"
        rows.append(Bar(str(candidate["recipe"]), said, 0.0, stored / 1e6, kind, strong))
    peak = (plan["measurement"] or {}).get("peak_rss_bytes")
    about = (
        "<p>Weights in memory, the embedding table included. Keys and values come on top: they grow with the "
        "context. In all: what the whole process takes at most on this load, predicted. The search itself, "
        f"which holds two models at a time, took {megabytes(peak)}.</p>"
    )
    return bars("memory", "Memory of the weights", rows, "MB of weights"), about


def _costs(plan: Record, search: Record) -> Iterator[tuple[str, str]]:
    measured, start = plan["measurement"], search["baseline"]["measurement"]
    price = _aims(plan).get("price_per_hour")
    if price is None or measured is None:
        yield "Cost", "unknown: no price of the machine was given"
    else:
        ours, theirs = (_million(one, price) for one in (measured, start))
        yield (
            "Cost",
            (
                f"{ours:.3g} a million tokens of answers, {theirs:.3g} in bf16: at {price:g} an hour, the "
                "machine busy all the time with this load"
            ),
        )
    joules = (measured or {}).get("joules_per_token")
    if joules is None:
        yield "Energy", "unknown: no counter of this machine could be read"
    else:
        before = start.get("joules_per_token")
        than = "" if before is None else f" ({before:.2g} J in bf16)"
        yield "Energy", f"{joules:.2g} J a token{than}, {joules / 3.6:.2g} kWh a million tokens"


def _million(measured: Record, price: float) -> float:
    """What a million tokens cost: whole requests, prompts included, back to back."""
    work = measured["workload"]
    seconds = measured["ttft_ms"]["median"] / 1e3
    seconds += work["batch"] * (work["output"] - 1) / measured["decode_tok_per_s"]["median"]
    return float(price / 3600 * seconds / (work["batch"] * work["output"]) * 1e6)


def _aims(plan: Record) -> Record:
    """Everything that was asked; of older plans, nothing beside the budget and the goal."""
    found: Record = plan.get("aims") or {}
    return found


def _repeated(plan: Record, search: Record) -> Iterator[tuple[str, str]]:
    options, budget = plan["options"], plan["budget"]
    words = [f"hasten optimize {plan['model']}", f"--max-ppl-increase {100 * budget['max_ppl_increase']:g}%"]
    words += [f"--for {plan['goal']}", f"--tokens {plan['text']['tokens']}", f"--runs {plan['runs']}"]
    words += [f"--threads {options['threads']}"] if options.get("threads") else []
    words += [f"--device {options['device']}"] if options.get("device", "cpu") != "cpu" else []
    yield "The search", f"<code>{text(plan.get('command') or ' '.join(words))}</code>"
    yield "This report", f"<code>hasten report {text(search['artifact'])}</code>"
    yield "Its speed again", f"<code>hasten bench {text(search['artifact'])} --json</code>"
    yield "Its quality again", f"<code>hasten eval {text(search['artifact'])} --json</code>"
    yield "Use it", f'<code>hasten generate {text(search["artifact"])} -p "What is a mutex?"</code>'
    for file in (plan.get("source") or {}).get("files", ()):
        yield "Source", f"{text(file['path'])}, sha256 <code>{text(file['sha256'])}</code>"


def with_peers(plan: Record, bench: Record, judged: Mapping[str, Record]) -> Record:
    """A plan with other engines beside its recipes.

    Args:
        plan: of a search.
        bench: what `hasten bench --against ENGINE --json` printed of the same load on the same machine.
        judged: engine -> what `hasten eval --json` printed of its file.

    Raises:
        UsageError: another load, machine or text, or an engine that was not timed.
    """
    search = plan["search"]
    peers = {one["name"]: one for one in bench["peers"]}
    start = search["baseline"]["measurement"]["workload"]
    pairs = [("load", start, bench["workload"]), ("machine", plan["machine"]["cpu"], bench["machine"]["cpu"])]
    pairs += [("text", plan["text"]["sha256"], one["text"]["sha256"]) for one in judged.values()]
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise UsageError(
                f"the {what} differs: the search had {ours}, the other result has {theirs}",
                hint=f"measure the engines with the {what} of the search",
            )
    unknown = [name for name in judged if name not in peers]
    if unknown:
        raise UsageError(f"{unknown[0]} was not timed", hint=f"engines that were: {', '.join(peers)}")
    found = [_peer(bench, peers[name], judged.get(name)) for name in peers]
    return {**plan, "search": {**search, "peers": [*(search.get("peers") or ()), *found]}}


def _peer(bench: Record, entry: Record, verdict: Record | None) -> Record:
    ratio = bench["ratios"][entry["name"]]
    low, high = ratio["decode_interval"]
    because = (
        f"{bench['subject']['name']} decodes {ratio['decode']:.2f} times as fast as this ({low:.2f} to "
        f"{high:.2f}), both measured in turn; "
    )
    because += (
        "how near this is to the source was not judged."
        if verdict is None
        else f"this is {verdict['kl_mean']:.2g} nats from the source."
    )
    return {"name": entry["name"], "measurement": entry, "verdict": verdict, "because": because}
