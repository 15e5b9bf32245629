"""Strict loading: every parameter is filled once, every tensor is used or listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ggml_blocks import check_finite, dequantize
from gguf_bytes import Gguf, Tensor, floats, smallest_model
from hasten.errors import ModelError
from hasten.models.families import FAMILIES
from hasten.models.gguf import GgufFile
from hasten.models.open import gguf_source, open_model
from hasten.models.rope import interleaved_rows
from hasten.models.source import Source


def opened(model: Gguf) -> Source:
    return gguf_source(GgufFile.parse(memoryview(model.build()), "test.gguf"), "test", ())


def test_the_smallest_model_opens() -> None:
    source = opened(smallest_model())
    assert source.unused == () and "head" not in source.tensors
    assert source.tensors["layers.0.q.bias"].shape == (4,)
    assert source.tensors["layers.0.down"].shape == (4, 6)
    assert all(name == tensor.name for name, tensor in source.tensors.items())


@pytest.mark.parametrize("index", range(len(smallest_model().tensors)))
def test_any_missing_tensor_is_an_error_that_names_it(index: int) -> None:
    model = smallest_model()
    gone = model.tensors.pop(index).name
    parts = {"token_embd": "embed", "output_norm": "final_norm", "attn_output": "o", "ffn_norm": "mlp_norm"}
    module, kind = gone.removeprefix("blk.0.").rsplit(".", 1)
    ours = parts.get(module, module.removeprefix("attn_").removeprefix("ffn_"))
    if module == "attn_norm":
        ours = "attn_norm"
    suffix = ".bias" if kind == "bias" else ""
    with pytest.raises(ModelError, match=f"{ours}{suffix}' is missing"):
        opened(model)


def test_extra_tensors_are_an_error_that_names_them() -> None:
    model = smallest_model()
    model.tensors += [floats("blk.1.ffn_norm.weight", 4), floats("blk.0.attn_sinks.weight", 4)]
    with pytest.raises(ModelError, match=r"2 tensors \('blk.1.ffn_norm.weight', 'blk.0.attn_sinks.weight'\)"):
        opened(model)


def test_a_bias_where_none_belongs_is_extra() -> None:
    model = smallest_model()
    model.tensors.append(floats("blk.0.attn_norm.bias", 4))
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_norm\.bias' is not part"):
        opened(model)


def test_a_bias_of_some_layers_only_is_missing_in_the_others() -> None:
    model = smallest_model()
    model.metadata = [(k, v) for k, v in model.metadata if not k.endswith("block_count")]
    model.metadata.append(("qwen2.block_count", b"\x04\0\0\0\x02\0\0\0"))
    layer = [t for t in model.tensors if t.name.startswith("blk.0.") and not t.name.endswith("bias")]
    model.tensors += [Tensor(t.name.replace("blk.0", "blk.1"), t.dims, t.kind, t.data) for t in layer]
    with pytest.raises(
        ModelError, match=r"3 parameters \('layers.1.q.bias', 'layers.1.k.bias', .*\) are missing"
    ):
        opened(model)


def test_a_misshapen_tensor_is_an_error_that_names_it() -> None:
    model = smallest_model()
    model.tensors[4] = floats("blk.0.attn_q.weight", 4, 5)
    with pytest.raises(ModelError, match=r"'blk.0.attn_q.weight' must be \[4, 4\], got \[4, 5\]"):
        opened(model)
    model.tensors[4] = floats("blk.0.attn_q.weight", 4)
    with pytest.raises(ModelError, match=r"must be \[4, 4\], got \[4\]"):
        opened(model)


def test_a_parameter_filled_twice_is_an_error() -> None:
    model = smallest_model()
    model.tensors.append(floats("blk.0.attn_qkv.weight", 8, 4))
    with pytest.raises(ModelError, match=r"'layers.0.q' is there twice, .* 'blk.0.attn_qkv.weight'"):
        opened(model)


def test_known_tensors_without_use_are_listed() -> None:
    model = smallest_model("llama")
    model.tensors = [t for t in model.tensors if not t.name.endswith("bias")]
    model.tensors.append(floats("rope_freqs.weight", 1))
    assert opened(model).unused == ("rope_freqs.weight",)


def test_fused_rows_are_split_in_order() -> None:
    model = smallest_model("phi3")
    for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
        model.tensors = [t for t in model.tensors if not t.name.startswith(f"blk.0.{name}.")]
    qkv, up = np.arange(32, dtype="<f4").reshape(8, 4), np.arange(48, dtype="<f4").reshape(12, 4)
    model.tensors.append(Tensor("blk.0.attn_qkv.weight", [4, 8], 0, qkv.tobytes()))
    model.tensors.append(Tensor("blk.0.ffn_up.weight", [4, 12], 0, up.tobytes()))
    tensors = opened(model).tensors
    for name, rows in (("q", qkv[:4]), ("k", qkv[4:6]), ("v", qkv[6:]), ("gate", up[:6]), ("up", up[6:])):
        np.testing.assert_array_equal(dequantize(tensors[f"layers.0.{name}"]), rows)


def test_the_interleaved_rows_of_llama_are_put_back() -> None:
    weight = np.arange(24 * 2, dtype="<f4").reshape(24, 2)  # 3 heads of 8 rows
    permuted = weight.reshape(3, 2, 4, 2).swapaxes(1, 2).reshape(24, 2)  # what llama.cpp's converter does
    np.testing.assert_array_equal(permuted[interleaved_rows(24, 8)], weight)


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny model's folder, to break."""
    source = tiny_folder("qwen2", dtype="float32")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_safetensors_are_as_strict(folder: Path) -> None:
    assert open_model(folder).unused == ()
    rewrite(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)})
    )
    assert open_model(folder).unused == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head.weight" in open_model(folder).unused  # the head is tied
    rewrite(folder, lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"))
    with pytest.raises(ModelError, match=r"'layers.1.q.bias' is missing"):
        open_model(folder)
    rewrite(folder, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.zeros(63, np.float32)}))
    with pytest.raises(
        ModelError, match=r"'model.layers.1.self_attn.q_proj.bias' must be \[64\], got \[63\]"
    ):
        open_model(folder)


