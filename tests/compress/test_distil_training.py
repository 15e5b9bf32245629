"""Training: students come nearer to their teacher, runs that were stopped end where they would have."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hasten.compress.calibration import Calibration
from hasten.compress.distil import Decoder
from hasten.compress.distil import trainer as schedule
from hasten.compress.distil.student import Student
from hasten.compress.distil.trainer import FILE, Distilled, Training, distil, held_out
from hasten.compress.quantise.rotate import rotate
from hasten.compress.result import Progress
from hasten.compress.torch_model import changed, tensor_values
from hasten.core import Format, Recipe
from hasten.errors import DiskError, MachineError, ModelError, UsageError
from hasten.models.open import open_folder
from hasten.models.source import Source
from hasten.recipe import Distillation, DistilLoss
from hasten.weights.packed import pack_linear, pack_model
from specs import changed as spec_changed

CPU = torch.device("cpu")
TEXT = Calibration("noise", np.random.default_rng(0).integers(0, 262, (136, 32)).astype(np.int32))
SHORT = Calibration("noise", TEXT.ids[:20])
QUICK = Training(recompute=False, points=2)


def steps(count: int, **options: object) -> Distillation:
    """So many steps of eight windows."""
    given = {"learning_rate": 1e-3, **options}
    return Distillation(tokens=count * 256, batch_tokens=256, **given)  # type: ignore[arg-type]


def four_bits(name: str) -> Format | None:
    return Format.of(4) if name.startswith("layers.") else Format.of(8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("teacher")
    return open_folder(tiny_models.save_folder(tiny_models.TINY["qwen2"], folder))


@pytest.fixture(scope="module")
def pruned(teacher: Source) -> Source:
    """A third of the channels cut off, nothing repaired: what is left are whole groups."""
    kept = teacher.config.blocks[0].feed_forward.width * 2 // 3
    values = {}
    for i in range(len(teacher.config.blocks)):
        for name in ("gate", "up"):
            values[f"layers.{i}.{name}"] = tensor_values(teacher.tensors[f"layers.{i}.{name}"])[:kept]
        values[f"layers.{i}.down"] = tensor_values(teacher.tensors[f"layers.{i}.down"])[:, :kept]
    return changed(teacher, values, config=spec_changed(teacher.config, intermediate_size=kept))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


Run = Callable[..., Distilled]


@pytest.fixture
def run(teacher: Source, pruned: Source, cache: Path, tmp_path: Path) -> Run:
    def call(options: Distillation, text: Calibration = TEXT, **more: object) -> Distilled:
        given = {"folder": tmp_path / "run", "training": QUICK, "cache": cache, "device": "cpu", **more}
        student = given.pop("student", pruned)
        return distil(teacher, student, text, options, **given)  # type: ignore[arg-type]

    return call


def weights(source: Source) -> dict[str, torch.Tensor]:
    return {name: tensor_values(tensor) for name, tensor in source.tensors.items()}


def assert_equal(one: Source, two: Source) -> None:
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("loss", ["forward", "reverse", "skewed"])
def test_a_pruned_student_comes_nearer(run: Run, loss: DistilLoss) -> None:
    made = run(steps(32, loss=loss))
    first, last = made.curve[0], made.curve[-1]
    assert last.kl < 0.98 * first.kl
    assert made.curve[1].loss is not None and last.loss is not None
    assert first.loss is None and last.loss < made.curve[1].loss
    assert made.tokens == last.tokens == 32 * 256 and last.step == 32
    assert made.source.config.blocks[0].feed_forward.width == 64
    assert "before" in made.lines()[1]


def test_a_quantised_student_comes_nearer_and_packs_as_it_is(run: Run, teacher: Source) -> None:
    made = run(steps(48, learning_rate=5e-4), student=teacher, layouts=four_bits)
    assert made.curve[-1].kl < 0.95 * made.curve[0].kl
    keep = Recipe("trained")
    packed = pack_model(made.source, keep, 1)
    for name, kept in made.integers.items():
        assert packed.linears[name].layout == four_bits(name)
        again = pack_linear(made.source.tensors[name], None)
        assert again.relative_error == 0
        torch.testing.assert_close(
            tensor_values(made.source.tensors[name]), torch.from_numpy(kept.values()), rtol=0, atol=0
        )
    assert set(made.integers) == {n for n, t in teacher.tensors.items() if len(t.shape) == 2}
    decoder = Decoder.of(made.source, torch.float32, CPU)
    nearer = _kl(Decoder.of(teacher, torch.float32, CPU), decoder)
    assert nearer == pytest.approx(made.curve[-1].kl, rel=1e-3)  # what came out is what was measured


def _kl(teacher: Decoder, student: Decoder) -> float:
    ids = torch.from_numpy(TEXT.ids[list(held_out(len(TEXT.ids)))]).long()
    with torch.no_grad():
        p, q = (torch.log_softmax(m.logits(m.hidden(ids), m.head()), -1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("change", ["rotated", "folded", "another"])
def test_hidden_states_of_another_basis_are_refused(
    run: Run, teacher: Source, change: str, tmp_path: Path
) -> None:
    """Also where `distil` is called by itself: what the student's head reads tells the basis."""
    if change == "rotated":
        student = rotate(teacher)
    elif change == "folded":
        head = tensor_values(teacher.tensors["embed"]) * torch.linspace(0.2, 5, teacher.config.width)
        student = changed(teacher, {"head": head}, config=spec_changed(teacher.config, tied_head=False))
    else:
        other = tiny_models.TINY["llama"]
        student = open_folder(tiny_models.save_folder(other, tmp_path / "other"))
    assert student.config.width == teacher.config.width
    with pytest.raises(UsageError, match="another basis"):
        run(steps(1, hidden=1.0), student=student)


