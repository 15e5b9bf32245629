"""One whole benchmark as a user asks for it: names in, ceilings measured, engines compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from hasten.bench import workloads
from hasten.bench.compare import Comparison, Contender, compare
from hasten.bench.peers import EngineSpec, parse
from hasten.core import Machine, Workload
from hasten.errors import UsageError

SUBJECT = "hasten.bench.peers.subject"


def bout(
    model: str,
    workload: Workload,
    *,
    recipe: str | None = None,
    against: Sequence[str] = (),
    source: str | None = None,
    threads: int | None = None,
    runs: int = 5,
    peer_python: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Comparison, Machine]:
    """Compare `model` on our engine with other engines on its source.

    Args:
        model: what `hasten.load` takes.
        against: peers by name, `llama.cpp:q4_0` (see `hasten.bench.peers.PEERS`).
        source: what the peers get, where `model` is an artifact.
        peer_python: the Python the peers are installed in; None is this one.
    Returns:
        The comparison, and the machine with the ceilings measured just before it.
    Raises:
        UsageError: an unknown peer, a bad length, or peers but no source for them.
        PeerError: a peer is not installed.
        HastenError: our own engine failed.
    """
    from hasten.machine.cores import usable_cores
    from hasten.machine.probe import probe

    workloads.check(workload)
    parsed = [(name, *parse(name)[1:]) for name in dict.fromkeys(against)]
    base = EngineSpec(
        name="hasten" if recipe is None else f"hasten:{recipe}",
        module=SUBJECT,
        format=recipe or "",
        source=model,
        cache="",
        threads=threads or usable_cores(),
        context=workload.prompt + workload.output,
        batch=workload.batch,
    )
    contenders = [Contender(base)]
    if parsed:
        origin, cache = str(peer_source(source or model)), str(_cache())
        for name, peer, form in parsed:
            spec = dataclasses.replace(
                base, name=name, module=peer.module, format=form, source=origin, cache=cache
            )
            contenders.append(Contender(spec, peer, peer_python))
    say("measuring the machine's ceilings")
    machine = usable_ceilings(probe(measure=True))
    return compare(contenders, workload, runs, machine=machine, say=say), machine


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
    from hasten.compress.artifact import is_artifact
    from hasten.models.open import open_model

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
