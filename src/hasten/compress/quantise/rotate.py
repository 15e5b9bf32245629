"""Hidden states turned by a random Hadamard matrix, folded into the weights (QuaRot, Ashkboos et al. 2024).

A decoder that normalises before each block computes the same in any orthogonal basis of the residual stream:
RMSNorm without weights keeps lengths only, so norm weights go into the matrices that read them, and every
matrix that reads the stream turns its columns, every one that writes it turns its rows. Values turn within
each head likewise, between `v` and `o` (R2 of SpinQuant, Liu et al. 2024). Outliers of single channels are
spread over all, which rounds better; the model computes what it did, at the same speed.

What turns while the model runs (QuaRot's Hadamard before `down`, and of queries and keys) is not done: the
engine would pay for it at each token.

Weights have less error this way, outputs not always: a channel that is large in the stream and small in the
norm's weights hardly counts before, and is part of every channel after. Rounded to nearest in groups of 32,
the demo model gained nothing at 4 bits: measure a recipe with and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hasten.compress.torch_model import Values, changed, tensor_values
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.weights.tensors import SourceTensor

_LARGEST_PALEY = 2048
"""Orders tried: a dense factor of this size costs what a dense matrix would."""
_CHUNK = 1 << 20
"""Values turned at once: what is held besides the result."""

Matrix = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Orthogonal:
    """Q = diag(signs) (left x right), x the Kronecker product; never built as a whole.

    A Hadamard matrix has entries of one magnitude alone, so that no channel keeps more than 1 / sqrt(n) of an
    outlier. They exist for powers of two (Sylvester 1867) and for many multiples of four (Paley 1933);
    Kronecker products of them are Hadamard matrices again.

    Turning a vector of n = a * b values costs n (a + b) multiply-adds instead of n^2. Hadamard factors keep
    entries of 1 and -1, which sum exactly: what makes their rows one long is rounded once, in the signs.
    """

    signs: torch.Tensor  # float32 [n], one magnitude
    left: torch.Tensor  # float32 [a, a], rows of one length at right angles
    right: torch.Tensor  # float32 [b, b], likewise
    because: str  # what was chosen, and why

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    def turn_(self, x: torch.Tensor) -> torch.Tensor:
        """x Q in the place of x, float32 [..., k * n]: every n values that lie together are one vector."""
        rows = x.view(-1, self.size)
        for piece in torch.split(rows, max(1, _CHUNK // self.size)):
            pairs = (piece * self.signs).view(-1, len(self.left), len(self.right))
            piece.copy_((self.left.T @ (pairs @ self.right)).view_as(piece))
        return x

    def turn_rows_(self, x: torch.Tensor) -> torch.Tensor:
        """Q^T x in the place of x, float32 [k * n, cols]: each n rows that lie together turn as one."""
        for piece in torch.split(x, max(1, _CHUNK // len(x)), dim=1):
            piece.copy_(self.turn_(piece.T.contiguous()).T)
        return x

    def matrix(self) -> torch.Tensor:
        """Q itself, float32 [n, n]."""
        return self.turn_(torch.eye(self.size))


def orthogonal(size: int, seed: int) -> Orthogonal:
    """A random orthogonal matrix of a size, a Hadamard matrix where one is known.

    Args:
        size: n, 1 or more.
        seed: of the signs, and of the odd factor where there is no Hadamard matrix.
    """
    rng = np.random.default_rng([seed, size])
    signs = rng.integers(0, 2, size) * 2.0 - 1.0
    odd = size // (size & -size)
    if odd == 1:
        twos = size.bit_length() - 1
        left, right = sylvester(1 << twos // 2), sylvester(1 << (twos - twos // 2))
        because = f"{size} is a power of two: a Hadamard matrix"
    elif (order := _paley_order(size, odd)) is not None:
        left, right = sylvester(size // order), paley(order)
        because = f"{size} = {size // order} x {order}: a Hadamard matrix of Sylvester's and Paley's"
    else:
        left, right = sylvester(size // odd), _random(odd, rng)
        because = f"{size} = {size // odd} x {odd}: no Hadamard matrix at hand, so {odd} are turned at random"
    signs /= np.linalg.norm(left[0]) * np.linalg.norm(right[0])
    return Orthogonal(_float(signs), _float(left), _float(right), because)


def sylvester(order: int) -> Matrix:
    """The Hadamard matrix of a power of two, entries 1 and -1."""
    matrix: Matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(matrix, [[1.0, 1.0], [1.0, -1.0]])
    return matrix


def paley(order: int) -> Matrix:
    """A Hadamard matrix from the quadratic residues of a prime, entries 1 and -1.

    Paley's first construction where order - 1 is a prime, his second where order / 2 - 1 is one that leaves 1
    when divided by 4: 12, 20, 28, 36, 44, 60 ...
    """
    assert _is_paley(order), order
    if _is_prime(order - 1):
        return np.eye(order) + _bordered(order - 1, -1.0)
    bordered = _bordered(order // 2 - 1, 1.0)
    turn = np.array([[1.0, 1.0], [1.0, -1.0]])
    whole: Matrix = np.kron(bordered, turn) + np.kron(np.eye(len(bordered)), [[1.0, -1.0], [-1.0, -1.0]])
    return whole


def _bordered(prime: int, column: float) -> Matrix:
    """[[0, 1 ...], [column, chi(i - j)]]: chi is 1 for squares modulo the prime, -1 for others, 0 for 0."""
    chi = np.full(prime, -1.0)
    chi[np.arange(prime) ** 2 % prime] = 1.0
    chi[0] = 0.0
    at = np.arange(prime)
    matrix = np.ones((prime + 1, prime + 1))
    matrix[1:, 1:] = chi[(at[:, None] - at[None, :]) % prime]
    matrix[1:, 0], matrix[0, 0] = column, 0.0
    return matrix


def _paley_order(size: int, odd: int) -> int | None:
    """The smallest order of Paley's that leaves a power of two of the size."""
    order = 4 * odd
    while size % order == 0 and order <= _LARGEST_PALEY:
        if _is_paley(order):
            return order
        order *= 2
    return None


