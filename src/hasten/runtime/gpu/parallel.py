"""One model on several GPUs (in tests: processors), a process for each share of it. The first one leads.

The leader is the process that opened the model: engine and scheduler run there. It tells the followers every
call that launches something, and they make the same call on their share, so that all ranks meet in the sums
(`hasten.runtime.gpu.ranks`). Tokens are equal on all ranks, bit by bit; followers hand nothing back.

A follower ends when the leader's end of its socket closes, however the leader ended. A follower that ends or
falls silent ends the group: the leader stops waiting for it within `SILENCE_S`, and every later call fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hasten.cache.reading import map_array
from hasten.core import EngineOptions, ModelSpec, Recipe
from hasten.errors import HastenError, MachineError
from hasten.runtime.executor import Draw, Part, PartResult, Ticket
from hasten.runtime.gpu.executor import LEAST_CHUNK, Floats, GpuExecutor, is_step
from hasten.runtime.gpu.ranks import GlooRanks, Meeting, Piece, Ranks, Shard, Team, shards
from hasten.runtime.gpu.tiles import Pieces, Tensors, cut, share_of_tensors, tensors_of_share
from hasten.runtime.pages import CachedSequence
from hasten.runtime.sampling import Masks, SamplingOptions
from hasten.weights.packed import PackedLinear, PackedModel

SILENCE_S = 3.5
"""A follower that says nothing for so long is taken for hung."""
_BEAT_S = 0.4
_LOADING_S = 600.0  # silence while a follower imports and loads
_END_S = 2.0  # that a follower has to end before it is killed
_MORE_ROWS = 512  # of a step beside a prompt's chunk
_FOLLOW = "import sys; from hasten.runtime.gpu.parallel import follow; follow(int(sys.argv[1]))"
_QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # NVLink multicast is not used

_log = logging.getLogger("hasten.runtime")


@dataclass(frozen=True)
class _Start:
    """What a follower is told first."""

    rank: int
    ranks: int
    port: int
    device: str
    options: EngineOptions
    spec: ModelSpec
    recipe: Recipe
    linears: dict[str, PackedLinear]  # without their bytes
    vectors: dict[str, npt.NDArray[np.float32]]
    maker: str | None  # `LeadingExecutor`'s


@dataclass(frozen=True)
class _Options:
    """What a follower knows of an answer's sampler."""

    options: SamplingOptions


def _no_masks() -> Masks:
    """In place of a grammar's: followers draw nothing."""
    return np.zeros((0, 0), np.uint32)


_NOBODY = CachedSequence()
_STEP = (Draw(_Options(SamplingOptions()), 0),)  # type: ignore[arg-type]
"""Of a part that gets its next greedy token and nothing else: followers are told the one before it alone."""


# ---- the leader's side ---------------------------------------------------------------------------------


