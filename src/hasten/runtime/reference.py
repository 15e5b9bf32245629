"""The plain twin of every fast path: a decoder and an executor in NumPy and float32, short and slow.

Nothing is rounded on the way: weights are what their formats mean, and activations, keys and values are
float32, also where a recipe keeps keys and values in int8. Every row of a matrix product and every query of
attention is computed by itself, so a token's result depends on the tokens before it and on nothing else:
batches, chunks and drafts change no bit. This costs a pass over the weights for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hasten.core import Attention, Block, EngineOptions, FeedForward, ModelSpec, Rotary, dense
from hasten.errors import ModelError, UsageError
from hasten.machine.cores import threads_of
from hasten.machine.memory import memory_room
from hasten.models.rope import frequencies, tables
from hasten.runtime.executor import LONG, Bytes, Executor, Ids, PartResult, Ticket, finish, prepare, token_ids
from hasten.runtime.pages import PAGE_TOKENS, CachedSequence, PageMemory, PagePool, kv_plan
from hasten.weights.codec import Encoded, from_bytes
from hasten.weights.packed import PackedLinear, PackedModel, bf16_bits, integers

Floats = npt.NDArray[np.float32]
Tokens = Sequence[int] | Ids
ValueHook = Callable[[str, Floats], Floats]
Turns = tuple[Floats, Floats]  # cosines and sines of a text's new positions, [T, Rotary.dim / 2] each
Extend = Callable[[int, Floats, Floats], tuple[Floats, Floats]]
"""(layer, keys and values of new tokens [T, K, D]) -> those of the whole text so far [S, K, D]."""


class ReferenceDecoder:
    """A dense decoder of any architecture that a ModelSpec can describe.

    Args:
        config: the model's shape and variation points.
        tensors: canonical name -> float32 array; matrices are [rows, cols] = [outputs, inputs]. Not copied.
        on_value: called with (name, value float32) of what an engine stores in fewer bits; what it returns is
            used instead. The input [T, cols] of every linear layer goes by the layer's canonical name, and
            attention's are `layers.{i}.queries` [T, H, D], scaled, `.keys` and `.values` [T, K, D]. Rounding
            there gives what such an engine computes; recording gives calibration data.

    Raises:
        ModelError: a tensor is missing or has another shape than the config says, or the model is not dense.
    """

    def __init__(
        self, config: ModelSpec, tensors: Mapping[str, Floats], on_value: ValueHook | None = None
    ) -> None:
        self.config = dense(config, "the reference decoder")
        self.on_value = on_value
        self._tensors: dict[str, Floats] = {}
        self._shapes = config.parameter_shapes()
        for name in self._shapes:
            if name not in tensors:
                raise ModelError(f"tensor {name!r} is missing")
            self.replace(name, tensors[name])

    def replace(self, name: str, values: Floats) -> None:
        """Compute with other values of a tensor from now on."""
        if values.shape != self._shapes[name]:
            raise ModelError(f"tensor {name!r} must be {self._shapes[name]}, got {values.shape}")
        self._tensors[name] = np.ascontiguousarray(values, np.float32)

    def logits(self, tokens: Tokens | Sequence[Tokens]) -> Floats:
        """Logits of one sequence, or of a ragged batch packed one after another.

        Args:
            tokens: ids [T], or several such sequences of any lengths.

        Returns:
            float32 [N, V], N all tokens together.

        Raises:
            UsageError: an id is outside the vocabulary, or a sequence is empty.
        """
        sequences = [tokens] if np.ndim(tokens[0]) == 0 else tokens
        return self.logits_of(np.concatenate([self.hidden(sequence) for sequence in sequences]))  # type: ignore[arg-type]

    def hidden(self, tokens: Tokens) -> Floats:
        """Hidden states after the final norm, float32 [T, E], of one sequence of ids [T].

        Raises:
            UsageError: an id is outside the vocabulary, or there is none.
        """
        ids = token_ids(tokens, self.config.vocab)
        if not len(ids):
            raise UsageError("the sequence has no tokens", hint="give at least one token")
        return self.run(ids, 0, len(ids), lambda layer, keys, values: (keys, values))

    def logits_of(self, hidden: Floats) -> Floats:
        """The head, with its soft-cap: float32 [R, E] -> float32 [R, V]."""
        with np.errstate(all="ignore"):
            return _capped(self._linear(self.config.head_name, hidden), self.config.head.softcap)

    def generate(self, prompt: Tokens, max_new_tokens: int) -> list[int]:
        """Greedy continuation, everything computed anew for each token; end-of-text ids do not stop it."""
        ids = [int(t) for t in prompt]
        for _ in range(max_new_tokens):
            ids.append(int(self.logits_of(self.hidden(ids)[-1:]).argmax()))
        return ids[len(prompt) :]

    def run(self, ids: Ids, past: int, length: int | None, extend: Extend) -> Floats:
        """Hidden states after the final norm, float32 [T, E], of tokens that follow others.

        Args:
            ids: int32 [T], of the vocabulary.
            past: how many tokens stand before them.
            length: tokens of the text, where rotation depends on it; None: the original context or less.
            extend: keeps keys and values, and gives those of all tokens.
        """
        spec, positions = self.config, np.arange(past, past + len(ids), dtype=np.int32)
        rotaries = {block.mixer.rotary for block in spec.blocks} - {None}
        turns = {rotary: _turns(rotary, spec.context, length, positions) for rotary in rotaries if rotary}
        with np.errstate(all="ignore"):  # what overflows ends as NaN, and the sampler says so
            x = self._tensors["embed"][ids] * np.float32(spec.embedding.scale)  # [T, E]
            for layer, block in enumerate(spec.blocks):
                mine = None if block.mixer.rotary is None else turns[block.mixer.rotary]
                x = self._block(layer, block, x, positions, mine, extend)
            return self._norm("final_norm", x, spec.final_norm.eps)

    def _block(
        self, layer: int, block: Block, x: Floats, positions: Ids, turns: Turns | None, extend: Extend
    ) -> Floats:
        """One layer, [T, E] -> [T, E]; where a norm stands is the placement's business alone."""
        p, eps = f"layers.{layer}.", block.norms.eps
        before = block.norms.placement in ("pre", "sandwich")
        after = block.norms.placement in ("post", "sandwich")
        y = self._norm(p + "attn_norm", x, eps) if before else x
        q, k, v = self._projected(p, block.mixer, eps, y, turns)
        keys, values = extend(layer, k, v)
        y = self._linear(p + "o", _attention(block.mixer, q, keys, values, positions))
        x = x + (self._norm(p + "post_attn_norm", y, eps) if after else y)
        y = self._norm(p + "mlp_norm", x, eps) if before else x
        y = self._feed_forward(p, block.feed_forward, y)
        return x + (self._norm(p + "post_mlp_norm", y, eps) if after else y)

    def _projected(
        self, p: str, mixer: Attention, eps: float, x: Floats, turns: Turns | None
    ) -> tuple[Floats, Floats, Floats]:
        """Scaled queries [T, H, D], keys and values [T, K, D]."""
        q, k, v = (self._linear(p + name, x) for name in "qkv")
        if mixer.qk_norm == "full":
            q, k = self._norm(p + "q_norm", q, eps), self._norm(p + "k_norm", k, eps)
        q = q.reshape(-1, mixer.heads, mixer.head_dim)
        k = k.reshape(-1, mixer.kv_heads, mixer.head_dim)
        v = v.reshape(-1, mixer.kv_heads, mixer.head_dim)
        if mixer.qk_norm == "head":
            q, k = self._norm(p + "q_norm", q, eps), self._norm(p + "k_norm", k, eps)
        if turns is not None:
            q, k = _turned(q, turns), _turned(k, turns)
        q = self._passed(p + "queries", q * np.float32(mixer.score_scale))
        return q, self._passed(p + "keys", k), self._passed(p + "values", v)

    def _feed_forward(self, p: str, ways: FeedForward, x: Floats) -> Floats:
        gate, up = self._linear(p + "gate", x), self._linear(p + "up", x)
        if ways.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate / 2 * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (gate + 0.044715 * gate**3)))
        return self._linear(p + "down", gate * up)

    def _linear(self, name: str, x: Floats) -> Floats:
        matrix, bias = self._tensors[name], self._tensors.get(name + ".bias")
        found = np.empty((len(x), len(matrix)), np.float32)
        for row, result in zip(self._passed(name, x), found, strict=True):
            np.matmul(matrix, row, out=result)
        return found if bias is None else found + bias

    def _passed(self, name: str, value: Floats) -> Floats:
        return value if self.on_value is None else self.on_value(name, value)

    def _norm(self, name: str, x: Floats, eps: float) -> Floats:
        size = np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)
        return np.asarray(x / np.sqrt(size) * self._tensors[name], np.float32)


