"""Prune torch modules by magnitude: whole neurons, or weights one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

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
