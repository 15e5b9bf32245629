"""Artifacts: the same bits back, and an error in words for everything else."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, field, make_dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import hasten
from hasten import _native
from hasten.core import ModelSpec, Recipe, as_json
from hasten.errors import ArtifactError, DiskError, HastenError, UsageError
from hasten.models.artifact import load_artifact, save
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.runtime.sampling import SamplingOptions
from hasten.weights import artifact
from hasten.weights import plan as artifact_plan
from hasten.weights.artifact import is_artifact
from hasten.weights.packed import PackedModel, pack_model
from hasten.weights.plan import FILES, PLAN_VERSION, config_from, config_json, format_digest, noun_from, seal
from specs import spec

PLAIN = spec("llama", 32, 64, 96, 2, 4, 2, 16, 128)
TEXT = [int(t) for t in np.random.default_rng(2).integers(0, 262, 30)]


@pytest.fixture(scope="module")
def source(tiny_folder: Callable[..., Path]) -> Source:
    return open_model(tiny_folder("gemma3"))


@pytest.fixture(scope="module")
def packed(source: Source) -> PackedModel:
    return pack_model(source, Recipe.parse("w4-head8-kv8"), 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source: Source, packed: PackedModel) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny.hasten"
    return save(folder, packed, source, {"because": ["it is small"]}, {"report.html": b"<html>"})


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy.hasten"))


def refused(folder: Path, *words: str) -> ArtifactError:
    """Loading must fail by an ArtifactError with a hint that holds these words."""
    with pytest.raises(ArtifactError) as caught:
        hasten.load(folder, threads=1)
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert caught.value.hint and "hasten" in caught.value.hint
    return caught.value


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change plan.json and its own checksum with it: someone lies on purpose."""
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        plan["artifact"]["sha256"] = seal(plan)
    (folder / "plan.json").write_text(json.dumps(plan))


def reseal(folder: Path, name: str) -> None:
    """Put the right size and checksums of a changed file into the plan: someone lies on purpose."""
    data = np.fromfile(folder / name, np.uint8)
    sums = [f"{v:016x}" for v in _native.checksums(data, 1 << 22, 1)]
    rewrite(folder, lambda p: p["artifact"]["files"][name].update(bytes=data.size, xxh64=sums))


@pytest.mark.parametrize(
    "name, recipe",
    [("gemma3", "w4-head8-kv8"), ("qwen3", "bf16"), ("llama-odd", "source"), ("phi3", "w6")],
)
def test_round_trip(tiny_folder: Callable[..., Path], tmp_path: Path, name: str, recipe: str) -> None:
    source = open_model(tiny_folder(name))
    packed = pack_model(source, Recipe.parse(recipe), 1)
    folder = save(tmp_path / "m.hasten", packed, source, {})
    back = load_artifact(folder)
    assert asdict(back.packed.config) == asdict(packed.config)
    assert back.name == source.name
    assert back.packed.linears.keys() == packed.linears.keys()
    for key, linear in packed.linears.items():
        assert replace(back.packed.linears[key], data=linear.data, relative_error=None) == replace(
            linear, relative_error=None
        )
        np.testing.assert_array_equal(back.packed.linears[key].data, linear.data)
        assert back.packed.linears[key].data.ctypes.data % 64 == 0
    assert back.packed.vectors.keys() == packed.vectors.keys()
    for key, values in packed.vectors.items():
        np.testing.assert_array_equal(back.packed.vectors[key], values)
    assert back.packed.recipe.kv == packed.recipe.kv and back.packed.recipe.name == recipe
    assert back.packed.bits_per_weight == packed.bits_per_weight


def test_the_same_tokens(made: Path, tiny_folder: Callable[..., Path]) -> None:
    direct = hasten.load(tiny_folder("gemma3"), "w4-head8-kv8", threads=1)
    again = hasten.load(made, threads=1)
    np.testing.assert_array_equal(again.logits(TEXT), direct.logits(TEXT))
    options = SamplingOptions(ignore_eos=True)
    assert list(again.stream(TEXT, 20, options)) == list(direct.stream(TEXT, 20, options))
    text = "hello, 你好 <|end|>"
    assert again.tokenizer.encode(text) == direct.tokenizer.encode(text)
    assert again.tokenizer.encode_chat([{"role": "user", "content": text}]) == direct.tokenizer.encode_chat(
        [{"role": "user", "content": text}]
    )
    assert again.recipe.kv == "int8" and again.name == direct.name