class ReferenceExecutor(Executor):
    """A packed model in NumPy, for whoever compares: every format of weights, of every dense decoder.

    Args:
        packed: the model. Its weights are decoded: four bytes each.
        options: threads draw tokens only; NumPy has its own.

    Raises:
        MachineError: so much memory is not free.
        ModelError: the model's parts do not fit each other.
        UsageError: more threads than cores, or a context or batch that is not positive.
    """

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        config, room = packed.config, memory_room()
        self.name, self.config, self.page_tokens, self.weights_version = "numpy", config, PAGE_TOKENS, 0
        self.threads, self.chunk = threads_of(options.threads), max(1, options.prefill_chunk)
        weights = sum(linear.rows * linear.cols for linear in packed.linears.values())
        room.require(4 * weights, f"a {config.architecture} model in float32")
        decoded = {name: _values(linear) for name, linear in packed.linears.items()}
        self._decoder = ReferenceDecoder(config, {**decoded, **packed.vectors})
        self._long_threshold = tables(config).long_threshold
        mixer = config.blocks[0].mixer
        self._page_shape = (len(config.blocks), 2, PAGE_TOKENS, mixer.kv_heads, mixer.head_dim)
        self._pages: dict[int, Floats] = {}  # those that take memory; keys are [:, 0], values [:, 1]
        self._kv = kv_plan(config, self.page_bytes, options, room)
        self.context = self._kv.context
        self.pool = PagePool(self._kv.pages, PAGE_TOKENS, PageMemory(room, self.page_bytes, self._drop))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers, in float32."""
        return 4 * int(np.prod(self._page_shape))

    @property
    def summary(self) -> str:
        """How much memory keys and values may take, and why."""
        return self._kv.summary

    def kv_class(self, tokens: int, as_prompt: bool) -> str:
        """LongRoPE rotates by other factors past its threshold; prompts and answers are computed alike."""
        return LONG if self._long_threshold is not None and tokens > self._long_threshold else ""

    def collect(self, ticket: Ticket) -> list[PartResult]:
        """Compute a step, one sequence after another; see `Executor.collect`."""
        parts = ticket.parts
        ids, counts = prepare(self, parts)
        with self.pool.computing():
            pieces = zip(parts, np.split(ids, np.cumsum(counts)[:-1]), strict=True)
            rows = [self._compute(part.sequence, mine)[part.first_row :] for part, mine in pieces]
        for part, count in zip(parts, counts, strict=True):
            part.sequence.length += count
        return finish(self, parts, rows)

    def _compute(self, sequence: CachedSequence, ids: Ids) -> Floats:
        past, end = sequence.length, sequence.length + len(ids)
        pages = [self._page(page) for page in sequence.pages[: -(-end // PAGE_TOKENS)]]

        def extend(layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
            for row, position in enumerate(range(past, end)):
                page, place = pages[position // PAGE_TOKENS], position % PAGE_TOKENS
                page[layer, 0, place], page[layer, 1, place] = keys[row], values[row]
            whole = np.concatenate([page[layer] for page in pages], axis=1)
            return whole[0, :end], whole[1, :end]

        assert self._long_threshold is not None or sequence.kv_class != LONG
        length = (self._long_threshold or 0) + 1 if sequence.kv_class == LONG else None
        return self._decoder.run(ids, past, length, extend)

    def head(self, hidden: Floats) -> Floats:
        """float32 [R, E] hidden states -> float32 [R, V] logits."""
        with self.pool.computing():
            return self._decoder.logits_of(np.asarray(hidden, np.float32))

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of keys and values, all layers."""
        self.pool.refuse_others()
        self._page(target)[:] = self._page(source)
        self.pool.wrote([target])

    def read_page(self, page: int) -> Bytes:
        """A copy of one page's keys and values, all layers: uint8 [page_bytes]."""
        self.pool.refuse_others()
        return self._page(page).reshape(-1).view(np.uint8).copy()

    def write_page(self, page: int, data: Bytes) -> None:
        """Put what `read_page` gave, uint8 [page_bytes], into a page."""
        self.pool.refuse_others()
        self._page(page)[:] = data.view(np.float32).reshape(self._page_shape)
        self.pool.wrote([page])

    def replace(self, name: str, linear: PackedLinear) -> None:
        """Put another matrix in a linear layer's place; see `Executor.replace`."""
        self.pool.refuse_others()
        self._decoder.replace(name, _values(linear))
        self.weights_version += 1

    def _page(self, page: int) -> Floats:
        if page not in self._pages:
            self._pages[page] = np.zeros(self._page_shape, np.float32)
        return self._pages[page]

    def _drop(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            self._pages.pop(page, None)


def _values(linear: PackedLinear) -> Floats:
    """What a matrix holds, decoded by the plain twin of its format: float32 [rows, cols]."""
    if linear.layout.table:
        return from_bytes(linear.data, linear.layout, linear.rows, linear.cols).values()
    if linear.layout.bits == 16:
        return Encoded(linear.layout, bf16_bits(linear), np.zeros((0, 0))).values()
    return integers(linear).values()


def _attention(mixer: Attention, queries: Floats, keys: Floats, values: Floats, positions: Ids) -> Floats:
    """Each query over the keys that it may look at: [T, H, D] and [S, K, D] twice -> [T, H * D]."""
    mixed = np.empty((len(queries), mixer.heads * mixer.head_dim), np.float32)
    for query, position, result in zip(queries, positions, mixed, strict=True):
        first, end = max(0, position + 1 - (mixer.window or position + 1)), position + 1
        seen_keys, seen_values = (kept[first:end].transpose(1, 0, 2) for kept in (keys, values))  # [K, S, D]
        grouped = query.reshape(mixer.kv_heads, -1, mixer.head_dim)  # heads that share keys: [K, H / K, D]
        scores = _capped(grouped @ seen_keys.swapaxes(1, 2), mixer.softcap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        result[:] = (weights @ seen_values).reshape(-1)
    return mixed


def _turns(rotary: Rotary, context: int, length: int | None, positions: Ids) -> Turns:
    inverse, scale = frequencies(rotary, context, length)
    angles = np.outer(positions, inverse)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def _turned(x: Floats, turns: Turns) -> Floats:
    """[T, H, D] -> [T, H, D]: pairs (i, i + dim / 2) of each head turn, what is behind them passes."""
    cos, sin = (turn[:, None] for turn in turns)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _capped(x: Floats, cap: float | None) -> Floats:
    return x if cap is None else np.asarray(np.tanh(x / cap) * cap, np.float32)