def test_temperature_and_hidden_states_change_what_is_learned(run: Run, tmp_path: Path) -> None:
    plain = run(steps(4), SHORT)
    others = [
        run(steps(4, **more), SHORT, folder=tmp_path / str(n))
        for n, more in enumerate([{"temperature": 2.0}, {"hidden": 1.0}])
    ]
    for other in others:
        assert other.curve[-1].kl < other.curve[0].kl == plain.curve[0].kl
        assert not torch.equal(weights(other.source)["layers.0.q"], weights(plain.source)["layers.0.q"])


def test_adapters_learn_and_are_merged(run: Run, pruned: Source) -> None:
    made = run(steps(32, lora=4, learning_rate=3e-3))
    assert made.curve[-1].kl < 0.97 * made.curve[0].kl
    before, after = weights(pruned), weights(made.source)
    for name, value in after.items():
        change = value - before[name]
        is_linear = name.startswith("layers.") and value.ndim == 2
        assert bool(change.any()) == is_linear, name
        if is_linear:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4, name
    assert made.source.tensors["embed"] is pruned.tensors["embed"]


def test_a_merged_adapter_is_the_adapter(pruned: Source) -> None:
    model = Decoder.of(pruned, torch.float32, CPU)
    student = Student.of(pruned, model, lora=3)
    with torch.no_grad():
        for value in student.learning.values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    ids = torch.from_numpy(TEXT.ids[:2]).long()
    merged = Decoder.of(student.made({}), torch.float32, CPU)
    with torch.no_grad():
        torch.testing.assert_close(merged.hidden(ids), model.hidden(ids), rtol=0, atol=0)


def test_adapters_and_a_layout_together(run: Run, teacher: Source) -> None:
    made = run(steps(4, lora=4), SHORT, student=teacher, layouts=four_bits)
    decoded = made.integers["layers.0.q"].values()
    torch.testing.assert_close(
        tensor_values(made.source.tensors["layers.0.q"]), torch.from_numpy(decoded), rtol=0, atol=0
    )
    assert made.curve[-1].kl != made.curve[0].kl


def test_zeros_stay_where_they_are_asked_to(run: Run, teacher: Source, tmp_path: Path) -> None:
    value = tensor_values(teacher.tensors["layers.0.up"])
    holes = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse = changed(teacher, {"layers.0.up": value.masked_fill(holes, 0)})
    kept = run(steps(3), SHORT, student=sparse, training=replace(QUICK, keep_zeros=True))
    found = weights(kept.source)["layers.0.up"]
    assert (found[holes] == 0).all() and not torch.equal(found, value.masked_fill(holes, 0))
    filled = run(steps(3), SHORT, student=sparse, folder=tmp_path / "filled")
    assert (weights(filled.source)["layers.0.up"][holes] != 0).any()


