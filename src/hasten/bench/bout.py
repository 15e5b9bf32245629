"""One whole benchmark as a user asks for it: names in, ceilings measured, engines compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hasten.bench import workloads
from hasten.bench.compare import Comparison, Contender, compare
from hasten.bench.peers import EngineSpec, parse
from hasten.core import Machine, Workload
from hasten.errors import UsageError

SUBJECT = "hasten.bench.peers.subject"


@dataclass(frozen=True)
class Request:
    """What a user asks to have measured."""

    model: str  # what `hasten.load` takes
    workload: Workload = field(default_factory=Workload)
    recipe: str | None = None
    against: tuple[str, ...] = ()  # peers by name, `llama.cpp:q4_0` (see `hasten.bench.peers.PEERS`)
    source: str | None = None  # what the peers get, where `model` is an artifact
    threads: int | None = None  # None: the cores this process may use
    runs: int = 5
    peer_python: str | None = None  # the Python the peers are installed in; None is this one


def bout(request: Request, say: Callable[[str], None] = lambda _: None) -> tuple[Comparison, Machine]:
    """Compare a model on our engine with other engines on its source.

    Returns:
        The comparison, and the machine with the ceilings measured just before it.

    Raises:
        UsageError: an unknown peer, a bad length, or peers but no source for them.
        PeerError: a peer is not installed.
        HastenError: our own engine failed.
    """
    from hasten.machine.probe import probe

    workloads.check(request.workload)
    contenders = _contenders(request)
    say("measuring the machine's ceilings")
    machine = usable_ceilings(probe(measure=True, threads=contenders[0].spec.threads))
    return compare(contenders, request.workload, request.runs, machine=machine, say=say), machine


def _contenders(request: Request) -> list[Contender]:
    """Ours first, then the peers, each named once."""
    from hasten.machine.cores import usable_cores

    base = EngineSpec(
        name="hasten" if request.recipe is None else f"hasten:{request.recipe}",
        module=SUBJECT,
        format=request.recipe or "",
        source=request.model,
        cache="",
        threads=request.threads or usable_cores(),
        context=request.workload.prompt + request.workload.output,
        batch=request.workload.batch,
    )
    contenders = [Contender(base)]
    parsed = [(name, *parse(name)[1:]) for name in dict.fromkeys(request.against)]
    if parsed:
        origin, cache = str(peer_source(request.source or request.model)), str(_cache())
        for name, peer, form in parsed:
            spec = dataclasses.replace(
                base, name=name, module=peer.module, format=form, source=origin, cache=cache
            )
            contenders.append(Contender(spec, peer, request.peer_python))
    return contenders


def usable_ceilings(machine: Machine) -> Machine:
    """The machine with the int8 ceiling of the instruction sets our engine may use (`HASTEN_ISA`)."""
    import os

    forced = os.environ.get("HASTEN_ISA")
    if not forced or forced not in machine.isa:
        return machine
    allowed = machine.isa[: machine.isa.index(forced) + 1]
    rates = [c.tera_ops_per_s for c in machine.ceilings if c.kind == "int8" and c.isa in allowed]
    return dataclasses.replace(machine, int8_tops=max(rates, default=None))


def peer_source(ref: str) -> Path:
    """The folder or .gguf file other engines can open for a model our engine can.

    Raises:
        UsageError: it is an artifact, which only our engine reads.
        ModelError: there is no such model.
    """
    from hasten.models.open import open_model
    from hasten.weights.artifact import is_artifact

    if is_artifact(ref):
        raise UsageError(
            f"{ref} is an artifact: other engines cannot read it",
            hint="name the model it was made from: --source demo, a .gguf file, a folder or a hub id",
        )
    first = open_model(ref).files[0].path
    return first if first.suffix == ".gguf" else first.parent


def _cache() -> Path:
    from hasten.cache import cache_dir

    return cache_dir() / "bench"
