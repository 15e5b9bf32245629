"""Checks the persistent decode kernel against float32, and times it at real shapes.

    python benchmarks/gpu/persistent.py [tiny] [0.6B] [8B] ... [--only TEXT] [--json FILE]

`tiny` compares every family, at small sizes, with the plain decoder, token after token. The real shapes have
random weights and 512 random keys and values; four steps are compared with a float32 twin, one step is
repeated and must give the same bits, then steps are timed as replays of one graph, the next token fed on the
device. One row a variant is written to benchmarks/results/gpu-persistent.json as soon as it is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from batch_models import copy_bandwidth
from persistent_models import REAL, TINY, Parameters, Twin, reference

from hasten.runtime.gpu.driver import Device, built, current_device, with_defines
from hasten.runtime.gpu.persistent import PersistentDecoder, load_weights, same_format
from hasten.runtime.gpu.shape import PAGE, Shape, Tuning, WeightFormat, kernel_source
from hasten.speed.cost import page_bytes

RESULTS = Path(__file__).parents[1] / "results" / "gpu-persistent.json"
BF16, FP8, INT8 = WeightFormat("bf16"), WeightFormat("fp8"), WeightFormat("int8", 128)
INT4, INT4_MINIMUM = WeightFormat("int4", 128), WeightFormat("int4", 128, minimum=True)
H200 = Device("NVIDIA H200", (9, 0), 132, 232448)
WORST = 3e-4  # relative error of logits that is still called right
WORST_TINY = (
    3e-3  # one key or value that rounds to its other neighbour is worth 2e-3 where heads have 16 elements
)
REPEATS = 40  # of one step: every one must give the same bits


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table."""

    model: str
    name: str
    format: WeightFormat = BF16
    head: WeightFormat | None = None
    tuning: Tuning = dataclasses.field(default_factory=Tuning)
    context: int = 512

    @property
    def shape(self) -> Shape:
        """What is built."""
        config = REAL[self.model]
        biases = frozenset("qkv") if config.architecture == "qwen2" else frozenset[str]()
        return Shape(config, same_format(self.format, self.head), biases, self.tuning)


def variants() -> Iterator[Variant]:
    """What is tried, model by model, formats together."""
    for tuning in (Tuning(), Tuning(in_flight=0), Tuning(16), Tuning(trace=True)):
        yield Variant("0.6B", named(tuning), tuning=tuning)
    for fmt in (BF16, FP8, INT4):
        for tuning in (
            Tuning(),
            Tuning(in_flight=0),
            Tuning(16),
            Tuning(16, in_flight=0),
            Tuning(trace=True),
        ):
            yield Variant("8B", f"{fmt}: {named(tuning)}", fmt, tuning=tuning)
    for fmt, head in (
        (FP8, BF16),
        (INT4, FP8),
        (INT4_MINIMUM, None),
        (WeightFormat("int4", 32), None),
        (INT8, None),
    ):
        yield Variant("8B", f"{fmt}{'' if head is None else f', {head} head'}: {named(Tuning())}", fmt, head)
    for context in (8192, 32768):
        yield Variant("8B", f"bf16, context {context}: {named(Tuning())}", context=context)
    yield Variant("qwen2.5-7B", "bf16")
    yield Variant("gemma3-1B", "bf16")


def named(tuning: Tuning) -> str:
    """What of a tuning is not usual, in a few words."""
    usual, words = Tuning(), []
    for field in dataclasses.fields(tuning):
        value = getattr(tuning, field.name)
        if value != getattr(usual, field.name):
            words.append(f"{field.name} {value}".replace("_", " "))
    return ", ".join(words) or "as usual"


def tiny_shapes() -> dict[str, tuple[Shape, Parameters]]:
    """Every family in bf16, and one model in every other format."""
    wide = TINY["llama-wide"]
    rows, groups = WeightFormat("int8"), [WeightFormat("int8", 32), WeightFormat("int4", 64)]
    cases = [(name, config, BF16) for name, config in TINY.items()]
    cases += [(f"llama-wide {fmt}", wide, fmt) for fmt in (FP8, rows, *groups, INT4, INT4_MINIMUM)]
    shapes = {}
    for name, config, fmt in cases:
        parameters = Parameters(config, 7, "cpu", 1.6)
        for warps in (8, 16):
            shape = Shape(config, same_format(fmt), parameters.biases, Tuning(warps))
            shapes[f"{name}, {warps} warps"] = shape, parameters
    return shapes


def text_of(shape: Shape) -> str:
    """The source that a decoder of this shape builds."""
    return with_defines(kernel_source(), shape.defines() | {"SLOTS": shape.slots(H200)})


