"""A workshop with a tiny NumPy model in place of the engine: packing really rounds, so quality is real.

The model predicts a letter from the letter before it alone, and the text is drawn from the model itself: its
losses behave like a trained model's, and rounding its weights makes them worse by the KL it causes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.bench.figures import Sample
from hasten.bench.measure import measurement_of
from hasten.core import (
    GAP_SHARES,
    EngineOptions,
    Format,
    Machine,
    Measurement,
    ModelSpec,
    Recipe,
    Stat,
    Workload,
)
from hasten.errors import MachineError
from hasten.optimize.workshop import Timed
from hasten.quality.text import Text
from specs import spec

Floats = npt.NDArray[np.float32]
ALPHABET = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 48))
LAYERS = 2
CONFIG = spec(
    architecture="llama",
    vocab_size=len(ALPHABET),
    hidden_size=32,
    intermediate_size=64,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    context_length=1024,
).with_blocks(
    lambda block: replace(block, mixer=replace(block.mixer, window=4))
)  # few keys beside the weights


class LetterTokenizer:
    """One token a letter."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [ALPHABET.index(letter) for letter in text if letter in ALPHABET]

    def vocabulary(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(ALPHABET)}


def rounded(weights: Floats, layout: Format) -> Floats:
    """Round to nearest in groups, as the engine's packer does."""
    if layout.bits == 16:
        return weights
    blocks = weights.reshape(-1, layout.group)
    if layout.symmetric:
        scale = np.abs(blocks).max(axis=1, keepdims=True) / (2 ** (layout.bits - 1) - 1)
        values = np.round(blocks / scale) * scale
    else:
        low = blocks.min(axis=1, keepdims=True)
        scale = (blocks.max(axis=1, keepdims=True) - low) / (2**layout.bits - 1)
        values = np.round((blocks - low) / scale) * scale + low
    return values.reshape(weights.shape).astype(np.float32)


def calibrated(weights: Floats, layout: Format) -> Floats:
    """Half the rounding error: stands for what calibration wins below 8 bits."""
    nearest = rounded(weights, layout)
    return nearest if layout.bits >= 8 else (weights + nearest) / np.float32(2)


