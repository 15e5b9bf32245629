"""What changes a torch module's layers: neurons or weights pruned by magnitude, Linear layers in int8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from hasten.errors import MachineError

# Modules that treat every channel alike and alone, so that removing one removes just it.
_ELEMENTWISE = (
    nn.Identity, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU,
    nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Softplus, nn.Softsign,
)  # fmt: skip


def prune_channels(module: nn.Module, amount: float) -> tuple[int, int]:
    """Remove the weakest neurons between two Linear layers of an `nn.Sequential`; both layers get smaller.

    A neuron's strength is the norm of the weights into it times the norm of those out of it; `amount` of each
    hidden layer goes, at least one neuron stays. Nothing is repaired: what the removed neurons gave is lost,
    so train on afterwards where that matters. Layers that are shared, hooked or parametrised stay.

    Source: Li et al., "Pruning filters for efficient ConvNets", ICLR 2017 (norms of filters), with the
    outgoing weights counted too, so that scaling a neuron up and its use down changes nothing.

    Returns:
        Neurons removed, and hidden layers they were removed from.
    """
    removed = layers = 0
    for first, second in list(_pairs(module)):  # found before anything changes
        hidden = first.out_features
        keep_count = max(1, hidden - round(amount * hidden))
        if keep_count == hidden:
            continue
        strength = first.weight.detach().float().norm(dim=1) * second.weight.detach().float().norm(dim=0)
        keep = strength.topk(keep_count).indices.sort().values
        first.weight = _part(first.weight, keep, 0)
        if first.bias is not None:
            first.bias = _part(first.bias, keep, 0)
        second.weight = _part(second.weight, keep, 1)
        first.out_features = second.in_features = keep_count
        removed += hidden - keep_count
        layers += 1
    return removed, layers


def prune_weights(module: nn.Module, amount: float) -> tuple[int, int]:
    """Set the smallest weights of every Linear layer to zero; shapes, bytes and time stay.

    This is what torch.nn.utils.prune.l1_unstructured does, made permanent.

    Returns:
        Weights set to zero, and Linear layers they lie in.
    """
    from torch.nn.utils import prune

    removed = layers = 0
    for layer in _linears(module):
        before = int((layer.weight == 0).sum())
        prune.l1_unstructured(layer, "weight", amount=float(amount))  # type: ignore[no-untyped-call]
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        removed += int((layer.weight == 0).sum()) - before
        layers += 1
    return removed, layers


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (layer for layer in module.modules() if type(layer) is nn.Linear and not _watched(layer))


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Linear, nn.Linear]]:
    """Linear layers that follow each other in a Sequential with nothing but elementwise modules between."""
    uses: dict[int, int] = {}  # of a layer or of its weight
    for _, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Linear):
            uses[id(part)] = uses.get(id(part), 0) + 1
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    seen: set[int] = set()
    for chain in module.modules():
        if type(chain) is not nn.Sequential:
            continue
        last: nn.Linear | None = None
        for part in _flat(chain):
            free = type(part) is nn.Linear and not _watched(part) and _used_once(part, uses)
            if free and isinstance(part, nn.Linear):
                if last is not None and id(last) not in seen:
                    seen.add(id(last))
                    yield last, part
                last = part
            elif type(part) not in _ELEMENTWISE or _watched(part):
                last = None


def _flat(chain: nn.Sequential) -> Iterator[nn.Module]:
    for part in chain:
        if type(part) is nn.Sequential and not _watched(part):
            yield from _flat(part)
        else:
            yield part


def _used_once(layer: nn.Linear, uses: dict[int, int]) -> bool:
    return uses[id(layer)] == 1 and all(uses[id(p)] == 1 for p in layer.parameters())


def _watched(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _part(parameter: torch.Tensor, keep: torch.Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, keep), requires_grad=parameter.requires_grad)


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
