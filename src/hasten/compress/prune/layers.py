"""What goes inside layers, and whole layers: FFN channels, attention heads, layers. Fits repair what is left.

**FFN channels**: the same number goes in every layer, and `down` is fitted to what is left. With repair those
go that cost the refitted output of the layer least (`least_loss`). Without, those that themselves contribute
least: second moment times |column of down|^2.

**Attention heads**: query heads with their KV head, the same number in every layer, and `o` fitted anew.
Whole KV groups go where that comes nearest to the amount (the KV cache shrinks with them); else each group
gives the same number of query heads. Those go that contribute least to the output. Choosing those that cost
the refitted output least errs less in every layer, and is far worse: a quarter of the demo model's heads then
costs +73 % perplexity instead of +8 %, as a few windows of text go wrong altogether.

**Layers**: those go that change the hidden state least. Block influence: 1 - mean cosine of what goes into a
layer and what comes out (Men et al. 2024, ShortGPT). Repair: `down` of the layer before a gap is fitted so
that it adds what the missing layers did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hasten.compress.calibration import Calibration
from hasten.compress.prune import MULTIPLE, Observer, PartPruned, Parts, Pruner, kept_multiple
from hasten.compress.stream import Found, Moments, Stream, refit, stream_linear, stream_weights
from hasten.compress.torch_model import Weights, made_tensor, renamed, taken_rows
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import Pruning
from hasten.weights.tensors import SourceTensor

_LOOSE = 0.1  # of the ridge of the fit: what it then errs on other text is 2 to 4 % less (demo model)
_AT_ONCE = 32  # inputs that may go before the rest is judged anew
_STRANGER = 0.3  # partial correlation below which two inputs may go at once


def least_loss(moments: Moments, prior: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` inputs that are kept, int64 ascending: those go that cost the refitted output least.

    Optimal brain surgeon for whole columns (Hassibi and Stork 1993; ZipLM, Kurtic et al. 2023).

    Args:
        prior: [outputs, inputs]: the weights that the ridge falls back on.
        count: inputs that stay.
    """
    weight, inverse = _solved(moments, prior)
    gone = torch.zeros(len(inverse), dtype=torch.bool)
    while (left := len(inverse) - count - int(gone.sum())) > 0:
        loss = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-12)
        worst = loss.masked_fill(gone, torch.inf).topk(min(_AT_ONCE, left), largest=False).indices
        out = worst[_strangers(inverse[worst][:, worst])]
        _remove(weight, inverse, out)
        gone[out] = True
    return (~gone).nonzero().squeeze(1)


