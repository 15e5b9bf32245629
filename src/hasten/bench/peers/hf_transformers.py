"""transformers: `generate` in eager PyTorch, greedy, with its default attention (sdpa) and cache."""

from __future__ import annotations

from typing import Any

from hasten.bench.figures import Sample, TokenClock
from hasten.bench.peers import EngineSpec, Peer, hf_folder

PEER = Peer(
    formats=("bf16", "fp32"),
    requires=("torch", "transformers", "accelerate", "gguf"),
    install='"torch==2.13.0" "transformers>=5,<6" accelerate gguf',
    devices=("cpu", "cuda"),
)


def prepare(spec: EngineSpec) -> str:
    return str(hf_folder(spec))


def load(spec: EngineSpec, prepared: str) -> Transformers:
    return Transformers(spec, prepared)


class Transformers:
    def __init__(self, spec: EngineSpec, folder: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(spec.threads)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.format]
        self._torch: Any = torch
        self._transformers: Any = transformers
        self._device = spec.device
        model = self._transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(spec.device).eval()
        self.version = f"{transformers.__version__} (torch {torch.__version__})"
        self.format = spec.format
        unique = {p.data_ptr(): p.numel() * p.element_size() for p in self._model.parameters()}
        self.weight_bytes: int | None = sum(unique.values())
        self.notes = f"eager, sdpa attention, on {spec.device}"
        if spec.device == "cpu":
            self.notes = (
                f"oneDNN may use up to {torch.backends.cpu.get_cpu_capability()} and AMX where the CPU has it"
            )

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        torch = self._torch
        config = self._transformers.GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ids = torch.tensor(prompts, dtype=torch.long, device=self._device)
        clock = TokenClock(prompts)
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_streamer(self._transformers, clock),
            )
        return clock.finish()


def _streamer(transformers: Any, clock: TokenClock) -> Any:
    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        """Hears the prompt once, then one token of every sequence a step."""

        started = False

        def put(self, value: Any) -> None:
            if self.started:
                for sequence, token in enumerate(value.reshape(-1).tolist()):
                    clock.push(sequence, token)
            self.started = True

        def end(self) -> None:
            return

    return Streamer()