def test_what_the_plan_says(made: Path, source: Source, packed: PackedModel) -> None:
    plan = json.loads((made / "plan.json").read_text())
    assert plan["because"] == ["it is small"] and plan["schema_version"] == PLAN_VERSION
    assert plan["source"]["ref"] == str(source.files[0].path.parent)
    assert plan["source"]["files"][0]["sha256"] and plan["recipe"]["name"] == "w4-head8-kv8"
    assert plan["recipe"]["bits_per_weight"] == packed.bits_per_weight
    assert "report.html" not in plan["artifact"]["files"]  # may be drawn again without breaking the artifact
    assert sorted(p.name for p in made.iterdir()) == [
        "config.json",
        "plan.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.safetensors",
    ]


def test_other_programs_can_read_the_weights(made: Path, packed: PackedModel) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(made / "weights.safetensors")
    linear = packed.linears["layers.0.down"]
    np.testing.assert_array_equal(tensors["layers.0.down"][: linear.data.size], linear.data)


def test_a_recipe_beside_an_artifact(made: Path) -> None:
    assert hasten.load(made, "w4-head8-kv8", threads=1).recipe.kv == "int8"
    with pytest.raises(UsageError, match="cannot become another"):
        hasten.load(made, "w8", threads=1)


def test_which_references_are_artifacts(made: Path, tmp_path: Path) -> None:
    assert is_artifact(made) and is_artifact("nowhere.hasten")
    assert is_artifact(made.rename(made.with_suffix(".moved")))
    made.with_suffix(".moved").rename(made)
    assert not is_artifact(tmp_path) and not is_artifact("demo")


@pytest.mark.parametrize("key", ["schema_version", "layout_version"])
@pytest.mark.parametrize("value", [0, 4, None, "1", True, 1.0, [1]])
def test_another_version(copy: Path, key: str, value: object) -> None:
    def change(plan: dict[str, Any]) -> None:
        (plan if key == "schema_version" else plan["artifact"])[key] = value

    rewrite(copy, change)
    said = refused(copy, key, str(value)).hint
    assert said is not None and ("update Hasten" in said) == (value == 4)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_flipped_bit(copy: Path, name: str, where: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(where * len(data))] ^= 0x10
    (copy / name).write_bytes(data)
    refused(copy, name, "damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_gone(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    for size in (len(data) - 1, 9, 0):
        (copy / name).write_bytes(data[:size])
        refused(copy, name, "bytes")
    (copy / name).write_bytes(data + b" ")
    refused(copy, name, "bytes")
    (copy / name).unlink()
    refused(copy, name)
    (copy / name).mkdir()
    refused(copy, name)


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"null", b"7", b'"x"', b"NaN", b"\xff\xfe", b"[" * 100_000),
        *(b"{}", b'{"artifact": {}}', b'{"artifact": {"files": []}}'),
        b'{"artifact": {"files": {}}, "schema_version": 1}',
    ],
    ids=lambda text: text[:20].decode(errors="replace"),
)
def test_a_plan_that_is_garbage(copy: Path, text: bytes) -> None:
    (copy / "plan.json").write_bytes(text)
    refused(copy)