def build_all(shapes: list[Shape]) -> None:
    """Compile everything side by side, into the cache."""
    with ProcessPoolExecutor(14) as pool:
        texts = sorted({text_of(shape) for shape in shapes})
        list(pool.map(built, texts, [H200.architecture] * len(texts)))


def check_tiny(name: str, shape: Shape, parameters: Parameters) -> dict[str, Any]:
    """Teacher-forced logits of 70 tokens, pages out of order.

    Before each step the cache holds the plain decoder's keys and values: rounding them to bf16 turns
    differences of 1e-6 into ones of 4e-3 now and then, which would hide a fault as small as that.
    """
    tokens = torch.randint(0, 262, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    expected, pages = reference(shape, parameters, tokens), [4, 1, 3]
    decoder = PersistentDecoder(load_weights(shape, parameters), 96, pages)
    where = [(pages[t // PAGE], t % PAGE) for t in range(len(tokens))]
    page, row = (torch.tensor(at, device="cuda") for at in zip(*where, strict=True))
    given = [t.cuda() for t in (expected.keys, expected.values)]
    found, written = [], 0.0
    for position, token in enumerate(tokens):
        for cache, right in zip(decoder.keys_and_values, given, strict=True):
            cache[:, page, :, row, : shape.config.blocks[0].mixer.head_dim] = right.transpose(0, 1)
        decoder.start(token, position)
        decoder.logits.fill_(float("nan"))
        decoder.step()
        torch.cuda.synchronize()
        found.append(decoder.logits.cpu())
        for cache, right in zip(decoder.keys_and_values, given, strict=True):
            own = cache[
                :, pages[position // PAGE], :, position % PAGE, : shape.config.blocks[0].mixer.head_dim
            ].float()
            written = max(written, float((own - right[:, position].float()).norm() / own.norm()))
    got = torch.stack(found)
    error = float(((got - expected.logits).norm(dim=1) / expected.logits.norm(dim=1)).max())
    agree = int((got.argmax(1) == expected.logits.argmax(1)).sum())
    good = error < WORST_TINY and written < WORST_TINY
    return {
        "variant": name,
        "error": error,
        "written": written,
        "agree": agree,
        "of": len(tokens),
        "good": good,
    }


def check(v: Variant, decoder: PersistentDecoder, parameters: Parameters) -> dict[str, Any]:
    """Four greedy steps from a full context, logits against the twin fed with the same tokens."""
    shape, config = v.shape, REAL[v.model]
    keys, values = decoder.keys_and_values
    for tensor in (keys, values):
        tensor.normal_(generator=torch.Generator(device="cuda").manual_seed(5))
    pages = decoder._buffers["pages"].long()
    held = [
        t[:, pages, :, :, : config.blocks[0].mixer.head_dim].transpose(2, 3).flatten(1, 2)[:, : v.context]
        for t in (keys, values)
    ]
    held = [t.clone() for t in held]
    decoder.start(1000, v.context)
    decoder.tokens.fill_(-1)
    logits = []
    for _ in range(4):
        decoder.logits.fill_(float("nan"))
        decoder.step()
        torch.cuda.synchronize()
        logits.append(decoder.logits.clone())
    chosen = decoder.tokens[v.context + 1 : v.context + 5].tolist()
    expected = Twin(shape, parameters).logits([1000, *chosen[:3]], v.context, *held)
    got = torch.stack(logits)
    error = float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())
    agree = sum(a == b for a, b in zip(chosen, expected.argmax(1).tolist(), strict=True))
    unlike = 0
    for _ in range(REPEATS):
        decoder.start(1000, v.context)
        decoder.step()
        torch.cuda.synchronize()
        unlike += not torch.equal(decoder.logits, logits[0])
    good = error < WORST and agree == 4 and not unlike
    return {"error": error, "agree": agree, "of": 4, "unlike": unlike, "good": good}


def measure(decoder: PersistentDecoder, context: int, steps: int = 64, rounds: int = 7) -> dict[str, float]:
    """Microseconds a step, over rounds of graph replays."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    decoder.start(1000, context)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        decoder.step()
    times = []
    for _ in range(rounds + 2):
        decoder.start(1000, context)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        with torch.cuda.stream(stream):
            begin.record()
            for _ in range(steps):
                graph.replay()
            end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / steps)
    kept = sorted(times[2:])
    return {"us": statistics.median(kept), "us_least": kept[0], "us_most": kept[-1], "rounds": rounds}


def run(v: Variant, weights: Any, parameters: Parameters, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    config = REAL[v.model]
    count = -(-(v.context + 96) // PAGE)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    decoder = PersistentDecoder(weights, count * PAGE, order)
    row = {"model": v.model, "variant": v.name, "context": v.context, **decoder.resources}
    if v.tuning.trace:
        return row | {"cycles": where_time_goes(decoder, v.context), "good": True}
    row |= check(v, decoder, parameters)
    row |= measure(decoder, v.context)
    read = weights.streamed_bytes + page_bytes(config, False, 1) * v.context
    row |= {"tok_s": 1e6 / row["us"], "bytes": read, "limit_us": read / bandwidth * 1e6}
    return row | {"of_limit": row["limit_us"] / row["us"]}


def where_time_goes(decoder: PersistentDecoder, context: int) -> dict[str, float]:
    """Cycles between the marks of a traced kernel: mean over layers and blocks, of thread 0."""
    for _ in range(3):
        decoder.start(1000, context)
        decoder.step()
    torch.cuda.synchronize()
    marks = decoder.trace[:, 2:-3].long().cpu()  # [block, layer, mark]
    order = [0, 1, 2, 12, 13, 14, 15, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    names = ["weights", "x", "sums"]
    label = {
        3 * p + i: f"{n} {names[i]}" for p, n in enumerate(("qkv", "o", "gate/up", "down")) for i in range(3)
    }
    label |= {12: "q, k, v", 13: "keys", 14: "warps merged", 15: "splits merged"}
    found = {}
    for before, at in pairwise(order):
        found[label[at]] = float(((marks[..., at] - marks[..., before]) & 0xFFFFFFFF).double().mean())
    whole = ((marks[:, 1:, 11] - marks[:, :-1, 11]) & 0xFFFFFFFF).double().mean()
    return found | {"qkv weights": float(whole) - sum(found.values()), "layer": float(whole)}


class Record:
    """The JSON file, written anew after every row."""

    def __init__(self, path: Path, bandwidth: float) -> None:
        self.path = path
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        self.value: dict[str, Any] = {
            "machine": f"{current_device().name}, torch {torch.__version__}",
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit.stdout.strip() or None,
            "command": " ".join(["python", *sys.argv]),
            "copy_bytes_per_s": bandwidth,
            "rows": [],
        }

    def add(self, row: dict[str, Any]) -> None:
        """Keep and print a row."""
        self.value["rows"].append(row)
        print({k: round(x, 6) if isinstance(x, float) else x for k, x in row.items()}, flush=True)
        self.path.write_text(json.dumps(self.value, indent=1) + "\n")

    def table(self) -> None:
        """What a reader wants, last."""
        for row in self.value["rows"]:
            if "us" in row:
                speed = f"{row['us']:9.1f} us {row['tok_s']:7.0f} tok/s {row['of_limit']:6.1%}"
            else:
                speed = "" if "failed" not in row else row["failed"][:120]
            right = "" if row.get("good") else "WRONG"
            agree = f"{row.get('agree')}/{row.get('of')}"
            checked = f"{row.get('error', -1):.1e} {agree} {row.get('unlike', '')} {right}"
            print(f"{row.get('model', 'tiny'):10} {row['variant']:42} {speed} {checked}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["tiny", "0.6B", "8B"])
    parser.add_argument("--only", default="", help="variants whose name has this text; several with |")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = [
        v
        for v in variants()
        if v.model in options.models and any(t in v.name for t in options.only.split("|"))
    ]
    tiny = tiny_shapes() if "tiny" in options.models else {}
    tiny = {name: case for name, case in tiny.items() if any(t in name for t in options.only.split("|"))}
    began = time.perf_counter()
    build_all([shape for shape, _ in tiny.values()] + [v.shape for v in chosen])
    print(f"built in {time.perf_counter() - began:.1f} s", flush=True)
    record = Record(options.json, copy_bandwidth())
    for name, (shape, parameters) in tiny.items():
        guarded(record, {"variant": name}, lambda n=name, s=shape, p=parameters: check_tiny(n, s, p))
    weights, key = None, None
    for v in chosen:
        parameters = Parameters(REAL[v.model], 11, "cuda")
        wanted = (v.model, v.format, v.head, v.tuning.warps, v.tuning.slot_bytes)
        if wanted != key:
            weights = None
            torch.cuda.empty_cache()
            weights, key = load_weights(v.shape, parameters), wanted
        own = dataclasses.replace(weights, shape=v.shape)
        guarded(
            record,
            {"model": v.model, "variant": v.name},
            lambda v=v, w=own, p=parameters: run(v, w, p, record.value["copy_bytes_per_s"]),
        )
    record.table()
    print(f"{time.perf_counter() - began:.0f} s")


def guarded(record: Record, named: dict[str, Any], work: Any) -> None:
    """A row, or what went wrong; a lost device ends the run."""
    try:
        record.add(work())
    except Exception as error:  # noqa: BLE001 - one variant's failure must not cost the others
        traceback.print_exc(limit=3)
        record.add({**named, "failed": repr(error)})
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001
            record.table()
            raise SystemExit("the device is lost") from error


if __name__ == "__main__":
    main()
