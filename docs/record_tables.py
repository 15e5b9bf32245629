"""The records of everything but the GPU as tables, for docs/benchmarks.py: one function a kind of record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from records import (
    UNKNOWN,
    Record,
    each,
    engine,
    figure,
    goals,
    goals_table,
    interval,
    names,
    percent,
    quality,
    ratio_of,
    read,
    spread,
    table,
)


def equal(record: Record) -> str:
    """Pairs of equal quality, and what every candidate loses."""
    pairs, tokens = record["details"]["pairs"], record["details"]["tokens"]
    rows = [row for pair in pairs for row in _pair(pair)]
    head = (
        "engine and weights",
        "bits",
        "KL",
        "perplexity",
        "decode tok/s",
        "prefill tok/s",
        "ours / theirs",
    )
    judged = [
        (f"`{one['name']}`", f"{one['bits']:.2f}", *quality(one)) for one in record["details"]["judged"]
    ]
    rounds = pairs[0]["speed"]["subject"]["decode_tok_per_s"]["n"]
    all_of_them = table(("name", "bits", "KL", "perplexity", "same likeliest token"), judged)
    return (
        f"{rounds} rounds each; quality on {tokens:,} tokens.\n\n{table(head, rows)}\n"
        f"All that were judged, on the same {tokens:,} tokens:\n\n{all_of_them}\n{goals_table(record)}"
    )


def _pair(pair: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    speed = pair["speed"]
    for judged, run in ((pair["peer"], speed["peers"][0]), (pair["ours"], speed["subject"])):
        ours = judged["is_ours"]
        yield (
            f"**Hasten, `{judged['name']}`**" if ours else f"{engine(run)}, {run['format']}",
            f"{judged['bits']:.2f}",
            *quality(judged)[:2],
            spread(run["decode_tok_per_s"]) + _disturbed(run),
            spread(run["prefill_tok_per_s"]),
            ratio_of(speed, pair["peer"]["name"], "decode") if ours else "",
        )


def _disturbed(run: Mapping[str, Any]) -> str:
    count = run.get("disturbed_rounds")
    return f", {count} rounds disturbed" if count else ""


def _known_quality(name: str, weight_bytes: int) -> str:
    """The KL divergence that equal.json found for weights of the same name and the same bytes."""
    record = read("equal")["details"]
    runs = [run for pair in record["pairs"] for run in (pair["speed"]["subject"], *pair["speed"]["peers"])]
    if (name, weight_bytes) not in {(r["name"].removeprefix("hasten:"), r["weight_bytes"]) for r in runs}:
        return UNKNOWN
    return next(figure(one["kl_mean"]) for one in record["judged"] if one["name"] == name)


def bench(record: Record) -> str:
    """One run of `hasten bench` beside other engines."""
    work, subject = record["workload"], record["subject"]
    rows = []
    for run in (subject, *record["peers"]):
        ours, name = run is subject, run["name"].removeprefix("hasten:")
        kl = _known_quality(name, run["weight_bytes"]) if run["format"] != "bf16" else "0: the source"
        rows.append(
            (
                f"**Hasten, `{run['format']}`**" if ours else f"{engine(run)}, {run['format']}",
                f"{run['weight_bytes'] / 1e6:,.0f}",
                kl,
                spread(run["decode_tok_per_s"]) + _disturbed(run),
                spread(run["prefill_tok_per_s"]),
                *(("", "") if ours else (ratio_of(record, name, what) for what in ("decode", "prefill"))),
            )
        )
    head = (
        "engine and weights",
        "MB",
        "KL",
        "decode tok/s",
        "prefill tok/s",
        "ours / theirs: decode",
        "prefill",
    )
    rounds = subject["decode_tok_per_s"]["n"]
    said = f"Prompt {work['prompt']}, output {work['output']} tokens, {record['threads']} threads"
    return f"{said}, {rounds} rounds.\n\n{table(head, rows)}"


def peers(record: Record) -> str:
    """Both comparisons of the record."""
    return "\n".join(bench(one) for one in record["details"].values()) + "\n" + goals_table(record)


def scaled(record: Record) -> str:
    """Runs of one recipe with different workloads."""
    rows = [
        (
            f"`{name}`",
            f"{run['workload']['batch']}",
            f"{run['workload']['prompt']:,}",
            spread(run["decode_tok_per_s"]),
            spread(run["prefill_tok_per_s"]),
            f"{run['decode_tok_per_s']['n']}",
        )
        for name, one in record["details"].items()
        for run in one["measurements"]
    ]
    head = ("recipe", "sequences", "prompt", "decode tok/s", "prefill tok/s", "rounds")
    return f"{table(head, rows)}\n{goals_table(record)}"


_PROCESSES = {"first_token_s": "first token", "help_s": "`hasten --help`", "seconds": "the whole process"}


def whole(record: Record) -> str:
    """Times of whole processes, with their spread."""
    rows = [
        (_PROCESSES[name], spread(times), f"{times['n']}")
        for name, times in record["details"].items()
        if isinstance(times, Mapping)
    ]
    return f"{table(('what', 'seconds', 'runs'), rows)}\n{goals_table(record)}"


def neighbour(record: Record) -> str:
    """Decode alone and beside a busy process."""
    found = record["details"]
    rows = [
        ("quiet", each(found["quiet_tok_per_s"])),
        ("beside one busy process", each(found["busy_tok_per_s"])),
    ]
    said = f"The ratio is {interval(found['ratio'])}, {found['ratio']['n']} rounds."
    return f"{table(('machine', 'decode tok/s'), rows)}\n{said}\n\n{goals_table(record)}"


def chats(record: Record) -> str:
    """Eight chats on every server."""
    found, work = record["details"]["contenders"], record["details"]["workload"]
    rows = [
        (
            f"**{name}**" if name.startswith("hasten") else name,
            each(one["cold"]["tok_per_s"]),
            each(one["warm"]["tok_per_s"]),
            f"{one['cold']['ttft_p95_ms'] / 1e3:.2f} / {one['warm']['ttft_p95_ms'] / 1e3:.2f}",
        )
        for name, one in found.items()
    ]
    ratios = [(name, interval(ratio)) for name, ratio in record["details"]["speed_ratios"].items()]
    head = (
        "server",
        "tokens/s, prompt new",
        "tokens/s, prompt seen",
        "95 % of first tokens within, s: new / seen",
    )
    runs = len(found["hasten serve"]["cold"]["tok_per_s"])
    return (
        f"{work['clients']} clients, {work['output']} new tokens each, {runs} runs (middle, least, most).\n\n"
        f"{table(head, rows)}\n{table(('tokens a second', 'ratio'), ratios)}\n{goals_table(record)}"
    )


def speculation(record: Record) -> str:
    """Kinds of tasks, with and without drafts."""
    rows = [
        (
            kind,
            f"{one['answers']}",
            figure(one["plain_decode_tok_per_s"]["median"]),
            figure(one["decode_tok_per_s"]["median"]),
            f"{one['ratio']['median']:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in one["of_each_answer"]),
            percent(one["accepted_tokens"] / one["drafted_tokens"], signed=False),
        )
        for kind, one in record["details"]["kinds"].items()
    ]
    head = ("task", "answers", "plain, tok/s", "with drafts", "ratio", "of each answer", "drafts accepted")
    return f"{table(head, rows)}\n{goals_table(record)}"


def judged(record: Record) -> str:
    """Quantisers of several projects on the same text, by size."""
    found = record["details"]
    rows = [
        (
            f"**Hasten, `{one['name']}`**" if one["is_ours"] else f"{one['name']}, {_version(one)}",
            f"{one['bits']:.2f}",
            *quality(one),
            _making(one["making"]),
        )
        for one in sorted(found["judged"], key=lambda one: (round(one["bits"], 1), -one["kl_mean"]))
    ]
    head = ("method", "bits", "KL", "perplexity", "same likeliest token", "minutes to make")
    said = (
        f"Judged on {found['evaluation_tokens']:,} tokens, calibrated on {found['calibration']['tokens']:,}"
    )
    return f"{said} others; one run each.\n\n{table(head, rows)}\n{goals_table(record)}"


def _version(one: Mapping[str, Any]) -> str:
    return str(next(iter(one["making"].get("versions", {}).values()), ""))


def _making(making: Mapping[str, Any]) -> str:
    if "seconds" not in making:
        return "in quantise.json"
    matrix = making.get("importance_s")
    return f"{making['seconds'] / 60:.1f}" + (f", importance matrix {matrix / 60:.0f}" if matrix else "")


def made(record: Record) -> str:
    """Recipes with what they take to make."""
    found = record["details"]["rows"]
    rows = [
        (
            f"`{name}`",
            f"{one['bits_per_weight']:.2f}",
            *quality(one["verdict"]),
            f"{one['seconds'] / 60:.1f}" if "seconds" in one else "",
            f"{one['peak_rss_bytes'] / 1e9:.1f}" if "peak_rss_bytes" in one else "",
        )
        for name, one in found.items()
    ]
    tokens = next(iter(found.values()))["verdict"]["tokens"]
    head = ("recipe", "bits", "KL", "perplexity", "same likeliest token", "minutes to make", "memory, GB")
    return f"Judged on {tokens:,} tokens, one run each.\n\n{table(head, rows)}\n{goals_table(record)}"


def verdicts(found: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Judgements by name."""
    rows = [(name, *quality(one), f"{one['tokens']:,}") for name, one in found]
    return table(("", "KL", "perplexity", "same likeliest token", "tokens judged"), rows)