W4 = {"bits": 4, "group": 32, "symmetric": True}  # as the first two versions wrote it
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda p: p["artifact"].update(files={}),
    "no configuration": lambda p: p["artifact"]["files"].pop("config.json"),
    "no tokenizer": lambda p: p["artifact"]["files"].pop("tokenizer.json"),
    "no tokens": lambda p: p["artifact"]["files"].pop("tokenizer_config.json"),
    "the plan itself": lambda p: p["artifact"]["files"].update({"plan.json": {"bytes": 0, "xxh64": []}}),
    "checksums too few": lambda p: p["artifact"]["files"]["config.json"].update(xxh64=[]),
    "numbers as checksums": lambda p: p["artifact"]["files"]["config.json"].update(xxh64=[7]),
    "words as checksums": lambda p: p["artifact"]["files"]["config.json"].update(xxh64=["x" * 16]),
    "a size of another kind": lambda p: p["artifact"]["files"]["config.json"].update(bytes="7"),
    "a negative size": lambda p: p["artifact"]["files"]["config.json"].update(bytes=-1, xxh64=[]),
    "more in a file": lambda p: p["artifact"]["files"]["config.json"].update(more=1),
    "pieces of another kind": lambda p: p["artifact"].update(piece_bytes=None),
    "other pieces": lambda p: p["artifact"].update(piece_bytes=7),
    "tensors of another kind": lambda p: p["artifact"].update(tensors=[]),
    "no tensors": lambda p: p["artifact"].pop("tensors"),
    "a checksum of another kind": lambda p: p["artifact"]["tensors"].update({"layers.0.q": 3}),
    "no word as a checksum": lambda p: p["artifact"]["tensors"].update({"layers.0.q": "xyz"}),
    "more in the description": lambda p: p["artifact"].update(dtype="fp8"),
    "a recipe of another kind": lambda p: p.update(recipe="w4"),
    "more in the recipe": lambda p: p["recipe"].update(activations="int8"),
    "a name of another kind": lambda p: p["recipe"].update(name=["w4"]),
    "a layer of another kind": lambda p: p["recipe"]["layers"].update({"layers.0.q": 4}),
    "a format of another kind": lambda p: p["recipe"].update(formats=["w4", "w8"]),
    "a version of another kind": lambda p: p["recipe"]["formats"].update(w4="1"),
    "a format that is not listed": lambda p: p["recipe"]["formats"].pop("w4"),
    "bits of another kind": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "bits": "4"}}),
    "a zero point of another kind": lambda p: p["recipe"]["layers"].update(
        {"layers.0.q": {**W4, "symmetric": 1}}
    ),
    "no weights": lambda p: p["artifact"]["files"].pop("weights.safetensors"),
    "a record of another kind": lambda p: p["artifact"]["files"].update({"config.json": 7}),
    "no checksums": lambda p: p["artifact"]["files"]["config.json"].pop("xxh64"),
    "checksums of another kind": lambda p: p["artifact"]["files"]["config.json"].update(xxh64=5),
    "no size": lambda p: p["artifact"]["files"]["config.json"].pop("bytes"),
    "a file elsewhere": lambda p: p["artifact"]["files"].update({"../../x": {"bytes": 0, "xxh64": []}}),
    "no recipe": lambda p: p.pop("recipe"),
    "no layers": lambda p: p["recipe"].pop("layers"),
    "layers of another kind": lambda p: p["recipe"].update(layers=[1]),
    "a layer too few": lambda p: p["recipe"]["layers"].pop("layers.0.q"),
    "an unknown layer": lambda p: p["recipe"]["layers"].update({"layers.99.q": "w4"}),
    "a norm as a layer": lambda p: p["recipe"]["layers"].update({"final_norm": "w4"}),
    "another format": lambda p: p["recipe"]["layers"].update({"layers.0.q": "w8"}),
    "other bits": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "bits": 8}}),
    "bits that do not exist": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "bits": 3}}),
    "a group that does not exist": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "group": 0}}),
    "another group": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "group": 64}}),
    "another zero point": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "symmetric": False}}),
    "a layout with more in it": lambda p: p["recipe"]["layers"].update({"layers.0.q": {**W4, "more": 1}}),
    "another cache": lambda p: p["recipe"].update(kv="int3"),
    "a cache of another kind": lambda p: p["recipe"].update(kv=["bf16"]),
    "no cache": lambda p: p["recipe"].pop("kv"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_plan_that_lies(copy: Path, lie: str) -> None:
    rewrite(copy, LIES[lie])
    refused(copy)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r["formats"].update(w3=1), ["w3"]),
        (lambda r: r["layers"].update({"layers.0.q": "nf4"}), ["layers.0.q", "nf4"]),
        (lambda r: r["formats"].update(w4=2), ["w4 has version 2", "reads 1"]),
    ],
)
def test_a_format_of_another_program_is_refused_by_its_name(
    copy: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    rewrite(copy, lambda plan: change(plan["recipe"]))
    assert "update Hasten" in str(refused(copy, *words).hint)


def test_a_flipped_bit_in_what_runs(copy: Path) -> None:
    """A changed value that makes sense is found too: the description has a checksum of its own."""
    text = (copy / "plan.json").read_text()
    assert '"kv": "int8"' in text
    (copy / "plan.json").write_text(text.replace('"kv": "int8"', '"kv": "bf16"'))
    refused(copy, "plan.json", "checksum")


def test_a_field_of_another_version_is_refused_by_its_name(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "sinks": True, "experts": None}))
    reseal(copy, "config.json")
    error = refused(copy, "sinks")
    assert "experts" not in error.message and error.hint is not None and "update Hasten" in error.hint
    (copy / "config.json").write_text(json.dumps({**config, "sinks": None}))  # not used: harmless
    reseal(copy, "config.json")
    hasten.load(copy, threads=1)


