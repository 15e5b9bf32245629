"""Models with random weights for the persistent decode kernel, and the same computation in float32 torch."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from hasten.core import ModelSpec, RopeScaling
from hasten.runtime.gpu.persistent import rotation_tables
from hasten.runtime.gpu.shape import Shape, WeightFormat
from hasten.runtime.gpu.tiles import rounded
from hasten.runtime.reference import ReferenceDecoder
from hasten.weights.plan import FlatConfig

BIASED = {"qwen2": frozenset("qkv"), "biased": frozenset({"q", "k", "v", "o", "gate", "up", "down"})}
_LLAMA = FlatConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    context_length=131072,
    norm_eps=1e-5,
    rope_theta=5e5,
)
_REAL = {
    "8B": _LLAMA,
    "0.6B": dataclasses.replace(
        _LLAMA,
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        qk_norm="head",
        tied_head=True,
        norm_eps=1e-6,
        rope_theta=1e6,
    ),
    "qwen2.5-7B": dataclasses.replace(
        _LLAMA,
        architecture="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
    ),
    "gemma3-1B": dataclasses.replace(
        _LLAMA,
        architecture="gemma3",
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        norm_placement="sandwich",
        qk_norm="head",
        activation="gelu_tanh",
        embed_scale=34.0,
        sliding_window=512,
        sliding_layers=tuple(i % 6 != 5 for i in range(26)),
        rope_local_theta=1e4,
        tied_head=True,
    ),
}
_TINY = FlatConfig(
    architecture="llama",
    vocab_size=263,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=1024,
)


def _tiny(architecture: str, **values: object) -> FlatConfig:
    return dataclasses.replace(_TINY, architecture=architecture, **values)  # type: ignore[arg-type]


_TINIES = {
    "llama": _tiny("llama"),
    "llama-wide": _tiny("llama", hidden_size=512, intermediate_size=1408, num_heads=8, head_dim=128),
    "llama-groups-of-8": _tiny("llama", num_heads=8, num_kv_heads=1, head_dim=128),
    "llama-groups-of-7": _tiny("qwen2", num_heads=14, num_kv_heads=2, head_dim=64),
    "mistral": _tiny("mistral", sliding_window=7, sliding_layers=(True,) * 3, head_dim=24),
    "qwen2": _tiny("qwen2", tied_head=True),
    "biased": _tiny("biased"),
    "qwen3": _tiny("qwen3", head_dim=80, qk_norm="head", rope_theta=1e6),
    "gemma3": _tiny(
        "gemma3",
        num_layers=7,
        num_kv_heads=1,
        head_dim=256,
        norm_placement="sandwich",
        qk_norm="head",
        activation="gelu_tanh",
        embed_scale=8.0,
        sliding_window=7,
        sliding_layers=tuple(i % 6 != 5 for i in range(7)),
        rope_theta=1e6,
        rope_local_theta=1e4,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        query_scale=24**-0.5,
        attention_softcap=4.0,
        logit_softcap=20.0,
        tied_head=True,
    ),
    "phi3": _tiny("phi3", head_dim=96, rotary_dim=72, num_kv_heads=4),
    "smollm3": _tiny("smollm3", num_layers=5, rope_layers=(True, True, True, False, True), tied_head=True),
    "olmo2": _tiny("olmo2", norm_placement="post", qk_norm="full", num_kv_heads=4, head_dim=192),
}


def _specs(models: dict[str, FlatConfig]) -> dict[str, ModelSpec]:
    return {name: flat.spec(BIASED.get(flat.architecture, ())) for name, flat in models.items()}


REAL, TINY = _specs(_REAL), _specs(_TINIES)


class Parameters:
    """Random parameters by canonical name, each made anew from the seed and its name: nothing is held."""

    def __init__(self, config: ModelSpec, seed: int, device: str, loud: float = 1.0) -> None:
        self.biases = BIASED.get(config.architecture, frozenset())
        self._shapes = config.parameter_shapes()
        self._seed, self._device, self._loud = seed, device, loud

    def __call__(self, name: str) -> torch.Tensor | None:
        shape = self._shapes.get(name)
        if shape is None:
            return None
        generator = torch.Generator(device=self._device).manual_seed(self._seed + zlib.crc32(name.encode()))
        noise = torch.randn(shape, generator=generator, device=self._device, dtype=torch.bfloat16)
        if "norm" in name:
            return 1 + 0.1 * noise.float()
        if name.endswith("bias"):
            return 0.3 * noise.float()
        if name == "embed":
            return (noise.float() * shape[1] ** -0.5).bfloat16()
        return (noise.float() * self._loud * shape[1] ** -0.5).bfloat16()


def format_of(shape: Shape, name: str) -> WeightFormat | None:
    """The format of a parameter by canonical name; None where it is not a product's."""
    last = name.split(".")[-1]
    product = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(last, last)
    return shape.formats.get(product)  # type: ignore[call-overload,no-any-return]


