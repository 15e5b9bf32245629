"""`hasten cache replay`: what a prefix cache would have saved on recorded requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from hasten.cli.console import console, emit, note
from hasten.cli.flags import JsonOption
from hasten.core import SCHEMA_VERSION, CachePolicy, as_json
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.engine.replay import ReplayResult
    from hasten.engine.trace import Trace

PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy", metavar="P,...", help="Which page goes first: lru, lfu, s3fifo, cost, or several."
    ),
]
RamOption = Annotated[
    str | None,
    typer.Option(
        "--ram-gb",
        metavar="N,...",
        help="Memory for keys and values, GB, one or several. Default: what the server had.",
        show_default=False,
    ),
]
DiskOption = Annotated[
    str, typer.Option("--disk-gb", metavar="N,...", help="Limit of the disk tier, GB; 0 is none.")
]


def replay_command(
    trace: Annotated[
        Path,
        typer.Argument(metavar="TRACE", help="A file that hasten serve --record wrote.", show_default=False),
    ],
    policy: PolicyOption = "lru,lfu,s3fifo,cost",
    ram_gb: RamOption = None,
    disk_gb: DiskOption = "0",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Whose requests. Default: the model that got most.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw hit ratios into an SVG file.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what a prefix cache of each policy and size would have saved on recorded requests.

    Runs the engine's own bookkeeping of pages without a model. Tokens found are counted; the time to first
    token they save is predicted from what a prompt token took in the recording.
    """
    from hasten.engine.replay import replay
    from hasten.engine.trace import read_trace

    policies = _policies(policy)
    disks = [int(size * 1e9) for size in _sizes(disk_gb, "--disk-gb")]
    found = read_trace(trace, model)
    ram = [int(size * 1e9) for size in _sizes(ram_gb, "--ram-gb")] if ram_gb is not None else []
    ram = ram or [found.model.kv_pages * found.model.page_bytes]
    results = [replay(found, name, memory, disk) for disk in disks for memory in ram for name in policies]
    if plot is not None:
        _draw(plot, results, found)
    if json:
        emit(document(found, results))
    else:
        _show(found, results)


def document(trace: Trace, results: Sequence[ReplayResult]) -> dict[str, Any]:
    """The record of a replay, as `--json` prints it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": as_json(trace.model),
        "recorded_hit_ratio": recorded_hit_ratio(trace),
        "seconds_per_token": trace.seconds_per_token,
        "results": [as_json(result) for result in results],
    }


def recorded_hit_ratio(trace: Trace) -> float:
    """Share of prompt tokens that the cache of the recording found."""
    tokens = sum(len(request.prompt) for request in trace.requests)
    return sum(request.cached_tokens for request in trace.requests) / max(1, tokens)


def _policies(text: str) -> list[CachePolicy]:
    known = {str(name): name for name in get_args(CachePolicy)}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown cache policy {name!r}", hint=f"use some of {','.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _sizes(text: str, flag: str) -> list[float]:
    sizes = []
    for part in text.split(","):
        try:
            sizes.append(float(part))
        except ValueError:
            raise UsageError(f"{flag} {text}: {part!r} is no number", hint=f"{flag} 1,2,4") from None
    if not all(0 <= size < 1e6 for size in sizes):
        raise UsageError(f"{flag} {text}: sizes go from 0 to a million GB", hint=f"{flag} 1,2,4")
    return list(dict.fromkeys(sizes))


def _draw(path: Path, results: Sequence[ReplayResult], trace: Trace) -> None:
    from hasten.cache import write_atomic
    from hasten.report.replay_chart import replay_chart

    title = f"{trace.model.model}: {len(trace.requests):,} recorded requests"
    write_atomic(path, replay_chart(results, title).encode())
    note(f"wrote {path}")


def _show(trace: Trace, results: Sequence[ReplayResult]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    first = results[0]
    table = Table(
        box=SIMPLE,
        title=f"{trace.model.model}: {first.requests:,} requests, {first.prompt_tokens:,} prompt tokens",
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("memory\nGB", "disk\nGB", "found", "of it\non disk", "first token sooner\npredicted, ms"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.policy,
            f"{result.ram_gb:.3g}",
            f"{result.disk_gb:.3g}" if result.disk_gb else "",
            f"{100 * result.hit_ratio:.1f} %",
            f"{100 * result.disk_hit_ratio:.1f} %" if result.disk_gb else "",
            "unknown" if trace.seconds_per_token is None else f"{result.ttft_saved_ms:,.1f}",
        )
    screen = console()
    if not screen.is_terminal:
        screen.width = 100  # a file or a pipe has no width of its own
    screen.print(table)
    note(f"the cache of the recording found {100 * recorded_hit_ratio(trace):.1f} %")
