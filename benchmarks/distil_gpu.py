"""Distillation on one GPU: a model without a quarter of its FFN channels, and one of 4 bits.

    python benchmarks/distil_gpu.py text                 # CPU: windows of text -> WORK/text.npz
    python benchmarks/distil_gpu.py prune                # CPU: WORK/cut.pt (as cut), WORK/repaired.pt
    python benchmarks/distil_gpu.py sample               # GPU: what the model writes -> WORK/sampled.npy
    python benchmarks/distil_gpu.py pruned --minutes 14  # GPU: distils the pruned model and judges it
    python benchmarks/distil_gpu.py quantised --minutes 5     # GPU: the same for 4 bits, int8 head
    python benchmarks/distil_gpu.py piece --file WORK/pruned.hasten/weights.safetensors --number 0   # 60 MB

Each step leaves its result in --work, so that they may run as separate commands, `prune` beside `text` and
`sample`. A training that was stopped goes on. Records go to --out: curve, verdicts, machine. `--save` packs
the student as an artifact (the pruned one at 8 bits); `piece` cuts a file for machines that give back little
at a time: `cat FILE.*` joins it again. No text that judges is ever trained on: distil_text.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import distil_sample
import distil_text
from bar import say
from hasten.cache import write_atomic, write_json
from hasten.compress.calibration import Calibration, cut
from hasten.compress.distil import Decoder
from hasten.compress.distil.trainer import Distilled, Training, distil, divergence
from hasten.compress.prune.layers import with_channels
from hasten.compress.result import Progress
from hasten.compress.torch_model import changed, tensor_values
from hasten.core import SCHEMA_VERSION, Budget, Recipe, as_json
from hasten.errors import HastenError
from hasten.machine.cores import usable_cores
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.quality.divergence import Divergence, judge
from hasten.quality.text import default_text, windows
from hasten.recipe import Distillation, Pruning
from hasten.weights.packed import pack_model

LENGTH = 512
AMOUNT = 0.25
PIECE_FILES, PIECE_BYTES = 4, 15_000_000


def main() -> int:
    """Run one step."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # what cannot be compiled is run as it is
    steps = {
        "text": text,
        "prune": pruned_models,
        "sample": sample,
        "pruned": pruned,
        "quantised": quantised,
        "piece": piece,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(steps))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hasten-distil"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=14.0, help="of training")
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument("--text-tokens", type=int, default=16_000_000, help="of packages' docstrings")
    parser.add_argument("--sample-tokens", type=int, default=8_000_000)
    parser.add_argument("--sample-batch", type=int, default=2048)
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="that pruning reads")
    parser.add_argument("--evaluation-tokens", type=int, default=65_536)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--micro-tokens", type=int, default=16_384)
    parser.add_argument("--head-rows", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--loss", default="forward", choices=["forward", "reverse", "skewed"])
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--recipe", default="w4-head8", help="of `quantised`")
    parser.add_argument("--compiled", action="store_true", help="torch.compile")
    parser.add_argument("--save", action="store_true", help="keep the student as an artifact in --work")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--number", type=int, default=0)
    given = parser.parse_args()
    try:
        steps[given.what](given)
    except HastenError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        return error.exit_code
    return 0


def text(given: argparse.Namespace) -> None:
    """Collect and encode what the machine carries."""
    found = distil_text.windows(given.model, tokens=given.text_tokens, length=given.length, cores=given.cores)
    say(", ".join(f"{name}: {ids.size:,} tokens" for name, ids in found.items()))
    write_atomic(given.work / "text.npz", lambda file: np.savez(file, **found))


def pruned_models(given: argparse.Namespace) -> None:
    """Prune, with and without repair."""
    from hasten.compress.prune import prune

    torch.set_num_threads(given.cores)
    source = open_model(given.model)
    calibration = cut(
        "topics", default_text().calibration, source.tokenizer(), tokens=given.calibration_tokens
    )
    for name, repair in (("repaired", True), ("cut", False)):
        began = time.monotonic()
        made = prune(source, Pruning(kind="ffn", amount=AMOUNT, repair=repair), calibration).source
        values = {
            key: tensor_values(tensor, torch.bfloat16)
            for key, tensor in made.tensors.items()
            if tensor is not source.tensors.get(key)
        }
        write_atomic(given.work / f"{name}.pt", lambda file, kept=values: torch.save(kept, file))
        say(f"{name}: {made.config.blocks[0].feed_forward.width} channels, {time.monotonic() - began:.0f} s")


def _pruned_source(source: Source, path: Path) -> Source:
    values = torch.load(path, weights_only=True)
    width = len(values["layers.0.gate"])
    return changed(source, values, config=with_channels(source.config, width))


def sample(given: argparse.Namespace) -> None:
    """Let the model write: half begins as the calibration topics do, half as docstrings."""
    source, dtype = open_model(given.model), _dtype(given)
    model = Decoder.of(source, dtype, torch.device(given.device), keep=dtype)
    kinds = np.load(given.work / "text.npz")
    found = []
    for seed, kind in enumerate(("topics", "docstrings")):
        began = time.monotonic()
        ids = distil_sample.sampled(
            model,
            kinds[kind],
            length=given.length,
            count=max(1, given.sample_tokens // given.length // 2),
            batch=given.sample_batch,
            seed=seed,
        )
        say(f"sampled from {kind}: {ids.size:,} tokens in {time.monotonic() - began:.0f} s")
        found.append(ids)
    everything = np.concatenate(found)
    kept = distil_text.clean(given.model, everything, given.cores)
    say(f"{len(everything) - len(kept)} of {len(everything)} windows quote the evaluation text and go")
    write_atomic(given.work / "sampled.npy", lambda file: np.save(file, kept))


def pruned(given: argparse.Namespace) -> None:
    """Distil the pruned model."""
    source = open_model(given.model)
    student = _pruned_source(source, given.work / "repaired.pt")
    before = {
        "not repaired": _verdict(given, source, _pruned_source(source, given.work / "cut.pt")),
        "repaired": _verdict(given, source, student),
    }
    _run(given, "pruned", source, student, before, rate=1e-4, recipe=None)


def quantised(given: argparse.Namespace) -> None:
    """Distil the model through the rounding of a recipe's layouts."""
    from hasten.compress.distil.student import Grid, integer_tensor

    source, recipe = open_model(given.model), Recipe.parse(given.recipe)
    rounded = changed(source, {})
    device = torch.device("cpu")
    for name, tensor in source.tensors.items():
        layout = recipe.layout_for(name)
        if len(tensor.shape) == 2 and layout is not None:
            grid = Grid.of(tensor, layout, device, learns=False)
            rounded.tensors[name] = integer_tensor(name, grid.integers(tensor_values(tensor)))
    before = {"rounded to nearest": _verdict(given, source, rounded)}
    _run(given, "quantised", source, source, before, rate=2e-5, recipe=recipe)


def _run(
    given: argparse.Namespace,
    name: str,
    source: Source,
    student: Source,
    before: dict[str, Any],
    rate: float,
    recipe: Recipe | None,
) -> None:
    """Train, judge, record."""
    ids = _training_ids(given)
    options = Distillation(
        loss=given.loss,
        tokens=10**9,  # the clock ends it
        batch_tokens=given.batch_tokens,
        learning_rate=given.learning_rate or rate,
    )
    training = Training(
        micro_tokens=given.micro_tokens,
        head_rows=given.head_rows,
        recompute=given.device == "cpu",
        compiled=given.compiled,
        live_teacher=True,
        checkpoint_seconds=420.0,
    )
    made = distil(
        source,
        student,
        Calibration("machine's text", ids),
        options,
        folder=given.work / name,
        layouts=None if recipe is None else recipe.layout_for,
        device=given.device,
        seconds=given.minutes * 60,
        training=training,
        observer=_tell,
    )
    after = _verdict(given, source, made.source)
    _record(given, name, made, options, ids, before | {"distilled": after})
    if given.save:
        kept = recipe or Recipe.parse("w8")
        plain = dataclasses.replace(kept, default=None, head=None) if recipe else kept
        packed = dataclasses.replace(pack_model(made.source, plain), recipe=kept)
        say(f"saved {save(given.work / f'{name}.hasten', packed, made.source, {'model': source.name})}")


def _training_ids(given: argparse.Namespace) -> npt.NDArray[np.int32]:
    """All windows, shuffled, so that those held out are of every kind."""
    kinds = np.load(given.work / "text.npz")
    parts = [kinds[name] for name in kinds.files]
    if (given.work / "sampled.npy").is_file():
        parts.append(np.load(given.work / "sampled.npy"))
    say(f"{sum(part.size for part in parts):,} tokens to train on")
    ids: npt.NDArray[np.int32] = np.random.default_rng(0).permutation(np.concatenate(parts))
    return ids


_last = [0.0]


def _tell(progress: Progress) -> None:
    now = time.monotonic()
    if now - _last[0] < 10 and progress.tokens_per_s is not None:
        return
    _last[0] = now
    parts = [f"{progress.stage} {progress.done}/{progress.total}"]
    parts += [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
    parts += [] if progress.kl is None else [f"held-out KL {progress.kl:.4f}"]
    if progress.tokens_per_s is not None:
        parts += [f"{progress.tokens_per_s:,.0f} tokens/s", f"{progress.seconds_left or 0:,.0f} s left"]
    say(", ".join(parts))


def _dtype(given: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if given.device != "cpu" else torch.float32


@torch.inference_mode()
def _verdict(given: argparse.Namespace, source: Source, candidate: Source) -> Any:
    """A candidate against the source, both in float32, on the evaluation text."""
    device = torch.device(given.device)
    models = [Decoder.of(made, torch.float32, device) for made in (source, candidate)]
    heads = [model.head() for model in models]
    found = []
    for window in windows(
        default_text().evaluation, source.tokenizer(), tokens=given.evaluation_tokens, length=given.length
    ):
        ids = torch.from_numpy(window.inputs).long().to(device)[None]
        targets = torch.from_numpy(window.targets).long().to(device)
        logits = [m.logits(m.hidden(ids)[0], h) for m, h in zip(models, heads, strict=True)]
        kl = divergence("forward", logits[1], logits[0])
        losses = [torch.nn.functional.cross_entropy(part, targets, reduction="none") for part in logits]
        agree = logits[0].argmax(-1) == logits[1].argmax(-1)
        kept = [part.double().cpu().numpy() for part in (kl, *losses)]
        found.append(Divergence(kept[0], kept[1], kept[2], agree.cpu().numpy()))
    verdict = judge(Divergence.join(found), Budget(0.12))
    say(f"perplexity {verdict.ppl:.4f} ({verdict.ppl_increase:+.2%}), KL {verdict.kl_mean:.4f}")
    return verdict


def _record(
    given: argparse.Namespace,
    name: str,
    made: Distilled,
    options: Distillation,
    ids: npt.NDArray[np.int32],
    verdicts: dict[str, Any],
) -> None:
    on_gpu = given.device != "cpu"
    document = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": f"distil-{name}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": Path(given.model).name,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "text": {"evaluation_sha256": default_text().sha256, "training_tokens": int(ids.size)},
        "options": as_json(options),
        "tokens": made.tokens,
        "seconds": made.seconds,
        "curve": as_json(made.curve),
        "verdicts": as_json(verdicts),
    }
    say(f"wrote {write_json(given.out / f'distil-{name}.json', document)}")
    print("\n".join(made.lines()))


def piece(given: argparse.Namespace) -> None:
    """Copy the number-th 60 MB of a file to --out as FILE.PART files, in order."""
    with given.file.open("rb") as file:
        file.seek(given.number * PIECE_FILES * PIECE_BYTES)
        for part in range(PIECE_FILES):
            data = file.read(PIECE_BYTES)
            if data:
                at = given.number * PIECE_FILES + part
                write_atomic(given.out / f"{given.file.name}.{at:03d}", data)


if __name__ == "__main__":
    sys.exit(main())
