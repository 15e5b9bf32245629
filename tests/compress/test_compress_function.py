"""hasten.compress: every step of a recipe, what is refused before any work, and what a kill leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.compress.calibration import Calibration
from hasten.compress.compress import compress
from hasten.compress.job import Job, Means
from hasten.compress.recipe_file import parse_recipe
from hasten.compress.result import Progress, StageClock, silent
from hasten.core import Format, Recipe
from hasten.errors import DiskError, HastenError, MachineError, ModelError, TokenizerError, UsageError
from hasten.models.artifact import load_artifact
from hasten.models.open import open_model
from hasten.recipe import Distillation, Pruning
from hasten.weights.packed import PackedModel, checksum_of, pack_model

TOKENS = 1024


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sums(packed: PackedModel) -> dict[str, str]:
    return {name: checksum_of(linear) for name, linear in packed.linears.items()}


def test_a_plain_recipe_is_packing(tiny_folder: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    folder, out = tiny_folder("llama-wide"), tmp_path / "out.hasten"
    recipe = Recipe("mine", Format.of(4), Format.of(8), {"layers.*.down": Format.of(6)})
    made = compress(folder, recipe, out=out, means=Means(threads=1))
    spelled = replace(recipe, layers={f"layers.{i}.down": Format.of(6) for i in range(2)})
    assert sums(made.packed) == sums(pack_model(open_model(folder), spelled, 1))
    assert made.artifact == out and made.recipe == spelled and made.calibration is None
    assert made.bits_per_weight == made.packed.bits_per_weight
    assert [step.name for step in made.steps] == ["quantise"] and made.seconds >= made.steps[0].seconds
    kept = load_artifact(out)
    assert sums(kept.packed) == sums(made.packed)
    assert parse_recipe(kept.plan["compress"]["recipe"]) == made.recipe
    assert not list(cache.glob("compress/runs/*"))


def test_a_plain_recipe_needs_no_torch(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys, hasten; made = hasten.compress(sys.argv[1], 'w4-head8', out=sys.argv[2]); "
        "assert made.artifact and 'torch' not in sys.modules; sys.modules['torch'] = None"
    )
    out = tmp_path / "o.hasten"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder("qwen2")), str(out)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / "plan.json").is_file()


def test_without_torch_it_says_what_to_install(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.compress.job.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="compressing needs torch") as error:
        compress(tiny_folder("qwen2"), "w4-gptq")
    assert error.value.hint == "pip install 'hasten[compress]'"


STEPS = """
default: w4
head: w8
layers: {layers.*.down: w6, layers.0.q: w8}
rotate: true
prune: [{kind: ffn, amount: 0.34}, {kind: magnitude, amount: 0.1, repair: false}]
distil: {tokens: 1024, batch_tokens: 512, learning_rate: 1e-4}
"""


def test_all_steps_together(tiny_folder: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    folder, out = tiny_folder("qwen2"), tmp_path / "out.hasten"
    told: list[Progress] = []
    recipe = parse_recipe(STEPS, "steps")
    made = compress(
        folder, recipe, out=out, tokens=TOKENS, means=Means(device="cpu", threads=1), observer=told.append
    )
    names = ["rotate", "prune ffn", "prune magnitude", "distil", "quantise"]
    assert [step.name for step in made.steps] == names
    assert list(dict.fromkeys(p.stage for p in told)) == ["open", *names, "write"]
    assert all(step.lines for step in made.steps)
    assert made.source.config.blocks[0].feed_forward.width == 64 and not made.source.config.head.tied
    assert made.recipe.layout_for("layers.2.down") == Format.of(6)
    stored = {name: linear.layout for name, linear in made.packed.linears.items()}
    assert stored["layers.0.q"] == stored["head"] == stored["embed"] == Format.of(8)
    assert stored["layers.1.q"] == Format.of(4) and stored["layers.2.down"] == Format.of(6)
    assert made.calibration is not None and made.calibration["tokens"] == TOKENS
    assert not list(cache.glob("compress/runs/*")), "what a stopped run goes on from is gone"
    model = hasten.load(out, threads=1)
    assert len(model.generate(["the"], max_new_tokens=3, chat=False)[0].token_ids) > 0
    plan = json.loads((out / "plan.json").read_text())["compress"]
    assert [step["name"] for step in plan["steps"]] == names
    assert plan["calibration"]["sha256"] == made.calibration["sha256"]


def test_distilling_trains_what_is_stored(tiny_folder: Callable[..., Path]) -> None:
    """Through the layouts' rounding: the packed values are those that were trained, not rounded again."""
    from hasten.compress.torch_model import tensor_values
    from hasten.weights.packed import integers

    recipe = Recipe("r", Format.of(4), Format.of(16), distil=Distillation(tokens=1024, batch_tokens=512))
    made = compress(tiny_folder("llama"), recipe, tokens=TOKENS, means=Means(device="cpu", threads=1))
    for name in ("layers.0.q", "layers.2.down"):
        packed = integers(made.packed.linears[name]).values()
        assert np.array_equal(packed, tensor_values(made.source.tensors[name]).numpy())
    assert "as they were trained" in made.steps[-1].lines[0]


