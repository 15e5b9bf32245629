"""How far a student's next-token distribution is from its teacher's: what distillation makes small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hasten.recipe import DistilLoss

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
