"""Distillation: a student is trained until it says what its teacher says.

Sources: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531); for pruned models Muralidharan et al. 2024 (Minitron,
arXiv:2407.14679); for quantised ones Liu et al. 2023 (LLM-QAT, arXiv:2305.17888).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from hasten.cache.reading import is_there
from hasten.compress.calibration import Calibration
from hasten.compress.distil import Decoder, Teacher, cached_teacher, live_teacher
from hasten.compress.distil.student import Layouts, Student
from hasten.compress.job import refuse_short
from hasten.compress.result import Observer, Progress, silent
from hasten.compress.torch_model import device_of, layer_forward, tensor_values, whole_state, write_state
from hasten.core import as_json
from hasten.errors import ModelError, UsageError
from hasten.models.source import Source
from hasten.recipe import Distillation, DistilLoss
from hasten.weights.codec import Encoded

Part = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""(hidden [R, E], head [V, E], which rows of all N) -> the loss summed over these rows."""


def divergence(
    kind: DistilLoss,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> torch.Tensor:
    """A divergence a token, in nats, times the temperature squared.

    `forward` is KL(teacher || student) (Hinton, Vinyals, Dean 2015; the factor T^2 keeps its gradients as
    large at any temperature), `reverse` KL(student || teacher) (MiniLLM, Gu et al. 2024), `skewed`
    KL(teacher || skew * teacher + (1 - skew) * student) (DistiLLM, Ko et al. 2024): finite where the student
    gives next to nothing.

    Args:
        student: logits [R, V]. teacher: logits [R, V]; computed in float32 whatever they come as.
        temperature: both are divided by it. skew: of `skewed` alone.

    Returns:
        float32 [R].
    """
    q = F.log_softmax(_softened(student, temperature), dim=-1)
    p = F.log_softmax(_softened(teacher, temperature), dim=-1)
    if kind == "forward":
        found = (p.exp() * (p - q)).sum(-1)
    elif kind == "reverse":
        found = (q.exp() * (q - p)).sum(-1)
    else:
        mixed = skew * p.exp() + (1 - skew) * q.exp()
        floor = torch.finfo(torch.float32).tiny  # both underflow: the teacher's factor is 0 there
        found = (p.exp() * (p - mixed.clamp(min=floor).log())).sum(-1)
    return found * temperature**2


def _softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def hidden_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of final hidden states a token, relative to the teacher's mean square: [..., E] -> [...].

    Of final states alone: they are what the teacher's cache holds.
    """
    size = teacher.float().pow(2).mean(-1)
    return (student.float() - teacher.float()).pow(2).mean(-1) / size.clamp(min=1e-12)


class _InParts(torch.autograd.Function):
    """Computes gradients in the forward pass, part by part: logits of all tokens are never there at once.

    Recomputing each part in the backward pass (gradient checkpointing) would save as much memory and cost
    one more product with the head; this works because nothing follows a loss but a factor.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, part: Part, rows: int) -> torch.Tensor:
        to_hidden, to_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if to_head else None
        for first in range(0, len(hidden), rows):
            cut = slice(first, first + rows)
            with torch.enable_grad():
                h = hidden[cut].detach().requires_grad_(to_hidden)
                w = head.detach().requires_grad_(to_head)
                loss = part(h, w, cut)
            wanted = [x for x in (h, w) if x.requires_grad]
            found = list(torch.autograd.grad(loss, wanted)) if wanted else []
            total += loss.detach()
            if d_hidden is not None:
                d_hidden[cut] = found[0]
            if d_head is not None:
                d_head += found[-1]
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        scale = grads[0]
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_head is None else d_head * scale.to(d_head.dtype),
            None,
            None,
        )


def in_parts(hidden: torch.Tensor, head: torch.Tensor, part: Part, rows: int) -> torch.Tensor:
    """`part` summed over all N rows of hidden [N, E], `rows` of them at a time.

    At V = 152k a row of logits is 0.6 MB in float32 and the loss keeps about six such rows a token: 1,024
    rows at a time take 3.7 GB, 256 take 0.9 GB.

    Returns:
        float32 scalar, differentiable by hidden and head, once.
    """
    found: torch.Tensor = _InParts.apply(hidden, head, part, rows)  # type: ignore[no-untyped-call]
    return found


