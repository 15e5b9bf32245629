"""`hasten bench`: speed, alone or side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cli.console import emit, note, print_table, shown, speeds, watched
from hasten.cli.flags import (
    DeviceOption,
    GpuMemoryOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    TensorParallelOption,
    ThreadsOption,
    WorkloadOption,
    given,
    optional,
    seconds,
)
from hasten.core import SCHEMA_VERSION, Machine, Measurement, Workload, as_json
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.bench.compare import Comparison, Outcome
    from hasten.bench.load import Address, Asked
    from hasten.models.tokenizer import Tokenizer

KEPT = "No figure is kept; what the engines had prepared in the cache is."

ENVIRONMENT = ("HASTEN_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Variables that change what engines do; the record says how they were set."""

AGAINST = (
    "Another engine to run in turn, repeatable: llama.cpp:q4_0 (:q8_0, :q4_k_m, :q6_k, :source), "
    "transformers (:fp32), openvino:int4 (:int8), vllm (:fp8). On a GPU: transformers and vllm."
)
AgainstOption = Annotated[list[str] | None, optional("--against", "ENGINE", AGAINST)]
SOURCE = "The model the other engines get. Default: MODEL; needed where that is an artifact."
SourceOption = Annotated[str | None, optional("--source", "MODEL", SOURCE)]
PEER_PYTHON = "The Python the other engines are installed in. Default: this one."
PeerPythonOption = Annotated[
    str | None, optional("--peer-python", "PATH", PEER_PYTHON, envvar="HASTEN_PEER_PYTHON")
]

RATE = "Requests a second that come at random to a server (open loop): goodput instead of rounds."
URL = "The server to ask, any with OpenAI's API. Default: one of MODEL, started for it."
LATE = "of a load: later than this (500ms) is not in time. Default: the workload's."


def command(
    model: ModelArgument,
    recipe: RecipeOption = None,
    against: AgainstOption = None,
    source: SourceOption = None,
    prompt: Annotated[int, given("--prompt", "N", "Prompt tokens.")] = 512,
    output: Annotated[int, given("--output", "N", "Tokens to generate.")] = 128,
    batch: Annotated[int, given("--batch", "N", "Sequences at once.")] = 1,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    tensor_parallel: TensorParallelOption = 1,
    runs: Annotated[int, given("--runs", "N", "Measured rounds.", min=1)] = 5,
    peer_python: PeerPythonOption = None,
    workload: WorkloadOption = None,
    rate: Annotated[float | None, optional("--rate", "X", RATE)] = None,
    requests: Annotated[int, given("--requests", "N", "Requests of such a load.", min=1)] = 100,
    seed: Annotated[int, given("--seed", "N", "Of its lengths and moments.")] = 0,
    ttft: Annotated[str | None, optional("--ttft", "TIME", f"First token, {LATE}")] = None,
    tpot: Annotated[str | None, optional("--tpot", "TIME", f"A token after it, mean, {LATE}")] = None,
    deadline: Annotated[str | None, optional("--deadline", "TIME", f"The whole answer, {LATE}")] = None,
    url: Annotated[str | None, optional("--url", "URL", URL)] = None,
    json: JsonOption = False,
) -> None:
    """Measure speed, alone or side by side with other engines.

    Every engine lives in a process of its own and they are asked in turn, round by round, on the same token
    ids; figures are medians. What another engine needs (a requantised file, an export) is made once, in the
    cache. With --rate a server is asked instead, as users do: requests come at random moments, and what
    counts is the share that is answered in time.
    """
    limits = {"ttft": ttft, "tpot": tpot, "deadline": deadline}
    if rate is not None:
        asked = _asked(workload, rate, requests, seed, limits)
        served = _Served(model, recipe, threads, device, gpu_memory, url)
        _bench_load(asked, served, json)
        return
    _refuse_alone(limits | {"url": url})
    from hasten.bench.compare import Request, bout
    from hasten.bench.workload import traffic
    from hasten.errors import PeerError
    from hasten.loading import prepared

    with watched() as observer:
        place, plain = prepared(model, recipe, observer, threads=threads)
    request = Request(
        model=str(place),
        workload=Workload(prompt, output, batch) if workload is None else traffic(workload).typical(batch),
        recipe=None if plain is None else recipe,
        against=tuple(against or ()),
        source=source if source is not None or place == model else model,
        threads=threads,
        runs=runs,
        peer_python=peer_python,
        device=device,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel,
    )
    comparison, machine = bout(request, note)
    if json:
        emit(document(comparison, machine))
    else:
        _show(comparison, machine)
    if comparison.failed:
        name, error = next(iter(comparison.failed.items()))
        raise PeerError(error.message, hint=error.hint or f"leave it out: drop --against {name}")


