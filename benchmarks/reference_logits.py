"""Logits of transformers in fp32, written window by window. Runs in the Python that has torch.

python reference_logits.py MODEL.gguf|FOLDER OUT WINDOW THREADS     # reads OUT/ids.npy, writes OUT/0.npy ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load the model in fp32 and write float32 [WINDOW, V] files."""
    source, out, window = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    ids = np.load(out / "ids.npy")
    if source.is_dir():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    model.eval()
    with torch.inference_mode():
        for number in range((len(ids) - 1) // window):
            part = torch.from_numpy(ids[number * window : (number + 1) * window]).long()[None]
            np.save(out / f"{number}.npy", model(part).logits[0].float().numpy())


if __name__ == "__main__":
    main()
