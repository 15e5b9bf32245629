"""Divergences against their definitions, and losses in parts against the whole at once."""

from __future__ import annotations

import pytest
import torch

from hasten.compress.distil.trainer import divergence, hidden_error, in_parts
from hasten.recipe import DistilLoss

KINDS: tuple[DistilLoss, ...] = ("forward", "reverse", "skewed")


def definition(kind: DistilLoss, s: torch.Tensor, t: torch.Tensor, heat: float, skew: float) -> torch.Tensor:
    """Sums of p log(p / q) in float64, by the letter."""
    p, q = (torch.softmax(x.double() / heat, -1) for x in (t, s))
    if kind == "reverse":
        p, q = q, p
    elif kind == "skewed":
        q = skew * p + (1 - skew) * q
    return (p * torch.log(p / q)).sum(-1) * heat**2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_divergences_are_what_they_are_called(kind: DistilLoss, heat: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 40) * 3, torch.randn(5, 40) * 3
    found = divergence(kind, student, teacher, heat, 0.2)
    torch.testing.assert_close(
        found.double(), definition(kind, student, teacher, heat, 0.2), rtol=1e-5, atol=1e-6
    )
    assert (found > 0).all()
    assert divergence(kind, teacher, teacher, heat, 0.2).abs().max() < 1e-5


def test_forward_and_reverse_differ_and_temperature_matters() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 30) * 3, torch.randn(3, 30) * 3
    forward = divergence("forward", student, teacher)
    assert not torch.allclose(forward, divergence("reverse", student, teacher), rtol=1e-2)
    torch.testing.assert_close(forward, divergence("reverse", teacher, student))
    assert not torch.allclose(forward, divergence("forward", student, teacher, 4.0), rtol=1e-2)
    torch.testing.assert_close(forward, divergence("skewed", student, teacher, 1.0, 0.0))


def test_gradients_keep_their_size_at_any_temperature() -> None:
    """Why the square of the temperature: without it they fall sixteenfold from 1 to 4."""
    torch.manual_seed(2)
    teacher, sizes = torch.randn(4, 30) * 0.1, []
    for heat in (1.0, 4.0):
        student = (torch.randn(4, 30, generator=torch.Generator().manual_seed(3)) * 0.1).requires_grad_()
        divergence("forward", student, teacher, heat).sum().backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overflows_where_one_is_certain_of_another_word(kind: DistilLoss) -> None:
    student, teacher = torch.zeros(1, 10), torch.zeros(1, 10)
    student[0, 0], teacher[0, 1] = 500.0, 500.0
    student.requires_grad_()
    loss = divergence(kind, student, teacher).sum()
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_parts_give_the_gradients_of_the_whole(rows: int) -> None:
    torch.manual_seed(4)
    teacher = torch.randn(7, 20)
    hidden, head = torch.randn(7, 6), torch.randn(20, 6)

    def part(h: torch.Tensor, w: torch.Tensor, cut: slice) -> torch.Tensor:
        return divergence("forward", h @ w.T, teacher[cut]).sum()

    whole = [x.clone().requires_grad_() for x in (hidden, head)]
    (part(whole[0], whole[1], slice(None)) / 3).backward()
    cut = [x.clone().requires_grad_() for x in (hidden, head)]
    loss = in_parts(cut[0], cut[1], part, rows) / 3
    loss.backward()
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    frozen = hidden.clone().requires_grad_()  # as with adapters: the head does not learn
    (in_parts(frozen, head, part, rows) / 3).backward()
    torch.testing.assert_close(frozen.grad, whole[0].grad)


def test_hidden_error_is_relative_to_the_teacher() -> None:
    teacher = torch.randn(2, 3, 8)
    torch.testing.assert_close(hidden_error(teacher * 1.5, teacher), torch.full((2, 3), 0.25))
    torch.testing.assert_close(hidden_error(teacher * 150, teacher * 100), torch.full((2, 3), 0.25))
