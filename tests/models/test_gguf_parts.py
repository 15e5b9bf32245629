"""Models in several GGUF files, and GGUF files that hold something else than a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gguf_bytes import I32, STRING, U16, U32, Gguf, array, floats, scalar, smallest_model
from hasten.errors import FormatError, ModelError
from hasten.models.gguf import part_names
from hasten.models.open import open_model
from hasten.models.source import file_name_of, locate


def write_parts(folder: Path, count: int = 3, tensors: int | None = None) -> list[Path]:
    """The smallest model in parts, as gguf-split writes them: later ones hold the split keys alone."""
    model = smallest_model()
    paths = []
    for number in range(count):
        own = model.tensors[number::count]
        split = [
            ("split.no", scalar(U16, number)),
            ("split.count", scalar(U16, count)),
            ("split.tensors.count", scalar(I32, len(model.tensors) if tensors is None else tensors)),
        ]
        path = folder / f"tiny-{number + 1:05d}-of-{count:05d}.gguf"
        path.write_bytes(Gguf(([] if number else model.metadata) + split, own).build())
        paths.append(path)
    return paths


def test_a_split_model_opens_by_any_part_and_by_its_folder(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "w.gguf").write_bytes(smallest_model().build())
    wanted = open_model(whole / "w.gguf")
    for ref in (*paths, tmp_path):
        source = open_model(ref)
        assert source.name == "tiny" and source.config == wanted.config
        assert source.content == wanted.content
        assert [file.path for file in source.files] == paths
        assert locate(ref).files() == tuple(paths)
    assert file_name_of(paths[1]) == "tiny"


def test_names_of_parts() -> None:
    assert part_names("a-00002-of-00003.gguf") == tuple(f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    for name in ("a.gguf", "a-00001-of-00001.gguf", "a-1-of-2.gguf", "a-00001-of-99999.gguf"):
        assert part_names(name) == ()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[2].unlink()
    with pytest.raises(ModelError, match=r"part 2 of 3 .* missing: tiny-00003-of-00003\.gguf") as caught:
        open_model(paths[1])
    assert "hasten pull" in (caught.value.hint or "")


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(FormatError, match="says that it is part 1"):
        open_model(paths[0])
    paths = write_parts(tmp_path, tensors=99)
    with pytest.raises(FormatError, match="its parts have 99 tensors, they have 14"):
        open_model(paths[0])
    renamed = paths[0].with_name("first.gguf")
    paths[0].rename(renamed)
    with pytest.raises(ModelError, match="part 1 of 3 of a model, and its name does not say so"):
        open_model(renamed)


def test_pieces_cut_by_bytes_are_said_to_be_such(tmp_path: Path) -> None:
    raw = smallest_model().build()
    (tmp_path / "m.gguf-split-a").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FormatError, match="one piece of a file that was cut by bytes") as caught:
        open_model(tmp_path / "m.gguf-split-a")
    assert "cat PIECE1" in (caught.value.hint or "")


def test_a_projector_beside_a_model_does_not_count(tmp_path: Path) -> None:
    write_parts(tmp_path)
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    assert open_model(tmp_path).name == "tiny"


def test_a_config_beside_a_gguf_file_is_no_folder_of_safetensors(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(smallest_model().build())
    (tmp_path / "config.json").write_text("{}")
    assert open_model(tmp_path).name == "m"


OTHERS = {
    "vocabulary": ([("tokenizer.ggml.tokens", array(STRING, ["a"]))], "a vocabulary alone"),
    "adapter": ([("general.type", scalar(STRING, "adapter"))], "a LoRA adapter"),
    "projector": ([("general.architecture", scalar(STRING, "clip"))], "the projector"),
    "mmproj": ([("general.type", scalar(STRING, "mmproj"))], "the projector"),
    "imatrix": ([("imatrix.chunk_count", scalar(U32, 1))], "an importance matrix"),
    "control vector": ([("general.architecture", scalar(STRING, "controlvector"))], "a control vector"),
    "another type": ([("general.type", scalar(STRING, "dataset"))], "of the type 'dataset'"),
    "nothing": ([], "of no architecture"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_language_model_is_said_as_what_it_is(name: str, tmp_path: Path) -> None:
    metadata, said = OTHERS[name]
    tensors = [] if name == "vocabulary" else [floats("blk.0.attn_q.weight", 2, 4)]
    path = tmp_path / "x.gguf"
    path.write_bytes(Gguf(metadata, tensors).build())
    with pytest.raises(ModelError, match=f"is no language model, it is {said}") as caught:
        open_model(path)
    assert caught.value.hint