WARM_UP = 0.03
"""Part of a run's steps in which the rate rises, 100 steps at most."""
FLOOR = 0.05
"""Part of the highest rate that a run ends with."""


def rate(step: int, steps: int, progress: float) -> float:
    """Part of the highest learning rate: up a line by steps, down a cosine by progress.

    The two are told apart because a time limit counts what is no step (compiling, loading): moments that have
    seen nothing must not begin at the full rate.

    Source: cosine annealing without restarts, Loshchilov and Hutter 2017 (arXiv:1608.03983).

    Args:
        step: steps done. steps: in all. progress: part of the run that is over, 0..1, by steps or by time.
    """
    rising = max(1, min(100, math.ceil(WARM_UP * steps)))
    falling = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / rising) * falling


def windows_of(step: int, windows: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Which windows step `step` reads, [size]: shuffled anew for each pass over the text.

    A function of the step alone, so that a run that goes on reads what it would have read.
    """
    places = np.arange(step * size, (step + 1) * size)
    epochs, inside = np.divmod(places, windows)
    orders = {e: np.random.default_rng([seed, e]).permutation(windows) for e in np.unique(epochs).tolist()}
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), inside.tolist(), strict=True)], np.int64)


@dataclass(frozen=True)
class Point:
    """One place of the curve."""

    step: int
    tokens: int  # trained on so far
    seconds: float  # of training so far
    loss: float | None  # mean since the last point; None before the first step
    kl: float  # mean KL(teacher || student) on windows held out, nats a token


@dataclass(frozen=True)
class Distilled:
    """A student that has learned.

    `source` has its values: float ones in the type they were computed in, and those of layers trained in a
    layout as that layout's integers, so that packing them with no layout named gives what was trained.
    """

    source: Source
    curve: tuple[Point, ...]
    tokens: int  # trained on, repeats counted
    seconds: float  # of training, interrupted runs together
    integers: Mapping[str, Encoded] = field(default_factory=dict, repr=False)  # of layers with a layout

    def lines(self) -> list[str]:
        """The report as text."""
        first, last = self.curve[0], self.curve[-1]
        return [
            f"distil: {self.tokens:,} tokens in {self.seconds:,.0f} s",
            f"KL to the teacher on held-out text: {first.kl:.4f} before, {last.kl:.4f} after",
        ]

    def record(self) -> dict[str, Any]:
        """The report as JSON: the curve."""
        return {"tokens": self.tokens, "seconds": self.seconds, "curve": [as_json(p) for p in self.curve]}


FILE = "distil.checkpoint"
_KIND = "distillation 1"


@dataclass(frozen=True)
class Checkpoint:
    """One place of a run; 12 bytes a number that learns."""

    run: str  # digest of everything that decides what the run computes
    step: int
    seconds: float  # of training so far
    curve: tuple[Point, ...]
    learning: dict[str, torch.Tensor]
    optimizer: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """Replace the one in the folder.

        Raises:
            DiskError: full, read-only or forbidden disk; the one before is untouched.
        """
        curve = [vars(point) for point in self.curve]
        return write_state(folder / FILE, _KIND, {**vars(self), "curve": curve})

    @classmethod
    def read(cls, folder: Path, run: str) -> Checkpoint | None:
        """The one in the folder, None where there is none.

        Raises:
            UsageError: it belongs to another run.
            ModelError: it cannot be read.
        """
        path = folder / FILE
        if not is_there(path):
            return None
        try:
            state = whole_state(path, _KIND)
            curve = tuple(Point(**point) for point in state.pop("curve"))
            found = cls(curve=curve, **state)
        except Exception as error:  # noqa: BLE001  torch.load raises whatever a damaged file makes it
            raise ModelError(
                f"{path} cannot be read: {type(error).__name__}: {error}"[:300],
                hint=f"remove it to begin anew: rm {path}",
            ) from None
        if found.run != run:
            raise UsageError(
                f"{path} belongs to a distillation of other models, text or settings",
                hint=f"choose another folder, or remove it to begin anew: rm {path}",
            )
        return found


HELD_OUT = 8
"""Most windows set aside for the curve."""
CLIP = 1.0
"""Largest norm of all gradients together."""
SCALES_RATE = 10.0
"""How much faster scales learn than weights: a step is of the order of the rate, weights are of 0.02."""

_HEAD_ROWS = 64  # of the LM heads that are compared
_SAME_BASIS = 0.5  # heads of a pruned copy are equal; those of a rotated one differ by 1.4


@dataclass(frozen=True)
class Training:
    """How the machine runs it; results differ by rounding alone."""

    dtype: torch.dtype | None = None  # None: bf16 on a GPU, float32 elsewhere
    micro_tokens: int = 4096  # computed at once; a batch of more is summed up
    head_rows: int = 1024  # of logits at once: 0.6 MB each in float32 at 152k words, about six times over
    recompute: bool = True  # layers in the backward pass, to save memory
    compiled: bool = False  # torch.compile of layer and loss: a minute first, then faster on a GPU
    live_teacher: bool = False  # run the teacher for each batch instead of caching its states
    keep_zeros: bool = False  # zeros of the student's linear layers stay: it was pruned weight by weight
    points: int = 20  # of the curve
    checkpoint_steps: int | None = None
    checkpoint_seconds: float = 300.0


def distil(
    teacher: Source,
    student: Source,
    calibration: Calibration,
    options: Distillation,
    *,
    folder: Path,
    layouts: Layouts | None = None,
    device: str | torch.device | None = None,
    seconds: float | None = None,
    training: Training | None = None,
    cache: Path | None = None,
    observer: Observer = silent,
) -> Distilled:
    """Train a student on what its teacher says about a text.

    A run that was stopped goes on from its checkpoint in `folder`, and ends with the weights it would have
    had; one that has ended is read from there. With a time limit the learning rate follows the clock.

    Args:
        teacher: the model to be like. student: where to begin; its widths may be smaller.
        calibration: the text, windows [B, T]; the last few are held out for the curve.
        options: loss, tokens, learning rate.
        folder: of the checkpoint. cache: of the teacher's states; None: `folder`/teacher.
        layouts: matrices are trained through these layouts' rounding.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        seconds: stop after so much training, this time and earlier ones together.

    Raises:
        UsageError: too few windows, vocabularies differ, or the folder holds another run.
        MachineError: no such device.
        ModelError: the loss is not finite: the rate is too high, or a model is damaged.
        DiskError: the disk is full, read-only or not ours.
    """
    how = training or Training()
    place = device_of(device)
    how = replace(how, dtype=how.dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32))
    _check(teacher, student, calibration, options)
    assert how.dtype is not None
    run = _run_digest(teacher, student, calibration, options, layouts, how)
    checkpoint = Checkpoint.read(folder, run)
    layer = torch.compile(layer_forward) if how.compiled else layer_forward
    model = Decoder.of(student, how.dtype, place, recompute=how.recompute, layer=layer)
    pupil = Student.of(
        student, model, lora=options.lora, layouts=layouts, keep_zeros=how.keep_zeros, seed=options.seed
    )
    if how.live_teacher:
        master: Teacher = live_teacher(teacher, calibration, how.dtype, place)
    else:
        master = cached_teacher(
            teacher,
            calibration,
            cache or folder / "teacher",
            how.dtype,
            place,
            batch_tokens=how.micro_tokens,
            step=lambda done, total: observer(Progress("teacher", done=done, total=total)),
        )
    trainer = _Trainer(pupil, master, calibration, options, how, _Run(run, folder, seconds, observer))
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.train()
    integers = pupil.integers()
    return Distilled(pupil.made(integers), tuple(trainer.curve), trainer.tokens, trainer.spent, integers)


@dataclass(frozen=True)
class _Run:
    """What one run is called, where it is kept, how long it may take, who watches it."""

    digest: str
    folder: Path
    seconds: float | None
    observer: Observer


class _Trainer:
    """The loop."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        text: Calibration,
        options: Distillation,
        how: Training,
        run: _Run,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.options, self.how, self.run = options, how, run
        self.curve: list[Point] = []
        self.step, self.spent = 0, 0.0
        count = len(text.ids)
        self.length = int(text.ids.shape[1])
        self.held = held_out(count)
        self.windows = count - len(self.held)
        self.ids = torch.from_numpy(text.ids).long().to(student.model.device)
        self.size = max(1, options.batch_tokens // self.length)
        self.steps = max(1, options.tokens // (self.size * self.length))
        self._numbers = list(student.learning.values())
        self._optimizer = _optimizer(student, options.learning_rate)
        self._losses: list[float] = []
        self._divergence = torch.compile(divergence) if how.compiled else divergence
        self._saved_at, self._slice, self._began = time.monotonic(), time.monotonic(), 0.0

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.size * self.length

    @property
    def progress(self) -> float:
        """Part of the run that is over, by steps or by the clock, whichever is further."""
        clock = self.spent / self.run.seconds if self.run.seconds else 0.0
        return max(self.step / self.steps, clock)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was."""
        with torch.no_grad():
            for name, value in self.student.learning.items():
                value.copy_(checkpoint.learning[name])
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self.step, self.spent, self.curve = checkpoint.step, checkpoint.seconds, list(checkpoint.curve)

    def train(self) -> None:
        """All steps that are left, or as many as the time limit allows."""
        self._slice, self._saved_at = time.monotonic(), time.monotonic()
        self._began = self.spent
        first = self.step
        if not self.curve:
            self._measure()
        while self.progress < 1 or not self.step:  # a limit shorter than the first look still gives a step
            loss = self._learn(windows_of(self.step, self.windows, self.size, self.options.seed))
            self.step += 1
            self._losses.append(loss)
            self._tick()
            self._tell(loss, self.step - first)
            if self.progress >= len(self.curve) / self.how.points or self.progress >= 1:
                self._measure()
            if self._is_due():
                self.save()
        if self.step > first:
            self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        self._tick()
        learning = {name: value.detach().cpu() for name, value in self.student.learning.items()}
        state = self._optimizer.state_dict()
        curve = tuple(self.curve)
        made = Checkpoint(self.run.digest, self.step, self.spent, curve, learning, state)
        made.write(self.run.folder)
        self._saved_at = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        self.spent += now - self._slice
        self._slice = now

    def _is_due(self) -> bool:
        every = self.how.checkpoint_steps
        if every is not None:
            return self.step % every == 0
        return time.monotonic() - self._saved_at >= self.how.checkpoint_seconds

    def _learn(self, rows: npt.NDArray[np.int64]) -> float:
        """One step of the optimiser; the mean loss a token."""
        self._optimizer.zero_grad(set_to_none=True)
        micro = max(1, self.how.micro_tokens // self.length)
        total = 0.0
        for at in range(0, len(rows), micro):
            part = rows[at : at + micro]
            loss = self._loss(part) / (len(rows) * self.length)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._numbers, CLIP))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ModelError(
                f"distil: at step {self.step + 1} of {self.steps} the loss is {total}, its gradient {norm}",
                hint=f"use a lower rate, such as learning_rate: {self.options.learning_rate / 4:g}",
            )
        share = rate(self.step, self.steps, self.progress)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * share
        self._optimizer.step()
        return total

    def _loss(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Summed over the tokens of some windows."""
        model, options = self.student.model, self.options
        theirs = self.teacher.hidden(rows).flatten(0, 1)  # [N, E]
        ours = model.hidden(self.ids[rows]).flatten(0, 1)

        def part(hidden: torch.Tensor, head: torch.Tensor, cut: slice) -> torch.Tensor:
            with torch.no_grad():
                target = self.teacher.logits(theirs[cut])
            found = self._divergence(
                options.loss, model.logits(hidden, head), target, options.temperature, options.skew
            )
            return found.sum()

        loss = in_parts(ours, model.head(), part, self.how.head_rows)
        if options.hidden:
            loss = loss + options.hidden * hidden_error(ours, theirs).sum()
        return loss

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """Mean KL(teacher || student) on the windows held out, at temperature 1, nats a token."""
        model, total = self.student.model, 0.0
        for row in self.held:
            rows = np.array([row])
            theirs = self.teacher.hidden(rows)[0]
            ours, head = model.hidden(self.ids[rows])[0], model.head()
            for at in range(0, self.length, self.how.head_rows):
                cut = slice(at, at + self.how.head_rows)
                logits = model.logits(ours[cut], head)
                total += float(divergence("forward", logits, self.teacher.logits(theirs[cut])).sum())
        return total / (len(self.held) * self.length)

    def _measure(self) -> None:
        kl = self.held_out_kl()
        self._tick()
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self.curve.append(Point(self.step, self.tokens, self.spent, loss, kl))
        self.run.observer(Progress("train", done=self.step, total=self.steps, loss=loss, kl=kl))

    def _tell(self, loss: float, done: int) -> None:
        spent = max(self.spent - self._began, 1e-9)
        left = spent / done * (self.steps - self.step)
        left = left if self.run.seconds is None else max(0.0, min(left, self.run.seconds - self.spent))
        speed = done * self.size * self.length / spent
        kl = self.curve[-1].kl
        self.run.observer(
            Progress("train", "", self.step, self.steps, left, loss=loss, tokens_per_s=speed, kl=kl)
        )


def held_out(windows: int) -> range:
    """Which windows are not trained on: the last ones, a sixteenth of them, 1 to 8."""
    return range(windows - max(1, min(HELD_OUT, windows // 16)), windows)


def _optimizer(student: Student, highest: float) -> torch.optim.AdamW:
    """AdamW without decay: the student is to be like its teacher, not small (Loshchilov and Hutter 2019)."""
    groups = [
        {"params": list(numbers.values()), "lr": rate, "highest": rate}
        for numbers, rate in ((student.weights, highest), (student.scales, highest * SCALES_RATE))
        if numbers
    ]
    is_fused = student.model.device.type == "cuda"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=is_fused)


def _heads_apart(teacher: Source, student: Source) -> float:
    """Relative difference of some rows of the LM heads, which say what a hidden state means."""
    rows = []
    for source in (teacher, student):
        head = source.tensors[source.config.head_name]
        count = min(_HEAD_ROWS, head.rows)
        rows.append(tensor_values(head.part("head", (head.rows - count) // 2, count)))
    return float((rows[0] - rows[1]).norm() / rows[0].norm().clamp(min=1e-30))


def _check(teacher: Source, student: Source, text: Calibration, options: Distillation) -> None:
    theirs, ours = teacher.config, student.config
    if theirs.vocab != ours.vocab:
        raise UsageError(
            f"distil: the teacher has {theirs.vocab:,} tokens and the student {ours.vocab:,}",
            hint="prune the vocabulary after distilling, or not at all",
        )
    if options.hidden and theirs.width != ours.width:
        raise UsageError(
            f"distil: hidden states of {theirs.width} and {ours.width} cannot be compared",
            hint="leave hidden: out where the width was pruned",
        )
    if options.hidden and (apart := _heads_apart(teacher, student)) > _SAME_BASIS:
        raise UsageError(
            f"distil: the student reads hidden states in another basis: the heads differ by {apart:.0%}",
            hint="leave hidden: out where the student was rotated, folded or is no copy of its teacher",
        )
    refuse_short(text)


def _run_digest(
    teacher: Source,
    student: Source,
    text: Calibration,
    options: Distillation,
    layouts: Callable[[str], object] | None,
    how: Training,
) -> str:
    stored = [f"{name} {layouts(name)}" for name in sorted(student.tensors)] if layouts else []
    parts = [teacher.content, student.content, text.sha256, options, stored, how.dtype, how.keep_zeros]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
