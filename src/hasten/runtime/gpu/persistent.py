"""One sequence decoded by one persistent kernel: weights, KV pages, exchange buffers, and `step`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hasten.core import READERS, ModelSpec
from hasten.errors import MachineError, ModelError, UsageError
from hasten.models import rope
from hasten.runtime.gpu.batch_weights import BatchWeights, Matrix
from hasten.runtime.gpu.driver import Device, Module, built, current_device, with_defines
from hasten.runtime.gpu.plain import PagedCache, upload
from hasten.runtime.gpu.ranks import Team
from hasten.runtime.gpu.shape import PAGE, PRODUCTS, ProductName, Shape, WeightFormat, kernel_source
from hasten.runtime.gpu.tiles import Weights, interleaved, joined, rounded, tiled

if TYPE_CHECKING:
    from hasten.runtime.gpu.peers import PeerRanks

TensorOf = Callable[[str], "torch.Tensor | Weights | None"]
"""A parameter by canonical name, on any device; None: the model has none. Floats are
rounded to the product's format; a matrix may also be Weights, which are kept."""

_NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")
_OF_HEADS = ("q_norm", "k_norm", "key_shift")
_WORDS = ("qkv", "square", "part", "weight", "attention", "out", "feed", "down", "best")
_SHARED_WORDS = ("out", "down", "best")  # that several ranks have a part of
_MEMBERS: dict[str, tuple[str, ...]] = dict(READERS.items())


def _arguments(ranks: int) -> Any:
    """`Args` of kernels/args.cuh: the same fields in the same order."""
    several = ctypes.c_void_p * ranks
    fields = [
        *((name, ctypes.c_void_p) for name in PRODUCTS),
        *((f"{name}_bias", ctypes.c_void_p) for name in PRODUCTS[:-1]),
        ("embedding", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in (*_NORMS, "final_norm", *_OF_HEADS)),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "keys", "values", "pages")),
        *((f"{name}_words", ctypes.c_void_p) for name in _WORDS),
        *((f"{name}_peers", several) for name in _SHARED_WORDS),
        *((name, ctypes.c_void_p) for name in ("state", "tokens", "logits", "trace")),
        ("pages_held", ctypes.c_int),
        ("positions", ctypes.c_int),
    ]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})()


