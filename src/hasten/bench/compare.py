"""Our engine and its peers, interleaved: one benchmark from the names a user gives to figures and ratios."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.bench.figures import Ratio, Sample, paired_ratio, steady
from hasten.bench.measure import PromptRing, check, default_text, measurement_of, rates_of, with_ceilings
from hasten.bench.peers import PEERS, EngineSpec, Peer, check_device, parse
from hasten.bench.process import WorkerProcess
from hasten.cache import cache_dir
from hasten.core import Machine, Measurement, Workload
from hasten.errors import HastenError, PeerError, UsageError
from hasten.speed.cost import Cost

PREPARE_LIMIT_S = 7200.0
LOAD_LIMIT_S = 1200.0
SHORT_LIMIT_S = 300.0
SLOWEST_TOK_PER_S = 0.2
"""A run slower than this counts as hung."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    spec: EngineSpec
    peer: Peer | None = None  # None: ours
    python: str | None = None  # None: this one


@dataclass(frozen=True)
class Outcome:
    name: str
    measurement: Measurement
    samples: tuple[Sample, ...]
    notes: str
    continuation: str  # text of the first run's first sequence: is it sane?


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave. `failed` names the peers that did not finish and why."""

    model: str
    subject: Outcome
    peers: dict[str, Outcome]
    ratios: dict[str, dict[str, Ratio]]  # peer -> "decode", "prefill" -> ours over theirs
    failed: dict[str, HastenError]


@dataclass
class _Seat:
    """A contender at the table: its process and what it gave so far."""

    contender: Contender
    process: WorkerProcess
    about: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    peak_rss_bytes: int | None = None


def compare(
    contenders: Sequence[Contender],
    workload: Workload,
    runs: int,
    *,
    machine: Machine | None = None,
    say: Say = lambda _: None,
) -> Comparison:
    """Measure all contenders in turn, `runs` rounds after one warm-up; the first one is ours.

    Round r begins with contender r mod n, so that no engine always comes after the same one. Every round has
    prompts of its own, the same ids for all. A peer that fails leaves the table; the others go on.

    Raises:
        HastenError: our own engine failed, or a peer is not installed.
    """
    check(workload)
    failed: dict[str, HastenError] = {}
    with ExitStack() as stack:
        prepared = _prepare_all(contenders, failed, say)
        seats = _seat_all(contenders, prepared, stack, failed, say)
        subject = seats[0]
        text = subject.process.ask("encode", SHORT_LIMIT_S, text=default_text())
        ring = PromptRing(text)
        table = _Table(seats, ring, workload, failed, runs, say)
        table.round(0)
        found = steady(table.round, table.rates, runs, say)
        seats = table.keep(found.rounds)
        cost = Cost(**subject.process.ask("cost", SHORT_LIMIT_S, workload=dataclasses.asdict(workload)))
        outcomes = {
            seat.contender.spec.name: _outcome(seat, workload, subject, found.disturbed) for seat in seats
        }
    name = subject.contender.spec.name
    ours = outcomes.pop(name)
    if machine is not None:
        ours = dataclasses.replace(ours, measurement=with_ceilings(ours.measurement, cost, machine))
    ratios = {peer: _ratios(ours, theirs) for peer, theirs in outcomes.items()}
    return Comparison(subject.about["model"], ours, outcomes, ratios, failed)


def _process(contender: Contender) -> WorkerProcess:
    hint = contender.peer.crash_hint if contender.peer else None
    return WorkerProcess(contender.spec.name, contender.python, hint)


def _prepare_all(contenders: Sequence[Contender], failed: dict[str, HastenError], say: Say) -> dict[str, str]:
    """What each engine needs on disk, in processes of their own: their memory is no part of a peak."""
    prepared: dict[str, str] = {}
    for contender in contenders:
        spec = contender.spec
        with _process(contender) as process:
            _check_installed(contender, process)
            say(f"{spec.name}: preparing (the first time may take minutes)")
            with _noting(contender, failed):
                arguments = {"spec": dataclasses.asdict(spec)}
                prepared[spec.name] = process.ask("prepare", PREPARE_LIMIT_S, **arguments)
    return prepared


def _check_installed(contender: Contender, process: WorkerProcess) -> None:
    peer = contender.peer
    if peer is None:
        return
    missing = process.ask("check", SHORT_LIMIT_S, requires=list(peer.requires))
    if missing:
        raise PeerError(
            f"{contender.spec.name} is not installed: no module {missing[0]!r}",
            hint=peer.install_command(contender.python or "python"),
        )


def _seat_all(
    contenders: Sequence[Contender],
    prepared: dict[str, str],
    stack: ExitStack,
    failed: dict[str, HastenError],
    say: Say,
) -> list[_Seat]:
    seats: list[_Seat] = []
    for contender in contenders:
        spec = contender.spec
        if spec.name in failed:
            continue
        if seats:  # where ours computes: it may have been told "auto"
            spec = dataclasses.replace(spec, device=seats[0].about.get("device", spec.device))
        say(f"{spec.name}: loading")
        process = stack.enter_context(_process(contender))
        with _noting(contender, failed):
            if contender.peer is not None:
                check_device(spec.name, contender.peer, spec.device)
            arguments = {"spec": dataclasses.asdict(spec), "prepared": prepared[spec.name]}
            about = process.ask("load", LOAD_LIMIT_S, **arguments)
            process.pause()
            seats.append(_Seat(contender, process, about))
            if about.get("device_because"):
                say(f"--device auto is {about['device']}: {about['device_because']}")
    return seats


@dataclass
class _Table:
    """Everybody who still takes part, round after round."""

    seats: list[_Seat]
    ring: PromptRing
    workload: Workload
    failed: dict[str, HastenError]
    runs: int
    say: Say

    def round(self, number: int) -> int:
        """Everybody runs once, in an order that moves on; 0 is the warm-up and leaves no sample."""
        extra = number > self.runs  # in place of one that other work disturbed
        counted = f"extra round {number - self.runs}" if extra else f"round {number} of {self.runs}"
        self.say("warm-up" if number == 0 else counted)
        turn = number % len(self.seats)
        for seat in self.seats[turn:] + self.seats[:turn]:
            _take_turn(seat, self.ring.round(number, self.workload), self.workload, number > 0, self.failed)
        self.seats = [seat for seat in self.seats if seat.contender.spec.name not in self.failed]
        return number

    def rates(self, number: int) -> list[float]:
        """All rates of a round, of those who are still here."""
        return [rate for seat in self.seats for rate in rates_of(seat.samples[number - 1])]

    def keep(self, numbers: Sequence[int]) -> list[_Seat]:
        """Everybody who is still here, with the samples of these rounds alone."""
        for seat in self.seats:
            seat.samples = [seat.samples[number - 1] for number in numbers]
        return self.seats


def _take_turn(
    seat: _Seat, prompts: list[list[int]], workload: Workload, counts: bool, failed: dict[str, HastenError]
) -> None:
    tokens = workload.batch * (workload.prompt + workload.output)
    limit_s = 60 + tokens / SLOWEST_TOK_PER_S
    with _noting(seat.contender, failed):
        sample = Sample.from_json(seat.process.ask("run", limit_s, prompts=prompts, output=workload.output))
        if counts:
            seat.samples.append(sample)
        seat.peak_rss_bytes = seat.process.ask("peak_rss", SHORT_LIMIT_S)
        seat.process.pause()


@contextmanager
def _noting(contender: Contender, failed: dict[str, HastenError]) -> Iterator[None]:
    """A peer's error is noted in `failed` and goes no further; our own engine's does."""
    try:
        yield
    except HastenError as error:
        if contender.peer is None:
            raise
        failed[contender.spec.name] = error


def _outcome(seat: _Seat, workload: Workload, subject: _Seat, disturbed: int) -> Outcome:
    spec, about = seat.contender.spec, seat.about
    measurement = measurement_of(
        seat.samples,
        workload,
        engine="hasten" if seat.contender.peer is None else spec.name.partition(":")[0],
        version=about["version"],
        form=about["format"],
        weight_bytes=about["weight_bytes"],
        threads=spec.threads,
        peak_rss_bytes=seat.peak_rss_bytes,
        disturbed_rounds=disturbed,
        device=subject.about.get("device", spec.device),
    )
    ids = list(seat.samples[0].ids[0])
    text = subject.process.ask("decode", SHORT_LIMIT_S, ids=ids)
    return Outcome(spec.name, measurement, tuple(seat.samples), about["notes"], text)


def _ratios(ours: Outcome, theirs: Outcome) -> dict[str, Ratio]:
    (decode, prefill), (their_decode, their_prefill) = (
        zip(*map(rates_of, one.samples), strict=True) for one in (ours, theirs)
    )
    return {"decode": paired_ratio(decode, their_decode), "prefill": paired_ratio(prefill, their_prefill)}


OURS = "hasten.bench.peers.ours"


@dataclass(frozen=True)
class Request:
    model: str  # what `hasten.load` takes
    workload: Workload = field(default_factory=Workload)
    recipe: str | None = None
    against: tuple[str, ...] = ()  # peers by name, `llama.cpp:q4_0` (see `hasten.bench.peers.PEERS`)
    source: str | None = None  # what the peers get, where `model` is an artifact
    threads: int | None = None  # None: the cores this process may use
    runs: int = 5
    peer_python: str | None = None  # the Python the peers are installed in; None is this one
    device: str = "cpu"  # where all of them compute: cpu, cuda, or auto
    gpu_memory: str | None = None  # what ours may take of the GPU's
    tensor_parallel: int = 1  # GPUs that ours computes on together


def bout(request: Request, say: Say = lambda _: None) -> tuple[Comparison, Machine]:
    """Compare a model on our engine with other engines on its source.

    Returns:
        The comparison, and the machine with the ceilings measured just before it.

    Raises:
        UsageError: an unknown peer, one that the device is nothing for, a bad length, or no source for peers.
        MachineError: `device` is "cuda", and there is no usable GPU.
        PeerError: a peer is not installed.
        HastenError: our own engine failed.
    """
    from hasten.machine.probe import probe
    from hasten.runtime.executor import choose_device

    check(request.workload)
    device, _ = choose_device(request.device)
    contenders = _contenders(request)
    for contender in contenders[1:]:
        assert contender.peer is not None
        check_device(contender.spec.name, contender.peer, device)
    say("measuring the machine's ceilings")
    devices = [device if device == "cuda" else "cpu"]
    machine = usable_ceilings(probe(threads=contenders[0].spec.threads, devices=devices))
    return compare(contenders, request.workload, request.runs, machine=machine, say=say), machine


def prepared(request: Request, say: Say = lambda _: None) -> dict[str, str]:
    """What each contender needs on disk, made if it is missing: name -> path, "" for one that needs nothing.

    Raises:
        UsageError, PeerError: as `bout`.
        HastenError: one of them cannot be prepared.
    """
    failed: dict[str, HastenError] = {}
    found = _prepare_all(_contenders(request), failed, say)
    for error in failed.values():
        raise error
    return found


def _contenders(request: Request) -> list[Contender]:
    """Ours first, then the peers, each named once."""
    from hasten.machine.cores import usable_cores

    base = EngineSpec(
        name="hasten" if request.recipe is None else f"hasten:{request.recipe}",
        module=OURS,
        format=request.recipe or "",
        source=request.model,
        cache="",
        threads=request.threads or usable_cores(),
        context=request.workload.prompt + request.workload.output,
        batch=request.workload.batch,
        device=request.device,
        gpu_memory=request.gpu_memory,
        tensor_parallel=request.tensor_parallel,
    )
    contenders = [Contender(base)]
    parsed = [(name, *parse(name)) for name in dict.fromkeys(request.against)]
    if parsed:
        origin, cache = str(peer_source(request.source or request.model)), str(cache_dir() / "bench")
        for name, engine, peer, form in parsed:
            spec = dataclasses.replace(
                base, name=name, module=PEERS[engine], format=form, source=origin, cache=cache
            )
            contenders.append(Contender(spec, peer, request.peer_python))
    return contenders


def usable_ceilings(machine: Machine) -> Machine:
    """The machine with the int8 ceiling of the instruction sets our engine may use (`HASTEN_ISA`)."""
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
    return first.parent if first.suffix == ".safetensors" else first
