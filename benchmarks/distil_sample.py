"""Text that a model writes itself, many sequences at once: a student learns its teacher's habits from it.

Sampling at temperature 1 (SeqKD, Kim and Rush 2016, arXiv:1606.07947, with sampling in place of beams).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from hasten.compress.distil import Decoder
from hasten.compress.torch_model import Positions, mlp


class Writer:
    """Writes sequences of `length` tokens, `batch` at once, each from the first tokens it is given."""

    def __init__(self, model: Decoder, length: int, batch: int, seed: int) -> None:
        config = model.config
        self.model, self.length = model, length
        self.positions = Positions.of(config, length, model.device)
        mixer = config.blocks[0].mixer
        shape = (len(config.blocks), batch, mixer.kv_heads, length, mixer.head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.random = torch.Generator(model.device).manual_seed(seed)
        names = range(len(config.blocks))
        self.layers = [
            {
                name.removeprefix(f"layers.{i}."): value
                for name, value in model.values.items()
                if name.startswith(f"layers.{i}.")
            }
            for i in names
        ]

    @torch.inference_mode()
    def write(self, opening: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Openings [B, P] -> [B, length], drawn at temperature 1."""
        device = self.model.device
        found = torch.zeros((len(opening), self.length), dtype=torch.long, device=device)
        found[:, : opening.shape[1]] = torch.from_numpy(opening).long().to(device)
        head = self.model.head()
        for at in range(self.length - 1):
            x = self._step(found[:, at], at)
            if at + 1 < opening.shape[1]:
                continue
            odds = self.model.logits(x, head).float().softmax(-1)
            drawn = torch.empty_like(odds).exponential_(generator=self.random)
            found[:, at + 1] = (odds / drawn).argmax(-1)
        return found.cpu().numpy().astype(np.int32)

    def _step(self, ids: torch.Tensor, at: int) -> torch.Tensor:
        """States after the final norm of one token each, [B, E]."""
        config = self.model.config
        here = slice(at, at + 1)
        positions = replace(
            self.positions,
            cos={key: value[here] for key, value in self.positions.cos.items()},
            sin={key: value[here] for key, value in self.positions.sin.items()},
        )
        placement, eps = config.blocks[0].norms.placement, config.blocks[0].norms.eps
        before, after = placement in ("pre", "sandwich"), placement in ("post", "sandwich")
        x = F.embedding(ids, self.model.values["embed"])[:, None] * config.embedding.scale
        for index, weights in enumerate(self.layers):

            def norm(name: str, value: torch.Tensor, own: dict[str, torch.Tensor] = weights) -> torch.Tensor:
                return F.rms_norm(value, value.shape[-1:], own[name], eps)

            y = self._attend(index, norm("attn_norm", x) if before else x, positions, at)
            x = x + (norm("post_attn_norm", y) if after else y)
            y = mlp(config, weights, norm("mlp_norm", x) if before else x)
            x = x + (norm("post_mlp_norm", y) if after else y)
        return F.rms_norm(x[:, 0], x.shape[-1:], self.model.values["final_norm"], config.final_norm.eps)

    def _attend(self, index: int, x: torch.Tensor, positions: Positions, at: int) -> torch.Tensor:
        config, weights = self.model.config, self.layers[index]
        mixer, eps, batch = config.blocks[index].mixer, config.blocks[index].norms.eps, len(x)
        slides = positions.slides(index)
        q, k, v = (F.linear(x, weights[n], weights.get(f"{n}.bias")) for n in "qkv")
        if mixer.qk_norm == "full":
            q = F.rms_norm(q, q.shape[-1:], weights["q_norm"], eps)
            k = F.rms_norm(k, k.shape[-1:], weights["k_norm"], eps)
        q, k, v = (part.view(batch, 1, -1, mixer.head_dim) for part in (q, k, v))
        if mixer.qk_norm == "head":
            q = F.rms_norm(q, q.shape[-1:], weights["q_norm"], eps)
            k = F.rms_norm(k, k.shape[-1:], weights["k_norm"], eps)
        if mixer.rotary is not None:
            q, k = positions.rotate(q, slides), positions.rotate(k, slides)
        self.keys[index, :batch, :, at] = k[:, 0]
        self.values[index, :batch, :, at] = v[:, 0]
        keys, values = (kept[index, :batch, :, : at + 1] for kept in (self.keys, self.values))
        share = q.shape[2] // keys.shape[1]
        grouped = q[:, 0].view(batch, keys.shape[1], share, mixer.head_dim)  # [B, K, H / K, D]
        scores = (grouped @ keys.transpose(-1, -2)).float() * mixer.score_scale
        if mixer.softcap is not None:
            scores = torch.tanh(scores / mixer.softcap) * mixer.softcap
        mask = positions.masks[slides][at, : at + 1]
        mixed = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(values.dtype) @ values
        return F.linear(mixed.reshape(batch, 1, -1), weights["o"], weights.get("o.bias"))


def sampled(
    model: Decoder,
    openings: npt.NDArray[np.int32],
    *,
    length: int,
    count: int,
    opening: int = 16,
    batch: int = 2048,
    seed: int = 0,
) -> npt.NDArray[np.int32]:
    """Sequences that begin as places of a text do, int32 [count, length].

    Args:
        model: of weights in its own type.
        openings: windows [N, T] whose random places are begun with.
        length: tokens a sequence holds, `opening` of them given.
        count: sequences. batch: at once. seed: of places and draws.
    """
    random = np.random.default_rng(seed)
    writer = Writer(model, length, min(batch, count), seed)
    found = []
    for first in range(0, count, batch):
        size = min(batch, count - first)
        rows = random.integers(0, len(openings), size)
        places = random.integers(0, openings.shape[1] - opening + 1, size)
        begun = np.stack([openings[r, p : p + opening] for r, p in zip(rows, places, strict=True)])
        found.append(writer.write(begun))
    return np.concatenate(found)