@dataclass(frozen=True)
class DeviceWeights:
    """A model's parameters on the device, by the names of `_arguments`."""

    shape: Shape
    tensors: Mapping[str, torch.Tensor]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights one step reads, scales included."""
        return sum(self.tensors[name].numel() for name in PRODUCTS)


def load_weights(shape: Shape, tensor_of: TensorOf, device: str = "cuda") -> DeviceWeights:
    """Round, tile and keep every parameter on the device, a layer at a time.

    Raises:
        ModelError: a parameter is missing.
        MachineError: they do not fit.
    """
    try:
        return _load_weights(shape, tensor_of, device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise MachineError(
            "the persistent kernel's own copy of the weights does not fit: "
            f"{free / 1e9:.2f} of {total / 1e9:.2f} GB of GPU memory are free",
            hint="close what else runs on the GPU, or use a recipe with fewer bits, such as --recipe w4-g128",
        ) from error


def tiled_copy(fused: BatchWeights, stored: Callable[[str], Weights] | None = None) -> DeviceWeights:
    """The weights of the batched step in this kernel's order, as well.

    Args:
        stored: linear layers in a narrower format of their own, by canonical name; None: `fused` has them.

    Raises:
        UsageError: the kernel, or the layout of keys and values that both share, does not hold this model.
        ModelError: formats differ from layer to layer.
        MachineError: they do not fit beside the others.
    """
    c, linears = replace(fused.config, vocab=len(fused.head.values)), fused.config.linear_shapes()
    mixer = c.blocks[0].mixer
    if mixer.head_dim % 64 or rope.rotations(c)[0].dim != mixer.head_dim:
        raise UsageError("the persistent kernel pads or turns the heads of this model in its own way")

    def part(name: str) -> torch.Tensor | Weights | None:
        return stored(name) if stored is not None and name in linears else _part_of(fused, name)

    formats: dict[ProductName, WeightFormat] = {}
    for product in PRODUCTS:
        first = part(c.head_name if product == "head" else f"layers.0.{_MEMBERS[product][0]}")
        formats[product] = first.format if isinstance(first, Weights) else WeightFormat()
    return load_weights(Shape(c, formats, frozenset(c.blocks[0].biases)), part)


def _format_of(matrix: Matrix) -> WeightFormat:
    return WeightFormat("bf16" if matrix.scales is None else "fp8")


def _part_of(fused: BatchWeights, name: str) -> torch.Tensor | Weights | None:
    """A parameter by canonical name, out of the fused ones."""
    if name in ("embed", "final_norm"):
        found: torch.Tensor = getattr(fused, name)
        return found
    layer, _, member = name.removesuffix(".bias").rpartition(".")
    if member in (*_NORMS, *_OF_HEADS):
        norm: torch.Tensor | None = getattr(fused.layers[int(layer.split(".")[1])], member)
        return norm
    matrix, rows = fused.place(name.removesuffix(".bias"))
    if name.endswith(".bias"):
        return None if matrix.bias is None else matrix.bias[rows]
    scales = None if matrix.scales is None else matrix.scales[rows]
    return Weights(_format_of(matrix), matrix.values[rows], scales)


def _load_weights(shape: Shape, tensor_of: TensorOf, device: str) -> DeviceWeights:
    c, found = shape.config, dict[str, torch.Tensor]()
    for name in PRODUCTS[:-1]:
        for layer in range(len(c.blocks)):
            _add_layer(found, shape, name, layer, lambda part: _device(tensor_of, part, device))
    embedding = _required(tensor_of, "embed", device)
    head = embedding if c.head.tied else _required(tensor_of, "head", device)
    if isinstance(embedding, torch.Tensor) and embedding.dtype == torch.bfloat16:
        found["embedding"] = embedding.contiguous()
    else:
        found["embedding"] = _floats(embedding).to(torch.bfloat16).contiguous()
    weights = head if isinstance(head, Weights) else rounded(head, shape.formats["head"])
    _add_matrix(found, "head", 0, 1, [weights], shape)
    for norm in (*_NORMS, *_OF_HEADS):
        layers = [_device(tensor_of, f"layers.{i}.{norm}", device) for i in range(len(c.blocks))]
        if layers[0] is not None:
            found[norm] = torch.stack([_floats(t) for t in layers if t is not None]).contiguous()
    found["final_norm"] = _floats(_required(tensor_of, "final_norm", device)).contiguous()
    return DeviceWeights(shape, found)


def _add_layer(
    found: dict[str, torch.Tensor],
    shape: Shape,
    name: ProductName,
    layer: int,
    tensor_of: Callable[[str], torch.Tensor | Weights | None],
) -> None:
    count, biases, parts = len(shape.config.blocks), [], []
    for member in _MEMBERS[name]:
        part = tensor_of(f"layers.{layer}.{member}")
        if part is None:
            raise ModelError(f"tensor 'layers.{layer}.{member}' is missing")
        weights = part if isinstance(part, Weights) else rounded(part, shape.formats[name])
        bias = tensor_of(f"layers.{layer}.{member}.bias")
        rows = len(weights.codes)
        biases.append(torch.zeros(rows, device=weights.codes.device) if bias is None else _floats(bias))
        parts.append(weights)
    _add_matrix(found, name, layer, count, parts if name == "gate_up" else [joined(parts)], shape)
    if shape.biases & set(_MEMBERS[name]):
        _place(found, f"{name}_bias", layer, count, torch.cat(biases))


def _add_matrix(
    found: dict[str, torch.Tensor],
    name: ProductName,
    layer: int,
    count: int,
    weights: list[Weights],
    shape: Shape,
) -> None:
    layout = shape.layout(name)
    tiles = [tiled(w, layout) for w in weights]
    _place(found, name, layer, count, tiles[0] if len(tiles) == 1 else interleaved(*tiles))


def _place(found: dict[str, torch.Tensor], name: str, layer: int, count: int, value: torch.Tensor) -> None:
    """Keep a layer's tensor in the array of all layers: nothing is held twice."""
    if name not in found:
        found[name] = torch.empty((count, *value.shape), dtype=value.dtype, device=value.device)
    found[name][layer] = value


def _floats(tensor: torch.Tensor | Weights) -> torch.Tensor:
    """float32 values of what may be in a format."""
    return tensor.values() if isinstance(tensor, Weights) else tensor.float()


def _device(tensor_of: TensorOf, name: str, device: str) -> torch.Tensor | Weights | None:
    found = tensor_of(name)
    return None if found is None else found.to(device)


def _required(tensor_of: TensorOf, name: str, device: str) -> torch.Tensor | Weights:
    found = _device(tensor_of, name, device)
    if found is None:
        raise ModelError(f"tensor {name!r} is missing")
    return found


