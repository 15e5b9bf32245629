"""Build keys, errors of machines that cannot run the kernels, and sources that compile where nvcc is."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


class Driver:
    """libcuda as a test wants it."""

    def __init__(self, version: int = 13000, code: int = 0, count: int = 1) -> None:
        self.version, self.code, self.count = version, code, count

    def cuInit(self, _: int) -> int:
        return self.code

    def cuDeviceGetCount(self, found: Any) -> int:
        found._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, found: Any) -> int:
        found._obj.value = self.version
        return 0

    def cuGetErrorString(self, code: int, found: Any) -> int:
        found._obj.value = b"system not yet initialized"
        return 0


class Cuda:
    """torch.cuda as a test wants it."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, _: int) -> Any:
        major, minor = self.capability
        return SimpleNamespace(name="Some GPU", major=major, minor=minor, multi_processor_count=4)


def machine(monkeypatch: pytest.MonkeyPatch, found: Driver, cuda: Any, fault: str = "") -> None:
    """This driver and this torch, whose first call to the device fails with `fault`."""

    def zeros(*_: Any, **__: Any) -> None:
        if fault:
            raise RuntimeError(fault)

    torch = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=cuda, zeros=zeros)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(driver, "_driver", lambda: found)


def refusal() -> tuple[str, str]:
    with pytest.raises(MachineError, match="no usable GPU here") as refused:
        driver.current_device()
    assert refused.value.hint
    return refused.value.message, refused.value.hint


def test_a_machine_without_a_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver._driver.cache_clear()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no such file")))
    message, hint = refusal()
    assert "NVIDIA driver" in message and "--device cpu" in hint


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Driver(count=0), "sees none"),
        (Driver(code=100), "sees none"),
        (Driver(code=802), r"system not yet initialized \(CUDA error 802\)"),
        (Driver(version=12040), r"supports CUDA 12\.4, and the installed torch needs CUDA 13\.0"),
    ],
)
def test_a_driver_that_cannot_be_used_is_told(
    monkeypatch: pytest.MonkeyPatch, found: Driver, said: str
) -> None:
    machine(monkeypatch, found, Cuda())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    message, hint = refusal()
    assert re.search(said, message) and "--device cpu" in hint


def test_a_hidden_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, Driver(code=100), Cuda())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message, hint = refusal()
    assert "hides" in message and "unset CUDA_VISIBLE_DEVICES" in hint


def test_a_torch_without_cuda_and_a_gpu_that_fails_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, Driver(), Cuda(), "CUDA error: no kernel image is available\nCompile with ...")
    message, _ = refusal()
    assert message.endswith("no kernel image is available")
    sys.modules["torch"].version.cuda = None  # type: ignore[attr-defined]
    message, hint = refusal()
    assert "built without CUDA" in message and "pip install" in hint


def test_a_generation_that_the_kernels_do_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, Driver(), Cuda((7, 5)))
    message, hint = refusal()
    assert "Some GPU has compute capability 7.5" in message and "8.0" in message and "--device cpu" in hint
    machine(monkeypatch, Driver(), Cuda((8, 0)))
    assert driver.current_device().architecture == "sm_80"


class AcceleratorError(RuntimeError):
    """As torch calls it."""


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AcceleratorError("CUDA error: unspecified launch failure\nadvice"), "the GPU stopped working"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), "the GPU stopped working"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "the GPU stopped working"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "ran out of memory"),
    ],
)
def test_a_fault_of_the_device_is_told_with_a_hint(error: RuntimeError, said: str) -> None:
    found = driver.fault_of(error)
    assert found is not None and said in found.message and "advice" not in found.message and found.hint


def test_a_fault_of_ours_is_not_called_the_devices() -> None:
    assert driver.fault_of(RuntimeError("Expected all tensors on cuda:0")) is None


def loops(text: str) -> Iterator[str]:
    """The `do` and `while` loops of CUDA source, each with its condition."""
    for match in re.finditer(r"(?<!\} )\bwhile \(|\bdo \{", text):
        depth, end = 0, match.start()
        while depth or text[end] not in "{;":  # a block, or the end of a loop of one statement
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        while text[end] == "{" or depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield text[match.start() : text.index(";", end) if match.group() == "do {" else end]


def test_every_wait_of_the_persistent_kernel_is_bounded() -> None:
    """A wait for another block or a copy counts its tries: a fault ends in an error and not in a hang."""
    found = []
    for path in (Path(driver.__file__).parent / "kernels").glob("*.cu*"):
        waits = [loop for loop in loops(path.read_text()) if re.search(r"peek\(|ld\.relaxed|try_wait", loop)]
        found += [(path.name, "count_try(" in loop or "is_over(" in loop) for loop in waits]
    assert len(found) >= 5 and all(is_bounded for _, is_bounded in found), found


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
