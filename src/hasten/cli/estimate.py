"""`hasten estimate`: how fast a model will be, before it is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cli.console import aligned, emit, note, print_table
from hasten.cli.flags import JsonOption, ThreadsOption, argument, given, optional
from hasten.core import SCHEMA_VERSION, Format, ModelSpec, Recipe, Workload, as_json
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.speed.fit import Calibration
    from hasten.speed.forecast import Case, Fleet, Forecast, Memory, Range
    from hasten.speed.pace import Pace, Published

KEPT = "A calibration that was not finished is not kept: run the same command again."

MODEL = (
    "A config.json or a folder with one (no weights needed), a hub id (its config.json alone is fetched), "
    "a GGUF file, a .hasten artifact, or demo."
)
RECIPES = (
    "How weights are stored, repeatable: bf16, w8, w4-g128, w4-kv8 ...; source: the file's own values. "
    "Default: bf16, w8 and w4, of a GGUF file and an artifact source and w4."
)
MACHINE = "A machine that is not here, by published peaks: h200, epyc-9654 ..., or a JSON file of one."
WORKLOAD = (
    "Instead of lengths: chat, support, translate, summarize, decide, code, a file of your own, latency (512 "
    "in, 128 out) or throughput (8 of 128 in, 64 out)."
)
PROMPTS = "Prompt tokens; several by commas."
CONTEXTS = "Tokens of context at the end of the answer, instead of --prompt; several by commas."


def command(
    model: Annotated[str, argument("MODEL", MODEL)],
    recipe: Annotated[list[str] | None, optional("--recipe", "R", RECIPES)] = None,
    prompt: Annotated[str, given("--prompt", "N", PROMPTS)] = "512",
    output: Annotated[int, given("--output", "N", "Tokens to generate.")] = 128,
    batch: Annotated[str, given("--batch", "N", "Sequences at once; several by commas.")] = "1,8",
    context: Annotated[str | None, optional("--context", "N", CONTEXTS)] = None,
    workload: Annotated[str | None, optional("--workload", "NAME", WORKLOAD)] = None,
    machine: Annotated[str | None, optional("--machine", "NAME", MACHINE)] = None,
    cached: Annotated[float, given("--cached", "X", "Share of a prompt that was computed before.")] = 0.0,
    drafts: Annotated[int, given("--drafts", "N", "Tokens guessed in each step.", min=0)] = 0,
    accepted: Annotated[float, given("--accepted", "X", "Of them, those that hold.")] = 0.0,
    tensor_parallel: Annotated[int, given("--tensor-parallel", "N", "Devices of one model.", min=1)] = 1,
    rate: Annotated[
        float | None, optional("--rate", "X", "Requests a second to serve: how many copies it takes.")
    ] = None,
    threads: ThreadsOption = None,
    calibrate: Annotated[bool, optional("--calibrate", None, "Time this machine again.")] = False,
    json: JsonOption = False,
) -> None:
    """Predict speed and memory of a model from its configuration alone.

    The first estimate on a machine times real layer shapes with the engine's kernels, about a minute, and
    keeps what it found; every later one takes a moment and reads no weights. Each figure has an interval
    that should hold the measured one nine times of ten. For another machine, published peaks stand in, and
    the intervals are as wide as that is vague.
    """
    asked = _Asked.of(model, recipe, _workloads(prompt, output, batch, context, workload))
    asked = replace(asked, cached=cached, drafts=drafts, accepted=accepted)
    where = _Where.of(machine, tensor_parallel, threads, calibrate)
    estimates = tuple(_estimates(asked, where))
    fleets = tuple(_fleets(asked, where, rate)) if rate is not None else ()
    if json:
        emit(_document(asked, where, estimates, fleets))
    else:
        _print(asked, where, estimates, fleets)


# What is asked ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A model by its shape, recipes for it, and workloads."""

    name: str
    spec: ModelSpec
    recipes: tuple[Recipe, ...]
    workloads: tuple[Workload, ...]
    cached: float = 0.0
    drafts: int = 0
    accepted: float = 0.0

    @classmethod
    def of(cls, model: str, recipes: Sequence[str] | None, workloads: tuple[Workload, ...]) -> _Asked:
        name, spec, kept = _shape(model)
        usual = ("bf16", "w8", "w4") if kept is None else ("source", "w4")
        chosen = tuple(_recipe(one, kept) for one in recipes or usual)
        longest = max(work.prompt + work.output for work in workloads)
        if longest > spec.context:
            raise UsageError(
                f"{longest} tokens of prompt and answer are more than the model's context of {spec.context}",
                hint=f"use --context {spec.context}",
            )
        return cls(name, spec, chosen, workloads)

    def cases(self) -> Iterator[Case]:
        from hasten.speed.forecast import Case

        for work in self.workloads:
            cached = max(self.cached, work.shared / work.prompt)
            yield Case(work, cached, self.drafts, self.accepted)


