"""What the calibration text is in a model: hidden states on their way through layers, and second moments.

Second moments of a layer's inputs and of its wanted outputs give the weights that fit them best.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hasten.compress.calibration import Calibration
from hasten.compress.torch_model import Linear, Positions, Weights, layer_forward, layer_weights, row_values
from hasten.core import ModelSpec
from hasten.errors import ModelError
from hasten.models.source import Source

_BLOCK = 640
_RIDGE = 0.3


def symmetric_add(gram: torch.Tensor, h: torch.Tensor) -> None:
    """Adds h^T h of inputs [..., inputs] to their second moments, [inputs, inputs], in place.

    The half above the diagonal is copied, which saves close to half of the work.
    """
    h = h.flatten(0, -2).float()
    for at in range(0, h.shape[1], _BLOCK):
        end = at + _BLOCK
        part = h[:, at:].T @ h[:, at:end]
        gram[at:, at:end] += part
        gram[at:end, end:] += part[_BLOCK:].T


def gram_error(gram: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    """Root of |(other - weight) h|^2 / |weight h|^2 over the tokens of `gram`; weights [outputs, inputs]."""

    def squares(of: torch.Tensor) -> float:
        return max(0.0, float(((of @ gram) * of).sum(dtype=torch.float64)))

    whole = squares(weight)
    return float((squares(other - weight) / whole) ** 0.5) if whole else 0.0


@dataclass
class Moments:
    """Sums over tokens: all that least squares needs, whatever the number of tokens.

    Costs 4 bytes times `inputs` squared, 95 MB for 4,864 inputs.
    """

    gram: torch.Tensor  # float32 [inputs, inputs]: sum of h h^T
    cross: torch.Tensor  # float32 [outputs, inputs]: sum of y h^T
    squares: float = 0.0  # sum of |y|^2
    tokens: int = 0

    @classmethod
    def zeros(cls, inputs: int, outputs: int) -> Moments:
        """Before the first token."""
        return cls(torch.zeros(inputs, inputs), torch.zeros(outputs, inputs))

    def add(self, h: torch.Tensor, y: torch.Tensor, state: torch.Tensor | None = None) -> None:
        """Count inputs [..., inputs] and wanted outputs [..., outputs] in.

        `state` [..., E] is the hidden state a norm reads once the outputs are in it: an error weighs as much
        as it then is of the state. A few tokens have states a thousand times as long as all others (Sun et
        al. 2024, Massive Activations), and would be all that is fitted.
        """
        h, y = h.flatten(0, -2).float(), y.flatten(0, -2).float()
        if state is not None:
            weight = state.flatten(0, -2).square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            h, y = h * weight, y * weight
        symmetric_add(self.gram, h)
        self.cross.addmm_(y.T, h)
        self.squares += float(y.square().sum(dtype=torch.float64))
        self.tokens += len(h)

    def scale(self) -> torch.Tensor:
        """Root of each input's summed square, [inputs], never zero."""
        squares = self.gram.diagonal()
        return squares.clamp_min(max(1e-30, 1e-12 * float(squares.mean()))).sqrt()

    @property
    def ridge(self) -> float:
        """How hard a fit is held to where it was: 0.3 at a token an input, less the more tokens there are.

        FFN layers 5 and 14 of the demo model fitted on 5,120 tokens: of 0.01, 0.03, 0.1, 0.3 and 1, 0.3 gave
        an error on 1,024 other tokens within 2 % of the best for both.
        """
        return _RIDGE * len(self.gram) / max(self.tokens, 1)

    def kept(self, inputs: torch.Tensor) -> Moments:
        """Of some inputs only, int64 [n]."""
        return Moments(self.gram[inputs][:, inputs], self.cross[:, inputs], self.squares, self.tokens)

    def error(self, weight: torch.Tensor) -> float:
        """Root of |y - weight h|^2 / |y|^2 over the tokens, for weights [outputs, inputs]."""
        if self.squares == 0:
            return 0.0
        explained = 2 * (weight * self.cross).sum(dtype=torch.float64)
        own = ((weight @ self.gram) * weight).sum(dtype=torch.float64)
        return float((max(0.0, self.squares - float(explained) + float(own)) / self.squares) ** 0.5)


def fitted(moments: Moments, prior: torch.Tensor, ridge: float | None = None) -> torch.Tensor:
    """Weights that give the wanted outputs: ridge regression that falls back on `prior`.

    Minimises |y - w h|^2 + ridge * sum of |(w - prior)_j|^2 |h_j|^2: each input's weights are held to where
    they were by the ridge times the input's own size, so that channels of all sizes are treated alike.

    Args:
        prior: [outputs, inputs].
        ridge: None is the moments' own.

    Returns:
        float32 [outputs, inputs].
    """
    ridge = moments.ridge if ridge is None else ridge
    scale = moments.scale()
    system = moments.gram / scale / scale[:, None]
    system.diagonal().add_(ridge)
    wanted = moments.cross / scale + ridge * (prior * scale)
    return torch.cholesky_solve(wanted.T, torch.linalg.cholesky(system)).T / scale


