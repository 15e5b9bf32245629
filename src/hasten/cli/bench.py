"""`hasten bench`: speed, alone or side by side."""

from __future__ import annotations

import os
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
    given,
    optional,
)
from hasten.core import SCHEMA_VERSION, Machine, Measurement, Workload, as_json

if TYPE_CHECKING:
    from hasten.bench.compare import Comparison, Outcome

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
    json: JsonOption = False,
) -> None:
    """Measure speed, alone or side by side with other engines.

    Every engine lives in a process of its own and they are asked in turn, round by round, on the same token
    ids; figures are medians. What another engine needs (a requantised file, an export) is made once, in the
    cache.
    """
    from hasten.bench.compare import Request, bout
    from hasten.errors import PeerError
    from hasten.loading import prepared

    with watched() as observer:
        place, plain = prepared(model, recipe, observer, threads=threads)
    request = Request(
        model=str(place),
        workload=Workload(prompt, output, batch),
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