def _shape(ref: str) -> tuple[str, ModelSpec, dict[str, Format] | None]:
    """A model's name and shape, and the formats its file holds; None: a configuration is all there is."""
    from hasten.models.open import open_model
    from hasten.models.source import file_name_of
    from hasten.weights.artifact import is_artifact
    from hasten.weights.packed import source_layout

    if is_artifact(ref):
        from hasten.models.artifact import load_artifact

        artifact = load_artifact(ref)
        linears = artifact.packed.linears.items()
        return artifact.name, artifact.packed.config, {name: linear.layout for name, linear in linears}
    config = _config_of(ref)
    if config is not None:
        spec, kept = _from_config(config)
        return file_name_of(ref) if config.name == Path(ref).name else ref, spec, kept
    source = open_model(ref)
    return (
        source.name,
        source.config,
        {n: source_layout(t) for n, t in source.tensors.items() if len(t.shape) == 2},
    )


def _config_of(ref: str) -> Path | None:
    """The config.json of a folder or hub id, the file itself; None: the model comes as something else."""
    from hasten.models.hub import OWNED, hub_file, is_hub_file

    path = Path(ref).expanduser()
    if path.is_file():
        return path if path.suffix == ".json" else None
    if path.is_dir():
        return path / "config.json" if (path / "config.json").is_file() else None
    if OWNED.fullmatch(ref) and not is_hub_file(ref) and not ref.upper().endswith("GGUF"):
        return hub_file(ref, "config.json", is_fixed=True)
    return None


def _from_config(path: Path) -> tuple[ModelSpec, dict[str, Format] | None]:
    """The shape that a config.json describes. Weights are 16-bit floats unless the folder holds others."""
    from hasten.models.families import hf_spec
    from hasten.models.quantized_formats import KEYS
    from hasten.models.source import read_json_object

    values = read_json_object(path)
    if any(values.get(key) for key in KEYS) and next(path.parent.glob("*.safetensors"), None) is not None:
        from hasten.models.open import open_model
        from hasten.weights.packed import source_layout

        source = open_model(path.parent)
        kept = {n: source_layout(t) for n, t in source.tensors.items() if len(t.shape) == 2}
        return source.config, kept
    return hf_spec({k: v for k, v in values.items() if k not in KEYS}, str(path)), None


def _recipe(name: str, kept: dict[str, Format] | None) -> Recipe:
    """A recipe by its name; `source` becomes the formats the file holds, or bf16 where it was not opened."""
    if name.startswith("mix:"):
        raise UsageError(
            "a mixture is known once it was searched for", hint="optimize first, then estimate the artifact"
        )
    recipe = Recipe.parse(name)
    if recipe.default is not None:
        return recipe
    if kept is None:
        return replace(recipe, default=Format.of(16))
    return replace(recipe, layers=kept, default=Format.of(16))