def refit(moments: Moments, prior: torch.Tensor, repair: bool) -> tuple[torch.Tensor, float, float | None]:
    """Weights for the inputs that are left, bfloat16 [outputs, inputs]; their errors as cut and as fitted.

    Args:
        moments: of the inputs that are there. prior: [outputs, inputs], as cut.
        repair: False leaves them as cut.
    """
    before = moments.error(prior)
    if not repair:
        return prior.bfloat16(), before, None
    fit = fitted(moments, prior).bfloat16()
    return fit, before, moments.error(fit.float())


BATCH_TOKENS = 2048
"""Tokens computed at once: 40 MB for each activation 4,864 wide."""

Found = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Short name of a linear layer -> what it read [b, T, cols] and gave [b, T, rows], bias left out."""


@dataclass
class Stream:
    """What every token's hidden state is before the next layer: float32 [B, T, E], 4 bytes E a token."""

    name: str  # the model's
    config: ModelSpec
    x: torch.Tensor
    positions: Positions

    @classmethod
    def of(cls, source: Source, calibration: Calibration) -> Stream:
        """Embeddings of the calibration text, before the first layer."""
        config = source.config
        ids, place = torch.unique(torch.from_numpy(calibration.ids).long(), return_inverse=True)
        x = row_values(source.tensors["embed"], ids)[place] * config.embedding.scale
        return cls(source.name, config, x, Positions.of(config, calibration.ids.shape[1]))

    def copy(self) -> Stream:
        """The same states again, to go another way from here."""
        return Stream(self.name, self.config, self.x.clone(), self.positions)

    def batches(self) -> Iterator[slice]:
        """Which sequences are computed together."""
        size = max(1, BATCH_TOKENS // self.x.shape[1])
        yield from (slice(at, at + size) for at in range(0, len(self.x), size))

    def through(
        self,
        index: int,
        weights: Weights,
        rows: slice,
        found: Found | None = None,
        *,
        silent: Collection[str] = (),
    ) -> torch.Tensor:
        """Some sequences after a layer, [b, T, E]; the stream stays where it is.

        Args:
            found: filled with what each linear layer reads and gives.
            silent: linear layers that are not computed and give zeros.

        Raises:
            ModelError: a value is not finite; the layer is named.
        """
        hook = _recording(found, silent) if found is not None else stream_linear
        y = layer_forward(self.config, index, weights, self.x[rows], self.positions, hook)
        if not torch.isfinite(y).all():
            raise ModelError(
                f"{self.name}: layers.{index} gives values that are not finite on the calibration text",
                hint=f"the weights of layers.{index} or before are damaged: get the model again",
            )
        return y

    def join(self, name: str, weights: Weights, inputs: torch.Tensor) -> None:
        """Add what `o` or `down` gives of its inputs [B, T, cols], normed where the model norms it."""
        norm = weights.get("post_attn_norm" if name == "o" else "post_mlp_norm")
        for rows in self.batches():
            y = stream_linear(name, inputs[rows], weights[name], weights.get(f"{name}.bias"))
            if norm is not None:
                y = F.rms_norm(y, norm.shape, norm, self.config.blocks[0].norms.eps)
            self.x[rows] += y

    def advance(self, index: int, weights: Weights) -> None:
        """All sequences through a layer, in place."""
        for rows in self.batches():
            self.x[rows] = self.through(index, weights, rows)


def fast_type() -> torch.dtype:
    """What matrices are multiplied in: bfloat16 where the processor has it, as the engine's own bf16 does."""
    mkldnn = torch.backends.mkldnn
    has = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if has else torch.float32


def stream_weights(source: Source, index: int) -> dict[str, torch.Tensor]:
    """A layer's parameters: matrices in `fast_type`, norms and biases in float32."""
    return in_fast_type(layer_weights(source, index))


def in_fast_type(weights: Weights) -> dict[str, torch.Tensor]:
    """A layer's parameters with the matrices in `fast_type`."""
    dtype = fast_type()
    return {name: value.to(dtype) if value.ndim == 2 else value for name, value in weights.items()}


def stream_linear(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Inputs and result in float32 around a product in the weight's type."""
    y = F.linear(x.to(weight.dtype), weight).float()
    return y if bias is None else y + bias


def _recording(found: Found, silent: Collection[str]) -> Linear:
    def linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name in silent:
            found[name] = x, x.new_zeros(1)
            return torch.zeros(*x.shape[:-1], len(weight))
        y = stream_linear(name, x, weight, None)
        found[name] = x, y
        return y if bias is None else y + bias

    return linear
