"""Figures of whole processes: start-up, peak memory, opening a GGUF file, `make demo`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bar import Bar, Settings, say
from hasten.errors import HastenError
from hasten.machine.probe import stat_of

PROMPT = "What is a mutex?"
NEW_TOKENS = 128
ALLOWANCE_BYTES = 200e6


@dataclass(frozen=True)
class Run:
    """A process that ended well."""

    wall_s: float
    peak_rss_bytes: int
    stdout: str
    stderr: str


def hasten(*arguments: str) -> Run:
    """Run the `hasten` beside this Python, or the module where there is no such script."""
    script = Path(sys.executable).parent / "hasten"
    return process([str(script)] if script.exists() else [sys.executable, "-m", "hasten"], *arguments)


def process(
    command: list[str], *arguments: str, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> Run:
    """Run a command; its wall time and highest resident set (wait4's ru_maxrss: this process is smaller).

    Raises:
        HastenError: it failed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        child = subprocess.Popen([*command, *arguments], stdout=out, stderr=err, cwd=cwd, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    if child.returncode != 0:
        raise HastenError(f"{' '.join([*command, *arguments])} failed: {texts[1][-800:]}")
    return Run(wall, usage.ru_maxrss * 1024, *texts)


def startup(settings: Settings) -> tuple[list[Bar], Any]:
    """One token from an artifact in the page cache, and the help."""
    first = ["generate", settings.artifact, "-p", PROMPT, "-n", "1", "--threads", str(settings.threads)]
    hasten(*first)  # fills the page cache
    tokens, helps = [], []
    for number in range(settings.runs):
        say(f"round {number + 1} of {settings.runs}")
        tokens.append(hasten(*first).wall_s)
        helps.append(hasten("--help").wall_s)
    bars = [
        Bar("generate ARTIFACT -n 1, whole process", stat_of(tokens).median, 1.0, "s", at_least=False),
        Bar("hasten --help, whole process", stat_of(helps).median, 0.25, "s", at_least=False),
    ]
    return bars, {"first_token_s": stat_of(tokens), "help_s": stat_of(helps)}


def memory(settings: Settings) -> tuple[list[Bar], Any]:
    """Peak memory of `generate` over artifact and KV cache."""
    folder = Path(settings.artifact)
    run = hasten("generate", settings.artifact, "-p", PROMPT, "-n", str(NEW_TOKENS), "--json")
    tokens = json.loads(run.stdout)["prompt_tokens"] + NEW_TOKENS
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kv_bytes = 4 * config["num_layers"] * config["num_kv_heads"] * config["head_dim"] * tokens
    artifact_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    limit = (artifact_bytes + kv_bytes + ALLOWANCE_BYTES) / 1e6
    details = {
        "peak_rss_bytes": run.peak_rss_bytes,
        "artifact_bytes": artifact_bytes,
        "kv_bytes": kv_bytes,
        "tokens": tokens,
    }
    return [Bar("generate: peak memory", run.peak_rss_bytes / 1e6, limit, "MB", at_least=False)], details


def gguf(settings: Settings) -> tuple[list[Bar], Any]:
    """From a GGUF file to the first token, whole process."""
    from hasten.models.open import open_model

    path = str(open_model(settings.model).files[0].path)
    first = ["generate", path, "-p", PROMPT, "-n", "1", "--threads", str(settings.threads)]
    seconds = [hasten(*first).wall_s for _ in range(settings.runs)]
    bar = Bar("GGUF to first token, whole process", stat_of(seconds).median, 6.0, "s", at_least=False)
    return [bar], {"seconds": stat_of(seconds), "file_bytes": Path(path).stat().st_size}


def make_demo(settings: Settings) -> tuple[list[Bar], Any]:
    """`make demo` from a fresh clone, its own set-up included."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "hasten"
        process(["git", "clone", "-q", str(root), str(clone)])
        run = process(["make", "demo"], cwd=clone)
    bar = Bar("make demo from a fresh clone", run.wall_s / 60, 6.0, "min", at_least=False)
    return [bar], {"seconds": run.wall_s}