def _workloads(
    prompt: str, output: int, batch: str, context: str | None, name: str | None
) -> tuple[Workload, ...]:
    """Every batch with every length."""
    batches = _numbers("--batch", batch)
    if name is not None:
        from hasten.bench.workload import traffic
        from hasten.optimize.choice import WORKLOADS

        shapes = {"latency": WORKLOADS["latency"], "throughput": WORKLOADS["throughput"]}
        if name in shapes:
            return (shapes[name],)
        return tuple(traffic(name).typical(m) for m in batches)
    if context is None:
        return tuple(Workload(n, output, m) for n in _numbers("--prompt", prompt) for m in batches)
    lengths = _numbers("--context", context)
    if min(lengths) <= output:
        raise UsageError(
            f"a context of {min(lengths)} tokens has no room for a prompt and an answer of {output}",
            hint=f"use --context {output + 1} or more, or a shorter --output",
        )
    return tuple(Workload(n - output, output, m) for n in lengths for m in batches)


def _numbers(flag: str, text: str) -> list[int]:
    """`1,8` as whole numbers above 0."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and 0 < int(part) < 10**9 for part in parts):
        raise UsageError(
            f"{flag} takes whole numbers from 1 on, by commas, got {text!r}", hint=f"use {flag} 1,8"
        )
    return list(dict.fromkeys(map(int, parts)))


# Where it runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Where:
    """This machine as it was timed, or another by published peaks."""

    calibration: Calibration | None
    other: Published | None
    devices: int

    @classmethod
    def of(cls, machine: str | None, devices: int, threads: int | None, fresh: bool) -> _Where:
        if machine is not None:
            from hasten.speed.pace import published

            return cls(None, published(machine), devices)
        if devices > 1:
            raise UsageError(
                f"--tensor-parallel {devices} is for GPUs, and this estimate is for the CPU",
                hint="name a machine: --machine h200",
            )
        from hasten.bench.calibrate import kept, load_or_calibrate

        if fresh or kept(threads) is None:
            note("timing layers on this machine, about a minute: other work on it lowers the figures ...")
        found = load_or_calibrate(threads, fresh=fresh, say=note)
        if found.is_doubtful:
            note(
                f"{found.untrusted} of {found.timed} times were disturbed by other work, so expect larger "
                "errors than the intervals say; on a quiet machine, time it again: --calibrate"
            )
        return cls(found, None, 1)

    def pace(self, recipe: Recipe) -> Pace:
        if self.other is not None:
            return self.other.pace(recipe, self.devices)
        assert self.calibration is not None
        return self.calibration

    @property
    def room(self) -> int | None:
        """Bytes that are there; None: unknown."""
        if self.other is not None:
            whole = self.other.memory_bytes
            return None if whole is None else whole * self.devices
        from hasten.machine.memory import installed_bytes

        return installed_bytes()


@dataclass(frozen=True)
class _Estimate:
    recipe: Recipe
    bits_per_weight: float | None
    forecast: Forecast
    memory: Memory


def _estimates(asked: _Asked, where: _Where) -> Iterator[_Estimate]:
    from hasten.speed.cost import load_of
    from hasten.speed.forecast import forecast, memory_of

    for recipe in asked.recipes:
        load, pace = load_of(asked.spec, recipe), where.pace(recipe)
        for case in asked.cases():
            yield _Estimate(
                recipe,
                recipe.bits_per_weight(asked.spec),
                forecast(asked.spec, recipe, case, pace, load=load),
                memory_of(asked.spec, recipe, case),
            )


def _fleets(asked: _Asked, where: _Where, rate: float) -> Iterator[tuple[str, Workload, Fleet]]:
    from hasten.speed.forecast import fleet_for

    for recipe in asked.recipes:
        for case in {replace(one, workload=replace(one.workload, batch=1)): None for one in asked.cases()}:
            found = fleet_for(asked.spec, recipe, case, where.pace(recipe), rate)
            yield recipe.name, case.workload, found


# What would help --------------------------------------------------------------------------------------------


def _crossover(asked: _Asked, where: _Where, one: _Estimate) -> int | None:
    """The batch from which on a decode step is bound by arithmetic; None: above 1,024."""
    from hasten.speed.cost import load_of
    from hasten.speed.pace import Step

    load, pace, work = load_of(asked.spec, one.recipe), where.pace(one.recipe), one.forecast.case.workload
    for batch in (1 << power for power in range(11)):
        if pace.spent(load, Step(batch, work.prompt + work.output / 2)).bound == "compute":
            return batch
    return None


def _helps(asked: _Asked, where: _Where, one: _Estimate) -> list[tuple[str, float]]:
    """What would shorten a whole answer, and to what share of its time; the most first."""
    from hasten.errors import HastenError
    from hasten.speed.forecast import forecast

    case, found = one.forecast.case, []
    now = one.forecast.whole_ms
    narrower = {"weights in 4 bits": Recipe.parse("w4-kv8" if one.recipe.kv == "int8" else "w4")}
    if one.recipe.kv == "bf16":
        narrower["keys and values in 8 bits"] = replace(one.recipe, kv="int8")
    tries = [(name, recipe, case) for name, recipe in narrower.items() if recipe != one.recipe]
    tries.append(
        ("half of each prompt from the cache", one.recipe, replace(case, cached=(1 + case.cached) / 2))
    )
    if not case.drafts:
        tries.append(("2 of 4 drafts accepted a step", one.recipe, replace(case, drafts=4, accepted=2.0)))
    for name, recipe, changed in tries:
        try:
            other = forecast(asked.spec, recipe, changed, where.pace(recipe))
        except HastenError:
            continue
        found.append((name, other.whole_ms / now))
    return sorted((pair for pair in found if pair[1] < 0.97), key=lambda pair: pair[1])


# What is shown ----------------------------------------------------------------------------------------------


def _document(
    asked: _Asked,
    where: _Where,
    estimates: Sequence[_Estimate],
    fleets: Sequence[tuple[str, Workload, Fleet]],
) -> dict[str, Any]:
    calibration = where.calibration
    return {
        "schema_version": SCHEMA_VERSION,
        "model": asked.name,
        "parameters": asked.spec.weights_stored,
        "machine": _machine(where),
        "calibration": None
        if calibration is None
        else {
            key: getattr(calibration, key)
            for key in ("cpu", "isa", "threads", "seconds", "noise", "repeated", "untrusted")
        },
        "estimates": [
            {
                "recipe": one.recipe.name,
                "bits_per_weight": one.bits_per_weight,
                **{k: v for k, v in as_json(one.forecast).items() if k != "recipe"},
                "memory": {**as_json(one.memory), "total": one.memory.total},
            }
            for one in estimates
        ],
        "recipes": [
            {
                "recipe": one.recipe.name,
                "compute_bound_from_batch": _crossover(asked, where, one),
                "would_help": [{"what": what, "time": share} for what, share in _helps(asked, where, one)],
            }
            for one in {one.recipe.name: one for one in reversed(estimates)}.values()
        ],
        "fleets": [
            {"recipe": name, "workload": as_json(work), **as_json(fleet)} for name, work, fleet in fleets
        ],
    }


def _machine(where: _Where) -> dict[str, Any]:
    if where.other is not None:
        return {**as_json(where.other), "devices": where.devices, "is_measured": False}
    assert where.calibration is not None
    return {"name": where.calibration.cpu, "source": where.calibration.source, "is_measured": True}


_COLUMNS = (
    *("recipe", "batch", "prompt", "first\ntoken", "90 %", "a token", "90 %", "decode\ntok/s"),
    *("memory\nGB", "bound by"),
)


def _print(
    asked: _Asked,
    where: _Where,
    estimates: Sequence[_Estimate],
    fleets: Sequence[tuple[str, Workload, Fleet]],
) -> None:
    print_table(None, _COLUMNS, [_row(one) for one in estimates], out=True)
    sys.stdout.write(aligned(list(_lines(asked, where, estimates))))
    if fleets:
        sys.stdout.write(f"\ncopies for {fleets[0][2].rate:g} requests a second, at most 85 % busy\n")
        rows = [["recipe", "prompt", "copies", "busy", "at once", "waiting", "first token", "a token"]]
        sys.stdout.write(aligned(rows + [_fleet_row(*one) for one in fleets]))


def _row(one: _Estimate) -> list[str]:
    found, work = one.forecast, one.forecast.case.workload
    tpot, decode = found.tpot_ms, found.decode_tok_per_s
    return [
        found.recipe,
        str(work.batch),
        f"{work.prompt:,}",
        _time(found.ttft_ms.value),
        _range(found.ttft_ms),
        "none" if tpot is None else _time(tpot.value),
        "" if tpot is None else _range(tpot),
        "none" if decode is None else _figure(decode.value),
        f"{one.memory.total / 1e9:,.2f}",
        found.bound,
    ]


def _fleet_row(name: str, work: Workload, fleet: Fleet) -> list[str]:
    times = [_time(ms) for ms in (fleet.waiting_ms, fleet.ttft_ms, fleet.tpot_ms)]
    return [
        *(name, f"{work.prompt:,}", str(fleet.replicas), f"{fleet.busy:.0%}", f"{fleet.running:.1f}"),
        *times,
    ]


def _range(found: Range) -> str:
    """The interval, in the unit that its middle has."""
    unit = 1e3 if found.value >= 1e3 else 1.0
    return f"{_figure(found.low / unit)}-{_figure(found.high / unit)}"


def _time(ms: float) -> str:
    """Milliseconds, or seconds from one on."""
    return f"{_figure(ms / 1e3)} s" if ms >= 1e3 else f"{_figure(ms)} ms"


def _figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _lines(asked: _Asked, where: _Where, estimates: Sequence[_Estimate]) -> Iterator[tuple[str, str]]:
    work = estimates[0].forecast.case.workload
    yield (
        "model",
        f"{asked.name}, {asked.spec.weights_stored / 1e6:,.0f} M parameters, {work.output} tokens out",
    )
    yield "machine", _described(where)
    room = where.room
    for recipe in asked.recipes:
        own = [one for one in estimates if one.recipe == recipe]
        batch = _crossover(asked, where, own[0])
        turn = "memory up to batch 1,024" if batch is None else f"arithmetic from batch {batch} on"
        parts = own[0].forecast.decode_parts
        most = max(parts, key=lambda part: parts[part])
        yield (
            recipe.name,
            f"decode: {turn}; {most} {parts[most] / sum(parts.values()):.0%} of a step of batch {work.batch}",
        )
        helps = [f"{what} {1 / share:.2f}x" for what, share in _helps(asked, where, own[0])]
        yield "", f"would help: {', '.join(helps) or 'nothing that is known here'}"
        if room is not None and own[-1].memory.total > room:
            yield "", f"does not fit: {own[-1].memory.total / 1e9:,.1f} GB of {room / 1e9:,.1f} GB"


def _described(where: _Where) -> str:
    if where.other is not None:
        times = f"{where.devices} x " if where.devices > 1 else ""
        title = where.other.title or where.other.name
        return f"{times}{title}: published peaks, not measured ({where.other.source})"
    found = where.calibration
    assert found is not None
    told = f", {found.repeated} disturbed rounds repeated" if found.repeated else ""
    told += f", {found.untrusted} times stayed disturbed" if found.untrusted else ""
    return f"{found.cpu}, {found.isa}, {found.threads} threads, timed in {found.seconds:.0f} s{told}"
