"""Fixtures that every test may use: tiny models, made once a session and kept in its temporary folder."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # whose clients and servers tests use too
os.environ.setdefault("HASTEN_CACHE_PACKED", "0")  # nothing of the tests' models goes into the user's cache
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads: the tests themselves run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_THP_DISABLE = 41  # of prctl(2)
if sys.platform == "linux":
    # The engine asks for huge pages for what it computes in. Tests open a thousand models of some kilobytes:
    # to zero 2 MB for each of their buffers took most of the time. Processes started here inherit it.
    ctypes.CDLL(None).prctl(_THP_DISABLE, 1, 0, 0, 0)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """name -> the tiny model in transformers, float32. Not to be changed by a test."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        from tiny_models import TINY

        if name not in models:
            models[name] = TINY[name].model()
        return models[name]

    return get


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(name, dtype="bfloat16", shards=False, old_config=False) -> the tiny model as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("folders")

    def get(name: str, dtype: str = "bfloat16", shards: bool = False, old_config: bool = False) -> Path:
        from tiny_models import TINY, save_folder, write_old_config

        folder = root / f"{name}-{dtype}{'-sharded' * shards}{'-old' * old_config}"
        if not folder.exists():
            save_folder(TINY[name], folder, dtype, shards)
            if old_config:
                write_old_config(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """(name, dtype="BF16") -> (the tiny model as a GGUF file, the transformers model of its values)."""
    root = tmp_path_factory.mktemp("gguf")
    made: dict[tuple[str, str], tuple[Path, Any]] = {}

    def get(name: str, dtype: str = "BF16") -> tuple[Path, Any]:
        from tiny_gguf import write_gguf
        from tiny_models import TINY

        if (name, dtype) not in made:
            path = root / f"{name}-{dtype}.gguf"
            made[name, dtype] = path, write_gguf(TINY[name], path, dtype)
        return made[name, dtype]

    return get


@pytest.fixture
def quantised(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """(packing, name="llama-wide") -> (the tiny model as such a folder, its matrices by module name)."""

    def make(packing: Any, name: str = "llama-wide") -> tuple[Path, Any]:
        from quantized_folders import quantised_folder

        into = tmp_path / str(packing)
        return into, quantised_folder(tiny_folder(name, dtype="float32"), into, packing)

    return make