@dataclass
class FakeModel:
    """Residual layers without attention, weights by name."""

    embedding: Floats
    weights: dict[str, Floats]
    recipe: Recipe
    bits_per_weight: float
    weight_bytes: int
    closed: bool = False
    calls: int = 0
    threads: int = 1
    config: ModelSpec = CONFIG
    device: str = "cpu"
    device_because: str = ""

    @property
    def stored_bytes(self) -> int:
        return self.weight_bytes

    def hidden(self, tokens: npt.NDArray[np.int32]) -> Floats:
        assert not self.closed
        self.calls += 1
        h = self.embedding[tokens]  # [T, E]
        for layer in range(LAYERS):
            w = {part: self.weights[f"layers.{layer}.{part}"] for part in ("v", "o", "gate", "up", "down")}
            h = h + np.tanh(h @ w["v"].T) @ w["o"].T
            h = h + (np.tanh(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
        return h / np.sqrt((h**2).mean(axis=-1, keepdims=True))

    def logits_of(self, hidden: Floats) -> Floats:
        return hidden @ self.weights["head"].T

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeWorkshop:
    """A source of random weights; `kept_bits` 16 is a float file, 8 a quantised one."""

    kept_bits: int = 16
    seed: int = 1
    name: str = "letters"
    config: ModelSpec = CONFIG
    options: EngineOptions = field(default_factory=EngineOptions)
    built: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    interrupt_at: str = ""  # recipe whose packing is interrupted by Ctrl-C
    can_calibrate: bool = False  # whether torch is there
    device_because: str = ""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.embedding = rng.normal(0, 1, (CONFIG.vocab, CONFIG.width)).astype(np.float32)
        self.weights: dict[str, Floats] = {}
        for name, shape in CONFIG.linear_shapes().items():
            scale = 0.5 if name == "head" else 0.6 / np.sqrt(shape[1])
            values = rng.normal(0, scale, shape).astype(np.float32)
            self.weights[name] = rounded(values, Format.of(self.kept_bits))

    def text(self, evaluation: int = 4096, calibration: int = 1024) -> Text:
        """A text of so many letters, drawn from the model."""
        rng = np.random.default_rng(self.seed + 1)
        model = self.build(Recipe.parse("bf16"))
        logits = model.logits_of(model.hidden(np.arange(CONFIG.vocab, dtype=np.int32))).astype(float)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        steps = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
        letters = [0]
        for draw in rng.random(evaluation + calibration):
            letters.append(min(int(np.searchsorted(steps[letters[-1]], draw)), CONFIG.vocab - 1))
        whole = "".join(ALPHABET[i] for i in letters)
        self.built.clear()
        return Text("letters", calibration=whole[evaluation + 1 :], evaluation=whole[: evaluation + 1])

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "kept": self.kept_bits}

    def machine(self, ceilings: bool = True) -> Machine:
        return Machine("fake <cpu>", ("scalar",), 2, None, None, None, None)

    def tokenizer(self) -> LetterTokenizer:
        return LetterTokenizer()

    def settle(self, recipe: Recipe) -> None:
        """Its device is named."""

    def kept(self) -> Mapping[str, Format]:
        return dict.fromkeys(CONFIG.linear_shapes(), Format.of(self.kept_bits))

    def build(self, recipe: Recipe) -> FakeModel:
        if recipe.name == self.interrupt_at:
            raise KeyboardInterrupt
        self.built.append(recipe.name)
        layouts = {name: recipe.layout_for(name) or self.kept()[name] for name in self.weights}
        assert recipe.method == "rtn" or self.can_calibrate
        weights = {n: self._packed(n, recipe.layout_for(n), recipe.method) for n in self.weights}
        count = sum(w.size for w in weights.values())
        bits = sum(layouts[n].bits_per_weight * w.size for n, w in weights.items()) / count
        size = sum(layouts[n].bytes_of(*w.shape) for n, w in weights.items())
        return FakeModel(self.embedding, weights, recipe, bits, size)

    def calibrate(self, text: Text, observer: object) -> str:
        if not self.can_calibrate:
            raise MachineError("torch is not installed")
        return f"calibrated on {text.sha256}"

    def swap(
        self, model: FakeModel, tensors: Sequence[str], layout: Format | None, method: str = "rtn"
    ) -> Mapping[str, Any]:
        before = {name: model.weights[name] for name in tensors}
        for name in tensors:
            model.weights[name] = self._packed(name, layout, method)
        return before

    def restore(self, model: FakeModel, before: Mapping[str, Any]) -> None:
        model.weights |= before

    def error(self, tensor: str, layout: Format) -> float:
        return float(np.mean((rounded(self.weights[tensor], layout) - self.weights[tensor]) ** 2))

    def run(self, model: FakeModel, workload: Workload, number: int) -> Sample:
        """A run without noise; a token takes as long as its weights are many."""
        decode = 1e6 / (500 + model.weight_bytes)
        tokens = workload.batch * (workload.output - 1)
        ids = (tuple(range(workload.output)),) * workload.batch
        prompt = workload.batch * workload.prompt
        return Sample(prompt, prompt / (20 * decode), tokens, tokens / decode, ids)

    def measurement(self, model: FakeModel, workload: Workload, timed: Timed) -> Measurement:
        self.measured.append(model.recipe.name)
        found = measurement_of(
            timed.samples,
            workload,
            engine="fake",
            version="1",
            form=model.recipe.name,
            weight_bytes=model.weight_bytes,
            threads=1,
            peak_rss_bytes=None,
            disturbed_rounds=timed.disturbed,
        )
        return replace(
            found,
            gaps_ms=tuple(found.tpot_ms.median * (1 + share) for share in GAP_SHARES),
            decode_bytes=1.1 * model.weight_bytes,
            decode_ops=2.2 * model.weight_bytes,
            prompt_bytes=float(model.weight_bytes),
            prompt_ops=2.0 * 512 * model.weight_bytes,
        )

    def claim(self, folder: Path) -> None:
        self.claimed = folder

    def save(self, model: FakeModel, folder: Path, plan: Mapping[str, Any], report: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(report)
        (folder / "plan.json").write_text(json.dumps(plan))
        return folder

    def _packed(self, name: str, layout: Format | None, method: str = "rtn") -> Floats:
        if layout is None:
            return self.weights[name]
        return (rounded if method == "rtn" else calibrated)(self.weights[name], layout)


def one(value: float, n: int = 1) -> Stat:
    """A figure whose runs were all alike."""
    return Stat(value, value, value, n, (value,) * n)