def test_a_base_model_without_prefix_opens(folder: Path) -> None:
    def strip(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    before = open_model(folder).tensors
    rewrite(folder, strip)
    after = open_model(folder).tensors
    assert before.keys() == after.keys()


def test_names_of_every_kind_of_checkpoint() -> None:
    table = FAMILIES["gemma3"].hf_names
    for prefix in ("model.", "", "language_model.model.", "model.language_model.", "language_model."):
        assert table.parts(f"{prefix}embed_tokens.weight") == ("embed",)
        assert table.parts(f"{prefix}layers.12.self_attn.k_proj.bias") == ("layers.12.k.bias",)
        assert table.parts(f"{prefix}layers.0.pre_feedforward_layernorm.weight") == ("layers.0.mlp_norm",)
    assert table.parts("language_model.lm_head.weight") == table.parts("lm_head.weight") == ("head",)
    for foreign in (
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.scale",
        "norm",
        "",
        ".",
    ):
        assert table.parts(foreign) is None and not table.ignores(foreign)
    assert table.ignores("vision_tower.x.weight") and table.ignores("model.multi_modal_projector.norm.weight")


def test_an_untied_head_must_be_there(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match="'head' is missing"):
        open_model(folder)


def test_the_gemma_offset_and_a_non_finite_norm(tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("gemma3", dtype="float32"))
    shifted = {name for name, tensor in source.tensors.items() if tensor.offset}
    assert shifted == {name for name in source.tensors if name.endswith("norm")} and len(shifted) > 6
    for tensor in source.tensors.values():
        check_finite(tensor)