def document(comparison: Comparison, machine: Machine) -> dict[str, Any]:
    """The record of a comparison, as `--json` prints it."""
    import hasten

    subject = comparison.subject.measurement
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": as_json(machine),
        "versions": {"hasten": hasten.__version__, "python": machine.python},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "model": comparison.model,
        "workload": as_json(subject.workload),
        "threads": subject.threads,
        "device": subject.device,
        "subject": _entry(comparison.subject),
        "peers": [_entry(outcome) for outcome in comparison.peers.values()],
        "ratios": {
            peer: {kind: ratio.median for kind, ratio in pair.items()}
            | {f"{kind}_interval": [ratio.low, ratio.high] for kind, ratio in pair.items()}
            for peer, pair in comparison.ratios.items()
        },
        "failed": {name: {"error": e.message, "hint": e.hint} for name, e in comparison.failed.items()},
    }


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        **as_json(outcome.measurement),
        "notes": outcome.notes,
        "continuation": outcome.continuation,
    }


def _show(comparison: Comparison, machine: Machine) -> None:
    subject = comparison.subject.measurement
    load = subject.workload
    rows = [[f"hasten {subject.format}", *_cells(subject), ""]]
    for name, outcome in comparison.peers.items():
        pair = comparison.ratios[name]
        faster = f"{pair['decode'].median:.2f}x, {pair['prefill'].median:.2f}x"
        rows.append([name, *_cells(outcome.measurement), faster])
    headings = "engine", "decode\ntok/s", "p10 to p90", "prefill\ntok/s", "first\ntoken ms", "peak\nMB"
    print_table(
        f"{comparison.model} on {subject.device}: prompt {load.prompt}, output {load.output}, "
        f"batch {load.batch}, {subject.threads} threads, medians of {subject.decode_tok_per_s.n} "
        "interleaved runs",
        [*headings, "ours / theirs\ndecode, prefill"],
        rows,
    )
    if subject.disturbed_rounds:
        note(
            f"{subject.disturbed_rounds} rounds were disturbed by other work on this machine and taken "
            "again: for firm figures, bench while nothing else runs"
        )
    note(_ceilings(subject, machine))


def _ceilings(subject: Measurement, machine: Machine) -> str:
    """How near our engine comes to what was measured of the machine."""
    read = _percent(subject.fraction_of_read_ceiling)
    if subject.device == "cuda" and machine.accelerators:
        gpu, compute = machine.accelerators[0], _percent(subject.fraction_of_gpu_ceiling)
        rates = f"{shown(gpu.bf16_tflops, 'bf16', 0)} or {shown(gpu.fp8_tflops, 'fp8 TFLOPS', 0)}"
        return (
            f"decode reads at {read} of a copy's {shown(gpu.copy_gb_per_s, 'GB/s', 0)}, prefill computes at "
            f"{compute} of {rates}; ceilings measured now on {gpu.name}"
        )
    int8 = _percent(subject.fraction_of_int8_ceiling)
    return (
        f"decode reads at {read} of {shown(machine.read_gb_per_s, 'GB/s')}, prefill computes at {int8} of "
        f"{shown(machine.int8_tops, 'int8 TOPS', 2)}; both ceilings measured now on {machine.cpu}"
    )


def _cells(measurement: Measurement) -> list[str]:
    spread, peak = measurement.decode_tok_per_s, measurement.peak_rss_bytes
    decode, *others = speeds(measurement)
    memory = shown(None if peak is None else peak / 1e6, digits=0)
    return [decode, f"{spread.p10:,.1f} to {spread.p90:,.1f}", *others, memory]


def _percent(fraction: float | None) -> str:
    return shown(None if fraction is None else 100 * fraction, "%", 0)


# A load on a server -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Served:
    """The server that a load goes to."""

    model: str
    recipe: str | None
    threads: int | None
    device: str
    gpu_memory: str | None
    url: str | None

    def command(self, port: int, context: int) -> list[str]:
        words = [sys.executable, "-m", "hasten", "serve", self.model, "--port", str(port)]
        words += ["--context", str(context)]
        flags = {"recipe": self.recipe, "threads": self.threads, "gpu-memory": self.gpu_memory}
        flags["device"] = None if self.device == "cpu" else self.device
        return words + [
            part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))
        ]

    @contextmanager
    def running(self, context: int) -> Iterator[Address]:
        """The server's address, once it answers."""
        from hasten.bench.load import Address
        from hasten.bench.process import ServerProcess, free_port

        if self.url is not None:
            yield _address(self.url)
            return
        address = Address("127.0.0.1", free_port())
        command = self.command(address.port, context)
        with ServerProcess("hasten serve", command, address, ready="/ready") as server:
            server.wait_ready(_START_LIMIT_S)
            yield address