def _solved(moments: Moments, prior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best weights with all inputs there, and the inverse of their moments; inputs scaled to size 1."""
    ridge, scale = _LOOSE * moments.ridge, moments.scale()
    system = moments.gram / scale / scale[:, None]
    system.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    return (moments.cross / scale + ridge * (prior * scale)) @ inverse, inverse


def _remove(weight: torch.Tensor, inverse: torch.Tensor, out: torch.Tensor) -> None:
    """Take inputs out of both, in place; the weights of the others change as a refit would change them."""
    update = torch.linalg.solve(inverse[out][:, out], inverse[out])  # [out, inputs]
    weight -= weight[:, out] @ update
    inverse.addmm_(inverse[:, out], update, alpha=-1)


def _strangers(inverse: torch.Tensor) -> torch.Tensor:
    """Which of some inputs, the best first, may go together, bool [n]: none that stands in for one before it.

    Of two inputs that say the same either may go, but not both; their partial correlation tells.
    """
    size = inverse.diagonal().clamp_min(1e-12).sqrt()
    partial = (inverse / size / size[:, None]).tril(-1).abs()
    return partial.amax(1) < _STRANGER


def to_middle(stream: Stream, index: int, weights: Weights) -> torch.Tensor:
    """Moves a stream behind a layer's attention; what `down` reads there, [B, T, F] in its type.

    Costs 2 bytes F a token; nothing is computed twice.
    """
    inputs = torch.empty(*stream.x.shape[:2], weights["down"].shape[1], dtype=weights["down"].dtype)
    for rows in stream.batches():
        found: Found = {}
        stream.x[rows] = stream.through(index, weights, rows, found, silent=("down",))
        inputs[rows] = found["down"][0].to(inputs.dtype)
    return inputs


def moments_of(original: Stream, inputs: torch.Tensor, wanted: torch.Tensor) -> Moments:
    """Moments of what `down` reads, [B, T, F], and what it should give, [B, T, E].

    The original stands behind the layer.
    """
    moments = Moments.zeros(inputs.shape[-1], wanted.shape[-1])
    state = original.x if original.config.blocks[0].norms.placement == "pre" else wanted
    for rows in original.batches():
        moments.add(inputs[rows], wanted[rows], state[rows])
    return moments


def wanted_output(original: Stream, ours: Stream, index: int, weights: Weights) -> torch.Tensor:
    """What `down` should add to our stream, which is in the middle of the layer: float32 [B, T, E].

    Moves the original one layer on. Its hidden state there is the aim; where a norm stands between `down` and
    the hidden state, what its own `down` gives.
    """
    if original.config.blocks[0].norms.placement == "pre":
        original.advance(index, weights)
        return original.x - ours.x - weights.get("down.bias", torch.zeros(()))
    theirs = to_middle(original, index, weights)
    wanted = torch.empty_like(original.x)
    for rows in original.batches():
        wanted[rows] = stream_linear("down", theirs[rows], weights["down"], None)
    original.join("down", weights, theirs)
    return wanted


_ROWS = ("gate", "up", "gate.bias", "up.bias")


def with_channels(config: ModelSpec, count: int) -> ModelSpec:
    """The model with as many channels in every feed-forward layer."""
    return config.with_blocks(lambda b: replace(b, feed_forward=replace(b.feed_forward, width=count)))


class Channels(Pruner):
    """`ffn`: take FFN channels out of every layer, one layer after another.

    Each layer is fitted on what the layers already pruned give it, towards the original model's hidden state
    behind the layer. Costs 2 bytes F a token besides the moments.
    """

    unit = "FFN channels"

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        return with_channels(config, kept_multiple(pruning, "channel", config.blocks[0].feed_forward.width))

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        assert text is not None
        config = self.after(source.config, pruning)
        count = config.blocks[0].feed_forward.width
        original = Stream.of(source, text)
        ours = original.copy()
        tensors = dict(source.tensors)
        parts = []
        for index in range(len(config.blocks)):
            step(index, len(config.blocks))
            weights = stream_weights(source, index)
            inputs = to_middle(ours, index, weights)
            wanted = wanted_output(original, ours, index, weights)
            moments = moments_of(original, inputs, wanted)
            cut = _cut(moments, weights["down"].float(), count, pruning.repair)
            del moments, wanted
            tensors |= _tensors(source, index, cut)
            parts.append(PartPruned(f"layers.{index}", count, len(weights["gate"]), cut.before, cut.after))
            ours.join("down", weights | {"down": cut.down.to(inputs.dtype)}, inputs[..., cut.kept])
        step(len(config.blocks), len(config.blocks))
        return replace(source, config=config, tensors=tensors), parts


@dataclass(frozen=True)
class _Cut:
    kept: torch.Tensor  # int64 [n], ascending
    down: torch.Tensor  # bfloat16 [E, n]
    before: float
    after: float | None


def _cut(moments: Moments, down: torch.Tensor, count: int, repair: bool) -> _Cut:
    if repair:
        kept = least_loss(moments, down, count)
    else:
        kept = (moments.gram.diagonal() * down.square().sum(0)).topk(count).indices.sort().values
    return _Cut(kept, *refit(moments.kept(kept), down[:, kept], repair))


def _tensors(source: Source, index: int, cut: _Cut) -> dict[str, SourceTensor]:
    prefix = f"layers.{index}."
    names = [prefix + name for name in _ROWS if prefix + name in source.tensors]
    found = {name: taken_rows(source.tensors[name], cut.kept) for name in names}
    down = made_tensor(prefix + "down", tuple(cut.down.shape), cut.down)
    return found | {prefix + "down": down}


def kept_layers(config: ModelSpec, amount: float) -> int:
    """How many layers stay.

    Raises:
        UsageError: none of them, or all.
    """
    kept = round((1 - amount) * len(config.blocks))
    if 0 < kept < len(config.blocks):
        return kept
    one = 1 / len(config.blocks)
    raise UsageError(
        f"prune layers: amount {amount:g} of {len(config.blocks)} layers "
        + ("leaves no layer" if kept == 0 else "takes no layer out"),
        hint=f"use an amount between {one:.3f} and {1 - one:.3f}"
        if len(config.blocks) > 1
        else "prune FFN channels instead: kind: ffn",
    )


class Layers(Pruner):
    """`layers`: take the layers of least influence out.

    Models whose MLP output is normed before it is added (Gemma 3, OLMo 2) are not repaired: the norm would
    undo what is added to `down`.
    """

    unit = "layers"

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        count = kept_layers(config, pruning.amount)  # which ones is found later
        return replace(config, blocks=config.blocks[:count])

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        assert text is not None
        config = source.config
        count = kept_layers(config, pruning.amount)
        passes = 2 if pruning.repair and config.blocks[0].norms.placement == "pre" else 1
        total = passes * len(config.blocks)
        found = influence(source, text, lambda done: step(done, total))
        kept = found.topk(count).indices.sort().values.tolist()
        fits: dict[int, SourceTensor] = {}
        errors: dict[int, tuple[float, float | None]] = {}
        if passes == 2:
            fits, errors = _repaired(source, text, kept, lambda done: step(len(config.blocks) + done, total))
        step(total, total)
        parts = [
            PartPruned(f"layers.{index}", int(index in kept), 1, *errors.get(index, (None, None)))
            for index in range(len(config.blocks))
        ]
        return _without(source, kept, fits), parts

    def notes(self, config: ModelSpec, pruning: Pruning) -> tuple[str, ...]:
        if config.blocks[0].norms.placement == "pre" or not pruning.repair:
            return ()
        return ("not repaired: a norm behind the MLP would undo what `down` is given to add",)


def influence(source: Source, calibration: Calibration, step: Callable[[int], None]) -> torch.Tensor:
    """Block influence of every layer, [layers]: 0 for one that changes no direction."""
    stream = Stream.of(source, calibration)
    found = torch.zeros(len(source.config.blocks))
    for index in range(len(found)):
        step(index)
        before = stream.x.clone()
        stream.advance(index, stream_weights(source, index))
        found[index] = 1 - torch.cosine_similarity(before, stream.x, dim=-1).mean()
    return found


def _repaired(
    source: Source, calibration: Calibration, kept: list[int], step: Callable[[int], None]
) -> tuple[dict[int, SourceTensor], dict[int, tuple[float, float | None]]]:
    """`down` of every layer before a gap, and the error of what it should add, before and after."""
    original = Stream.of(source, calibration)
    ours = original.copy()
    for gone in range(kept[0]):  # nothing comes before this gap: the original crosses it alone
        original.advance(gone, stream_weights(source, gone))
    fits, errors = {}, {}
    for place, index in enumerate(kept):
        step(index)
        following = kept[place + 1] if place + 1 < len(kept) else len(source.config.blocks)
        weights = stream_weights(source, index)
        original.advance(index, weights)
        if following == index + 1:
            ours.advance(index, weights)
            continue
        inputs = to_middle(ours, index, weights)
        for gone in range(index + 1, following):
            original.advance(gone, stream_weights(source, gone))
        wanted = original.x - ours.x - weights.get("down.bias", torch.zeros(()))
        moments = moments_of(original, inputs, wanted)
        down = weights["down"].float()
        fit, before, after = refit(moments, down, repair=True)
        errors[index] = before, after
        fits[index] = made_tensor(f"layers.{index}.down", tuple(fit.shape), fit)
        ours.join("down", weights | {"down": fit.to(inputs.dtype)}, inputs)
    return fits, errors


def _without(source: Source, kept: list[int], fits: dict[int, SourceTensor]) -> Source:
    """The model of some layers, renumbered."""
    config = source.config
    tensors = {name: t for name, t in source.tensors.items() if not name.startswith("layers.")}
    for place, index in enumerate(kept):
        prefix = f"layers.{index}."
        for name, tensor in source.tensors.items():
            if name.startswith(prefix):
                new = f"layers.{place}." + name.removeprefix(prefix)
                changed = fits.get(index) if name == prefix + "down" else None
                tensors[new] = renamed(changed or tensor, new)
    shape = replace(config, blocks=tuple(config.blocks[i] for i in kept))
    return replace(source, config=shape, tensors=tensors)


_AFTER = ("gate", "up", "down")


@dataclass(frozen=True)
class HeadPlan:
    """What stays in every layer: `groups` KV heads, each with `share` query heads."""

    groups: int
    share: int


def with_heads(config: ModelSpec, plan: HeadPlan) -> ModelSpec:
    """The model with the plan's heads in every layer."""
    heads, groups = plan.groups * plan.share, plan.groups
    return config.with_blocks(lambda b: replace(b, mixer=replace(b.mixer, heads=heads, kv_heads=groups)))


def kept_heads(config: ModelSpec, amount: float) -> HeadPlan:
    """How many heads stay: the plan nearest to the amount, whole groups where both are as near.

    Raises:
        UsageError: none of them, or all; or a norm over all heads together.
    """
    mixer = config.blocks[0].mixer
    if mixer.qk_norm == "full":
        raise UsageError(
            f"prune heads: {config.architecture} norms all of a layer's queries together: no head can go "
            "without changing the others",
            hint="prune FFN channels instead: kind: ffn",
        )
    share = mixer.heads // mixer.kv_heads
    plans = [HeadPlan(groups, share) for groups in range(1, mixer.kv_heads)]
    plans += [HeadPlan(mixer.kv_heads, fewer) for fewer in range(1, share)]
    whole = mixer.heads * mixer.head_dim % MULTIPLE
    fits = [p for p in plans if whole or p.groups * p.share * mixer.head_dim % MULTIPLE == 0]
    wanted = (1 - amount) * mixer.heads

    def far(plan: HeadPlan) -> float:
        return abs(plan.groups * plan.share - wanted)

    if fits and min(map(far, fits)) <= min(wanted, mixer.heads - wanted):  # nearer than none or all
        return min(fits, key=far)
    can = ", ".join(f"{1 - p.groups * p.share / mixer.heads:.3f}" for p in fits[:6])
    raise UsageError(
        f"prune heads: amount {amount:g} of {mixer.heads} heads with {mixer.kv_heads} KV heads "
        "leaves none or takes none out",
        hint=f"use an amount near one of {can}" if can else "prune FFN channels instead: kind: ffn",
    )


class Heads(Pruner):
    """`heads`: take heads out of every layer, one layer after another, and fit `o` to what is left.

    Args:
        plan: what stays; None is the plan nearest to the amount.
    """

    unit = "query heads"
    because = "smaller q, k, v and o; the KV cache shrinks where whole KV groups go"

    def __init__(self, plan: HeadPlan | None = None) -> None:
        self.plan = plan

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        return with_heads(config, kept_heads(config, pruning.amount))

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        assert text is not None
        old, mixer = source.config, source.config.blocks[0].mixer
        plan = self.plan or kept_heads(old, pruning.amount)
        config = with_heads(old, plan)
        original = Stream.of(source, text)
        ours = original.copy()
        tensors = dict(source.tensors)
        parts = []
        for index in range(len(config.blocks)):
            step(index, len(config.blocks))
            weights = stream_weights(source, index)
            moments = _moments(original, ours, index, weights)
            heads = _kept(moments.gram, weights["o"].float(), old, plan)
            queries = _rows(heads, old)
            keys = _rows(heads[:: plan.share] // (mixer.heads // mixer.kv_heads), old)
            cut = weights["o"].float()[:, queries]
            o, before, after = refit(moments.kept(queries), cut, pruning.repair)
            prefix = f"layers.{index}."
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                for full in (name, f"{name}.bias"):
                    if prefix + full in tensors:
                        tensors[prefix + full] = taken_rows(source.tensors[prefix + full], rows)
                        weights[full] = weights[full][rows]
            tensors[prefix + "o"] = made_tensor(prefix + "o", tuple(o.shape), o)
            weights["o"] = o.to(weights["o"].dtype)
            parts.append(PartPruned(f"layers.{index}", len(heads), mixer.heads, before, after))
            ours.advance(index, weights)
        step(len(config.blocks), len(config.blocks))
        return replace(source, config=config, tensors=tensors), parts

    def inputs(self, config: ModelSpec) -> int:
        return max(block.mixer.heads * block.mixer.head_dim for block in config.blocks)


def _moments(original: Stream, ours: Stream, index: int, weights: Weights) -> Moments:
    """Of what our `o` reads and what it should give; moves the original one layer on."""
    rows_out, inputs = weights["o"].shape
    moments = Moments.zeros(inputs, rows_out)
    for rows in original.batches():
        theirs: Found = {}
        found: Found = {}
        after = original.through(index, weights, rows, theirs)
        ours.through(index, weights, rows, found, silent=("o", *_AFTER))
        wanted = state = theirs["o"][1]
        if (
            original.config.blocks[0].norms.placement == "pre"
        ):  # else a norm stands between `o` and the hidden state
            state = wanted + original.x[rows] + weights.get("o.bias", torch.zeros(()))
            wanted = wanted + original.x[rows] - ours.x[rows]
        moments.add(found["o"][0], wanted, state)
        original.x[rows] = after
    return moments


def _kept(gram: torch.Tensor, o: torch.Tensor, config: ModelSpec, plan: HeadPlan) -> torch.Tensor:
    """Query heads that stay, int64 ascending; those of one KV head lie together."""
    mixer = config.blocks[0].mixer
    share, dim = mixer.heads // mixer.kv_heads, mixer.head_dim
    columns = torch.arange(mixer.heads * dim)
    if plan.share == share:  # whole groups
        kept = _largest(gram, o, columns.view(mixer.kv_heads, share * dim), plan.groups)
        return (kept[:, None] * share + torch.arange(share)).flatten()
    groups = columns.view(mixer.kv_heads, share, dim)
    heads = [at * share + _largest(gram, o, group, plan.share) for at, group in enumerate(groups)]
    return torch.cat(heads)


def _largest(gram: torch.Tensor, o: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Which groups of inputs, int64 [n, size], give most, ascending."""
    size = torch.stack([((o[:, at] @ gram[at][:, at]) * o[:, at]).sum() for at in groups])
    return size.topk(count).indices.sort().values


def _rows(heads: torch.Tensor, config: ModelSpec) -> torch.Tensor:
    dim = config.blocks[0].mixer.head_dim
    return (heads[:, None] * dim + torch.arange(dim)).flatten()
