"""`hasten show` and `hasten pull`: what a model is before it runs, and how one of the hub is fetched."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cli.console import Ticker, aligned, emit
from hasten.cli.flags import JsonOption, ModelArgument, argument, optional
from hasten.core import SCHEMA_VERSION, ModelSpec
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.models.hub import Pulled
    from hasten.models.source import Source
    from hasten.models.tokenizer import Tokenizer

KEPT = "What is complete of a download is kept; the same command goes on where this one stopped."
CONTEXT = "Tokens of context to reckon the memory for. Default: the model's own."
ContextOption = Annotated[int | None, optional("--context", "N", CONTEXT, min=1)]


def command(model: ModelArgument, context: ContextOption = None, json: JsonOption = False) -> None:
    """Show what a model is: architecture, formats, memory, tokenizer, what is unusual.

    Opens the model without reading its weights. The memory is what recipe `source` takes: weights as packed,
    and keys and values in bf16 of one sequence at this context.
    """
    from hasten.weights.artifact import is_artifact

    document = _of_artifact(model, context) if is_artifact(model) else _of_source(model, context)
    document = {"schema_version": SCHEMA_VERSION, "model": model, **document}
    if json:
        emit(document)
    else:
        sys.stdout.write(aligned(list(_lines(document))))


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Warnings that opening a model gives, as lines instead of on stderr."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, handler = logging.getLogger("hasten.models"), Keep(logging.WARNING)
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.propagate = before


def _of_source(ref: str, context: int | None) -> dict[str, Any]:
    from hasten.models.open import open_model
    from hasten.weights.packed import source_layout

    tokenizer = None
    with _heard() as warnings:
        source = open_model(ref)
        try:
            tokenizer = source.tokenizer()
        except HastenError as error:  # what the weights are is worth showing all the same
            warnings.append(f"the tokenizer cannot be used: {error.message}")
    stored = {name: (t.dtype, t.shape) for name, t in source.tensors.items()}
    packed = {
        name: (layout.name, layout.bytes_of(*t.shape))
        for name, t in source.tensors.items()
        if len(t.shape) == 2 and (layout := source_layout(t))
    }
    return {
        "name": source.name,
        "files": [{"path": str(file.path), "bytes": file.bytes} for file in source.files],
        **_shape(source.config),
        "formats": _formats({name: kind for name, (kind, shape) in stored.items() if len(shape) == 2}),
        "packed": _formats({name: kind for name, (kind, _) in packed.items()}),
        "memory": _memory(source.config, sum(size for _, size in packed.values()), context),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        "unusual": [*warnings, *_unusual(source, tokenizer)],
    }


def _of_artifact(ref: str, context: int | None) -> dict[str, Any]:
    from hasten.models.artifact import load_artifact

    with _heard() as warnings:
        artifact = load_artifact(ref)
    packed, plan = artifact.packed, artifact.plan
    kinds = {name: linear.layout.name for name, linear in packed.linears.items()}
    origin = plan.get("source")
    return {
        "name": artifact.name,
        "files": [{"path": str(p), "bytes": p.stat().st_size} for p in sorted(artifact.folder.iterdir())],
        **_shape(packed.config),
        "recipe": packed.recipe.name,
        "source": origin.get("ref") if isinstance(origin, Mapping) else None,
        "verdict": plan.get("verdict"),
        "formats": _formats(kinds),
        "packed": _formats(kinds),
        "memory": _memory(packed.config, packed.stored_bytes, context),
        "tokenizer": _tokenizer(artifact.tokenizer),
        "unusual": warnings,
    }


def _shape(spec: ModelSpec) -> dict[str, Any]:
    """The architecture in numbers; what blocks differ in is listed."""
    mixers = [block.mixer for block in spec.blocks]
    first = mixers[0]
    rotary = first.rotary
    return {
        "architecture": spec.architecture,
        "parameters": spec.weights_stored,
        "layers": len(spec.blocks),
        "width": spec.width,
        "heads": first.heads,
        "kv_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "feed_forward": spec.blocks[0].feed_forward.width,
        "activation": spec.blocks[0].feed_forward.activation,
        "vocabulary": spec.vocab,
        "tied_head": spec.head.tied,
        "context": spec.context,
        "rope": None
        if rotary is None
        else {"theta": rotary.theta, "scaling": rotary.scaling.kind, "factor": rotary.scaling.factor},
        "windows": {str(window): n for window, n in Counter(m.window for m in mixers).items() if window},
        "biases": sorted({name for block in spec.blocks for name in block.biases}),
    }


def _formats(kinds: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """How many matrices of each kind of layer have each format: {"q": {"Q4_K": 20, "Q6_K": 4}}."""
    found: dict[str, Counter[str]] = {}
    for name, kind in kinds.items():
        found.setdefault(name.rpartition(".")[2], Counter())[kind] += 1
    order = ("embed", "q", "k", "v", "o", "gate", "up", "down", "head")
    parts = sorted(found, key=lambda part: order.index(part) if part in order else len(order))
    return {part: dict(found[part].most_common()) for part in parts}


def _memory(spec: ModelSpec, weights: int, context: int | None) -> dict[str, int]:
    from hasten.speed.cost import kv_read_bytes

    tokens = min(context or spec.context, spec.context)
    kv = round(kv_read_bytes(spec, tokens, False))
    return {"context": tokens, "weight_bytes": weights, "kv_bytes": kv, "bytes": weights + kv}


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    fields = tokenizer.fields
    plain = tokenizer.encode("a", add_special=False)
    return {
        "tokens": fields.vocab_size,
        "bos": fields.special_tokens.get("bos_token"),
        "bos_before_texts": len(tokenizer.encode("a")) > len(plain),
        "ends": {tokenizer.spelling(i) or str(i): i for i in fields.eos_ids},
        "templates": sorted(fields.chat_templates),
        "sampling": dict(fields.sampling),
    }


def _unusual(source: Source, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What a reader would not expect of such a model."""
    if source.adapters:
        yield "merged with " + ", ".join(source.adapters)
    if source.unused:
        more = f" and {len(source.unused) - 3} more" if len(source.unused) > 3 else ""
        yield f"{len(source.unused)} tensors without use: {', '.join(source.unused[:3])}{more}"
    if tokenizer is not None:
        extra = source.config.vocab - tokenizer.vocab_size
        if extra:
            what = (
                "rows of the embedding have no token" if extra > 0 else "tokens have no row of the embedding"
            )
            yield f"{abs(extra)} {what}"
        if not tokenizer.fields.chat_templates:
            yield "no chat template: a base model, or one whose template was lost"
        if not tokenizer.eos_ids:
            yield "no token ends a text"
    made = [name for name, tensor in source.tensors.items() if tensor.is_made and tensor.dtype == "F32"]
    if made:
        yield f"{len(made)} matrices fit no integer layout and are kept in bf16"