def mixture(record: Record) -> str:
    """The mixture within a budget, beside 8 bits everywhere."""
    budget = record["details"]["budget"]
    ours, uniform = budget["decode_tok_per_s"]
    said = f"Decode, tok/s: `mix:1%` {each(ours)}, `w8` {each(uniform)} (middle, least, most); ratio"
    return (
        f"{verdicts([('`mix:1%`', budget['verdict'])])}\n"
        f"{said} {interval(budget['ratio'])}, {budget['ratio']['n']} rounds.\n\n{goals_table(record)}"
    )


def one_verdict(record: Record) -> str:
    """A record with one judgement."""
    return f"{verdicts([('keys and values in int8', record['details']['verdict'])])}\n{goals_table(record)}"


def judgements(record: Record) -> str:
    """Judgements whose answer is known: how often the judge is right."""
    rows = [
        (
            f"`{one['recipe']}`",
            figure(one["kl_mean"]),
            percent(one["worse"]["detectable"]),
            *(_three(one[world]) for world in ("equal", "worse")),
            *(
                f"{one['coverage'][of][str(size)] * 100:.1f} %"
                for of, size in record["details"]["blocks"].items()
            ),
        )
        for one in record["details"]["noises"]
    ]
    head = (
        "noise of",
        "KL",
        "seen in 9 of 10",
        "equal: pass / insufficient / fail",
        "+0.5 %: pass / insufficient / fail",
        "intervals that hold the truth: perplexity",
        "KL",
    )
    return f"{table(head, rows)}\n{goals_table(record)}"


