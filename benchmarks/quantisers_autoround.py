"""AutoRound, run in the Python that has it: 4 bits, groups of 32, symmetric, the head left alone.

    python quantisers_autoround.py SOURCE OUT IDS.npy THREADS ITERATIONS

SOURCE is a Hugging Face folder, IDS.npy the calibration windows, int32 [B, T]; OUT becomes a checkpoint in
GPTQ's format. The last line of stdout is JSON: versions, settings, seconds, peak memory.
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
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4
"""Windows a step. Its default, 8, takes twice as long on a CPU."""


def main() -> None:
    """Quantise and save."""
    source, out, ids = (Path(text).resolve() for text in sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[4]))
    iterations = int(sys.argv[5])
    torch.manual_seed(0)
    windows = torch.from_numpy(np.load(ids)).long()  # [B, T]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    settings = {"bits": 4, "group_size": 32, "sym": True, "iters": iterations, "batch_size": BATCH, "seed": 0}
    started = time.perf_counter()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        dataset=DataLoader(list(windows), batch_size=1),
        nsamples=windows.shape[0],
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        **settings,
    )
    rounder.quantize_and_save(str(out), format="auto_gptq")
    (written,) = out.iterdir()  # it makes a folder of its own there
    for file in written.iterdir():
        file.rename(out / file.name)
    written.rmdir()
    record = {
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers")},
        "settings": settings,
        "seconds": time.perf_counter() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
