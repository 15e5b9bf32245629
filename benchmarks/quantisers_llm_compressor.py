"""GPTQ of llm-compressor, run in the Python that has it: W4A16, groups of 32, symmetric, the head left alone.

    python quantisers_llm_compressor.py SOURCE OUT IDS.npy THREADS OBSERVER

SOURCE is a Hugging Face folder, IDS.npy the calibration windows, int32 [B, T]; OUT becomes a
compressed-tensors checkpoint with fp16 scales. OBSERVER is what finds the scales: `memoryless_minmax`, the
default, or `memoryless_mse`, a search. The last line of stdout is JSON: versions, settings, seconds, memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

ACT_ORDER = "static"
"""Columns of the largest activations first; the other order, `group`, is deprecated there."""


def main() -> None:
    """Quantise and save."""
    source, out, ids = (Path(text).resolve() for text in sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[4]))
    observer = sys.argv[5]
    windows = torch.from_numpy(np.load(ids)).long()  # [B, T]
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, observer=observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=1),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder=ACT_ORDER),
        num_calibration_samples=windows.shape[0],
        max_seq_length=windows.shape[1],
    )
    model.to(torch.float16).save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    record = {
        "versions": {
            name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
        },
        "settings": {"scheme": "W4A16", "group_size": 32, "actorder": ACT_ORDER, "observer": observer},
        "seconds": time.perf_counter() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
