"""The plain decoder in torch and float32: slow, short, and what every fast path is compared with.

It reads nothing but a ModelSpec and tensors by canonical name, computes each sequence as a whole without a
cache, and needs torch (`pip install hasten[compress]`), which the fast CPU path never imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from hasten.core import ModelSpec
from hasten.errors import ModelError, UsageError
from hasten.models import rope

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
ValueHook = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Rotation:
    """Cosines and sines of the positions of one sequence, float32 [T, rotary_dim / 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:  # [T, H, D] -> [T, H, D]
        half = self.cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class ReferenceDecoder:
    """A dense decoder of any architecture that a ModelSpec can describe.

    Args:
        config: the model's shape and variation points.
        tensors: canonical name -> float32 array; matrices are [rows, cols] = [outputs, inputs]. Not copied.
        on_value: called with (name, value float32) of what an engine stores in fewer bits; what it returns is
            used instead. The input [T, cols] of every linear layer goes by the layer's canonical name, and
            attention's are `layers.{i}.queries` [T, H, D], scaled, `.keys` and `.values` [T, K, D]. Rounding
            there (`int8_groups`) gives what such an engine computes; recording gives calibration data.

    Raises:
        ModelError: a tensor is missing or has another shape than the config says.
    """

    def __init__(
        self,
        config: ModelSpec,
        tensors: Mapping[str, npt.NDArray[np.float32]],
        on_value: ValueHook | None = None,
    ) -> None:
        self.config = config
        self.on_value = on_value
        self._tensors = {
            name: torch.from_numpy(np.ascontiguousarray(t, np.float32)) for name, t in tensors.items()
        }
        for name, shape in config.parameter_shapes().items():
            if name not in self._tensors:
                raise ModelError(f"tensor {name!r} is missing")
            if tuple(self._tensors[name].shape) != shape:
                raise ModelError(f"tensor {name!r} must be {shape}, got {tuple(self._tensors[name].shape)}")

    def logits(self, tokens: Tokens | Sequence[Tokens]) -> torch.Tensor:
        """Logits of one sequence, or of a ragged batch packed one after another.

        Args:
            tokens: ids [T], or several such sequences of any lengths.

        Returns:
            float32 [N, V], N all tokens together.

        Raises:
            UsageError: an id is outside the vocabulary, or a sequence is empty.
        """
        sequences = [tokens] if np.ndim(tokens[0]) == 0 else tokens
        return self.logits_of(torch.cat([self.hidden(sequence) for sequence in sequences]))  # type: ignore[arg-type]

    @torch.inference_mode()
    def hidden(self, tokens: Tokens) -> torch.Tensor:
        """Hidden states after the final norm, float32 [T, E], of one sequence of ids [T].

        Raises:
            UsageError: an id is outside the vocabulary, or there is none.
        """
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        if not len(ids):
            raise UsageError("the sequence has no tokens", hint="give at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            limit, low, high = self.config.vocab_size - 1, int(ids.min()), int(ids.max())
            raise UsageError(f"token ids must be from 0 to {limit}, got ids from {low} to {high}")
        rotations = self._rotations(len(ids))
        x = self._tensors["embed"][ids] * self.config.embed_scale  # [T, E]
        for layer in range(self.config.num_layers):
            slides = self._slides(layer)
            x = self._layer(layer, x, self._mask(len(ids), slides), rotations[slides])
        return self._norm("final_norm", x)

    @torch.inference_mode()
    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head, with its soft-cap: float32 [R, E] -> float32 [R, V]."""
        logits = self._linear("embed" if self.config.tied_head else "head", hidden)
        return _softcap(logits, self.config.logit_softcap)

    def generate(self, prompt: Tokens, max_new_tokens: int) -> list[int]:
        """Greedy continuation, everything computed anew for each token; end-of-text ids do not stop it."""
        ids = [int(t) for t in prompt]
        for _ in range(max_new_tokens):
            ids.append(int(self.logits_of(self.hidden(ids)[-1:]).argmax()))
        return ids[len(prompt) :]

    def _slides(self, layer: int) -> bool:
        flags = self.config.sliding_layers
        return self.config.sliding_window is not None and bool(flags) and flags[layer]

    def _mask(self, length: int, slides: bool) -> torch.Tensor:
        """Which positions each may look at, bool [T, T]."""
        position = torch.arange(length)
        back = position[:, None] - position[None, :]
        if slides and self.config.sliding_window is not None:
            return (back >= 0) & (back < self.config.sliding_window)
        return back >= 0

    def _rotations(self, length: int) -> dict[bool, _Rotation]:
        """One rotation for layers that slide (True) and one for all others, of `length` positions."""
        tables = rope.tables(self.config, length)
        is_long = tables.long_threshold is not None and length > tables.long_threshold
        frequencies, scale = tables.global_inv_freq, tables.global_scale
        if is_long and tables.long_inv_freq is not None:
            frequencies, scale = tables.long_inv_freq, tables.long_scale
        everywhere = _rotation(length, frequencies, scale)
        local = tables.local_inv_freq
        return {False: everywhere, True: everywhere if local is None else _rotation(length, local, 1.0)}

    def _layer(self, layer: int, x: torch.Tensor, mask: torch.Tensor, rotation: _Rotation) -> torch.Tensor:
        """One decoder layer, [T, E] -> [T, E]; where a norm stands is the placement's business alone."""
        p = f"layers.{layer}."
        before = self.config.norm_placement in ("pre", "sandwich")
        after = self.config.norm_placement in ("post", "sandwich")
        y = self._attention(layer, self._norm(p + "attn_norm", x) if before else x, mask, rotation)
        x = x + (self._norm(p + "post_attn_norm", y) if after else y)
        y = self._mlp(p, self._norm(p + "mlp_norm", x) if before else x)
        return x + (self._norm(p + "post_mlp_norm", y) if after else y)

    def _attention(
        self, layer: int, x: torch.Tensor, mask: torch.Tensor, rotation: _Rotation
    ) -> torch.Tensor:
        c, p = self.config, f"layers.{layer}."
        q, k, v = (self._linear(p + name, x) for name in "qkv")  # [T, H * D], [T, K * D] twice
        if c.qk_norm == "full":
            q, k = self._norm(p + "q_norm", q), self._norm(p + "k_norm", k)
        q = q.view(-1, c.num_heads, c.head_dim)  # [T, H, D]
        k = k.view(-1, c.num_kv_heads, c.head_dim)  # [T, K, D]
        v = v.view(-1, c.num_kv_heads, c.head_dim)
        if c.qk_norm == "head":
            q, k = self._norm(p + "q_norm", q), self._norm(p + "k_norm", k)
        if not c.rope_layers or c.rope_layers[layer]:
            q, k = rotation.apply(q), rotation.apply(k)
        q = self._passed(p + "queries", q * c.score_scale)
        k, v = self._passed(p + "keys", k), self._passed(p + "values", v)
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for t in (k, v))  # [T, H, D]
        scores = _softcap(torch.einsum("thd,shd->hts", q, k), c.attention_softcap).masked_fill(
            ~mask, float("-inf")
        )
        mixed = torch.einsum("hts,shd->thd", scores.softmax(dim=-1), v)
        return self._linear(p + "o", mixed.flatten(1))

    def _mlp(self, p: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear(p + "gate", x), self._linear(p + "up", x)
        gate = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self._linear(p + "down", gate * up)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._passed(name, x), self._tensors[name], self._tensors.get(name + ".bias"))

    def _passed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value if self.on_value is None else self.on_value(name, value)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self._tensors[name], self.config.norm_eps)


def int8_groups(x: torch.Tensor, group: int = 32) -> torch.Tensor:
    """x rounded to int8 with one scale (largest magnitude / 127) a group of inputs; float32 [T, cols].

    This is the rounding of the native engine's int8 activations (native/layout.h, kActGroup), undone again.
    """
    cols = x.shape[-1]
    grouped = F.pad(x, (0, -cols % group)).reshape(*x.shape[:-1], -1, group)
    scale = grouped.abs().amax(dim=-1, keepdim=True) / 127
    rounded = torch.round(grouped / scale.clamp(min=torch.finfo(torch.float32).tiny)) * scale
    restored: torch.Tensor = rounded.flatten(-2)[..., :cols]
    return restored


def _rotation(length: int, frequencies: rope.Frequencies, scale: float) -> _Rotation:
    angles = torch.from_numpy(np.outer(np.arange(length), frequencies))  # [T, rotary_dim / 2] float64
    return _Rotation((angles.cos() * scale).float(), (angles.sin() * scale).float())


def _softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap
