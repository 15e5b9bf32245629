"""Run by another interpreter, or by hand: another engine's logits of some tokens.

    python peer_logits.py llama|transformers|gptqmodel|openvino|genai|onnx MODEL IDS.json OUT.npy

IDS.json holds {"ids": [...]}, for llama also {"texts": [...], "messages": [...]}: what its own tokenizer and
chat template make of them is printed as JSON. OUT.npy becomes float32 [T, V], for genai int64 ids of its
greedy answer.
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


def openvino(model: str, wanted: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """optimum-intel, everything in float32; the second half of the ids comes after the first is cached."""
    import torch
    from optimum.intel import OVModelForCausalLM

    exact = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
    peer = OVModelForCausalLM.from_pretrained(model, ov_config=exact)
    ids = torch.tensor([wanted["ids"]])
    half = ids.shape[1] // 2
    first = peer(input_ids=ids[:, :half], attention_mask=torch.ones_like(ids[:, :half]))
    second = peer(
        input_ids=ids[:, half:], attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values
    )
    return torch.cat([first.logits, second.logits], 1)[0].float().numpy(), {}


def genai(model: str, wanted: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """OpenVINO GenAI's greedy answer of 8 ids, in float32 where it can be told, and its tokenizer's ids."""
    import openvino
    import openvino_genai

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
    pipeline = openvino_genai.LLMPipeline(model, "CPU", **options, **wanted.get("options", {}))
    ids = np.array([wanted["ids"]], np.int64)
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = 8, True, False
    given = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    found = pipeline.generate(given, settings).tokens[0]
    tokenizer = pipeline.get_tokenizer()
    tokens = [
        tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        for text in wanted.get("texts", ())
    ]
    return np.array(found, np.int64), {"tokens": tokens}


def onnx(model: str, wanted: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """onnxruntime with float activations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", wanted.get("accuracy", "1"))
    peer = onnxruntime.InferenceSession(f"{model}/model.onnx", options, ["CPUExecutionProvider"])
    ids = np.array([wanted["ids"]], np.int64)
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
    }
    for one in peer.get_inputs():
        if one.name not in given:
            given[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    return peer.run(["logits"], given)[0][0], {}


if __name__ == "__main__":
    which, place, ids_file, out = sys.argv[1:]
    engines = (llama, transformers, gptqmodel, openvino, genai, onnx)
    run = {engine.__name__: engine for engine in engines}[which]
    logits, more = run(place, json.loads(Path(ids_file).read_text()))
    np.save(out, logits)
    sys.stdout.write("\n" + json.dumps(more))  # the last line: the peers say things too