def _lines(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    size, memory = sum(file["bytes"] for file in document["files"]), document["memory"]
    files = f"{len(document['files'])} file" + "s" * (len(document["files"]) != 1)
    yield "model", f"{document['name']}, {files}, {size / 1e9:,.2f} GB"
    if "recipe" in document:
        yield "artifact", f"recipe {document['recipe']}, made from {document['source'] or 'unknown'}"
    yield (
        "architecture",
        f"{document['architecture']}, {document['parameters'] / 1e6:,.0f} M parameters, "
        f"{document['layers']} layers of width {document['width']}, {document['heads']} heads of "
        f"{document['head_dim']} ({document['kv_heads']} for keys), feed-forward {document['feed_forward']}, "
        f"{document['activation']}",
    )
    rope = document["rope"]
    turned = "no positions" if rope is None else f"rope theta {rope['theta']:,.0f}, scaling {rope['scaling']}"
    windows = "".join(f", window {window} in {n} layers" for window, n in document["windows"].items())
    yield "context", f"{document['context']:,} tokens, {turned}{windows}"
    for part, kinds in document["formats"].items():
        yield "format" if part == next(iter(document["formats"])) else "", f"{part}: {_counted(kinds)}"
    yield (
        "memory",
        f"{memory['bytes'] / 1e9:,.2f} GB: weights {memory['weight_bytes'] / 1e9:,.2f}, keys and values of "
        f"{memory['context']:,} tokens {memory['kv_bytes'] / 1e9:,.2f}",
    )
    if document["tokenizer"] is not None:
        yield from _tokenizer_lines(document["tokenizer"])
    for number, text in enumerate(document["unusual"] or ["nothing"]):
        yield "" if number else "unusual", text


def _tokenizer_lines(tokens: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    before = " before texts" if tokens["bos_before_texts"] else " not put before texts"
    bos = f"{tokens['bos']}{before}" if tokens["bos"] else "none"
    yield "tokenizer", f"{tokens['tokens']:,} tokens, bos {bos}"
    yield "ends", ", ".join(f"{text} ({index})" for text, index in tokens["ends"].items()) or "none"
    yield "template", ", ".join(tokens["templates"]) or "none"
    advised = ", ".join(f"{name} {value:g}" for name, value in tokens["sampling"].items())
    yield "sampling", advised or "no advice of the authors: greedy"


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} x {count}" if count > 1 else kind for kind, count in kinds.items())


# pull -------------------------------------------------------------------------------------------------------

IdArgument = Annotated[str, argument("ID", "OWNER/NAME, OWNER/NAME:Q4_K_M or OWNER/NAME/FILE.gguf.")]
INCLUDE = "Take the files whose name has this text in it, such as Q4_K_M, alone; repeatable."
IncludeOption = Annotated[list[str] | None, optional("--include", "TEXT", INCLUDE)]


def pull(model: IdArgument, include: IncludeOption = None, json: JsonOption = False) -> None:
    """Download a model from the hub, and check every file's digest.

    A download that was cut goes on where it stopped. Of a folder of safetensors everything that running it
    needs is taken; of a hub id of GGUF files the one that is named (--include, or :Q4_K_M behind the id).
    The files lie in the hub's own cache: later verbs find them by the same id, without a network too.
    """
    from hasten.models import hub

    with Ticker() as ticker:
        found = hub.pull(
            model, tuple(include or ()), lambda name, done, total: _tell_pulled(ticker, name, done, total)
        )
    if json:
        emit(_pulled(model, found))
        return
    rows = [(f.name, f"{f.bytes / 1e6:,.1f} MB", f"{f.kind} {f.digest[:16]}") for f in found.files]
    total = sum(f.bytes for f in found.files)
    sys.stdout.write(aligned(rows) + f"{len(rows)} files, {total / 1e9:,.2f} GB, all digests are right\n")
    sys.stdout.write(f"run it: hasten generate {found.ref} -p TEXT\n")


def _tell_pulled(ticker: Ticker, name: str, done: int, total: int) -> None:
    ticker.count(f"downloading {name}", done >> 20, total >> 20, detail="MB")


def _pulled(model: str, found: Pulled) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "ref": found.ref,
        "revision": found.revision,
        "folder": str(found.folder),
        "files": [
            {"name": f.name, "path": str(f.path), "bytes": f.bytes, f.kind: f.digest} for f in found.files
        ],
    }
