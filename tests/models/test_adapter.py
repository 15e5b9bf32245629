"""LoRA adapters merged into a model: against PEFT's arithmetic, in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ggml_blocks import dequantize
from gguf_bytes import STRING, Gguf, Tensor, scalar
from hasten.errors import ModelError
from hasten.models.open import open_model
from hasten.models.rope import interleaved_rows
from hasten.models.source import locate, ref_of, with_adapters
from hasten.weights.packed import finite_values

RANK = 4


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **options: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": "x/y", **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(base: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in], B [out, r]."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((RANK, base.shape[1])).astype(np.float32)
    return a, rng.standard_normal((base.shape[0], RANK)).astype(np.float32)


def lora(module: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 8 / RANK),
        ({"use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"alpha_pattern": {"down_proj": 8, "q_proj": 2}}, None),
    ],
)
def test_products_are_added(
    tiny_folder: Callable[..., Path], tmp_path: Path, options: dict[str, Any], scale: float | None
) -> None:
    base = tiny_folder("llama")
    plain = open_model(base)
    pairs = {
        m: pair(finite_values(plain.tensors[p])) for m, p in ((Q, "layers.0.q"), (DOWN, "layers.1.down"))
    }
    path = write_adapter(
        tmp_path / "tuned", {k: v for m, ab in pairs.items() for k, v in lora(m, *ab).items()}, **options
    )
    source = open_model(with_adapters(str(base), [str(path)]))
    for module, part in ((Q, "layers.0.q"), (DOWN, "layers.1.down")):
        a, b = pairs[module]
        by = scale if scale is not None else (2 if module == Q else 8) / RANK
        wanted = finite_values(plain.tensors[part]) + np.float32(by) * b @ a
        np.testing.assert_allclose(finite_values(source.tensors[part]), wanted, rtol=1e-5, atol=1e-5)
    same = [name for name in plain.tensors if name not in ("layers.0.q", "layers.1.down")]
    assert all(source.tensors[name].content == plain.tensors[name].content for name in same)
    assert source.content != plain.content and source.name == f"{plain.name}+tuned"
    assert open_model(ref_of(source)).content == source.content
    downloaded = replace(source, name="owner/name+1+tuned")  # a hub id, whose name may hold a +
    assert ref_of(downloaded) == f"owner/name+1+lora:{path}"
    assert {path / "adapter_config.json", path / "adapter_model.safetensors"} <= set(
        locate(with_adapters(str(base), [str(path)])).files()
    )


def test_a_tied_head_gets_its_own(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder("qwen2")
    plain = open_model(base)
    assert plain.config.head.tied
    a, b = pair(finite_values(plain.tensors["embed"]))
    path = write_adapter(tmp_path / "a", lora("lm_head", a, b))
    source = open_model(with_adapters(str(base), [str(path)]))
    assert not source.config.head.tied
    wanted = finite_values(plain.tensors["embed"]) + np.float32(2) * b @ a
    np.testing.assert_allclose(finite_values(source.tensors["head"]), wanted, rtol=1e-5, atol=1e-5)


def test_trained_modules_take_the_place_of_the_base(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder("llama")
    norm = np.full(finite_values(open_model(base).tensors["final_norm"]).shape, 2.0, np.float32)
    path = write_adapter(tmp_path / "a", {"base_model.model.model.norm.modules_to_save.weight": norm})
    source = open_model(with_adapters(str(base), [str(path)]))
    np.testing.assert_array_equal(finite_values(source.tensors["final_norm"]), norm)


def test_a_gguf_adapter_has_its_rows_where_llama_cpp_puts_them(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder("llama")
    plain = open_model(base)
    values = finite_values(plain.tensors["layers.0.q"])
    a, b = pair(values)
    permuted = b[np.argsort(interleaved_rows(len(b), plain.config.blocks[0].mixer.head_dim))]
    assert not np.array_equal(permuted, b)
    metadata = [
        ("general.type", scalar(STRING, "adapter")),
        ("general.architecture", scalar(STRING, "llama")),
        ("adapter.type", scalar(STRING, "lora")),
        ("adapter.lora.alpha", scalar(6, 8.0)),
    ]
    tensors = [
        Tensor(f"blk.0.attn_q.weight.lora_{half}", array.shape[::-1], 0, array.astype("<f4").tobytes())
        for half, array in (("a", a), ("b", permuted))
    ]
    path = tmp_path / "tuned.gguf"
    path.write_bytes(Gguf(metadata, tensors).build())
    source = open_model(with_adapters(str(base), [str(path)]))
    wanted = values + np.float32(8 / RANK) * b @ a
    np.testing.assert_allclose(finite_values(source.tensors["layers.0.q"]), wanted, rtol=1e-5, atol=1e-5)


def test_what_no_adapter_may_hold(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = str(tiny_folder("llama"))
    a, b = pair(finite_values(open_model(base).tensors["layers.0.q"]))
    wrong: list[tuple[dict[str, np.ndarray], dict[str, Any], str]] = [
        (lora("model.layers.0.self_attn.x_proj", a, b), {}, "x_proj.weight', which this model does not have"),
        (lora(Q, a[:, :-1].copy(), b), {}, r"does not fit the model's"),
        ({k: v for k, v in lora(Q, a, b).items() if "_A" in k}, {}, "one half of a product"),
        (lora(Q, a, b), {"use_dora": True}, "use_dora is not supported"),
        (lora(Q, a, b), {"peft_type": "IA3"}, "an adapter of the kind 'IA3'"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": a}, {}, "a kind of LoRA"),
    ]
    for number, (tensors, options, message) in enumerate(wrong):
        path = write_adapter(tmp_path / str(number), tensors, **options)
        with pytest.raises(ModelError, match=message):
            open_model(with_adapters(base, [str(path)]))
    with pytest.raises(ModelError, match="there is no adapter"):
        open_model(with_adapters(base, ["no/such/place"]))
    assert load_file(path / "adapter_model.safetensors")


def test_a_model_of_gguf_takes_an_adapter_of_a_folder(tiny_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """The rows of a file are put back first: an adapter's are those of the original."""
    base, _ = tiny_gguf("llama", "F16")
    plain = open_model(base)
    values = finite_values(plain.tensors["layers.0.q"])
    a, b = pair(values)
    path = write_adapter(tmp_path / "a", lora(Q, a, b))
    source = open_model(with_adapters(str(base), [str(path)]))
    wanted = values + np.float32(2) * b @ a
    np.testing.assert_allclose(dequantize(source.tensors["layers.0.q"]), wanted, rtol=1e-5, atol=1e-5)


def test_eval_finds_the_source_of_an_artifact_with_its_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hasten.cli.eval import _source
    from hasten.weights import artifact

    ref = with_adapters(str(tmp_path), ["/gone/adapter"])
    monkeypatch.setattr(artifact, "is_artifact", lambda path: True)
    monkeypatch.setattr(artifact, "made_from", lambda path: {"ref": ref})
    assert _source("a.hasten", None) == ref