def _three(counts: Mapping[str, Any]) -> str:
    return " / ".join(str(counts[status]) for status in ("pass", "insufficient", "fail"))


def distilled(record: Record) -> str:
    """Before and after distilling."""
    said = f"{record['tokens'] / 1e6:.1f} million tokens in {record['seconds'] / 60:.1f} minutes"
    return f"{said}; one run.\n\n{verdicts(record['verdicts'].items())}"


def pruned(record: Record) -> str:
    """What cutting costs and gains, repaired and not."""
    cases = record["details"]["cases"]
    head = ("what is cut", "bytes left", "KL", "perplexity", "decode tok/s, before", "after")
    rounds = record["settings"]["runs"]
    said = f"Judged on {cases[0]['tokens']:,} tokens; {rounds} rounds."
    return f"{said}\n\n{table(head, map(_cut, cases))}\n{goals_table(record)}"


def _cut(one: Mapping[str, Any]) -> tuple[str, ...]:
    if one["kind"] == "none":
        return "nothing", "", *quality(one)[:2], "", ""
    part = ":".join(map(str, one["pattern"])) if one["pattern"] else percent(one["amount"], signed=False)
    return (
        f"`{one['kind']}`, {part}, {'repaired' if one['repaired'] else 'as cut'}",
        percent(one["bytes_left"], signed=False),
        *quality(one)[:2],
        spread(one["source_tok_per_s"]),
        spread(one["decode_tok_per_s"]),
    )