def test_a_config_holds_what_is_not_as_by_default(packed: PackedModel) -> None:
    """A field that is added later is missing in what was written before, and has its default."""
    written = config_json(packed.config)
    block = written["blocks"][5]
    assert "embedding" in written and "softcap" not in block["mixer"] and "front_end" not in written
    assert block["mixer"]["rotary"]["scaling"] == {"kind": "linear", "factor": 8.0}
    assert config_from(json.dumps(written).encode(), "x") == packed.config
    for needed in ("architecture", "blocks"):
        less = {key: value for key, value in written.items() if key != needed}
        with pytest.raises(ArtifactError, match=f"{needed} is missing"):
            config_from(json.dumps(less).encode(), "x")


def test_caches_know_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    before = format_digest()
    grown = make_dataclass(
        "ModelSpec", [("sinks", bool, field(default=False))], bases=(ModelSpec,), frozen=True
    )
    monkeypatch.setattr(artifact_plan, "ModelSpec", grown)
    assert format_digest() != before and noun_from(grown, config_json(PLAIN), "").sinks is False


def old_files(version: int) -> dict[str, Any]:
    """plan.json and config.json as an old version wrote them of the same tiny model."""
    text = Path(__file__).with_name(f"artifact_version_{version}.json").read_text()
    return dict(json.loads(text))


def aged(folder: Path, version: int = 1, tensors: bool = True) -> None:
    """Make an artifact what an old version would have written."""
    old, now = old_files(version), json.loads((folder / "plan.json").read_text())
    assert version == 1 or old["plan"]["artifact"]["sha256"] == artifact_plan.seal(old["plan"])
    (folder / "config.json").write_text(json.dumps(old["config"], indent=2, ensure_ascii=False) + "\n")
    files = {name: artifact._fingerprint(folder / name, 1) for name in FILES}
    assert old["plan"]["artifact"]["files"].keys() == files.keys()
    assert files["config.json"] == old["plan"]["artifact"]["files"]["config.json"]
    old["plan"]["artifact"].update(files=files, tensors=now["artifact"]["tensors"])
    if not tensors:
        del old["plan"]["artifact"]["tensors"]
    if version > 1:
        old["plan"]["artifact"]["sha256"] = artifact_plan.seal(old["plan"])
    (folder / "plan.json").write_text(json.dumps(old["plan"]))


@pytest.mark.parametrize("version, tensors", [(1, True), (1, False), (2, True)])
def test_an_artifact_of_an_old_version_opens(made: Path, copy: Path, version: int, tensors: bool) -> None:
    aged(copy, version, tensors)
    old, new = hasten.load(copy, threads=1), hasten.load(made, threads=1)
    assert old.config == new.config and old.recipe.kv == "int8"
    np.testing.assert_array_equal(old.logits(TEXT), new.logits(TEXT))


