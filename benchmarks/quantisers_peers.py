"""Who is compared, and how each is run: in its own Python as a child process, once, its result kept."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bar import say
from hasten.errors import PeerError
from quantisers_material import Material

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tool:
    """A program with quantisers of its own."""

    script: str  # run by the tool's Python with SOURCE OUT IDS.npy THREADS VARIANT
    package: str
    file_type: str = ""  # of source and result; "": folders


TOOLS = {
    "llm-compressor": Tool("quantisers_llm_compressor.py", "llmcompressor==0.14.0.1"),
    "autoround": Tool("quantisers_autoround.py", "auto-round==0.16.1"),
    "llama.cpp": Tool("quantisers_llama_cpp.py", "llama-cpp-python==0.3.36", ".gguf"),
}


@dataclass(frozen=True)
class Peer:
    """One way of quantising: 4 bits, groups of 32, symmetric (Q4_K_M: its own)."""

    name: str
    tool: str  # a key of TOOLS
    variant: str  # the script's last argument

    @property
    def recipe(self) -> str:
        """How our engine opens the result: values kept, an unquantised head and embedding in int8."""
        return "source" if TOOLS[self.tool].file_type else "source-head8"

    def place(self, work: Path) -> Path:
        """Where the result goes."""
        return work / (self.name.replace(":", "-") + TOOLS[self.tool].file_type)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("llm-compressor:gptq", "llm-compressor", "memoryless_minmax"),
        Peer("llm-compressor:gptq-mse", "llm-compressor", "memoryless_mse"),
        Peer("autoround:light", "autoround", "50"),
        Peer("autoround", "autoround", "200"),
        Peer("autoround:best", "autoround", "1000"),
        Peer("llama.cpp:q4_0", "llama.cpp", "q4_0"),
        Peer("llama.cpp:q4_k_m", "llama.cpp", "q4_k_m"),
    )
}
DEFAULT = (
    "llama.cpp:q4_0",
    "llama.cpp:q4_k_m",
    "llm-compressor:gptq",
    "llm-compressor:gptq-mse",
    "autoround",
)
"""AutoRound's light and best presets are its default with a quarter and five times the steps."""


def made(
    peer: Peer, material: Material, tools: Mapping[str, str], threads: int
) -> tuple[Path, dict[str, Any]]:
    """A peer's result and what is known about its making; made now unless an earlier run did.

    Raises:
        PeerError: the tool is not there or fails.
    """
    place = peer.place(material.work)
    record = place.with_name(f"{place.name}.json")
    if record.is_file():
        known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if known["digest"] == material.digest:
            return place, known
    at = tools.get(peer.tool)
    if at is None:
        raise PeerError(
            f"nobody said where {peer.tool} is",
            hint=f"--peer {peer.tool}=PYTHON, one with {TOOLS[peer.tool].package}; or leave it out: --only",
        )
    say(f"{peer.name}: quantising")
    found = _child(peer, material, at, place, threads)
    found["digest"] = material.digest
    record.write_text(json.dumps(found), encoding="utf-8")
    return place, found


def _child(peer: Peer, material: Material, python: str, place: Path, threads: int) -> dict[str, Any]:
    """Run the tool's script; its output goes to a log beside the result."""
    tool, log = TOOLS[peer.tool], place.with_name(f"{place.name}.log")
    source = material.gguf if tool.file_type else material.folder
    command = [python, str(HERE / tool.script), str(source), str(place), str(material.ids)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    try:
        with log.open("w", encoding="utf-8") as errors:
            done = subprocess.run(
                [*command, str(threads), peer.variant],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **offline},
                text=True,
                check=False,
            )
    except OSError as wrong:
        raise PeerError(
            f"{python} cannot be run: {wrong.strerror}",
            hint=f"--peer {peer.tool}=PYTHON, one with {tool.package} installed",
        ) from None
    if done.returncode != 0:
        last = log.read_text(encoding="utf-8", errors="replace")[-800:]
        raise PeerError(
            f"{peer.name} failed: {last}",
            hint=f"{python} -m pip install {tool.package}; all of its output: {log}",
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