def stored(shape: Shape, parameters: Parameters, name: str) -> torch.Tensor:
    """What the kernel multiplies with, float32."""
    value = parameters(name)
    assert value is not None, name
    fmt = format_of(shape, name)
    return value.float() if fmt is None else rounded(value, fmt).values()


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the plain decoder gives for one sequence."""

    logits: torch.Tensor  # float32 [T, V]
    keys: torch.Tensor  # bf16 [layer, T, KV head, D], as the cache holds them
    values: torch.Tensor


def reference(shape: Shape, parameters: Parameters, tokens: Sequence[int]) -> Expected:
    """The plain decoder over the stored weights, keys and values rounded as the cache holds them."""
    names = shape.config.parameter_shapes()
    tensors = {name: stored(shape, parameters, name).cpu().numpy() for name in names}
    cached: dict[str, torch.Tensor] = {}

    def as_cached(name: str, value: np.ndarray) -> np.ndarray:
        if not name.endswith((".keys", ".values")):
            return value
        cached[name] = torch.from_numpy(value).bfloat16()
        return cached[name].float().numpy()

    hidden = torch.from_numpy(ReferenceDecoder(shape.config, tensors, as_cached).hidden(np.array(tokens)))
    if shape.config.head.tied:  # the head is stored in its own format, the embedding's rows are bf16
        embed = parameters("embed")
        assert embed is not None
        head = rounded(embed, shape.formats["head"]).values().cpu()
    else:
        head = torch.from_numpy(tensors["head"])
    logits, cap = hidden @ head.T, shape.config.head.softcap
    layers = range(len(shape.config.blocks))
    return Expected(
        logits if cap is None else torch.tanh(logits / cap) * cap,
        torch.stack([cached[f"layers.{i}.keys"] for i in layers]),
        torch.stack([cached[f"layers.{i}.values"] for i in layers]),
    )


class Twin:
    """One sequence's next tokens in float32 on the device, over given keys and values."""

    def __init__(self, shape: Shape, parameters: Parameters) -> None:
        self.shape, self.parameters = shape, parameters

    @torch.inference_mode()
    def logits(
        self, tokens: Sequence[int], position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Logits [T, V] of `tokens` put at `position` and after it.

        Args:
            keys, values: [layer, position, KV head, D] of what came before.
        """
        c = self.shape.config
        cosines, sines = (
            torch.from_numpy(t).to(keys.device) for t in rotation_tables(c, position + len(tokens))
        )
        embed = self.parameters("embed")
        assert embed is not None
        x = embed[list(tokens)].float() * c.embedding.scale
        for layer in range(len(c.blocks)):
            slides = c.blocks[layer].mixer.window is not None
            turn = (cosines[int(slides), position:], sines[int(slides), position:])
            x = self._layer(layer, x, turn, keys[layer], values[layer])
        x = self._norm("final_norm", x)
        head = rounded(embed, self.shape.formats["head"]).values() if c.head.tied else self._matrix("head")
        logits = x @ head.T
        return logits if c.head.softcap is None else torch.tanh(logits / c.head.softcap) * c.head.softcap

    def _matrix(self, name: str) -> torch.Tensor:
        return stored(self.shape, self.parameters, name)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.parameters(name + ".bias")
        y = x @ self._matrix(name).T
        return y if bias is None else y + bias.float()

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.parameters(name)
        assert weight is not None
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.float(), self.shape.config.final_norm.eps)

    def _layer(self, i: int, x: torch.Tensor, turn: tuple, keys: torch.Tensor, values: torch.Tensor):  # type: ignore[no-untyped-def,type-arg]
        c, p = self.shape.config, f"layers.{i}."
        before, after = c.blocks[0].norms.placement != "post", c.blocks[0].norms.placement != "pre"
        y = self._attention(i, self._norm(p + "attn_norm", x) if before else x, turn, keys, values)
        x = x + (self._norm(p + "post_attn_norm", y) if after else y)
        y = self._norm(p + "mlp_norm", x) if before else x
        gate = self._linear(p + "gate", y)
        gate = (
            torch.nn.functional.silu(gate)
            if c.blocks[0].feed_forward.activation == "silu"
            else torch.nn.functional.gelu(gate, approximate="tanh")
        )
        y = self._linear(p + "down", gate * self._linear(p + "up", y))
        return x + (self._norm(p + "post_mlp_norm", y) if after else y)

    def _attention(self, i: int, x: torch.Tensor, turn: tuple, keys: torch.Tensor, values: torch.Tensor):  # type: ignore[no-untyped-def,type-arg]
        c, p, count = self.shape.config, f"layers.{i}.", len(x)
        mixer = c.blocks[0].mixer
        q = self._linear(p + "q", x).view(count, mixer.heads, mixer.head_dim)
        k = self._linear(p + "k", x).view(count, mixer.kv_heads, mixer.head_dim)
        v = self._linear(p + "v", x).view(count, mixer.kv_heads, mixer.head_dim)
        if mixer.qk_norm == "head":
            q, k = self._norm(p + "q_norm", q), self._norm(p + "k_norm", k)
        q, k = self._turned(q, turn), self._turned(k, turn)
        k = torch.cat((keys.float(), k.bfloat16().float()))
        v = torch.cat((values.float(), v.bfloat16().float()))
        ratio = mixer.heads // mixer.kv_heads
        scores = torch.einsum(
            "tkgd,skd->kgts", q.view(count, -1, ratio, mixer.head_dim) * mixer.score_scale, k
        )
        back = (
            torch.arange(len(k), device=x.device)
            - (len(keys) + torch.arange(count, device=x.device))[:, None]
        )
        window = c.blocks[i].mixer.window
        hidden = (back > 0) | ((back <= -window) if window else (back > 0))
        mixed = torch.einsum("kgts,skd->tkgd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
        return self._linear(p + "o", mixed.reshape(count, -1))

    def _turned(self, x: torch.Tensor, turn: tuple) -> torch.Tensor:  # type: ignore[type-arg]
        half = turn[0].shape[-1]
        cos, sin = turn[0][: len(x), None], turn[1][: len(x), None]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
