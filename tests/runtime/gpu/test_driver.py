"""Build keys, errors of machines that cannot run the kernels, and sources that compile where nvcc is."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from hasten.errors import MachineError
from hasten.runtime.gpu import driver
from hasten.runtime.gpu.driver import Device, cubin_key, refuse_old_driver, with_defines
from hasten.runtime.gpu.shape import PRODUCTS, Shape, Tuning, WeightFormat, kernel_source
from specs import spec

NVCC = [
    "nvcc",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-cubin",
    "-std=c++17",
    "--use_fast_math",
    "-Xptxas=-v",
]
H200 = Device("NVIDIA H200", (9, 0), 132, 232448)


def test_a_key_changes_with_everything_that_decides_the_program() -> None:
    keys = {
        cubin_key(with_defines("source", {"A": 1}), "sm_90a", (13, 0)),
        cubin_key(with_defines("source", {"A": 2}), "sm_90a", (13, 0)),
        cubin_key(with_defines("other", {"A": 1}), "sm_90a", (13, 0)),
        cubin_key(with_defines("source", {"A": 1}), "sm_100a", (13, 0)),
        cubin_key(with_defines("source", {"A": 1}), "sm_90a", (13, 1)),
    }
    assert len(keys) == 5


def test_the_order_of_defines_does_not_matter() -> None:
    assert with_defines("x", {"A": 1, "B": 2}) == with_defines("x", {"B": 2, "A": 1})


def test_architecture_names() -> None:
    assert H200.architecture == "sm_90a"
    assert dataclasses.replace(H200, capability=(8, 9)).architecture == "sm_89"


def test_an_old_driver_is_refused() -> None:
    refuse_old_driver(13000, (13, 2))
    refuse_old_driver(13020, (12, 8))
    with pytest.raises(MachineError, match=r"12\.4.*13\.0") as caught:
        refuse_old_driver(12040, (13, 0))
    assert "driver" in (caught.value.hint or "")


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="no usable GPU"):
        driver.current_device()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Counts compilations; nothing is compiled."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    done: list[str] = []

    def compile_(text: str, architecture: str) -> bytes:
        done.append(text)
        return b"\x7fELF" + text.encode() + architecture.encode()

    monkeypatch.setattr(driver, "_compile", compile_)
    monkeypatch.setattr(driver, "compiler_version", lambda: (13, 0))
    return done


def test_a_program_is_compiled_once(compiled: list[str], tmp_path: Path) -> None:
    first = driver.built("text", "sm_90a")
    assert driver.built("text", "sm_90a") == first
    assert compiled == ["text"]
    assert [p.suffix for p in (tmp_path / "cubins").iterdir()] == [".cubin"]


def test_a_torn_program_is_compiled_again(compiled: list[str], tmp_path: Path) -> None:
    first = driver.built("text", "sm_90a")
    next((tmp_path / "cubins").iterdir()).write_bytes(b"torn")
    assert driver.built("text", "sm_90a") == first
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_costs_no_answer(compiled: list[str], tmp_path: Path) -> None:
    (tmp_path / "cubins").write_text("a file where the folder should be")
    assert driver.built("text", "sm_90a").startswith(b"\x7fELF")
    assert len(compiled) == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["bf16", "int4"])
def test_the_kernel_compiles_without_spills(fmt: str, tmp_path: Path) -> None:
    config = spec("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 40960, qk_norm="head")
    weights = WeightFormat("int4", 128) if fmt == "int4" else WeightFormat()
    shape = Shape(config, dict.fromkeys(PRODUCTS, weights), tuning=Tuning())
    source = tmp_path / "decode.cu"
    source.write_text(with_defines(kernel_source(), shape.defines() | {"SLOTS": shape.slots(H200)}))
    done = subprocess.run(
        [*NVCC, "-o", str(tmp_path / "decode.cubin"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:2000]
    spilled = int(done.stderr.split(" bytes spill stores")[0].split()[-1])
    assert spilled <= 16, done.stderr  # bytes a thread: a trap anywhere in the kernel makes it hundreds