def _is_paley(order: int) -> bool:
    return order % 4 == 0 and (_is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1)))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _random(size: int, rng: np.random.Generator) -> Matrix:
    """Uniformly random among the orthogonal matrices: QR of normal values, signs by R (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    turned: Matrix = q * np.sign(np.diag(r))
    return turned


def _float(values: Matrix) -> torch.Tensor:
    return torch.from_numpy(values).float()


_READERS = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "gate": "mlp_norm", "up": "mlp_norm"}
_WRITERS = ("o", "down")


def obstacle(config: ModelSpec) -> str | None:
    """Why a model cannot be rotated; None where it can."""
    if config.blocks[0].norms.placement == "pre":
        return None
    return (
        f"{config.architecture} normalises what joins the residual stream, with a weight for each channel, "
        "and such weights fold into no matrix that follows"
    )


def residual_rotation(config: ModelSpec, seed: int = 0) -> Orthogonal:
    """The matrix Q [E, E] that `rotate` turns hidden states by; `because` says what was chosen."""
    return orthogonal(config.width, seed)


def head_rotation(config: ModelSpec, layer: int, seed: int = 0) -> Orthogonal:
    """The matrix R2 [D, D] that `rotate` turns the values of every head of a layer by."""
    return orthogonal(config.blocks[0].mixer.head_dim, seed + 1 + layer)


def rotate(source: Source, seed: int = 0) -> Source:
    """The model in another basis: the same outputs up to float32 rounding, weights without outliers.

    Nothing is computed now: each tensor is unpacked, folded and turned when it is read. A tied head is untied
    unless all weights of the final norm are equal (`config.head.tied` says): embedding and head then differ,
    and the model stores both. Norm weights become 1, so nothing more folds into them that was there before.

    Args:
        source: a model that normalises before each block, and nowhere else but queries and keys.
        seed: of both rotations.

    Raises:
        UsageError: norms stand where their weights fold into nothing (Gemma 3, OLMo 2).
    """
    if (why := obstacle(source.config)) is not None:
        raise UsageError(f"{source.name} cannot be rotated: {why}", hint="leave rotate out of the recipe")
    config, turn = source.config, residual_rotation(source.config, seed)
    values: dict[str, Values] = {"embed": _columns(source.tensors["embed"], turn)}
    for layer in range(len(config.blocks)):
        values |= _layer(source, layer, turn, head_rotation(config, layer, seed))
    final = source.tensors["final_norm"]
    weights = tensor_values(final)
    if config.head.tied and bool((weights == weights[0]).all()):
        return changed(source, values)  # a single factor commutes with every rotation: it stays in the norm
    head = source.tensors[config.head_name]
    values |= {"head": _columns(head, turn, final), "final_norm": torch.ones_like(weights)}
    return changed(source, values, config=replace(config, head=replace(config.head, tied=False)))


def _layer(source: Source, layer: int, turn: Orthogonal, heads: Orthogonal) -> dict[str, Values]:
    """The new tensors of one layer by canonical name."""
    prefix = f"layers.{layer}."
    found = {name.removeprefix(prefix): t for name, t in source.tensors.items() if name.startswith(prefix)}
    values: dict[str, Values] = {
        name: _columns(found[name], turn, found[norm], heads if name == "v" else None)
        for name, norm in _READERS.items()
    }
    values |= {name: _rows(found[name], turn, heads if name == "o" else None) for name in _WRITERS}
    values |= {norm: torch.ones(found[norm].shape) for norm in ("attn_norm", "mlp_norm")}
    biases = {"v": heads, "o": turn, "down": turn}
    for name, by in biases.items():
        if (bias := found.get(f"{name}.bias")) is not None:
            values[f"{name}.bias"] = _columns(bias, by)
    return {prefix + name: value for name, value in values.items()}


def _columns(
    tensor: SourceTensor, turn: Orthogonal, norm: SourceTensor | None = None, heads: Orthogonal | None = None
) -> Callable[[], torch.Tensor]:
    """W diag(norm) Q, and R2^T of that for each head's rows: what reads the stream, or a vector in it."""

    def made() -> torch.Tensor:
        values = tensor_values(tensor)
        if norm is not None:
            values *= tensor_values(norm)
        values = turn.turn_(values)
        return values if heads is None else heads.turn_rows_(values)

    return made


def _rows(tensor: SourceTensor, turn: Orthogonal, heads: Orthogonal | None) -> Callable[[], torch.Tensor]:
    """Q^T W, and that times R2 for each head's columns: what writes the stream."""

    def made() -> torch.Tensor:
        values = tensor_values(tensor)
        return turn.turn_rows_(values if heads is None else heads.turn_(values))

    return made
