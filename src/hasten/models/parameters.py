"""Which parameters a configuration has, and filling every one of them exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hasten.core import ModelConfig
from hasten.errors import ModelError
from hasten.models.names import NameTable
from hasten.weights.tensors import SourceTensor

Shapes = dict[str, tuple[int, ...]]
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def parameter_shapes(config: ModelConfig, biases: Iterable[str] = ()) -> Shapes:
    """Every parameter by canonical name: linear layers [rows, cols], embedding [V, E], others [rows].

    Args:
        config: the model.
        biases: which of "q", "k", "v", "o", "gate", "up", "down" have a bias, in every layer.
    """
    shapes: Shapes = {"embed": (config.vocab_size, config.hidden_size), **config.linear_shapes()}
    hidden, head_dim = (config.hidden_size,), config.head_dim
    norms: dict[str, tuple[int, ...]] = {}
    if config.norm_placement in ("pre", "sandwich"):
        norms |= {"attn_norm": hidden, "mlp_norm": hidden}
    if config.norm_placement in ("post", "sandwich"):
        norms |= {"post_attn_norm": hidden, "post_mlp_norm": hidden}
    if config.qk_norm != "none":
        is_full = config.qk_norm == "full"
        norms["q_norm"] = (config.num_heads * head_dim if is_full else head_dim,)
        norms["k_norm"] = (config.num_kv_heads * head_dim if is_full else head_dim,)
    wanted = sorted(biases)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in norms.items()}
        shapes |= {f"{prefix}{name}.bias": shapes[prefix + name][:1] for name in wanted}
    shapes["final_norm"] = hidden
    return shapes


def present_biases(names: Iterable[str]) -> frozenset[str]:
    """Linear layers with a bias anywhere among canonical names: for a format that does not say so."""
    found = {name.split(".")[2] for name in names if name.startswith("layers.") and name.endswith(".bias")}
    return frozenset(found & set(_LINEARS))


def fill(
    tensors: Mapping[str, SourceTensor], table: NameTable, shapes: Shapes, where: str
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Match the tensors of a file with the parameters of a model; fused ones are split by rows.

    Args:
        tensors: by the file's names.
        table: what those names mean.
        shapes: the parameters, as `parameter_shapes` gives them.
        where: what errors call the file.

    Returns:
        (tensors by canonical name, file names of the unused)

    Raises:
        ModelError: a tensor is missing, extra, misshapen or there twice; it is named.
    """
    filled: dict[str, SourceTensor] = {}
    unused: list[str] = []
    extra: list[str] = []
    for name, tensor in tensors.items():
        parts = table.parts(name)
        is_tied_head = parts == ("head",) and "head" not in shapes
        if is_tied_head or table.ignores(name):
            unused.append(name)
        elif parts is None or any(part not in shapes for part in parts):
            extra.append(name)
        else:
            _place(filled, tensor, parts, shapes, where)
    if extra:
        raise ModelError(
            f"{where}: {_listed(extra, 'tensor')} not part of this architecture",
            hint="the file holds another model than its configuration says, or an unsupported feature",
        )
    missing = [name for name in shapes if name not in filled]
    if missing:
        raise ModelError(
            f"{where}: {_listed(missing, 'parameter')} missing",
            hint="the checkpoint is incomplete: download it again",
        )
    return filled, tuple(unused)


def _place(
    filled: dict[str, SourceTensor], tensor: SourceTensor, parts: tuple[str, ...], shapes: Shapes, where: str
) -> None:
    """Put one tensor, or each part of a fused one, where it belongs."""
    rows = sum(shapes[part][0] for part in parts)
    wanted = (rows, *shapes[parts[0]][1:])
    if tensor.shape != wanted:
        raise ModelError(
            f"{where}: tensor {tensor.name!r} must be {list(wanted)}, got {list(tensor.shape)}",
            hint="the file does not belong to its configuration",
        )
    first = 0
    for part in parts:
        if part in filled:
            raise ModelError(f"{where}: {part!r} is there twice, the second time as {tensor.name!r}")
        count = shapes[part][0]
        filled[part] = tensor.part(part, first, count)
        first += count


def _listed(names: list[str], noun: str) -> str:
    """`tensor 'a' is`, or `12 tensors ('a', 'b', 'c', ...) are`."""
    if len(names) == 1:
        return f"{noun} {names[0]!r} is"
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} {noun}s ({shown}{', ...' if len(names) > 3 else ''}) are"