class _Link:
    """The leader's end of one follower."""

    def __init__(self, rank: int, device: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _FOLLOW, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | _QUIET | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {}),
                start_new_session=True,  # Ctrl-C is the leader's: it ends the others
            )
        self.rank, self.connection, self.lock = rank, Connection(ours.detach()), threading.Lock()
        self.heard = time.monotonic()
        self.is_ready = threading.Event()
        self.pages: queue.SimpleQueue[npt.NDArray[np.uint8]] = queue.SimpleQueue()

    def send(self, message: bytes) -> None:
        with self.lock:
            self.connection.send_bytes(message)

    def end(self) -> None:
        """Let it end; kill it where it does not."""
        with contextlib.suppress(OSError):
            self.connection.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def store_of_this_host() -> Any:
    """A store in which ranks meet, on 127.0.0.1; a socket that torch opens listens on every address."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


class Crew:
    """The followers of one model, as their leader knows them."""

    def __init__(
        self, packed: PackedModel, options: EngineOptions, device: str, maker: str | None = None
    ) -> None:
        count = options.tensor_parallel
        self._packed, self._failure, self._is_over = packed, "", False
        self._turn = threading.Lock()
        self.stop: Callable[[], None] = lambda: None  # ends what a GPU waits for
        self._store = store_of_this_host()
        self.meeting = Meeting(0, count, self._store.port, self.check)
        bare = {name: replace(one, data=np.zeros(0, np.uint8)) for name, one in packed.linears.items()}
        self.links: list[_Link] = []
        try:
            for rank in range(1, count):
                link = _Link(rank, device)
                self.links.append(link)
                start = _Start(rank, count, self._store.port, device, options, packed.config, packed.recipe,
                               bare, packed.vectors, maker)  # fmt: skip
                link.send(pickle.dumps(start))
        except BaseException:
            self.close()
            raise
        for link in self.links:
            threading.Thread(target=self._watch, args=(link,), name="hasten-rank", daemon=True).start()

    def check(self) -> None:
        """Raise what ended the group.

        Raises:
            MachineError: a follower ended or fell silent.
        """
        if self._failure:
            raise MachineError(self._failure, hint="load the model again; the log says more")

    def tell(self, *message: Any) -> None:
        """The same to all followers."""
        self.check()
        data = pickle.dumps(message, protocol=5)
        for link in self.links:
            self.tell_one(link, data)

    def tell_one(self, link: _Link, data: bytes) -> None:
        """A pickled message to one of them."""
        try:
            link.send(data)
        except OSError as error:
            self._fail(f"rank {link.rank} of the tensor-parallel group ended")
            self.check()
            raise MachineError("the tensor-parallel group was ended") from error

    def page(self, link: _Link) -> npt.NDArray[np.uint8]:
        """What a follower read of a page."""
        while True:
            with contextlib.suppress(queue.Empty):
                return link.pages.get(timeout=0.2)
            self.check()

    def wait_until_ready(self) -> None:
        """Until all followers have loaded their shares."""
        for link in self.links:
            while not link.is_ready.wait(0.2):
                self.check()

    def _watch(self, link: _Link) -> None:
        """Read what one follower says, until it ends."""
        while not self._is_over:
            try:
                is_there = link.connection.poll(_BEAT_S)
                message = link.connection.recv() if is_there else None
            except (EOFError, OSError):
                code = link.process.poll()
                said = "" if code is None else f" (exit code {code})"
                self._fail(f"rank {link.rank} of the tensor-parallel group ended{said}")
                return
            if message is not None:
                link.heard = time.monotonic()
                self._hear(link, *message)
            silence = time.monotonic() - link.heard
            if silence > (SILENCE_S if link.is_ready.is_set() else _LOADING_S):
                self._fail(
                    f"rank {link.rank} of the tensor-parallel group has not answered for {silence:.1f} s"
                )
                return

    def _hear(self, link: _Link, what: str, *more: Any) -> None:
        if what == "need":
            name, piece = more
            linear = self._packed.linears[name]
            found = mapped_place(linear) or cut(linear, piece)
            with contextlib.suppress(OSError):
                link.send(pickle.dumps(("pieces", found), protocol=5))
        elif what == "page":
            link.pages.put(more[0])
        elif what == "ready":
            link.is_ready.set()
        elif what == "failed":
            self._fail(f"rank {link.rank}: {more[0]}")

    def _fail(self, why: str) -> None:
        """The group has ended: nobody waits any longer, nobody is left."""
        with self._turn:
            if self._failure or self._is_over:
                return
            self._failure = why
        _log.error("%s; its group is ended", why)
        self.stop()
        for link in self.links:
            with contextlib.suppress(OSError):
                link.process.kill()

    def close(self) -> None:
        """End all followers."""
        self._is_over = True
        for link in self.links:
            link.end()


class LeadingExecutor(GpuExecutor):
    """A model of which this process computes one share, and followers that it starts the others.

    Args:
        packed: the model.
        options: `tensor_parallel` of them.
        device: "cuda", or "cpu" for plain torch.
        maker: "module:function" that every rank calls with the packed model and its device, for `Tensors` of
            the whole model: other weights than the packed ones.

    Raises:
        UsageError: the model cannot be shared out so.
        MachineError: there are too few GPUs, or a follower could not start.
    """

    def __init__(
        self, packed: PackedModel, options: EngineOptions, device: str = "cuda", maker: str | None = None
    ) -> None:
        shard = shards(packed.config, options.tensor_parallel)[0]
        if device == "cuda":
            _refuse_too_few(options.tensor_parallel)
        self._crew = crew = Crew(packed, options, device, maker)
        self._known: dict[int, tuple[weakref.ref[CachedSequence], int, list[int]]] = {}
        self._gone: deque[int] = deque()
        self._numbers = 0
        self.close = weakref.finalize(self, crew.close)  # type: ignore[method-assign]
        try:
            ranks = _ranks(crew.meeting, packed.config, options, device)
            self._check, crew.stop = ranks.check, ranks.end_waits
            tensors = _tensors(
                packed, shard, device, maker, lambda name, piece: cut(packed.linears[name], piece)
            )
            super().__init__(packed, options, device, tensors, Team(shard, ranks))
            crew.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _launch(self, parts: Sequence[Part]) -> Ticket:
        """See `GpuExecutor`; the followers launch the same."""
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        told = [
            (self._changed(part.sequence), int(part.tokens[0]) if is_step(part) else _bare(part))
            for part in parts
        ]
        self._crew.tell("step", gone, told)
        return super()._launch(parts)

    def collect(self, ticket: Ticket) -> list[PartResult]:
        try:
            found = super().collect(ticket)
        finally:
            self._check()
        return found

    def head(self, hidden: Floats) -> Floats:
        self.pool.refuse_others()
        self._crew.tell("head", hidden)
        logits = super().head(hidden)
        self._check()
        return logits

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of keys and values, all layers and shares."""
        self.pool.refuse_others()
        self._crew.tell("copy", source, target)
        super().copy_page(source, target)

    @property
    def page_bytes(self) -> int:
        """Bytes of `read_page`: those of all shares."""
        return self.kv.page_bytes * (1 + len(self._crew.links))

    def read_page(self, page: int) -> npt.NDArray[np.uint8]:
        """A page's keys and values, share by share: uint8 [page_bytes]."""
        self.pool.refuse_others()
        self._crew.tell("read", page)
        parts = [super().read_page(page), *(self._crew.page(link) for link in self._crew.links)]
        return np.concatenate(parts)

    def write_page(self, page: int, data: npt.NDArray[np.uint8]) -> None:
        """Put what `read_page` gave into a page."""
        self.pool.refuse_others()
        mine, *others = np.split(data, 1 + len(self._crew.links))
        for link, part in zip(self._crew.links, others, strict=True):
            self._crew.tell_one(link, pickle.dumps(("write", page, part), protocol=5))
        super().write_page(page, mine)

    def replace(self, name: str, linear: PackedLinear) -> None:
        self._refuse_misfit(name, linear)
        self._crew.tell("replace", name, linear)
        super().replace(name, linear)

    def _changed(self, sequence: CachedSequence) -> tuple[int, int, int, list[int]]:
        """(number, length, pages that are as before, those behind): what a follower needs of a sequence."""
        ref, number, before = self._known.get(id(sequence), (None, 0, []))
        if ref is None or ref() is not sequence:
            self._numbers += 1
            number, before, gone = self._numbers, [], self._gone
            ref = weakref.ref(sequence, lambda _, number=number: gone.append(number))  # type: ignore[misc]
        pages, kept = sequence.pages, len(before)
        if pages == before:
            return number, sequence.length, kept, []
        if pages[:kept] != before:
            kept = next(i for i, page in enumerate(before) if i >= len(pages) or pages[i] != page)
        self._known[id(sequence)] = ref, number, list(pages)
        return number, sequence.length, kept, pages[kept:]