class Stop(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("kind", ["full", "lora", "layouts"])
def test_a_run_that_was_killed_ends_with_the_same_weights(run: Run, tmp_path: Path, kind: str) -> None:
    options = steps(7, lora=3 if kind == "lora" else None)
    training = replace(QUICK, checkpoint_steps=2)
    more = {"layouts": four_bits} if kind == "layouts" else {}

    def kill(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 5:
            raise Stop

    whole = run(options, SHORT, folder=tmp_path / "whole", training=training, **more)
    with pytest.raises(Stop):
        run(options, SHORT, folder=tmp_path / "killed", training=training, observer=kill, **more)
    seen: list[int] = []
    again = run(
        options,
        SHORT,
        folder=tmp_path / "killed",
        training=training,
        observer=lambda p: seen.append(p.done) if p.stage == "train" else None,
        **more,
    )
    assert seen[0] == 5  # step 4 was kept
    assert_equal(again.source, whole.source)
    assert [p.kl for p in again.curve] == [p.kl for p in whole.curve]
    seen.clear()
    third = run(options, SHORT, folder=tmp_path / "killed", training=training, **more)
    assert not seen and third.seconds == again.seconds
    assert_equal(third.source, whole.source)


def test_recomputing_layers_gives_the_same_gradients(pruned: Source) -> None:
    ids = torch.from_numpy(TEXT.ids[:2]).long()
    grads = []
    for recompute in (False, True):
        model = Decoder.of(pruned, torch.float32, CPU, recompute=recompute)
        student = Student.of(pruned, model, layouts=four_bits)
        model.logits(model.hidden(ids), model.head()).square().mean().backward()
        grads.append({name: value.grad for name, value in student.learning.items()})
    assert all(value is not None for value in grads[0].values())
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-5, atol=1e-8, msg=name)


def test_bf16_learns_as_float32_does(run: Run, tmp_path: Path) -> None:
    exact = run(steps(16))
    half = run(steps(16), folder=tmp_path / "half", training=replace(QUICK, dtype=torch.bfloat16))
    assert half.source.tensors["layers.0.q"].dtype == "BF16"
    assert half.curve[-1].kl == pytest.approx(exact.curve[-1].kl, rel=0.03)
    assert half.curve[-1].kl < 0.96 * half.curve[0].kl


def test_how_the_machine_runs_it_changes_nothing_but_rounding(run: Run, tmp_path: Path) -> None:
    plain = run(steps(4), SHORT)
    for n, other in enumerate(
        [{"micro_tokens": 64}, {"head_rows": 5}, {"live_teacher": True}, {"recompute": True}]
    ):
        made = run(steps(4), SHORT, folder=tmp_path / str(n), training=replace(QUICK, **other))  # type: ignore[arg-type]
        assert made.curve[-1].kl == pytest.approx(plain.curve[-1].kl, rel=1e-3), other


def test_a_time_limit_ends_the_run(run: Run) -> None:
    made = run(steps(10**6), SHORT, seconds=0.4)
    assert 1 <= made.curve[-1].step < 10**5
    assert made.seconds >= 0.4
    again = run(steps(10**6), SHORT, seconds=0.4)
    assert again.tokens == made.tokens  # it has had its time


def test_progress_says_loss_speed_and_time_left(run: Run, tmp_path: Path) -> None:
    told: list[Progress] = []
    run(steps(4), SHORT, observer=told.append, cache=tmp_path / "fresh")
    assert told[0].stage == "teacher" and told[0].total == 20
    last = told[-1] if told[-1].tokens_per_s else told[-2]
    assert last.done == last.total == 4 and last.loss and last.kl
    assert last.tokens_per_s and last.tokens_per_s > 0 and last.seconds_left == 0


def test_a_rate_too_high_is_said(run: Run) -> None:
    with pytest.raises(ModelError, match="loss is") as refused:
        run(steps(30, learning_rate=1e30), SHORT)
    assert "learning_rate: 2.5e+29" in str(refused.value.hint)


def test_what_cannot_be_distilled_is_refused(run: Run, teacher: Source, tmp_path: Path) -> None:
    shorter = {"embed": tensor_values(teacher.tensors["embed"])[:200]}
    other = changed(teacher, shorter, config=spec_changed(teacher.config, vocab_size=200))
    with pytest.raises(UsageError, match="263 tokens and the student 200"):
        run(steps(1), SHORT, student=other)
    with pytest.raises(UsageError, match="one window"):
        run(steps(1), Calibration("one", TEXT.ids[:1]))
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="no GPU"):
            run(steps(1), SHORT, device="cuda")


def test_another_runs_checkpoint_is_refused_and_a_damaged_one_named(run: Run, tmp_path: Path) -> None:
    run(steps(2), SHORT)
    with pytest.raises(UsageError, match="other models, text or settings") as refused:
        run(steps(2, temperature=2.0), SHORT)
    assert "rm " in str(refused.value.hint)
    path = tmp_path / "run" / FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        run(steps(2), SHORT)


def test_a_full_disk_leaves_the_checkpoint_before(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(QUICK, checkpoint_steps=2)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 3:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(DiskError, match="No space left"):
        run(steps(6), SHORT, training=training, observer=fill)
    monkeypatch.setattr(os, "fsync", fsync)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FILE]
    assert run(steps(6), SHORT, training=training).curve[-1].step == 6


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule.rate(i, 1000, i / 1000) for i in range(1001)]
    top = int(np.argmax(rates))
    assert rates[top] > 0.99 and abs(top - 30) <= 1
    assert all(b > a for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(b < a for a, b in itertools.pairwise(rates[top:]))
    assert 0 < rates[0] < 0.04 and math.isclose(rates[-1], schedule.FLOOR)
    assert schedule.rate(0, 10**6, 0.1) < 0.02  # the clock ran before the first step


def test_every_window_is_read_once_a_pass_in_another_order() -> None:
    passes = [
        np.concatenate([schedule.windows_of(step, 12, 4, seed=5) for step in range(first, first + 3)])
        for first in (0, 3)
    ]
    for order in passes:
        assert sorted(order.tolist()) == list(range(12))
    assert passes[0].tolist() != passes[1].tolist()
    across = np.concatenate([schedule.windows_of(step, 12, 5, seed=5) for step in range(5)])
    assert across[:24].tolist() == [*passes[0].tolist(), *passes[1].tolist()]
    assert not set(held_out(136)) & set(range(128)) and list(held_out(2)) == [1]
