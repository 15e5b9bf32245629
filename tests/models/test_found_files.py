"""Models as people have them: names that training left behind, files under other names, parts of a cache."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_bytes import ARRAY, F32, I32, STRING, U32, array, scalar, smallest_model
from hasten.errors import HastenError, ModelError
from hasten.models.gguf import GgufFile
from hasten.models.hub import plain_ref
from hasten.models.open import open_model
from hasten.models.source import ref_of


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "m"))


def renamed(folder: Path, name_of: Callable[[str], str], **more: torch.Tensor) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({name_of(name): value for name, value in tensors.items()} | more, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name_of",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
        lambda name: name.replace("model.", "model._fsdp_wrapped_module."),
    ],
)
def test_names_that_training_wrapped(folder: Path, name_of: Callable[[str], str]) -> None:
    before = open_model(folder).content
    assert open_model(renamed(folder, name_of)).content == before


def test_buffers_and_value_heads_are_left_out(folder: Path) -> None:
    more = {
        "model.position_ids": torch.arange(4),
        "model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.bool),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(2, 2),
        "v_head.summary.weight": torch.ones(1, 4),
    }
    assert set(more) <= set(open_model(renamed(folder, str, **more)).unused)


@pytest.mark.parametrize("name", ["model.foo", "score.weight", "model.layers.0.self_attn.q_proj.extra"])
def test_what_may_count_is_refused_by_name(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        open_model(renamed(folder, str, **{name: torch.ones(2)}))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.int8])
def test_a_parameter_of_integers_is_named_by_its_type(folder: Path, kind: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(kind)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(HastenError, match=r"'model\.norm\.weight' has type '(I64|BOOL|I8)'"):
        open_model(folder)


def in_shards(folder: Path, stem: str = "model") -> list[Path]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    paths = [folder / f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, path)
    return paths


@pytest.mark.parametrize("stem", ["model", "model.fp16"])
def test_shards_need_no_index_where_all_are_there(folder: Path, stem: str) -> None:
    before = open_model(folder).content
    first, second = in_shards(folder, stem)
    source = open_model(folder)
    assert source.content == before and [file.path for file in source.files] == [first, second]
    second.unlink()
    with pytest.raises(ModelError, match=rf"1 of 2 files of a checkpoint: {second.name} missing"):
        open_model(folder)


def test_a_model_by_one_of_its_files_or_by_its_place_in_a_cache(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        source = open_model(folder / name)
        assert source.name == "m" and ref_of(source) == str(folder)
    cached = tmp_path / "models--a--b"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    assert open_model(cached).name == "abc"
    shutil.copytree(folder, cached / "snapshots" / "def")
    with pytest.raises(ModelError, match=r"no model folder"):
        open_model(cached)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("def\n")
    assert open_model(cached).name == "def"
    with pytest.raises(ModelError) as error:
        open_model(tmp_path)
    assert error.value.hint == f"a folder in it has one: give {folder}"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_other_editors(folder: Path, encoding: str) -> None:
    before = open_model(folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            (folder / name).write_bytes((folder / name).read_text().encode(encoding))
    (folder / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + (folder / "tokenizer.json").read_bytes())
    after = open_model(folder)
    assert after.config == before.config and after.tokenizer().encode("ab") == before.tokenizer().encode("ab")


@pytest.mark.parametrize(
    ("change", "bos", "eos"),
    [
        ({"eos_token_id": -1, "bos_token_id": -1}, None, ()),
        ({"eos_token_id": [7, -1, 8.0], "bos_token_id": [3]}, 3, (7, 8)),
        ({"max_position_embeddings": 64.0, "attention_bias": 0, "bos_token_id": 1.0}, 1, None),
    ],
)
def test_values_that_are_clear(
    folder: Path, change: dict[str, Any], bos: int | None, eos: tuple[int, ...] | None
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config | change))
    spec = open_model(folder).config
    assert spec.bos_token_id == bos and (eos is None or spec.eos_token_ids == eos)
    assert spec.context == change.get("max_position_embeddings", spec.context)


CONTENTS = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
    (b"\n<!DOCTYPE html><html></html>", "a web page"),
    (b"PK\x03\x04" + bytes(60), "a zip archive"),
    (gzip.compress(b"x" * 100), "compressed by gzip"),
    (b"\x80\x02}q\x00." + bytes(60), "a pickle"),
    (b"tjgg" + bytes(60), "from before GGUF"),
    (bytes(100), "nothing but zeros"),
]


@pytest.mark.parametrize(("content", "said"), CONTENTS, ids=[said for _, said in CONTENTS])
@pytest.mark.parametrize(
    "name", ["model.gguf", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_is_named_as_what_it_is(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(HastenError) as error:
        open_model(folder / name if name.endswith(".gguf") else folder).tokenizer()
    assert name in error.value.message and said in error.value.message and error.value.hint


def test_gguf_and_safetensors_under_each_other_s_names(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path / "a.gguf")
    with pytest.raises(HastenError, match="but a safetensors file"):
        open_model(tmp_path / "a.gguf")
    (folder / "model.safetensors").write_bytes(smallest_model().build())
    with pytest.raises(HastenError, match="but a GGUF file"):
        open_model(folder)


@pytest.mark.parametrize("name", ["M.GGUF", "model", "m\u00f6del n\u00e4me.gguf"])
def test_a_gguf_file_of_any_name_is_found_again(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(smallest_model().build())
    assert ref_of(open_model(tmp_path / name)) == str(tmp_path / name)
    if name.lower().endswith(".gguf"):
        assert open_model(tmp_path).name == Path(name).stem


def with_metadata(key: str, value: bytes) -> bytes:
    model = smallest_model()
    model.metadata = [(known, old) for known, old in model.metadata if known != key] + [(key, value)]
    return model.build()


NESTED = struct.pack("<IIQ", ARRAY, ARRAY, 2) + array(I32, [1, 2])[4:] + array(STRING, ["a"])[4:]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.description", scalar(STRING, b"caf\xe9")),
        ("general.tags", array(STRING, [b"\xff", "b"])),
        ("tool.table", NESTED),
        ("general.type", scalar(STRING, "Model")),
        ("qwen2.expert_count", array(U32, [0, 0])),
        ("qwen2.context_length", scalar(F32, 8.0)),
    ],
)
def test_metadata_that_changes_nothing_is_in_nobody_s_way(tmp_path: Path, key: str, value: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(smallest_model().build())
    (tmp_path / "b.gguf").write_bytes(with_metadata(key, value))
    assert open_model(tmp_path / "b.gguf").content == open_model(tmp_path / "a.gguf").content


def test_nested_arrays_are_read_and_bounded() -> None:
    assert GgufFile.parse(memoryview(with_metadata("a", NESTED)), "x").metadata["a"][1] == ["a"]
    deep = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 20 + array(I32, [1])[4:]
    with pytest.raises(HastenError, match="nests arrays deeper than 8"):
        GgufFile.parse(memoryview(with_metadata("a", deep)), "x")
    wide = struct.pack("<IIQ", ARRAY, ARRAY, 1 << 18) + array(I32, [])[4:] * (1 << 18)
    with pytest.raises(HastenError, match="more than 131,072"):
        GgufFile.parse(memoryview(with_metadata("a", wide)), "x")


VALUES = [
    *(array(kind, values) for kind in (U32, F32) for values in ([], [1], [1, 2])),
    *(array(STRING, ["a", "b"]), scalar(STRING, "x"), scalar(U32, 7), scalar(F32, float("nan"))),
    *(scalar(STRING, b"\xff"), NESTED),
]
KEYS = [
    *(key for key, _ in smallest_model().metadata),
    *(f"tokenizer.ggml.{name}" for name in ("pre", "merges", "scores", "add_bos_token", "eot_token_id")),
    *(f"qwen2.{name}" for name in ("expert_count", "logit_scale", "rope.scaling.type", "rope.freq_base")),
    *("general.type", "general.alignment", "split.count", "tokenizer.chat_template", "general.sampling.temp"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_with_a_value_of_another_type_is_understood_or_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.gguf"
    for value in VALUES:
        path.write_bytes(with_metadata(key, value))
        try:
            source = open_model(path)
            source.tokenizer().encode("ab")
        except HastenError as error:
            assert error.message
        else:
            assert all(np.isfinite(tensor.rows) for tensor in source.tensors.values())


SCALES = ("k_scale", "v_scale", "attn.k_scale", "k_proj.output_scale", "q_scale")


def test_scales_of_keys_and_values_in_fp8_are_left_out(folder: Path) -> None:
    """llm-compressor, AutoFP8 and Quark write them; the cache here has other types."""
    more = {f"model.layers.0.self_attn.{name}": torch.tensor(0.5) for name in SCALES}
    assert set(more) <= set(open_model(renamed(folder, str, **more)).unused)


def changed(folder: Path, name: str = "config.json", **values: Any) -> Path:
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: one for key, one in {**known, **values}.items() if one is not ...}))
    return folder


def test_a_config_without_a_type_is_known_by_its_class(folder: Path) -> None:
    before = open_model(folder).config
    assert open_model(changed(folder, model_type=...)).config == before
    with pytest.raises(ModelError, match="model_type is missing"):
        open_model(changed(folder, architectures=...))


def test_numbers_may_be_written_as_text(folder: Path) -> None:
    """YAML reads 1e-05 as a text, and so do configurations that went through it."""
    before = open_model(folder).config
    values = json.loads((folder / "config.json").read_text())
    eps, layers = f"{values['rms_norm_eps']:.0e}", str(values["num_hidden_layers"])
    assert open_model(changed(folder, rms_norm_eps=eps, num_hidden_layers=layers)).config == before
    with pytest.raises(ModelError, match="rms_norm_eps must be a number"):
        open_model(changed(folder, rms_norm_eps="small"))
    changed(folder, rms_norm_eps=eps)
    changed(folder, "generation_config.json", eos_token_id=[None, "5", 6])
    assert {5, 6} <= set(open_model(folder).config.eos_token_ids)


def test_a_decoder_without_its_head_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="'head' is missing") as caught:
        open_model(folder)
    assert "tie_word_embeddings" in (caught.value.hint or "")


def test_a_download_that_was_not_finished_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete")
    with pytest.raises(ModelError, match=r"not finished: model\.safetensors\.incomplete"):
        open_model(folder)
    (folder / "model.safetensors").symlink_to("../../blobs/0")
    with pytest.raises(ModelError, match=r"is a link to \.\./\.\./blobs/0, which is not there"):
        open_model(folder)


def test_a_vocabulary_of_tiktoken_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(HastenError, match="a vocabulary of tiktoken"):
        open_model(folder).tokenizer()


def test_a_byte_order_mark_is_no_part_of_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes("\ufeff{{ messages[0].content }}".encode())
    assert open_model(folder).tokenizer().apply_chat([{"role": "user", "content": "a"}]) == "a"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "Qwen/Qwen3-0.6B"),
        ("huggingface.co/Qwen/Qwen3-0.6B/", "Qwen/Qwen3-0.6B"),
        ("https://hf.co/o/n/blob/main/a/x-Q8_0.gguf?download=true", "o/n/a/x-Q8_0.gguf"),
        ("https://huggingface.co/o/n/resolve/main/x.gguf", "o/n/x.gguf"),
        ("hf.co/o/n-GGUF:Q4_K_M", "o/n-GGUF:Q4_K_M"),
        ("hf://o/n", "o/n"),
        ("Qwen/Qwen3-0.6B/", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B"),
        ("file:///a/b%20c", "/a/b c"),
        ("o/n:Q4_K_M", "o/n:Q4_K_M"),
        ("gpt2", "gpt2"),
        ("./a/b", "./a/b"),
    ],
)
def test_what_people_paste_is_understood(given: str, meant: str) -> None:
    assert plain_ref(given) == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://example.com/m.gguf", "is an address"),
        ("ollama://qwen3", "is an address"),
        ("s3://bucket/m", "is an address"),
        ("qwen3:0.6b", "Ollama"),
        ("o/n@v1.0", "the revision 'v1.0'"),
        ("https://huggingface.co/o/n/tree/fp16", "the revision 'fp16'"),
    ],
)
def test_what_cannot_be_opened_by_name_is_said(given: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        open_model(given)


def test_an_address_of_a_file_opens_it(folder: Path) -> None:
    assert open_model(f"file://{folder}").content == open_model(folder).content
