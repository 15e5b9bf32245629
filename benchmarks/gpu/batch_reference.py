"""One decode step in plain float32 torch, and whether a row's result depends on its company."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hasten.runtime.gpu.batch_step import PAGE, BatchStep
from hasten.runtime.gpu.batch_weights import Matrix


def linear(matrix: Matrix, inputs: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """Inputs [R, cols] as the kernels round them (or not, if `exact`) times a matrix, in float32."""
    x = inputs if exact else inputs.to(torch.bfloat16).float()
    weights = matrix.values.float()
    if matrix.scales is not None:
        weights *= matrix.scales[:, None]
        if not exact:
            factor = 448 / x.abs().amax(-1, keepdim=True)
            x = (x * factor).to(torch.float8_e4m3fn).float() / factor
    return x @ weights.T


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@torch.inference_mode()
def logits(step: BatchStep, rows: int, exact: bool = False) -> torch.Tensor:
    """Logits [rows, V] of the step that comes next; nothing is changed. Pre-norm models without windows.

    `exact` keeps activations in float32: the difference to that is the noise of rounding.
    """
    weights, c = step.weights, step.weights.config
    x = hidden(step, rows, len(c.blocks), exact)
    return linear(weights.head, x * weights.final_norm, exact) * rms(x, c.final_norm.eps)


@torch.inference_mode()
def first_layer(step: BatchStep, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer adds to the residual stream [rows, E]: the kernels', and plain torch's.

    Few values round the other way within one layer, so this error is small where all is right, in fp8 too.
    """
    embedded, expected = hidden(step, rows, 0), hidden(step, rows, 1)
    shape = step.shape(rows, int(step.positions.max()) + 1)
    step.begin(shape)
    step.look_up(shape)
    for kernel in (step.qkv, step.attention, step.o, step.gate_up, step.down):
        kernel(shape, 0)
    return step.buffers.residual[:rows] - embedded, expected - embedded


def hidden(step: BatchStep, rows: int, layers: int, exact: bool = False) -> torch.Tensor:
    """The residual stream [rows, E] after so many layers."""
    weights, c = step.weights, step.weights.config
    mixer = c.blocks[0].mixer
    position = step.positions[:rows].long()
    x = weights.embed[step.tokens[:rows].long()].float() * c.embedding.scale
    for i, w in enumerate(weights.layers[:layers]):
        y = linear(w.qkv, x * w.attn_norm, exact) * rms(x, c.final_norm.eps)
        heads = y.unflatten(-1, (-1, mixer.head_dim)).split([mixer.heads, mixer.kv_heads, mixer.kv_heads], 1)
        turned = []
        for part, gamma in zip(heads[:2], (w.q_norm, w.k_norm), strict=True):
            part = part if gamma is None else part * rms(part, c.final_norm.eps) * gamma
            a, b = part.chunk(2, -1)
            table = weights.rotations[weights.rotation_of(i)]
            cos, sin = (t[position][:, None] for t in (table.cos, table.sin))
            turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(torch.bfloat16).float())
        mixed = torch.stack([_attend(step, i, row, turned[0], turned[1], heads[2]) for row in range(rows)])
        x = x + linear(w.o, mixed, exact)
        gate, up = (linear(w.gate_up, x * w.mlp_norm, exact) * rms(x, c.final_norm.eps)).chunk(2, -1)
        x = x + linear(w.down, F.silu(gate) * up, exact)
    return x


def _attend(
    step: BatchStep, layer: int, row: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """One row's attention over its pages and its new token: [H D]."""
    past = int(step.positions[row])
    pages = step.table[row, : -(-past // PAGE) or 1].long()
    old = [
        cache[layer][pages].transpose(0, 1).flatten(1, 2)[:, :past].float()
        for cache in (step.keys, step.values)
    ]
    new = [t[row].to(torch.bfloat16).float()[:, None] for t in (k, v)]
    keys, values = (torch.cat(pair, 1) for pair in zip(old, new, strict=True))  # [K, S, D]
    queries = q[row].unflatten(0, (keys.shape[0], -1))  # [K, H / K, D]
    scores = queries @ keys.transpose(1, 2) * step.weights.config.blocks[0].mixer.score_scale
    return (scores.softmax(-1) @ values).flatten()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


class Company:
    """One sequence that is decoded in changing company: its logits and tokens must not change by a bit."""

    def __init__(self, step: BatchStep, position: int, steps: int = 4) -> None:
        self.step, self.position, self.steps = step, position, steps
        count = step.table.shape[1]
        self.pages = torch.arange(
            count, device=step.table.device, dtype=torch.int32
        )  # the first ones are its own
        self.token = 1234

    def decode(self, size: int, row: int, seed: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [steps, V], tokens [steps]) in a batch of `size` at `row`, beside random others."""
        step, count = self.step, len(self.pages)
        generator = torch.Generator().manual_seed(seed)
        total = step.options.pages
        for other in range(size):
            pages = torch.randperm(total - count, generator=generator)[:count] + count
            step.table[other] = pages.to(step.table)
            step.positions[other] = int(torch.randint(0, longest - self.steps, (1,), generator=generator))
            step.tokens[other] = int(torch.randint(0, step.weights.config.vocab, (1,), generator=generator))
        step.positions[size:] = -1
        step.table[row], step.positions[row], step.tokens[row] = self.pages, self.position, self.token
        assert step.buffers.logits is not None
        found = []
        for _ in range(self.steps):
            step.step(size, longest)
            found.append(step.buffers.logits[row].clone())
        first = self.position + 1
        return torch.stack(found), step.emitted[row, first : first + self.steps].clone()