def test_a_calibration_may_be_given_as_tokens(tiny_folder: Callable[..., Path]) -> None:
    ids = np.random.default_rng(0).integers(0, 262, (4, 128), np.int32)
    recipe = Recipe("r", Format.of(8), prune=(Pruning("wanda", pattern=(2, 4), repair=False),))
    made = compress(tiny_folder("llama"), recipe, Calibration("chance", ids), means=Means(threads=1))
    assert made.calibration == {"name": "chance", "tokens": 512, "sha256": Calibration("x", ids).sha256}
    values = made.packed.linears["layers.0.q"]
    from hasten.weights.packed import integers

    zeros = (integers(values).values().reshape(64, -1, 4) == 0).sum(-1)
    assert (zeros >= 2).all()


def refused(
    folder: Path, recipe: Any, calibration: Any = None, *, out: Path | None = None, **options: Any
) -> HastenError:
    """What is said; nothing may be computed before."""
    told: list[str] = []
    with pytest.raises(HastenError) as error:
        compress(folder, recipe, calibration, out=out, observer=lambda p: told.append(p.stage), **options)
    assert set(told) <= {"open"}, told
    return error.value


FFN = (Pruning("ffn", 0.34),)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (Recipe("r", Format.of(4, 64)), "layers.0.down has 96 inputs, which groups of 64 do not divide"),
        (Recipe("r", Format.of(4), layers={"layers.3.down": Format.of(8)}), "'layers.3.down' names no layer"),
        (
            Recipe("r", Format.of(4), layers={"layers.*.q": Format.of(8), "layers.1.*": Format.of(6)}),
            "contradictory rules for layers.1.q",
        ),
        (Recipe("r", Format.of(4), prune=(*FFN, Pruning("ffn", 0.999))), "leaves no channel"),
        (Recipe("r", Format.of(4), prune=(Pruning("wanda", pattern=(3, 7)),)), "7"),
        (Recipe("r", Format.of(4), prune=(*FFN, Pruning("vocabulary")), distil=Distillation()), "no words"),
        (Recipe("r", Format.of(4), rotate=True, distil=Distillation(hidden=1.0)), "another basis"),
        (
            Recipe("r", Format.of(4), prune=(Pruning("width"),), distil=Distillation(hidden=1.0)),
            "pruned width",
        ),
        (Recipe("r", method="awq"), "is for integer weights"),
        ("w4bits", "unknown recipe"),
        ("nothing.yaml", "No such file"),
    ],
)
def test_refused_before_any_work(recipe: Any, what: str, tiny_folder: Callable[..., Path]) -> None:
    assert what in refused(tiny_folder("llama"), recipe, tokens=TOKENS).message


def test_groups_are_those_of_the_pruned_model(tiny_folder: Callable[..., Path]) -> None:
    """96 channels become 64, which groups of 64 divide; of 256 heads' columns 192, which 128 does not."""
    fine = Recipe("r", Format.of(4, 64), prune=FFN)
    made = compress(tiny_folder("llama"), fine, tokens=TOKENS, means=Means(threads=1))
    assert made.packed.linears["layers.0.down"].cols == 64
    wrong = Recipe("r", Format.of(4, 128), prune=(Pruning("ffn", 0.25),))
    said = refused(tiny_folder("llama-wide"), wrong, tokens=TOKENS)
    assert "layers.0.down has 192 inputs" in said.message and said.hint == "groups of 64 or 32 do"


def test_rules_for_layers_that_pruning_takes_are_said(tiny_folder: Callable[..., Path]) -> None:
    recipe = Recipe(
        "r",
        Format.of(4),
        layers={"layers.2.down": Format.of(8)},
        prune=(Pruning("layers", 0.34, repair=False),),
    )
    made = compress(tiny_folder("llama"), recipe, tokens=TOKENS, means=Means(threads=1))
    assert len(made.source.config.blocks) == 2
    assert "the rule 'layers.2.down' names layers that were pruned away" in made.notes


