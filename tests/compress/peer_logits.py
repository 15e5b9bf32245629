"""Run by another interpreter, or by hand: another engine's logits of some tokens.

    python peer_logits.py llama|transformers|gptqmodel MODEL IDS.json OUT.npy

IDS.json holds {"ids": [...]}, for llama also {"texts": [...], "messages": [...]}: what its own tokenizer and
chat template make of them is printed as JSON. OUT.npy becomes float32 [T, V].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def llama(model: str, wanted: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """llama-cpp-python, whole prompt at once."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    ids = wanted["ids"]
    peer = Llama(model, n_ctx=max(64, len(ids)), n_batch=512, logits_all=True, n_threads=2, verbose=False)
    peer.eval(ids)
    found = np.array(peer.scores[: len(ids)], np.float32)
    tokens = [peer.tokenize(t.encode(), add_bos=False, special=True) for t in wanted.get("texts", ())]
    said = {"tokens": tokens, "metadata": {k: v for k, v in peer.metadata.items() if "template" not in k}}
    template = peer.metadata.get("tokenizer.chat_template")
    if template and "messages" in wanted:
        text = Jinja2ChatFormatter(template, eos_token="", bos_token="")(messages=wanted["messages"]).prompt
        said["prompt"] = text
    return found, said


def transformers(model: str, wanted: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """transformers in float32, so that what differs is the activations' rounding in our engine alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = peer(torch.tensor([wanted["ids"]])).logits[0].float().numpy()
    said: dict[str, Any] = {"tokens": [tokenizer(t)["input_ids"] for t in wanted.get("texts", ())]}
    if "messages" in wanted and tokenizer.chat_template:
        said["prompt"] = tokenizer.apply_chat_template(
            wanted["messages"], tokenize=False, add_generation_prompt=True
        )
    return found, said


def gptqmodel(model: str, wanted: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """GPTQModel's plain kernel in float16, the widest it has."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    peer = GPTQModel.load(model, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    with torch.inference_mode():
        found = peer.model(torch.tensor([wanted["ids"]])).logits[0].float().numpy()
    return found, {"kinds": sorted({type(m).__name__ for m in peer.model.modules()})}


if __name__ == "__main__":
    which, place, ids_file, out = sys.argv[1:]
    run = {"llama": llama, "transformers": transformers, "gptqmodel": gptqmodel}[which]
    logits, more = run(place, json.loads(Path(ids_file).read_text()))
    np.save(out, logits)
    sys.stdout.write("\n" + json.dumps(more))  # the last line: the peers say things too
