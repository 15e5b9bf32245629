"""Tiny models as GPTQ, AWQ and compressed-tensors folders, packed field by field as published.

Scales and zero points are what rounding to nearest gives; what matters is that the folder, and the values the
numpy twin here takes from the same integers, are known exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

AWQ_OUTPUT = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs nibble i holds


@dataclass(frozen=True)
class Packing:
    """One way of packing a model."""

    kind: str  # "gptq", "awq", "packed", "plain"
    bits: int = 4
    group: int = 32  # -1: a whole row
    symmetric: bool = True
    scale: torch.dtype = torch.float16
    ordered: bool = True  # False: act-order
    config: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)  # put over the usual

    def __str__(self) -> str:
        order = "" if self.ordered else "-act-order"
        return f"{self.kind}{self.bits}-g{self.group}{'' if self.symmetric else '-asym'}{order}"


@dataclass(frozen=True)
class Rounded:
    """A matrix as integers, rows first."""

    q: np.ndarray  # [rows, cols], unsigned
    scale: np.ndarray  # [rows, groups] float32
    zero: np.ndarray  # [rows, groups], unsigned
    groups_of: np.ndarray  # [cols]

    def values(self) -> np.ndarray:
        steps = self.q.astype(np.float64) - self.zero[:, self.groups_of]
        return (self.scale[:, self.groups_of].astype(np.float64) * steps).astype(np.float32)

    def step(self) -> np.ndarray:
        return self.scale[:, self.groups_of]


def rounded(w: np.ndarray, packing: Packing, seed: int) -> Rounded:
    """Round a matrix to nearest; with act-order, inputs belong to groups at random."""
    rows, cols = w.shape
    group = cols if packing.group == -1 else packing.group
    rng = np.random.default_rng(seed)
    groups_of = np.arange(cols) // group
    if not packing.ordered:
        groups_of = rng.permutation(groups_of)
    top = (1 << packing.bits) - 1
    scale = np.empty((rows, cols // group), np.float32)
    zero = np.full(scale.shape, (top + 1) // 2)
    for g in range(cols // group):
        part = w[:, groups_of == g]
        if packing.symmetric:
            scale[:, g] = np.abs(part).max(axis=1) / (top // 2)
        else:
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scale[:, g] = (high - low) / top
            zero[:, g] = np.clip(np.round(-low / scale[:, g]), 0, top)
    scale = torch.from_numpy(scale).to(packing.scale).float().numpy()
    q = np.clip(np.round(w / scale[:, groups_of]) + zero[:, groups_of], 0, top).astype(np.int64)
    return Rounded(q, scale, zero, groups_of)


def packed_words(fields: np.ndarray, bits: int) -> torch.Tensor:
    """[n, count] -> int32 [n, words]: field i at bits i * bits and up, running over into the next word."""
    n, count = fields.shape
    words = np.zeros((n, -(-count * bits // 32) + 1), np.uint64)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        wide = fields[:, i].astype(np.uint64) << np.uint64(shift)
        words[:, word] |= wide & np.uint64(0xFFFFFFFF)
        words[:, word + 1] |= wide >> np.uint64(32)
    return torch.from_numpy(words[:, :-1].astype(np.uint32).view(np.int32).copy())


def gptq_parts(r: Rounded, packing: Packing) -> dict[str, torch.Tensor]:
    stored = r.zero.T
    if packing.config.get("checkpoint_format", "gptq") == "gptq":
        stored = (stored - 1) % (1 << packing.bits)
    return {
        "qweight": packed_words(r.q, packing.bits).T.contiguous(),
        "qzeros": packed_words(stored, packing.bits),
        "scales": torch.from_numpy(r.scale.T.copy()).to(packing.scale),
        "g_idx": torch.from_numpy(r.groups_of.astype(np.int32)),
    }


def awq_parts(r: Rounded, packing: Packing) -> dict[str, torch.Tensor]:
    def words(by_output: np.ndarray) -> torch.Tensor:
        n, rows = by_output.shape
        return packed_words(by_output.reshape(n, -1, 8)[:, :, AWQ_OUTPUT].reshape(n, rows), 4)

    scales = torch.from_numpy(r.scale.T.copy()).to(packing.scale)
    return {"qweight": words(r.q.T), "qzeros": words(r.zero.T), "scales": scales}


def packed_parts(r: Rounded, packing: Packing) -> dict[str, torch.Tensor]:
    parts = {
        "weight_packed": packed_words(r.q, packing.bits),
        "weight_shape": torch.tensor(r.q.shape),
        "weight_scale": torch.from_numpy(r.scale).to(packing.scale),
    }
    if not packing.symmetric:
        parts["weight_zero_point"] = packed_words(r.zero.T, packing.bits).T.contiguous()
    if not packing.ordered:
        parts["weight_g_idx"] = torch.from_numpy(r.groups_of.astype(np.int32))
    return parts


def plain_parts(r: Rounded, packing: Packing) -> dict[str, torch.Tensor]:
    parts = {
        "weight": torch.from_numpy((r.q - 128).astype(np.int8)),
        "weight_scale": torch.from_numpy(r.scale).to(packing.scale),
    }
    if not packing.symmetric:
        parts["weight_zero_point"] = torch.from_numpy((r.zero - 128).astype(np.int8))
    return parts


Make = Callable[..., tuple[Path, dict[str, Rounded]]]
"""The fixture `quantised`: (packing, name of the tiny model) -> (folder, matrices by module name)."""

PARTS: dict[str, Callable[[Rounded, Packing], dict[str, torch.Tensor]]] = {
    "gptq": gptq_parts,
    "awq": awq_parts,
    "packed": packed_parts,
    "plain": plain_parts,
}


def quantization_config(packing: Packing) -> dict[str, Any]:
    """What the tools write beside the integers."""
    if packing.kind == "gptq":
        usual: dict[str, Any] = {
            "quant_method": "gptq", "bits": packing.bits, "group_size": packing.group, "lm_head": False,
            "sym": packing.symmetric, "desc_act": not packing.ordered, "checkpoint_format": "gptq",
        }  # fmt: skip
    elif packing.kind == "awq":
        usual = {
            "quant_method": "awq", "bits": 4, "group_size": packing.group, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": None,
        }  # fmt: skip
    else:
        name = "pack-quantized" if packing.kind == "packed" else "int-quantized"
        weights = {
            "num_bits": packing.bits, "type": "int", "symmetric": packing.symmetric, "dynamic": False,
            "strategy": "channel" if packing.group == -1 else "group", "observer": "minmax",
            "group_size": None if packing.group == -1 else packing.group,
            "actorder": None if packing.ordered else "group",
        }  # fmt: skip
        one = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        usual = {
            "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
            "config_groups": {"group_0": one},
            "ignore": ["lm_head"], "kv_cache_scheme": None,
        }  # fmt: skip
    return {**usual, **packing.config}


def quantised_folder(folder: Path, into: Path, packing: Packing) -> dict[str, Rounded]:
    """Write a tiny model's folder with its blocks' matrices packed; returns them by module name."""
    shutil.copytree(folder, into)
    tensors: dict[str, torch.Tensor] = {}
    matrices: dict[str, Rounded] = {}
    for number, (name, values) in enumerate(load_file(folder / "model.safetensors").items()):
        if "_proj.weight" not in name:
            tensors[name] = torch.from_numpy(values).to(torch.float16)
            continue
        module = name.removesuffix(".weight")
        matrices[module] = rounded(values.astype(np.float32), packing, number)
        parts = PARTS[packing.kind](matrices[module], packing)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, into / "model.safetensors")
    config = json.loads((into / "config.json").read_text())
    config["quantization_config"] = quantization_config(packing)
    (into / "config.json").write_text(json.dumps(config))
    return matrices


def with_values(model: Any, matrices: dict[str, Rounded]) -> Any:
    """A transformers model with the matrices' values in place of its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (module := name.removesuffix(".weight")) in matrices:
                parameter.copy_(torch.from_numpy(matrices[module].values()))
    return model


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder in place."""
    tensors = load_torch(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **options: Any) -> None:
    """Put options over those of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    change_model(folder, quantization_config={**config["quantization_config"], **options})


def change_model(folder: Path, **options: Any) -> None:
    """Put options over those of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))
