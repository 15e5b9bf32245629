"""vLLM in one process, stepped by hand so that each token has its time: greedy, graphs on, no prefix cache.

It gets nine tenths of the GPU's memory that is free when it loads: engines that were loaded before it wait
beside it with what they hold.
"""

from __future__ import annotations

import os
from typing import Any

from hasten.bench.figures import Sample, TokenClock
from hasten.bench.peers import EngineSpec, Peer, hf_folder

PEER = Peer(
    formats=("bf16", "fp8"),
    requires=("torch", "vllm"),
    install="vllm",
    crash_hint="see whether the GPU has memory for it beside the others: nvidia-smi",
    devices=("cuda",),
)
_SHARE = 0.9  # of what is free


def prepare(spec: EngineSpec) -> str:
    return str(hf_folder(spec))


def load(spec: EngineSpec, prepared: str) -> Vllm:
    return Vllm(spec, prepared)


class Vllm:
    def __init__(self, spec: EngineSpec, folder: str) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its clock is this process's
        import torch
        import vllm

        free, whole = torch.cuda.mem_get_info()
        self._vllm: Any = vllm
        self._engine: Any = vllm.LLM(
            model=folder,
            dtype="bfloat16",
            quantization="fp8" if spec.format == "fp8" else None,
            max_model_len=spec.context,
            max_num_seqs=spec.batch,
            gpu_memory_utilization=_SHARE * free / whole,
            enable_prefix_caching=False,
        ).llm_engine
        self.version = f"{vllm.__version__} (torch {torch.__version__})"
        self.format = spec.format
        self.weight_bytes: int | None = None
        self.notes = "one process, graphs on, no prefix cache"
        self._count = 0

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        clock = TokenClock(prompts)
        rows: dict[str, int] = {}
        for row, ids in enumerate(prompts):
            self._count += 1
            rows[str(self._count)] = row
            self._engine.add_request(str(self._count), {"prompt_token_ids": ids}, params)
        seen = [0] * len(prompts)
        while self._engine.has_unfinished_requests():
            for news in self._engine.step():
                row = rows[news.request_id]
                ids = list(news.outputs[0].token_ids)  # all so far
                for token in ids[seen[row] :]:
                    clock.push(row, int(token))
                seen[row] = len(ids)
        return clock.finish()