def exported(record: Record) -> str:
    """Formats in the engines they are for."""
    rows = [
        (
            f"{one['engine']} {one['version']}",
            one["format"],
            f"{one['megabytes']:.1f}",
            figure(one["kl_mean"]),
            figure(one["kl_p99"]),
            f"{one['top1_agreement'] * 100:.1f} %",
            f"{one['tokens']}",
        )
        for one in record["rows"]
    ]
    head = ("engine", "format", "MB", "KL", "KL, 99 % within", "same likeliest token", "tokens judged")
    return table(head, rows)


_READERS = {"bfloat16": "lm-eval in bf16", "float32": "lm-eval in float32"}


def choices(record: Record) -> str:
    """lm-eval's choices through the server and through transformers."""
    rows = [
        (
            model,
            _READERS.get(one["one"], one["one"]),
            _READERS.get(one["other"], one["other"]),
            f"{one['same_choice']} of {one['questions']}",
            figure(one["mean_difference"]),
        )
        for model, found in record["models"].items()
        for one in found
    ]
    return table(("model", "one", "other", "same choice", "mean difference of log-probability"), rows)


def turns(record: Record) -> str:
    """First tokens of later turns, with and without what was kept."""
    found = record["details"]
    cases = {"from disk": found} if "hot_ms" in found else found
    rows = [
        (
            name.replace("_", " "),
            spread(one["hot_ms"]),
            spread(one["cold_ms"]),
            f"{one['ratio']:.3f}",
            f"{one['hot_ms']['n']}",
        )
        for name, one in cases.items()
    ]
    head = ("", "first token with what was kept, ms", "computed anew, ms", "ratio", "runs")
    return f"{table(head, rows)}\n{goals_table(record)}"


def overhead(record: Record) -> str:
    """What the server adds, pair by pair."""
    rows = [
        (
            f"{name} prompt",
            spread(one["ttft_differences_ms"]),
            spread(one["token_differences_ms"]),
            f"{one['ttft_differences_ms']['n']}",
        )
        for name, one in record["details"].items()
    ]
    head = ("", "added to the first token, ms", "added to each token, ms", "pairs")
    return f"{table(head, rows)}\n{goals_table(record)}"


def zero_hit(record: Record) -> str:
    """Load that never meets a prefix, with the cache and without."""
    found = record["details"]
    rows = [(name, each(rates)) for name, rates in found["tok_per_s"].items()]
    said = f"The ratio is {interval(found['ratio'])}, {found['ratio']['n']} rounds."
    return f"{table(('prefix cache', 'tokens/s'), rows)}\n{said}\n\n{goals_table(record)}"


def soak(record: Record) -> str:
    """Ten minutes of a crowd."""
    found = record["details"]
    said = ", ".join(f"{count:,} {kind}" for kind, count in found["requests"].items())
    return (
        f"{found['seconds'] / 60:.0f} minutes, {found['clients']} clients at once: {said}. There is room for "
        f"{found['kv_gb']} GB of keys and values, so that the server has to preempt.\n\n{goals_table(record)}"
    )


def attacks(record: Record) -> str:
    """The goals of one attack in one row."""
    rows: dict[str, dict[str, str]] = {}
    rest = []
    for goal in goals(record):
        name, _, kind = goal.name.rpartition(": ")
        if kind not in ("/health", "a stream", "200 or 400"):
            rest.append((goal.name, goal.shown, goal.limit, goal.verdict))
            continue
        rows.setdefault(name, {})[kind] = goal.shown if goal.reached else f"{goal.shown} {goal.verdict}"
        rows[name].setdefault("limit", goal.limit)
    shown = [
        (name, one["/health"], one["a stream"], one["limit"], one["200 or 400"].replace("1", "yes", 1))
        for name, one in rows.items()
    ]
    head = ("body", "`/health` took", "a stream paused longer by", "goal of both", "answered with 200 or 400")
    return f"{table(head, shown)}\n{table(('what', 'figure', 'goal', ''), rest)}"


