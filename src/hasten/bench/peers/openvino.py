"""OpenVINO GenAI on an optimum-intel export: LLMPipeline, and ContinuousBatchingPipeline for many chats.

The export is what `optimum-cli export openvino --model DIR --weight-format int4|int8` writes with no
further option; for int4 optimum-intel's defaults are 4 bits, asymmetric, groups of 128, ratio 1.0,
embedding and head in int8 (`_DEFAULT_4BIT_WQ_CONFIG`), for int8 asymmetric a channel. The options found in
the export are in `notes`. The pipeline runs as `LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=n)` makes
it: its own scheduler, KV precision and prefix cache; every run's prompt is new, so the prefix cache has
nothing to give.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hasten.bench.figures import Answer, Sample, TokenClock
from hasten.bench.peers import EngineSpec, Peer, hf_folder, key_of, made_once
from hasten.errors import PeerError

PEER = Peer(
    formats=("int4", "int8"),
    requires=("openvino_genai", "optimum.intel", "nncf", "accelerate", "gguf"),
    install='"torch==2.13.0" openvino-genai optimum-intel nncf accelerate gguf',
)
EXPORT_LIMIT_S = 3600


def prepare(spec: EngineSpec) -> str:
    folder = hf_folder(spec)
    target = Path(spec.cache) / key_of(Path(spec.source)) / f"openvino-{spec.format}"
    return str(made_once(target, lambda part: _export(folder, part, spec.format)))


def load(spec: EngineSpec, prepared: str) -> OpenVino | OpenVinoBatching:
    return (OpenVinoBatching if spec.chats else OpenVino)(spec, prepared)


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
        import numpy as np

        genai = self._genai
        ids = np.array(prompts, dtype=np.int64)
        inputs = genai.TokenizedInputs(
            self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids, dtype=np.int64))
        )
        config = _greedy(genai, output)
        if len(prompts) > 1:  # the pipeline streams one sequence only
            return self._batch(prompts, self._pipeline.generate(inputs, config))
        clock = TokenClock(prompts)
        self._pipeline.generate(inputs, config, _streamer(genai, clock))
        return clock.finish()

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


def _greedy(genai: Any, output: int) -> Any:
    """So many tokens, past end tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = output, True, False
    return config


def _options(folder: Path) -> str:
    """What the export says of its weight compression, in the runtime info of the model's XML."""
    text = (folder / "openvino_model.xml").read_text(encoding="utf-8")[-20_000:]
    wanted = ("mode", "group_size", "ratio", "backup_mode", "all_layers")
    found = [(name, re.search(rf'<{name} value="([^"]*)"', text)) for name in wanted]
    return ", ".join(f"{name}={match.group(1)}" for name, match in found if match)


def _streamer(genai: Any, clock: TokenClock) -> Any:
    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        """Hears every token, or several at once."""

        def write(self, token: Any) -> Any:
            for one in token if isinstance(token, (list, tuple)) else (token,):
                clock.push(0, int(one))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            return

    return Streamer()


CACHE_GB = 2
BATCHED_TOKENS = 1024


class OpenVinoBatching:
    """A ContinuousBatchingPipeline on the CPU.

    All chats are added at once and the pipeline is stepped until all are done; a token is taken from its
    handle after the step that made it. Settings are the best of those tried on the benchmark's chats: prefix
    caching on, prompts and answers mixed in one step (`dynamic_split_fuse`), and 1,024 tokens a step (the
    default of 256 gives 10 % worse times to first token and 1 % less throughput; no limit, hyper-threading
    and pinning options and other dynamic quantisation groups change nothing above the noise). KV precision
    and the rest are defaults.
    """

    def __init__(self, spec: EngineSpec, folder: str) -> None:
        import openvino
        import openvino_genai

        self._openvino: Any = openvino
        self._genai: Any = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = BATCHED_TOKENS
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": spec.threads}
        )
        self._ids = itertools.count()
        self.version = str(openvino_genai.__version__)
        self.format = spec.format
        self.weight_bytes: int | None = (Path(folder) / "openvino_model.bin").stat().st_size
        self.notes = f"prefix caching, dynamic split fuse, {BATCHED_TOKENS} tokens a step"

    def chats(self, prompts: list[list[int]], output: int) -> list[Answer]:
        """All prompts at once, greedily, `output` tokens each, past end tokens."""
        import numpy as np

        config = _greedy(self._genai, output)
        start = time.perf_counter()
        handles = [
            self._pipeline.add_request(
                next(self._ids), self._openvino.Tensor(np.array([ids], np.int64)), config
            )
            for ids in prompts
        ]
        times: list[list[float]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, came in zip(handles, times, strict=True):
                while handle.can_read():
                    for news in handle.read().values():
                        came.extend([time.perf_counter() - start] * len(news.generated_ids))
        return [Answer(came[0], came[-1], len(came), finish_reason="length") for came in times]
