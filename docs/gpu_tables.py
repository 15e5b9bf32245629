"""The GPU's records as tables, for docs/benchmarks.py."""

from __future__ import annotations

import re

from records import Record, figure, goals_table, percent, table

SHAPES = {
    "0.6B": "Qwen3-0.6B",
    "8B": "Llama-3.1-8B",
    "qwen2.5-7B": "Qwen2.5-7B",
    "gemma3-1B": "Gemma-3-1B",
}


def gpu_bars(record: Record) -> str:
    """Speeds in a grid, and every bar."""
    found = {bar["name"]: bar for bar in record["bars"]}
    rows = []
    for model, weights in (("0.6B", "bf16"), ("8B", "bf16"), ("8B", "fp8"), ("8B", "int4")):
        bars = [found.get(f"{model} {weights}, batch {count}") for count in (1, 16, 64)]
        shown = [f"{figure(bar['value'])} ({_steps(bar)})" if bar else "" for bar in bars]
        rows.append((f"{SHAPES[model]}, {weights}", *shown))
    head = ("shape and weights", "1 sequence, tok/s (step: median, mean)", "16", "64")
    others = [
        (
            bar["name"],
            figure(bar.get("tok_s", bar["value"])),
            f"{percent(bar['value'], signed=False)} {bar['unit']}" if "tok_s" in bar else "",
            figure(bar["seconds"]) if "seconds" in bar else "",
        )
        for bar in record["bars"]
        if "tok_s" in bar or "seconds" in bar
    ]
    more = table(("workload", "tok/s", "of what is possible", "seconds"), others)
    return f"{table(head, rows)}\n{more}\n{goals_table(record)}"


def _steps(bar: Record) -> str:
    return f"{bar['step_us'] / 1e3:.2f} ms, {bar['mean_us'] / 1e3:.2f}"


def gpu_two(record: Record) -> str:
    """Two GPUs beside one, and every bar."""
    rows = [
        (
            bar["name"].removesuffix(" over one").removesuffix(", 2 GPUs"),
            figure(bar["one"]) if "one" in bar else "",
            figure(bar.get("several", bar.get("tok_s"))),
            f"{bar['value']:.2f}" if "one" in bar else "",
        )
        for bar in record["bars"]
        if "several" in bar or "tok_s" in bar
    ]
    head = ("shape and workload", "one GPU, tok/s", "two, tok/s", "ratio")
    return f"{table(head, rows)}\n{goals_table(record)}"


def persistent(record: Record) -> str:
    """Real shapes with the settings in use.

    The limit is the bytes of weights, keys and values over the measured copy.
    """
    rows = [
        (
            SHAPES[row["model"]],
            re.sub(r":? ?as usual$", "", row["variant"]) or "bf16",
            f"{row['context']:,}",
            figure(row["tok_s"]),
            f"{figure(row['us'])} ({figure(row['us_least'])} to {figure(row['us_most'])})",
            percent(row["of_limit"], signed=False),
            figure(row["error"]),
        )
        for row in record["rows"]
        if row["model"] != "tiny" and "us" in row and re.search(r"as usual$|^bf16$", row["variant"])
    ]
    head = (
        "shape",
        "weights",
        "context",
        "tok/s",
        "us a step (least to most)",
        "of the limit",
        "error of logits",
    )
    return table(head, rows)


def persistent_tiny(record: Record) -> str:
    """The tiny models of the same record, in a sentence."""
    tiny = [row for row in record["rows"] if row["model"] == "tiny"]
    agree, of = (sum(row[key] for row in tiny) for key in ("agree", "of"))
    return (
        f"{len(tiny)} rows of tiny models agree with the plain decoder within "
        f"{figure(max(row['error'] for row in tiny))}; {agree:,} of {of:,} greedy tokens are equal.\n"
    )


def batch_step(record: Record) -> str:
    """Rows a step."""
    rows = [
        (SHAPES[row["model"]], row["precision"], f"{row['rows']}", figure(row["tok_s"]), figure(row["us"]),
         f"{row['tb_per_s']:.2f}", _bar(row), f"`{row['commit']}`")
        for row in record["rows"]
    ]  # fmt: skip
    head = ("shape", "weights", "rows", "tok/s", "us a step", "TB/s", "goal, tok/s", "commit")
    return f"{record['note']}\n\n{table(head, rows)}"


def _bar(row: Record) -> str:
    if "bar" not in row:
        return ""
    return f"{figure(row['bar'])}: " + ("reached" if row["pass"] else "**missed**")