def rotation_tables(
    config: ModelSpec, positions: int, length: int | None = None, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [global, sliding layers][positions][rotary / 2], made on a device.

    Args:
        length: longest sequence that they are for; LongRoPE takes its long factors past its threshold.
    """
    tables = rope.tables(config, length)
    is_long = tables.long_threshold is not None and (length or 0) > tables.long_threshold
    frequencies, scale = tables.global_inv_freq, tables.global_scale
    if is_long and tables.long_inv_freq is not None:
        frequencies, scale = tables.long_inv_freq, tables.long_scale
    local = (frequencies, scale) if tables.local_inv_freq is None else (tables.local_inv_freq, 1.0)
    places = torch.arange(positions, dtype=torch.float64, device=device)
    both = [
        (torch.from_numpy(np.asarray(f, np.float64)).to(device), s) for f, s in ((frequencies, scale), local)
    ]
    angles = [(torch.outer(places, f), s) for f, s in both]
    cosines, sines = (torch.stack([turn(a) * s for a, s in angles]) for turn in (torch.cos, torch.sin))
    return cosines.float(), sines.float()


class PersistentDecoder:
    """Decodes one sequence greedily, a token a launch.

    Args:
        weights: on the device.
        positions: longest sequence, tokens.
        pages: page table of the sequence, page numbers; default: in order.
        cache: keys and values; None: they are allocated here.

    Raises:
        MachineError: the GPU is too old or too small.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        positions: int,
        pages: list[int] | None = None,
        cache: PagedCache | None = None,
        team: Team | None = None,
    ) -> None:
        self._team = team
        self.shape = weights.shape
        self.weights = weights
        self.device = current_device()
        _refuse_device(self.device, self.shape.blocks)
        self.positions = -(-positions // PAGE) * PAGE
        count = self.positions // PAGE
        self._held = max(pages or [0, count - 1]) + 1 if cache is None else cache.keys.shape[1]
        self._buffers = self._allocate(pages or list(range(count)), cache)
        self._kernel, self._threads = self._build()
        self._arguments = self._pointers()
        self.position = 0

    def _allocate(self, pages: list[int], cache: PagedCache | None) -> dict[str, torch.Tensor]:
        c = self.shape.config
        mixer, ranks = c.blocks[0].mixer, 1 if self._team is None else self._team.ranks.ranks
        kv = (len(c.blocks), self._held, mixer.kv_heads, PAGE, self.shape.padded_head)
        cosines, sines = rotation_tables(c, self.positions, self.positions, "cuda")
        group = mixer.heads * self.shape.padded_head * self.shape.splits
        words = {
            "qkv": (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim,
            "square": (mixer.heads + mixer.kv_heads) * mixer.head_dim // 8 + 2,
            "part": group,
            "weight": 2 * mixer.heads * self.shape.splits,
            "attention": mixer.heads * mixer.head_dim,
            "out": ranks * (c.width + 2),
            "feed": c.blocks[0].feed_forward.width,
            "down": ranks * (c.width + 2),
            "best": ranks * 2 * self.shape.blocks,
        }
        found = {f"{k}_words": torch.zeros(n + 2, dtype=torch.int64) for k, n in words.items()}
        found |= {"cosines": cosines, "sines": sines, "pages": torch.tensor(pages, dtype=torch.int32)}
        found |= {"state": torch.zeros(4, dtype=torch.int32), "logits": torch.zeros(c.vocab)}
        found["trace"] = torch.zeros(self.shape.blocks * (len(c.blocks) + 1) * 16, dtype=torch.int32)
        on_device = {k: t.cuda() for k, t in found.items()} | self._shared_words(words)
        on_device["tokens"] = torch.zeros(self.positions + 1, dtype=torch.int32).pin_memory()
        for name in ("keys", "values"):  # zeros: what was never written must be finite
            given = None if cache is None else getattr(cache, name)
            on_device[name] = torch.zeros(kv, dtype=torch.bfloat16, device="cuda") if given is None else given
        return on_device

    def _shared_words(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Words of all ranks, in memory that they map."""
        if self._team is None:
            return {}
        own, starts = _peers(self._team).one.own.view(torch.int64), self._starts(sizes)
        return {f"{k}_words": own[starts[k] : starts[k] + sizes[k]] for k in _SHARED_WORDS}

    def _starts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Where each of `_SHARED_WORDS` begins in a rank's memory, in words."""
        return {"out": 0, "down": sizes["out"], "best": sizes["out"] + sizes["down"]}

    def _build(self) -> tuple[Any, int]:
        defines = self.shape.defines() | {"SLOTS": self.shape.slots(self.device)}
        if self._team is not None:
            shard = self._team.shard
            defines |= {"RANKS": shard.ranks, "RANK": shard.rank}
            defines |= {"TOKENS": shard.spec.vocab, "FIRST_TOKEN": shard.vocabulary.start}
        text = with_defines(kernel_source(), defines)
        module = Module(built(text, self.device.architecture))
        if self._team is not None:
            module.set_constant("stop_word", _peers(self._team).stop.data_ptr())
        shared, threads, *tile_bytes, padded = module.constants("layout", 8)
        expected = [self.shape.layout(name).tile_bytes for name in PRODUCTS]
        if tile_bytes != expected or padded != self.shape.padded_head:
            raise ModelError(f"kernel and host disagree on the layout: {tile_bytes}, {expected}, {padded}")
        return module.kernel("decode_step", shared), threads

    def _pointers(self) -> Any:
        arguments = _arguments(1 if self._team is None else self._team.ranks.ranks)
        for name, tensor in {**self.weights.tensors, **self._buffers}.items():
            setattr(arguments, name, tensor.data_ptr())
        arguments.pages_held, arguments.positions = self._held, self.positions
        sizes = {name: len(self._buffers[f"{name}_words"]) for name in _SHARED_WORDS}
        starts = self._starts(sizes)
        for name, size in sizes.items():
            addresses = [self._buffers[f"{name}_words"].data_ptr()]
            if self._team is not None:
                at = starts[name] + self._team.shard.rank * (size // self._team.shard.ranks)
                addresses = [address + 8 * at for address in _peers(self._team).one.addresses]
            for rank, address in enumerate(addresses):
                getattr(arguments, f"{name}_peers")[rank] = address
        return arguments

    @property
    def resources(self) -> dict[str, int]:
        """Registers, bytes of local memory and of shared memory of the kernel."""
        return {**self._kernel.resources(), "shared_bytes": self._kernel.shared_bytes}

    @property
    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bf16 [layer, page, KV head, 32, padded head size] each."""
        return self._buffers["keys"], self._buffers["values"]

    @property
    def logits(self) -> torch.Tensor:
        """Of the last step, float32 [V], on the device."""
        return self._buffers["logits"]

    @property
    def tokens(self) -> torch.Tensor:
        """int32 [positions + 1]: what was chosen for each position. On the host, written by the device."""
        return self._buffers["tokens"]

    @property
    def pages(self) -> torch.Tensor:
        """int32 [positions / 32] on the device: the sequence's page table."""
        return self._buffers["pages"]

    @property
    def trace(self) -> torch.Tensor:
        """Clock marks [block, layer, mark] of a kernel built with TRACE."""
        return self._buffers["trace"].view(self.shape.blocks, -1, 16)

    def start(self, token: int, position: int) -> None:
        """Put `token` at `position`; keys and values of all positions before it must be there."""
        if not 0 <= position < self.positions:
            raise UsageError(f"position {position} is outside the {self.positions} positions held")
        vocab = len(self.weights.tensors["embedding"])
        if not 0 <= token < vocab:
            raise UsageError(f"token ids are below {vocab}, got {token}")
        state = self._buffers["state"]
        state[:2] = upload(np.array([token, position], np.int32), state.device)
        self.position = position

    def step(self) -> None:
        """Queue one step on torch's current stream: the token at hand in, the next one chosen on the device.

        Returns before the device is done; a captured graph may replay it. The chosen token is in `tokens`.
        """
        self._kernel.launch(
            self.shape.blocks,
            self._threads,
            [self._arguments],
            torch.cuda.current_stream().cuda_stream,
        )
        self.position += 1


def _peers(team: Team) -> PeerRanks:
    from hasten.runtime.gpu.peers import PeerRanks

    assert isinstance(team.ranks, PeerRanks)
    return team.ranks


def _refuse_device(device: Device, blocks: int) -> None:
    if device.capability[0] != 9:
        raise MachineError(
            f"the persistent decode kernel runs on compute capability 9.0 (H100, H200), "
            f"and {device.name} has {device.capability[0]}.{device.capability[1]}"
        )
    if device.multiprocessors < blocks:
        raise MachineError(
            f"{device.name} shows {device.multiprocessors} multiprocessors, and the kernel needs {blocks}",
            hint="a part of a GPU (MIG) is too small for it",
        )


def same_format(fmt: WeightFormat, head: WeightFormat | None = None) -> dict[ProductName, WeightFormat]:
    """One format for every product, another for the head where given."""
    return {name: head or fmt if name == "head" else fmt for name in PRODUCTS}