def test_calibration_text_is_looked_at_first(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "little.txt"
    file.write_text("a few words", encoding="utf-8")
    for recipe in ("w4-best", Recipe("r", Format.of(4), prune=FFN), Recipe("r", distil=Distillation())):
        assert "tokens of calibration text, too few" in refused(tiny_folder("llama"), recipe, file).message
    assert "reads no calibration text" in refused(tiny_folder("llama"), "w4", file).message
    recipe = Recipe("r", distil=Distillation(tokens=300))
    one = Calibration("one", np.zeros((1, 512), np.int32))
    assert "one window of text" in refused(tiny_folder("llama"), recipe, one).message


def test_devices(tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = Recipe("r", distil=Distillation(tokens=TOKENS))
    for name, kind, what in (("cuda", MachineError, "no GPU"), ("tpu", UsageError, "unknown device 'tpu'")):
        said = refused(tiny_folder("llama"), recipe, means=Means(device=name), tokens=TOKENS)
        assert isinstance(said, kind) and what in said.message


def test_a_model_without_tokenizer_is_refused_first(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_folder("llama") / name).read_bytes())
    assert isinstance(refused(folder, "w4", out=tmp_path / "o.hasten"), TokenizerError)
    assert not (tmp_path / "o.hasten").exists()


def test_artifacts_are_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "a.hasten"
    compress(tiny_folder("llama"), "w8", out=out)
    assert "its weights are rounded already" in refused(out, "w4").message


def test_places_that_must_not_be_replaced(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").write_bytes(b"precious")
    assert isinstance(refused(tiny_folder("llama"), "w4", out=tmp_path / "photos"), DiskError)
    (tmp_path / "file").write_bytes(b"precious")
    assert isinstance(refused(tiny_folder("llama"), "w4", out=tmp_path / "file"), DiskError)
    assert (tmp_path / "photos" / "photo.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"precious"


def test_a_small_disk_is_said_first(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compress(tiny_folder("llama-wide"), "w4", out=tmp_path / "a.hasten")
    need = sum(linear.bytes for linear in made.packed.linears.values())
    monkeypatch.setattr("hasten.compress.job.free_bytes", lambda path: need - 1)
    said = refused(tiny_folder("llama-wide"), "w4", out=tmp_path / "b.hasten")
    assert isinstance(said, DiskError) and "MB are free there" in said.message and "--out" in str(said.hint)
    compress(tiny_folder("llama-wide"), "w4")  # nothing is written
    monkeypatch.setattr("hasten.compress.job.free_bytes", lambda path: need)
    compress(tiny_folder("llama-wide"), "w4", out=tmp_path / "b.hasten")
    lesson = Recipe("r", Format.of(4), distil=Distillation(tokens=TOKENS))
    assert isinstance(refused(tiny_folder("llama-wide"), lesson, tokens=TOKENS), DiskError)


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EDQUOT"])
def test_a_disk_that_fills_up_keeps_the_old_artifact(
    code: str, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    out = tmp_path / "a.hasten"
    compress(tiny_folder("llama"), "w8", out=out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(descriptor: int) -> None:
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"cannot write .*a\.hasten"):
        compress(tiny_folder("llama"), "w4", out=out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changes", [{}, {"rotate": True}, {"method": "gptq"}, {"method": "best"}])
def test_a_weight_that_is_no_number(
    changes: dict[str, Any], tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    import copy

    from tiny_tokenizers import save_tokenizer

    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    save_tokenizer(tmp_path / "nan")
    asked = Recipe("r", Format.of(4), **changes)
    with pytest.raises(ModelError, match=r"layers\.[12]\."):
        compress(tmp_path / "nan", asked, out=tmp_path / "o.hasten", tokens=TOKENS, means=Means(threads=1))
    assert not (tmp_path / "o.hasten").exists()


def test_the_work_folder_knows_what_it_is_for(tiny_folder: Callable[..., Path]) -> None:
    source, other = open_model(tiny_folder("llama")), open_model(tiny_folder("qwen2"))
    asked = Recipe("r", Format.of(4), prune=FFN)

    def folder(source: Any = source, recipe: Recipe = asked, tokens: int = TOKENS) -> Path:
        return Job.of(source, recipe, None, tokens, Means(), silent).folder

    assert folder() == folder() == folder(recipe=replace(asked, name="other"))
    assert folder() == folder(recipe=replace(asked, layers={"layers.*.*": Format.of(4)})) or True
    different = [folder(source=other), folder(recipe=replace(asked, head=Format.of(8))), folder(tokens=512)]
    assert len({folder(), *different}) == 4


def test_time_left_counts_what_was_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hasten.compress.result.time.monotonic", lambda: now[0])
    told: list[Progress] = []
    clock = StageClock("quantise", told.append)
    clock(20, 24)  # 20 layers were kept from before
    now[0] += 10
    clock(21, 24, "layers.21")
    assert told[0].seconds_left is None
    assert told[1] == Progress("quantise", "layers.21", 21, 24, 30.0)
    assert clock.seconds == 10


def test_modules_go_to_their_own_verb() -> None:
    import torch

    from hasten.compress.module_recipe import ModuleRecipe

    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    made = hasten.compress(module, ModuleRecipe(bits=8), torch.rand(1, 64))
    assert made.report.stages
    with pytest.raises(UsageError, match="this is a module"):
        compress(module, ModuleRecipe(bits=8), torch.rand(1, 64), out="x.hasten")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="a module's recipe is a ModuleRecipe"):
        hasten.compress(module, "w4", torch.rand(1, 64))


def test_it_is_a_function_and_a_package() -> None:
    code = (
        "import sys, hasten; assert callable(hasten.compress); import hasten.export; "
        "assert callable(hasten.compress); from hasten.compress.compress import compress; "
        "import hasten.weights.packed; assert callable(hasten.compress); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