def _bare(part: Part) -> Part:
    """A part as followers get it: they draw nothing."""
    draws = tuple(
        Draw(_Options(one.sampler.options), one.position, one.logprobs, one.masks and _no_masks)  # type: ignore[arg-type]
        for one in part.draws
    )
    return replace(part, sequence=_NOBODY, draws=draws, tokens=list(part.tokens), drafts=list(part.drafts))


class TorchLeader(LeadingExecutor):
    """The same on processors, in plain torch with gloo: slow, for tests of what runs on GPUs."""

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        super().__init__(packed, options, "cpu")


def _refuse_too_few(count: int) -> None:
    there = torch.cuda.device_count()
    if there < count:
        raise MachineError(
            f"--tensor-parallel {count} needs as many GPUs, and {there} can be used here",
            hint=f"use --tensor-parallel {there}" if there > 1 else "leave --tensor-parallel out",
        )


def _ranks(meeting: Meeting, spec: ModelSpec, options: EngineOptions, device: str) -> Ranks:
    """This process's side of the group."""
    if device == "cpu":
        return GlooRanks(meeting)
    from hasten.runtime.gpu.peers import PeerRanks

    rows = max(options.prefill_chunk, LEAST_CHUNK) + _MORE_ROWS
    return PeerRanks(meeting, rows, spec.width)


def _tensors(packed: PackedModel, shard: Shard, device: str, maker: str | None, pieces: Pieces) -> Tensors:
    """Where a rank's weights come from."""
    if maker is None:
        return tensors_of_share(packed, shard, device, pieces)
    module, _, name = maker.partition(":")
    return share_of_tensors(getattr(import_module(module), name)(packed, device), shard)


@dataclass(frozen=True)
class Mapped:
    """A matrix in a file that every process can map."""

    linear: PackedLinear  # without its bytes
    path: str
    offset: int
    size: int

    def open(self) -> PackedLinear:
        """The matrix; its bytes are read when they are looked at."""
        return replace(self.linear, data=map_array(self.path)[self.offset :][: self.size])