@pytest.mark.parametrize("name", FILES)
def test_a_file_struck_from_the_list_of_an_old_one(copy: Path, name: str) -> None:
    aged(copy)
    plan = json.loads((copy / "plan.json").read_text())
    del plan["artifact"]["files"][name]
    (copy / "plan.json").write_text(json.dumps(plan))
    refused(copy, name)


@pytest.mark.parametrize("name", ["plan.json", *FILES])
def test_a_pipe_in_place_of_a_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    refused(copy, name, "named pipe")


def test_a_plan_may_lack_what_is_only_told(copy: Path) -> None:
    rewrite(copy, lambda p: p.update(source=7))
    assert hasten.load(copy, threads=1).name == "copy"


CONFIG_LIES: list[tuple[str, Any]] = [
    ("width", 32), ("vocab", -1), ("blocks", []), ("blocks", 7), ("head.tied", 1), ("experts", 8),
    ("eos_token_ids", 262), ("eos_token_ids", ["262"]), ("encoder", {"architecture": "whisper"}),
    ("blocks.0.mixer.kv_heads", 0), ("blocks.0.mixer.heads", 3), ("blocks.0.mixer.heads", 8),
    ("blocks.0.mixer.head_dim", 7), ("blocks.0.mixer.head_dim", 24.0), ("blocks.0.mixer.head_dim", True),
    ("blocks.0.mixer.rotary", 5), ("blocks.0.mixer.rotary", {}), ("blocks.0.mixer.window", [7]),
    ("blocks.0.mixer.window", 5), ("blocks.0.mixer.scale", "0.2"), ("blocks.0.mixer.scale", 10**400),
    ("blocks.0.mixer.sinks", True), ("blocks.0.mixer.mask", "full"), ("blocks.0.mixer.mask", "some"),
    ("blocks.0.norms.placement", "pre"), ("blocks.0.norms.eps", "1e-6"),
    ("blocks.0.feed_forward.activation", "relu"), ("blocks.0.feed_forward.activation", ["silu"]),
    ("blocks.0.feed_forward.kind", "plain"), ("blocks.0.feed_forward.experts", "8"),
    ("blocks.5.mixer.rotary.scaling", {"factor": float("inf")}),
    ("blocks.5.mixer.rotary.scaling", {"stretch": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), CONFIG_LIES, ids=str)
def test_a_config_that_lies(copy: Path, place: str, value: Any) -> None:
    config = json.loads((copy / "config.json").read_text())
    *way, last = place.split(".")
    inside = config
    for step in way:
        inside = inside[int(step)] if isinstance(inside, list) else inside[step]
    inside[last] = value
    (copy / "config.json").write_text(json.dumps(config))
    reseal(copy, "config.json")
    refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 6},
        {"num_layers": 0},
        {"sliding_layers": [True]},
        {"tied_head": 1},
        {"norm_eps": None},
        {"experts": 8},
    ],
    ids=str,
)
def test_a_config_of_the_first_version_that_lies(copy: Path, change: dict[str, Any]) -> None:
    aged(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    plan = json.loads((copy / "plan.json").read_text())
    plan["artifact"]["files"]["config.json"] = as_json(artifact._fingerprint(copy / "config.json", 1))
    (copy / "plan.json").write_text(json.dumps(plan))
    refused(copy)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"7", b"\xff", b"[" * 100_000])
def test_a_config_that_is_garbage(copy: Path, text: bytes) -> None:
    (copy / "config.json").write_bytes(text)
    reseal(copy, "config.json")
    refused(copy, "config.json")