def kernels(record: Record) -> str:
    """Formats by rows: the chosen kernels over the best single instruction set."""
    columns = ("1 rows", "2 rows", "4 rows", "8 rows", "prefill of 256")
    rows: dict[str, dict[str, str]] = {}
    for goal in goals(record):
        name, _, rest = goal.name.partition(", ")
        column, _, over = rest.partition(": chosen over ")
        mark = "" if goal.reached else f" {goal.verdict}"
        rows.setdefault(name, {})[column] = f"{goal.shown.removesuffix(' x')} ({over}){mark}"
    shown = [(f"`{name}`", *(one[column] for column in columns)) for name, one in rows.items()]
    said = f"The goal is {goals(record)[0].limit}; {record['settings']['runs']} rounds."
    return f"{said}\n\n{table(('format', '1 row', *columns[1:]), shown)}"


def modules(record: Record) -> str:
    """The article's sample, step by step."""
    rows = [
        (
            name,
            stage["name"],
            f"{stage['seconds']['median'] * 1e6:,.0f}",
            f"{stage['seconds']['p10'] * 1e6:,.0f} to {stage['seconds']['p90'] * 1e6:,.0f}",
            f"{stage['bytes'] / 1e3:,.0f}",
        )
        for name, case in record["details"]["cases"].items()
        for stage in case["report"]["stages"]
    ]
    head = ("module", "step", "us a call", "10 to 90 % of calls", "KB")
    return f"{record['settings']['runs']} rounds.\n\n{table(head, rows)}"


def missed() -> str:
    """Every goal of all records that was not reached."""
    found = [(name, goal) for name in names() for goal in goals(read(name))]
    rows = [
        (goal.name, goal.shown, goal.limit, goal.verdict, goal.rounds, f"`{name}.json`")
        for name, goal in found
        if not goal.reached
    ]
    reached = sum(goal.verdict == "reached" for _, goal in found)
    said = f"{reached} goals were reached, {len(rows)} were not:"
    return f"{said}\n\n{table(('what', 'figure', 'goal', 'verdict', 'rounds', 'record'), rows)}"


def predicted(record: Record) -> str:
    """Errors of predictions against measured runs, and whether they are what was demanded of them."""
    names_of = {"ttft": "time to the first token", "tpot": "time a token", "all": "both"}
    ways = {"raw": "as measured", "steady": "at the calibration's speed"}
    rows = [
        (
            f"{names_of[kind]}, {said}",
            str(found["points"]),
            f"{100 * found['median_error']:.1f} %{_missed(found['median_error'], 0.08)}",
            f"{100 * found['p90_error']:.1f} %{_missed(found['p90_error'], 0.2)}",
            percent(found["bias"]),
            f"{100 * found['inside']:.0f} %{_missed(-found['inside'], -0.9)}",
        )
        for way, said in ways.items()
        for kind, found in record[way].items()
    ]
    head = ("predicted", "points", "median error", "90th percentile", "bias", "inside the interval")
    memory = [
        (
            f"`{one['recipe']}`",
            f"{one['predicted'] / 1e6:,.0f}",
            f"{one['measured'] / 1e6:,.0f}",
            percent(one["error"]),
        )
        for one in record["memory"]
    ]
    timed = record["calibration"]
    return (
        f"{record['rounds']} rounds; calibrated in {timed['seconds']:.0f} s, {timed['repeated']} rounds "
        f"of it taken again, {timed['untrusted']} times that stayed disturbed.\n\n{table(head, rows)}\n"
        f"{table(('recipe', 'peak of memory, predicted, MB', 'measured, MB', 'error'), memory)}"
    )


def _missed(value: float, limit: float) -> str:
    return ", **missed**" if value > limit else ""