_START_LIMIT_S = 600.0


def _refuse_alone(flags: Mapping[str, object]) -> None:
    """Refuses flags that only a load reads, where no --rate asks for a load.

    Raises:
        UsageError: one was given.
    """
    for name, value in flags.items():
        if value is not None:
            raise UsageError(f"--{name} belongs to a load, and there is no --rate", hint="add --rate 2")


def _asked(name: str | None, rate: float, count: int, seed: int, limits: Mapping[str, str | None]) -> Asked:
    """The load that the flags describe.

    Raises:
        UsageError: no workload, or a rate or limit that is none.
    """
    from hasten.bench.load import Asked
    from hasten.bench.workload import traffic

    if name is None:
        raise UsageError("--rate needs a workload", hint=f"add --workload chat (--rate {rate:g})")
    if rate <= 0:
        raise UsageError(f"--rate must be above 0 requests a second, got {rate:g}", hint="use --rate 2")
    given_limits: dict[str, Any] = {
        f"{flag}_ms": 1e3 * seconds(f"--{flag}", written)
        for flag, written in limits.items()
        if written is not None
    }
    return Asked(replace(traffic(name), **given_limits), rate, count, seed)


def _address(url: str) -> Address:
    """Host and port of an `http://` address; a path such as /v1 behind it is passed over.

    Raises:
        UsageError: it is none.
    """
    from urllib.parse import urlsplit

    from hasten.bench.load import Address

    hint = "use --url http://127.0.0.1:8000"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"--url {url!r} is no address", hint=hint) from None
    if parts.scheme != "http" or not host:
        raise UsageError(f"--url {url!r} is no http:// address", hint=hint)
    return Address(host, port or 80)


def _bench_load(asked: Asked, served: _Served, json: bool) -> None:
    from hasten import __version__
    from hasten.bench.load import run_open
    from hasten.bench.measure import default_text
    from hasten.machine.probe import probe

    ids = _tokenizer(served.model).encode(default_text(), add_special=False)
    last_s = max(one.at_s for one in asked.arrivals(ids))
    note(f"{asked.count} requests of {asked.traffic.name} within {last_s:.0f} s")
    with served.running(asked.traffic.longest + 16) as address:
        load = run_open(address, asked, ids)
    machine = probe(measure=False)
    record = {
        "schema_version": SCHEMA_VERSION,
        "machine": as_json(machine),
        "versions": {"hasten": __version__, "python": machine.python},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "model": served.model,
        "server": served.url or " ".join(["hasten", *served.command(0, asked.traffic.longest + 16)[3:]]),
        "load": load,
    }
    if json:
        emit(record)
    else:
        _show_load(record)


def _tokenizer(ref: str) -> Tokenizer:
    from hasten.models.artifact import load_artifact
    from hasten.models.open import open_model
    from hasten.weights.artifact import is_artifact

    return load_artifact(ref).tokenizer if is_artifact(ref) else open_model(ref).tokenizer()


def _show_load(record: Mapping[str, Any]) -> None:
    from hasten.bench.figures import percentile

    load, rows = record["load"], []
    for name, title in (("ttft_ms", "first token"), ("tpot_ms", "a token"), ("latency_ms", "whole answer")):
        values = [one[name] for one in load["requests"] if one[name] is not None]
        limit = load["limits"].get("deadline_ms" if name == "latency_ms" else name)
        cells = [shown(percentile(values, at), "ms") if values else "" for at in (0.5, 0.9, 0.99)]
        rows.append([title, *cells, "" if limit is None else shown(limit, "ms", 0)])
    print_table(
        f"{record['model']}: {load['count']} requests of {load['workload']} at {load['rate']:g} a second",
        ("", "p50", "p90", "p99", "in time up to"),
        rows,
    )
    shares = ", ".join(f"{_percent(load[key])} {key}" for key in ("late", "refused", "failed"))
    note(f"in time: {_percent(load['goodput'])} of the requests ({shares})")
    note(
        f"{shown(load['good_per_s'], 'requests in time a second', 2)}, "
        f"{shown(load['output_tok_per_s'], 'tok/s')}; {_percent(load['cached'])} of prompt tokens were cached"
    )
    late = max(one["client_late_ms"] for one in load["requests"])
    if late > _LATE_MS:
        note(f"the client itself was up to {late:.0f} ms late: times are too long by so much at most")


_LATE_MS = 20.0
