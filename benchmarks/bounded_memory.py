"""Bounded memory: a server whose KV cache could fill the machine many times, and prompts that never repeat.

    python benchmarks/bounded_memory.py                              # as root: two minutes in a group of 4 GB
    python benchmarks/bounded_memory.py --seconds 20 --group-gb 2    # while developing

`hasten serve` runs in a control group of its own with a model made here: random, small weights, and 512 KB of
keys and values a token, as Llama 2 7B has. Its prefix cache would fill 64 GB. Once prompts were computed that
would fill the group, a neighbour in it takes a quarter of the memory within four seconds, for a third of the
time. A machine that is too slow for that in the time goes on, at most five times as long.

Checked: no process is killed; every request is answered; the server keeps below the limit and gives the
neighbour what it needs; the same prompt gets the same answer before, during and after; SIGTERM ends the
server with code 0. Writes benchmarks/results/bounded-memory.json. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bar import Bar, Settings, record, say
from hasten.bench.load import Address, send
from hasten.bench.process import ServerProcess, free_port
from hasten.errors import HastenError, PeerError
from server_process import ControlGroup, control_group
from serving_contenders import hasten_command

LAYERS, HEADS, HEAD_DIM, HIDDEN, WIDTH = 32, 32, 128, 32, 64
TOKEN_BYTES = 2 * 2 * LAYERS * HEADS * HEAD_DIM  # keys and values in bf16: 512 KB
CONTEXT = 8192
PROMPT, OUTPUT = 200, 4  # tokens: 100 MB of keys and values a request
NEIGHBOUR = """
import sys, time
held = []
for _ in range(40):
    held.append(b"x" * (int(sys.argv[1]) // 40))
    time.sleep(0.1)
print("has it", flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True)
class Plan:
    """How long, in how much memory, by how many clients."""

    seconds: float = 120.0
    group_bytes: int = 4_000_000_000
    clients: int = 4
    threads: int = 2

    @property
    def neighbour_bytes(self) -> int:
        """What the neighbour takes."""
        return self.group_bytes // 4

    @property
    def last_s(self) -> float:
        """When it ends, whatever was reached."""
        return 5 * self.seconds


@dataclass
class Found:
    """What happened."""

    answered: int = 0
    computed: int = 0  # bytes of keys and values: without a bound they would all be held
    failed: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # answers to the one prompt that is asked again
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)  # the group's memory that is no file's
    neighbour: tuple[float, float] | None = None  # it held its memory from when to when, seconds
    engine: dict[str, Any] = field(default_factory=dict)
    kills: int = 0
    exit_code: int | None = None

    def is_enough(self, plan: Plan, now_s: float) -> bool:
        """Whether it has gone on for long enough, and memory was full with and without the neighbour."""
        full = self.computed >= 1.25 * plan.group_bytes and self.neighbour is not None
        return now_s >= plan.seconds and (full or now_s >= plan.last_s)

    def held(self, start: float, end: float) -> int | None:
        """Most bytes between two times."""
        return max(
            (b for s, b in zip(self.seconds, self.bytes, strict=True) if start <= s < end), default=None
        )


def main() -> int:
    """Run it and judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--group-gb", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    plan = Plan(given.seconds, int(given.group_gb * 1e9), given.clients, given.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="hasten-bounded-") as folder:
            found = run(plan, make_model(Path(folder) / "wide-cache"))
    except HastenError as error:
        say(f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return 1
    bars = judge(plan, found)
    settings = Settings("random, 512 KB of keys and values a token", "", plan.threads, 1, None, None)
    say(f"written: {record('bounded-memory', settings, bars, _details(plan, found))}")
    return 0 if all(bar.passed for bar in bars) else 1


def make_model(folder: Path) -> Path:
    """A Llama of random weights, 34 MB of them, as a Hugging Face folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    vocab, wide = 257, HEADS * HEAD_DIM
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (vocab, HIDDEN), "lm_head": (vocab, HIDDEN)}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj": (wide, HIDDEN) for part in "qkv"}
        shapes |= {f"{at}.self_attn.o_proj": (HIDDEN, wide), f"{at}.mlp.down_proj": (HIDDEN, WIDTH)}
        shapes |= {f"{at}.mlp.{part}_proj": (WIDTH, HIDDEN) for part in ("gate", "up")}
        norms += [f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
    tensors = {
        f"{name}.weight": (rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float16)
        for name, shape in shapes.items()
    }
    tensors |= {f"{name}.weight": np.ones(HIDDEN, np.float16) for name in norms}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": vocab - 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, and an end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run(plan: Plan, model: Path) -> Found:
    """The server in its group, its clients and the neighbour.

    Raises:
        MachineError: this user cannot make a control group.
        PeerError: the server did not start.
    """
    found, address = Found(), Address("127.0.0.1", free_port())
    command = [*hasten_command(), "serve", str(model), "--host", address.host, "--port", str(address.port)]
    command += ["--threads", str(plan.threads)]
    with (
        control_group(memory_bytes=plan.group_bytes) as group,
        ServerProcess("hasten serve", command, address, ready="/ready", join=group.join) as server,
    ):
        server.wait_ready()
        asyncio.run(_load(plan, found, address, group))
        alive = server.running
        if not alive:
            found.failed.append(f"the server is gone{server.last_words()}")
        found.exit_code = server.terminate() if alive else None
        found.kills = group.oom_kills
    return found


async def _load(plan: Plan, found: Found, address: Address, group: ControlGroup) -> None:
    began = time.perf_counter()
    watch = asyncio.create_task(_watch(found, group, began))
    neighbour = asyncio.create_task(_neighbour(plan, found, group, began))
    await asyncio.gather(*(_client(plan, found, address, seed, began) for seed in range(plan.clients)))
    await neighbour
    watch.cancel()
    with contextlib.suppress(PeerError):
        stats = await send(address, "GET", "/stats", limit_s=30.0)
        found.engine = next(iter(stats.json()["models"].values()))


async def _client(plan: Plan, found: Found, address: Address, seed: int, began: float) -> None:
    """Distinct prompts; every tenth is one that all clients ask again and again."""
    rng, known = random.Random(seed), random.Random(-1)
    again, count = [known.randrange(256) for _ in range(PROMPT)], 0
    while not found.is_enough(plan, time.perf_counter() - began):
        prompt = again if count % 10 == 0 else [rng.randrange(256) for _ in range(PROMPT)]
        body = {
            "model": "wide-cache",
            "prompt": prompt,
            "max_tokens": OUTPUT,
            "temperature": 0,
            "ignore_eos": True,
        }
        try:
            answer = await send(address, "POST", "/v1/completions", json.dumps(body).encode(), limit_s=300.0)
            text = answer.json()["choices"][0]["text"] if answer.status == 200 else ""
        except (PeerError, ValueError, KeyError) as error:
            found.failed.append(str(error)[:200])
            return
        if answer.status != 200:
            found.failed.append(f"{answer.status} {answer.body[:200]!r}")
            return
        found.answered += 1
        if prompt is again:
            found.repeated.append(text)
        else:
            found.computed += PROMPT * TOKEN_BYTES
        count += 1


async def _watch(found: Found, group: ControlGroup, began: float) -> None:
    while True:
        found.seconds.append(time.perf_counter() - began)
        found.bytes.append(group.anonymous_bytes)
        await asyncio.sleep(0.25)


async def _neighbour(plan: Plan, found: Found, group: ControlGroup, began: float) -> None:
    """Another process in the group, which takes memory once the server has filled it."""
    while found.computed < 0.9 * plan.group_bytes:
        if found.failed or time.perf_counter() - began > plan.last_s:
            return
        await asyncio.sleep(0.1)
    with _process(group, plan.neighbour_bytes) as process:
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        start = time.perf_counter() - began
        await asyncio.sleep(plan.seconds / 3)
        found.neighbour = start, time.perf_counter() - began
        if process.poll() is not None:
            found.failed.append(f"the neighbour ended with code {process.returncode}")


@contextlib.contextmanager
def _process(group: ControlGroup, size: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", NEIGHBOUR, str(size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=group.join)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def judge(plan: Plan, found: Found) -> list[Bar]:
    """What must hold."""
    most = max(found.bytes, default=None)
    start, end = found.neighbour or (0.0, 0.0)
    settled = found.held(start + min(3.0, (end - start) / 2), end)
    limit = plan.group_bytes / 1e9
    return [
        Bar("processes killed for want of memory", float(found.kills), 0.0, "", at_least=False),
        Bar("requests that failed", float(len(found.failed)), 0.0, "", at_least=False),
        Bar("requests answered", float(found.answered), 10.0, ""),
        Bar("different answers to one prompt", float(len(set(found.repeated))), 1.0, "", at_least=False),
        Bar("most memory in use", None if most is None else most / 1e9, limit, "GB", at_least=False),
        Bar("  with the neighbour", None if settled is None else settled / 1e9, limit, "GB", at_least=False),
        Bar("keys and values computed, times the memory", found.computed / plan.group_bytes, 1.0, "x"),
        Bar(
            "exit code after SIGTERM",
            1.0 if found.exit_code is None else float(found.exit_code),
            0.0,
            "",
            at_least=False,
        ),
    ]


def _details(plan: Plan, found: Found) -> dict[str, Any]:
    return {
        "seconds": found.seconds[-1] if found.seconds else None,
        "group_bytes": plan.group_bytes,
        "neighbour_bytes": plan.neighbour_bytes,
        "clients": plan.clients,
        "kv_bytes_per_token": TOKEN_BYTES,
        "answered": found.answered,
        "faults": found.failed[:20],
        "neighbour_s": found.neighbour,
        "anonymous_bytes": {
            f"{s:.1f}": b for s, b in list(zip(found.seconds, found.bytes, strict=True))[::8]
        },
        "engine": found.engine,
    }


if __name__ == "__main__":
    sys.exit(main())