def mapped_place(linear: PackedLinear) -> Mapped | None:
    """Where a matrix lies in a file, if it does."""
    base: Any = linear.data
    while base is not None and not isinstance(base, np.memmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    while isinstance(base, np.memmap) and isinstance(base.base, np.memmap):
        base = base.base
    if base is None or not getattr(base, "filename", None):
        return None
    offset = linear.data.ctypes.data - base.ctypes.data + base.offset
    return Mapped(replace(linear, data=np.zeros(0, np.uint8)), str(base.filename), offset, linear.bytes)


# ---- a follower's side ---------------------------------------------------------------------------------


class _Follower:
    """A follower's end of its leader."""

    def __init__(self, handle: int) -> None:
        self.connection, self._lock = Connection(handle), threading.Lock()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="hasten-listen", daemon=True).start()
        threading.Thread(target=self._beat, name="hasten-beat", daemon=True).start()

    def say(self, *message: Any) -> None:
        with self._lock:
            self.connection.send(message)

    def hear(self) -> Any:
        return self._said.get()

    def pieces(self, name: str, piece: Piece) -> list[PackedLinear]:
        """This rank's part of a matrix, read from where it lies, or sent by the leader."""
        self.say("need", name, piece)
        _, found = self.hear()
        return cut(found.open(), piece) if isinstance(found, Mapped) else found

    def _listen(self) -> None:
        try:
            while True:
                self._said.put(pickle.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)  # the leader has ended, or wants this process to

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.say("beat")
                time.sleep(_BEAT_S)


class FollowingExecutor(GpuExecutor):
    """A rank's share of a model; its calls come from the leader."""

    device = ""

    def __init__(
        self, packed: PackedModel, options: EngineOptions, device: str, tensors: Tensors, team: Team
    ) -> None:
        super().__init__(packed, options, device, tensors, team)
        self._sequences: dict[int, CachedSequence] = {}

    def step(
        self, gone: Sequence[int], told: Sequence[tuple[tuple[int, int, int, list[int]], int | Part]]
    ) -> None:
        """Launch what the leader launches."""
        for number in gone:
            self._sequences.pop(number, None)
        parts = []
        for (number, length, kept, pages), one in told:
            sequence = self._sequences.get(number)
            if sequence is None:
                sequence = self._sequences[number] = CachedSequence()
            if pages or kept != len(sequence.pages):
                sequence.pages[kept:] = pages
            sequence.length = length
            parts.append(
                Part(sequence, [one], draws=_STEP)
                if isinstance(one, int)
                else replace(one, sequence=sequence)
            )
        self._launch(parts)


def follow(handle: int) -> None:
    """Be a follower until the leader ends: the whole life of such a process.

    Args:
        handle: the descriptor of the socket to the leader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leader = _Follower(handle)
    try:
        start: _Start = leader.hear()
        executor = _loaded(start, leader)
        leader.say("ready")
        while True:
            what, *more = leader.hear()
            _obey(executor, leader, what, more)
    except BaseException as error:  # noqa: BLE001  the leader is told, whatever it is
        if not isinstance(error, HastenError):
            _log.error("a rank of a tensor-parallel group failed", exc_info=error)
        with contextlib.suppress(OSError):
            leader.say("failed", str(error) or repr(error))
            time.sleep(_BEAT_S)  # the leader ends this process when it has read that
        os._exit(1)


def _loaded(start: _Start, leader: _Follower) -> FollowingExecutor:
    if start.device == "cuda":
        torch.cuda.set_device(start.rank)
    meeting = Meeting(start.rank, start.ranks, start.port, lambda: None)
    ranks = _ranks(meeting, start.spec, start.options, start.device)
    shard = Shard(start.spec, start.rank, start.ranks)
    packed = PackedModel(start.spec, start.recipe, start.linears, start.vectors)
    tensors = _tensors(packed, shard, start.device, start.maker, leader.pieces)
    return FollowingExecutor(packed, start.options, start.device, tensors, Team(shard, ranks))


def _obey(executor: FollowingExecutor, leader: _Follower, what: str, more: Sequence[Any]) -> None:
    """One call of the leader's."""
    if what == "step":
        executor.step(*more)
    elif what == "read":
        leader.say("page", executor.read_page(*more))
    else:
        calls: dict[str, Callable[..., Any]] = {
            "head": executor.head,
            "copy": executor.copy_page,
            "write": executor.write_page,
            "replace": executor.replace,
        }
        calls[what](*more)