@pytest.mark.parametrize("lie", ["length", "sizes", "offsets", "negative", "no metadata", "extra", "empty"])
def test_a_weights_header_that_lies(copy: Path, lie: str) -> None:
    path = copy / "weights.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    sizes = json.loads(header["__metadata__"]["sizes"])
    if lie == "sizes":
        sizes["layers.0.q"] -= 32
    elif lie == "offsets":
        header["layers.0.q"]["data_offsets"] = [len(data), 2 * len(data)]
    elif lie == "negative":
        header["layers.0.q"]["data_offsets"] = [-start, 64]
    elif lie == "extra":
        header["more"], sizes["more"] = header["final_norm"], 64
    header["__metadata__"]["sizes"] = json.dumps(sizes)
    if lie == "no metadata":
        del header["__metadata__"]
    text = json.dumps(header).encode()
    length = 2**63 if lie == "length" else len(text)
    path.write_bytes(b"" if lie == "empty" else length.to_bytes(8, "little") + text + data[start:])
    reseal(copy, "weights.safetensors")
    refused(copy)


def test_no_artifact(tmp_path: Path) -> None:
    refused(tmp_path / "none.hasten", "no artifact at")
    (tmp_path / "empty.hasten").mkdir()
    refused(tmp_path / "empty.hasten", "plan.json")
    (tmp_path / "file.hasten").write_bytes(b"x")
    refused(tmp_path / "file.hasten", "plan.json")
    with pytest.raises(HastenError) as caught:
        hasten.load(tmp_path / "nothing here")
    assert caught.value.hint


def test_another_artifact_is_replaced_whole(
    made: Path, copy: Path, source: Source, tiny_folder: Callable[..., Path]
) -> None:
    other = open_model(tiny_folder("qwen3"))
    save(copy, pack_model(other, Recipe.parse("bf16"), 1), other, {})
    assert hasten.load(copy, threads=1).config.architecture == "qwen3"
    assert not (copy / "report.html").exists()


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, source: Source, packed: PackedModel
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DiskError):
        save(tmp_path, packed, source, {})
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def untouched(folder: Path, before: dict[str, bytes]) -> None:
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    hasten.load(folder, threads=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir"])
def test_refused_writes_keep_the_old_one(
    monkeypatch: pytest.MonkeyPatch, copy: Path, source: Source, packed: PackedModel, code: int, call: str
) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}

    real = os.open

    def refuse(path: Any, flags: int = os.O_CREAT, *args: Any, **options: Any) -> int:
        if call == "open" and not flags & os.O_CREAT:  # reading stays possible, and so does cleaning up
            return real(path, flags, *args, **options)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(DiskError) as caught:
            save(copy, packed, source, {})
    assert caught.value.hint
    untouched(copy, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), MemoryError()])
@pytest.mark.parametrize("step", ["_weights_writer", "_fingerprint", "_recipe_json", "seal", "write"])
def test_interrupted_anywhere_keeps_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
    copy: Path,
    source: Source,
    packed: PackedModel,
    step: str,
    error: BaseException,
) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}

    def stop(*args: object) -> None:
        raise error

    def half(packed: PackedModel) -> Callable[[BinaryIO], None]:
        def write(file: BinaryIO) -> None:
            file.write(b"half")
            stop()

        return write

    with monkeypatch.context() as patch:
        patch.setattr(
            artifact, "_weights_writer" if step == "write" else step, half if step == "write" else stop
        )
        with pytest.raises(DiskError if isinstance(error, OSError) else type(error)):
            save(copy, packed, source, {})
    untouched(copy, before)


def test_a_really_small_disk(copy: Path, source: Source, packed: PackedModel) -> None:
    """The system itself refuses the bytes of the weights: a limit on file size stands in for a full disk."""
    import resource
    import signal

    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
        with pytest.raises(HastenError) as caught:
            save(copy, packed, source, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.hint
    untouched(copy, before)


def test_weights_stay_mapped(made: Path) -> None:
    """Processes that run one artifact share one copy, and a file put in its place changes none of them."""
    base: Any = load_artifact(made).packed.linears["layers.0.q"].data
    while isinstance(base, np.ndarray):
        assert not base.flags.writeable
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def test_the_format_has_the_same_digest_in_every_process() -> None:
    """It is part of the keys of caches: one that changed would make every start the first."""
    script = "from hasten.weights.plan import format_digest; print(format_digest())"
    command = [sys.executable, "-c", script]
    found = {subprocess.check_output(command, text=True).strip() for _ in range(2)}
    assert found == {format_digest()}
