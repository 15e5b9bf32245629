"""OpenVINO GenAI's LLMPipeline on an optimum-intel export.

The export is what `optimum-cli export openvino --model DIR --weight-format int4|int8` writes with no
further option; for int4 optimum-intel's defaults are 4 bits, asymmetric, groups of 128, ratio 1.0,
embedding and head in int8 (`_DEFAULT_4BIT_WQ_CONFIG`), for int8 asymmetric a channel. The options found in
the export are in `notes`. The pipeline runs as `LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=n)` makes
it: its own scheduler, KV precision and prefix cache; every run's prompt is new, so the prefix cache has
nothing to give.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hasten.bench.peers import EngineSpec
from hasten.bench.peers.hf_folder import hf_folder
from hasten.bench.peers.once import key_of, made_once
from hasten.bench.sample import Sample, TokenClock
from hasten.errors import PeerError

EXPORT_LIMIT_S = 3600


def prepare(spec: EngineSpec) -> str:
    """Export once."""
    folder = hf_folder(spec)
    target = Path(spec.cache) / key_of(Path(spec.source)) / f"openvino-{spec.format}"
    return str(made_once(target, lambda part: _export(folder, part, spec.format)))


def load(spec: EngineSpec, prepared: str) -> OpenVino:
    """Load an export."""
    return OpenVino(spec, prepared)


def _export(folder: Path, target: Path, form: str) -> None:
    program = "from optimum.commands.optimum_cli import main; main()"
    options = ["--model", str(folder), "--task", "text-generation-with-past", "--weight-format", form]
    command = [sys.executable, "-c", program, "export", "openvino", *options, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=EXPORT_LIMIT_S, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise PeerError(
            f"optimum-cli could not export {folder} to {form}: {' '.join(done.stderr.split())[-600:]}",
            hint="optimum-intel names the transformers versions it supports; install one of them",
        )


class OpenVino:
    """An LLMPipeline on the CPU."""

    def __init__(self, spec: EngineSpec, folder: str) -> None:
        import openvino
        import openvino_genai

        self._openvino: Any = openvino
        self._genai: Any = openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=spec.threads)
        self.version = str(openvino_genai.__version__)
        self.format = spec.format
        self.weight_bytes: int | None = (Path(folder) / "openvino_model.bin").stat().st_size
        options = _options(Path(folder))
        self.notes = f"export options {options}" if options else "optimum-cli export's defaults"

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        """See `peers.Engine`."""
        import numpy as np

        genai = self._genai
        ids = np.array(prompts, dtype=np.int64)
        inputs = genai.TokenizedInputs(
            self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids, dtype=np.int64))
        )
        config = genai.GenerationConfig()
        config.max_new_tokens = output
        config.ignore_eos = True
        config.do_sample = False
        if len(prompts) > 1:  # the pipeline streams one sequence only
            return self._batch(prompts, self._pipeline.generate(inputs, config))
        clock = TokenClock(prompts)
        self._pipeline.generate(inputs, config, _streamer(genai, clock))
        return clock.finish()

    def close(self) -> None:
        """See `peers.Engine`."""
        del self._pipeline

    def _batch(self, prompts: list[list[int]], result: Any) -> Sample:
        """The pipeline's own clock: time to the first tokens, then its mean time a token."""
        metrics = result.perf_metrics
        ids = tuple(tuple(row) for row in result.tokens)
        steps = len(ids[0]) - 1
        return Sample(
            prompt_tokens=sum(map(len, prompts)),
            ttft_s=metrics.get_ttft().mean / 1000,
            decode_tokens=steps * len(ids),
            decode_s=steps * metrics.get_tpot().mean / 1000,
            ids=ids,
        )


def _options(folder: Path) -> str:
    """What the export says of its weight compression, in the runtime info of the model's XML."""
    import re

    text = (folder / "openvino_model.xml").read_text(encoding="utf-8")[-20_000:]
    wanted = ("mode", "group_size", "ratio", "backup_mode", "all_layers")
    found = [(name, re.search(rf'<{name} value="([^"]*)"', text)) for name in wanted]
    return ", ".join(f"{name}={match.group(1)}" for name, match in found if match)


def _streamer(genai: Any, clock: TokenClock) -> Any:
    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        """Hears every token, or several at once."""

        def __init__(self) -> None:
            super().__init__()
            self.first = time.perf_counter()

        def write(self, token: Any) -> Any:
            for one in token if isinstance(token, (list, tuple)) else (token,):
                clock.push(0, int(one))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            return

    return Streamer()
