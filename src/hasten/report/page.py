"""report.html: one file, no script and nothing fetched, drawn from the record in plan.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.report.figures import median, megabytes, number, percent, share, small, text, times
from hasten.report.frontier import frontier
from hasten.report.sensitivity import sensitivity_map
from hasten.report.style import document

Record = Mapping[str, Any]

_GOALS = {
    "latency": "The fastest answer",
    "throughput": "The most tokens of a batch",
    "memory": "The least memory",
}


def page(plan: Record) -> str:
    """The report of a search.

    Args:
        plan: what plan.json holds, as `hasten.optimize` writes it. Every string in it is escaped.
    """
    search = plan["search"]
    name = text(plan["model"])
    body = "".join(
        [
            _head(plan, search),
            "<h2>Speed against divergence</h2>",
            frontier(search),
            _KEY,
            "<h2>What was tried</h2>",
            _table(plan, search),
            "<h2>Why</h2>",
            _reasons(plan, search),
            sensitivity_map(
                plan.get("sensitivity") or [],
                plan.get("sensitivity_method", "rtn"),
                plan.get("sensitivity_error"),
            ),
            "<h2>How this was measured</h2>",
            _facts(plan, search),
        ]
    )
    return document(f"{name}: {text(search['chosen'])}", body)


_KEY = (
    '<p class="key"><span><i class="round k-pick"></i>chosen</span>'
    '<span><i class="round k-good"></i>within the budget</span>'
    '<span><i class="turned k-bad"></i>not within the budget</span>'
    "Hollow: not timed, speed predicted from its bytes.</p>"
)


def _head(plan: Record, search: Record) -> str:
    verdict, speedup = plan["verdict"], search["speedup"]
    chosen = next(c for c in search["candidates"] if c["recipe"] == search["chosen"])
    measured = chosen["measurement"]
    tiles = [
        (times(speedup["decode"]), f"decode: {number(median(measured, 'decode_tok_per_s'))} tok/s"),
        (times(speedup["prefill"]), f"prefill: {number(median(measured, 'prefill_tok_per_s'), 0)} tok/s"),
        (times(speedup["ttft"]), f"first token: {number(median(measured, 'ttft_ms'), 0)} ms"),
        (
            percent(verdict["ppl_increase"]),
            f"perplexity; 95 %: {_interval(verdict)}",
        ),
        (
            number(chosen["bits_per_weight"], 2),
            f"bits a weight: {megabytes(chosen['weight_bytes'])} read a token",
        ),
    ]
    items = "".join(f"<li><b>{value}</b><span>{about}</span></li>" for value, about in tiles)
    limit = percent(plan["budget"]["max_ppl_increase"])
    return (
        f"<h1>{text(plan['model'])} as {text(search['chosen'])}</h1>"
        f'<p class="lead">{text(_GOALS[plan["goal"]])} within a perplexity increase of {limit}, on '
        f"{text(plan['machine']['cpu'])}. Factors are against the same model in bf16 on the same engine.</p>"
        f'<ul class="tiles">{items}</ul>'
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


def _table(plan: Record, search: Record) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    start = search["baseline"]
    first = _row("bf16 (start)", 16.0, start["measurement"], None, "", False)
    rows = "".join(
        _row(
            c["recipe"],
            c["bits_per_weight"],
            c["measurement"],
            c["verdict"],
            c["weight_bytes"],
            c["recipe"] == search["chosen"],
        )
        for c in search["candidates"]
    )
    about = (
        "Medians. A recipe out of the budget is not timed. One that clearly fails is judged on fewer tokens. "
        f"Perplexity of the start: {number(start['ppl'], 3)}."
    )
    return (
        '<div class="scroll" role="region" aria-label="Recipes tried" tabindex="0"><table>'
        f"<caption><span>{about}</span></caption><thead><tr>{head}</tr></thead><tbody>{first}{rows}</tbody></table></div>"
    )


def _row(
    name: str,
    bits: float | None,
    measured: Record | None,
    verdict: Record | None,
    weight_bytes: Any,
    chosen: bool,
) -> str:
    size = weight_bytes or (measured or {}).get("weight_bytes")
    status = "" if verdict is None else text(verdict["status"])
    cells = [
        f'<span class="{status}">{status}</span>',
        number(bits, 2),
        number(size / 1e6 if size else None, 0),
        *(_timed(measured, figure) for figure in ("decode_tok_per_s", "prefill_tok_per_s", "ttft_ms")),
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
    return f'<tr{mark}><th scope="row">{text(name)}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _interval(verdict: Record) -> str:
    return f"{percent(verdict['ppl_increase_low'])} to {percent(verdict['ppl_increase_high'])}"


def _timed(measured: Record | None, figure: str) -> str:
    if measured is None:
        return '<span class="small">not timed</span>'
    stat = measured[figure]
    digits = 0 if stat["median"] >= 1000 else 1
    spread = f"{number(stat['p10'], digits)} to {number(stat['p90'], digits)}"
    return f'<span title="p10 to p90: {spread}, n {stat["n"]}">{number(stat["median"], digits)}</span>'


def _reasons(plan: Record, search: Record) -> str:
    chosen = [c for c in search["candidates"] if c["recipe"] == search["chosen"]]
    others = [c for c in search["candidates"] if c["recipe"] != search["chosen"]]
    items = "".join(f"<dt>{text(c['recipe'])}</dt><dd>{text(c['because'])}</dd>" for c in [*chosen, *others])
    extra = "".join(f"<p>{text(reason)}</p>" for reason in plan["because"][1:])
    return f'<dl class="reasons">{items}</dl>{extra}'


def _facts(plan: Record, search: Record) -> str:
    machine, judged = plan["machine"], plan["text"]
    measured = plan["measurement"] or search["baseline"]["measurement"]
    workload = measured["workload"]
    memory = machine["memory_bytes"]
    read, int8 = measured["fraction_of_read_ceiling"], measured["fraction_of_int8_ceiling"]
    facts = [
        (
            "Machine",
            f"{text(machine['cpu'])}, {machine['cores']} cores, {', '.join(map(text, machine['isa']))}",
        ),
        ("Memory", text(None) if memory is None else f"{memory / 2**30:.1f} GiB"),
        (
            "Ceilings",
            f"read {number(machine['read_gb_per_s'])} GB/s, int8 {number(machine['int8_tops'], 2)} TOPS, "
            f"bf16 {number(machine['bf16_tflops'], 2)} TFLOP/s, measured",
        ),
        ("Of the ceilings", f"decode {share(read)} of the read rate, prefill {share(int8)} of the int8 rate"),
        (
            "Speed",
            f"{workload['prompt']} tokens in, {workload['output']} out, {workload['batch']} at once, "
            f"{measured['threads']} threads; medians of {plan['runs']} runs after a warm-up, in one process",
        ),
        (
            "Quality",
            f"up to {number(judged['tokens'], 0)} tokens of {text(judged['name'])} in windows of 512, each "
            "from an empty cache; the source in bf16 on the same engine reads the same. KL over the whole "
            "vocabulary. Interval: paired bootstrap over blocks of 64 tokens, 95 %, seeded. A recipe passes "
            "when the whole interval is within the budget. Widths were chosen on other text than judged.",
        ),
        ("Text", f"sha256 <code>{text(judged['sha256'])}</code>"),
        (
            "Versions",
            ", ".join(f"{text(k)} {text(v)}" for k, v in plan["versions"].items())
            + f"; {text(machine['os'])}",
        ),
        ("Use it", f'<code>hasten generate {text(search["artifact"])} -p "What is a mutex?"</code>'),
    ]
    return (
        '<dl class="facts">' + "".join(f"<dt>{about}</dt><dd>{fact}</dd>" for about, fact in facts) + "</dl>"
    )
