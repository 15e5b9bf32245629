"""OpenVINO GenAI's ContinuousBatchingPipeline on the export of `openvino_pipeline`.

All chats are added at once and the pipeline is stepped until all are done; a token is taken from its handle
after the step that made it. Settings are the best of those tried on the benchmark's chats: prefix caching on,
prompts and answers mixed in one step (`dynamic_split_fuse`), and 1,024 tokens a step (the default of 256
gives 10 % worse times to first token and 1 % less throughput; no limit, hyper-threading and pinning options
and other dynamic quantisation groups change nothing above the noise). KV precision and the rest are defaults.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from hasten.bench.load import Answer
from hasten.bench.peers import EngineSpec, openvino_pipeline

CACHE_GB = 2
BATCHED_TOKENS = 1024

prepare = openvino_pipeline.prepare


def load(spec: EngineSpec, prepared: str) -> OpenVinoBatching:
    """Load an export."""
    return OpenVinoBatching(spec, prepared)


class OpenVinoBatching:
    """A ContinuousBatchingPipeline on the CPU."""

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

        config = self._genai.GenerationConfig()
        config.max_new_tokens = output
        config.ignore_eos = True
        config.do_sample = False
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

    def close(self) -> None:
        """Free the model."""
        del self._pipeline
