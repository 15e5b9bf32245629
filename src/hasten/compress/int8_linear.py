"""Linear layers with int8 weights, activations rounded to int8 as they come."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from hasten.errors import MachineError

_TINY = torch.finfo(torch.float32).tiny
_FULL, _REDUCED = 127, 64  # largest weight; the second is exact on processors without VNNI too
MOST_INPUTS = (2**31 - 1) // (127 * 127)
"""More inputs could overflow a 32-bit sum."""


class Int8Linear(nn.Module):
    """`nn.Linear` with a scale for each output of the weight and for each row of the input, both symmetric.

    y[m, n] = (sum over k of a[m, k] * w[n, k]) * scale_a[m] * scale_w[n] + bias[n], the sum exact in int32.

    Method: dynamic quantisation as in torch.ao (deprecated there) with finer scales: rounding a row alone
    keeps its error from the largest value of another row. The product is torch._int_mm, the operation that
    torchao stands on too. On processors without VNNI it adds pairs of products in 16 bits, which
    saturate (measured: 4,080 where 516,128 is right); weights then stay within +-64, where it is exact.

    Cost: torch takes the weight as it lies, [out, in] read as columns; stored the other way round a row's
    product takes half as long again (459 us for 299, 784 x 4,096). Few rows in small layers gain nothing.

    A row with a NaN or an infinity gives NaN, as silence would be a wrong answer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.levels = exact_levels()
        scale = (weight.abs().amax(1) / self.levels).clamp_min(_TINY)
        rounded = (weight / scale[:, None]).round()
        self.register_buffer("weight_int8", rounded.to(torch.int8))  # [out, in]
        self.register_buffer("scale", scale)  # float32 [out]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())

    weight_int8: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in the input's dtype."""
        rows = x.reshape(-1, self.in_features).float()
        row_scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp_min(_TINY)
        sums = torch._int_mm((rows / row_scale).round().to(torch.int8), self.weight_int8.t())
        y = sums.float() * row_scale * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For print(module)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def get_extra_state(self) -> int:
        """How large the weights are: part of the state dict, as not every processor can use all."""
        return self.levels

    def set_extra_state(self, state: int) -> None:
        """See `get_extra_state`.

        Raises:
            MachineError: the weights are larger than this processor multiplies exactly.
        """
        if state > exact_levels():
            raise MachineError(
                "these int8 weights were made on a processor with VNNI and would give wrong sums on this one",
                hint="compress the module again on this machine",
            )
        self.levels = state

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.set_extra_state(self.levels)


@cache
def exact_levels() -> int:
    """Largest absolute weight for which int8 products are exact on this processor: 127 with VNNI, else 64."""
    extreme = torch.full((2, 64), 127, dtype=torch.int8)
    exact = bool((torch._int_mm(extreme, extreme.t()) == 127 * 127 * 64).all())
    return _FULL if exact else _REDUCED


def quantise_linears(module: nn.Module) -> tuple[nn.Module, list[str], dict[str, str]]:
    """Replace the Linear layers of `module`, in place where it is not one itself.

    Returns:
        The module, the names of the layers replaced, and why others were left alone.
    """
    done: list[str] = []
    skipped: dict[str, str] = {}
    made: dict[nn.Module, Int8Linear] = {}  # a layer used in two places stays one
    if isinstance(module, nn.Linear):
        why = why_not(module, None)
        return (Int8Linear(module), ["the module"], {}) if why is None else (module, [], {"the module": why})
    for path, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):  # a child with two names, twice
            if not isinstance(child, nn.Linear):
                continue
            full = f"{path}.{name}" if path else name
            why = why_not(child, parent)
            if why is not None:
                skipped[full] = why
                continue
            setattr(parent, name, made.setdefault(child, made.get(child) or Int8Linear(child)))
            done.append(full)
    return module, done, skipped


def why_not(linear: nn.Linear, parent: nn.Module | None) -> str | None:
    """Why a layer must stay as it is, or None."""
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, whose own rules would be lost"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "has hooks, which would be lost"
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"{type(parent).__name__} reads its weights without calling it"
    if linear.in_features > MOST_INPUTS:
        return f"has more than {MOST_INPUTS:,} inputs"
    return None
