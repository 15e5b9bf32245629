"""CUDA C++ from source to a launch, with nothing but the driver and NVRTC from torch's wheel.

No nvcc and no headers: the sources include nothing. A machine program (cubin) is kept on disk under a key of
everything that decides it, so that a kernel is compiled once a machine: 2 to 6 s the first time, ms later.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hasten.cache.reading import read_file
from hasten.cache.store import cache_dir, write_atomic
from hasten.errors import DeviceLost, DiskError, MachineError

P = ParamSpec("P")
T = TypeVar("T")
_OPTIONS = ("-std=c++17", "--use_fast_math")
_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
_MOST_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_REGISTERS, _LOCAL_BYTES = 4, 3  # CU_FUNC_ATTRIBUTE_NUM_REGS, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
_OUT_OF_MEMORY, _NO_DEVICE, _TOO_LARGE_LAUNCH = 2, 100, 720
_OLDEST = (8, 0)  # compute capability
_CHECK = "check nvidia-smi, or use --device cpu"
_OF_GPUS = re.compile(r"CUDA (driver )?error|Triton Error|CUBLAS_STATUS|cuDNN error|NCCL error")
"""In the text of a RuntimeError: a library's call failed on the device."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Device:
    """What a program is built for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # a block may ask for

    @property
    def architecture(self) -> str:
        """As NVRTC calls it; from 9.0 on with the instructions of exactly this generation."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def current_device() -> Device:
    """The GPU that torch computes on. The driver is asked first: without one, that costs no import of torch.

    Raises:
        MachineError: there is no GPU that answers, the driver is too old for the installed torch, torch is
            missing or cannot use GPUs, or the GPU is of a generation that the kernels do not know.
    """
    find_gpu()
    try:
        import torch
    except ImportError as error:
        raise MachineError(
            "running on a GPU needs torch, which is not installed", hint='pip install "hasten[gpu]"'
        ) from error
    if torch.version.cuda is None:
        raise _no_gpu(
            "the installed torch was built without CUDA",
            "install a torch with CUDA (pip install --force-reinstall torch), or use --device cpu",
        )
    refuse_old_driver(_driver_version(), _version_of(torch.version.cuda))
    if not torch.cuda.is_available():
        raise _no_gpu("the driver answers, and torch sees no GPU", _CHECK)
    try:
        torch.zeros(1, device="cuda")  # makes the context that the driver's calls below use
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
    except RuntimeError as wrong:
        raise _no_gpu(_first_line(wrong), _CHECK) from wrong
    return known_generation(
        Device(
            found.name,
            (found.major, found.minor),
            found.multi_processor_count,
            getattr(found, "shared_memory_per_block_optin", 227 * 1024),
        )
    )


def known_generation(device: Device) -> Device:
    """The device, where kernels for it can be built.

    Raises:
        MachineError: it is older than those that multiply in bf16.
    """
    if device.capability < _OLDEST:
        raise _no_gpu(
            f"{device.name} has compute capability {device.capability[0]}.{device.capability[1]}, "
            f"and the kernels need {_OLDEST[0]}.{_OLDEST[1]} (Ampere) or later",
            "use --device cpu",
        )
    return device


def find_gpu() -> None:
    """Ask the driver alone whether there is a GPU: milliseconds, and no torch.

    Raises:
        MachineError: there is no driver, or it has no GPU for this process.
    """
    driver, count = _driver(), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code not in (0, _NO_DEVICE):
        raise _no_gpu(f"the NVIDIA driver does not start: {_text_of_error(code)}", _CHECK)
    if code or not count.value:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            raise _no_gpu(
                f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides every GPU",
                "unset CUDA_VISIBLE_DEVICES, or use --device cpu",
            )
        raise _no_gpu("the NVIDIA driver sees none", _CHECK)


def _no_gpu(why: str, hint: str) -> MachineError:
    return MachineError(f"no usable GPU here: {why}", hint=hint)


def _first_line(error: BaseException) -> str:
    """What a library says of a fault, without its advice for programmers."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def telling(method: Callable[P, T]) -> Callable[P, T]:
    """The method of an executor, whose faults of the device become a MachineError with a hint."""

    @wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            fault = fault_of(error)
            if fault is None:
                raise
            if isinstance(fault, DeviceLost):
                never_freed((args, error))
            raise fault from error
        except DeviceLost as lost:
            never_freed((args, lost))
            raise

    return told


def never_freed(thing: object) -> None:
    """Keep something until the process is gone. torch ends the process where a pinned tensor is freed behind
    a lost GPU, and the executor, its step and the error's traceback hold some."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def fault_of(error: RuntimeError) -> MachineError | None:
    """What to tell a user of an error that torch or Triton raised in a step; None: it is none of a GPU's.

    A device that ran out of memory goes on. After any other fault CUDA refuses every call of this process.
    """
    said = _first_line(error)
    if type(error).__name__ == "OutOfMemoryError":
        return MachineError(
            f"the GPU ran out of memory in a step: {said}",
            hint="use a smaller --prefill-chunk, a smaller --gpu-memory, or close what else runs on the GPU",
        )
    if type(error).__name__ != "AcceleratorError" and not _OF_GPUS.search(said):
        return None
    return DeviceLost(
        f"the GPU stopped working: {said}",
        hint="look at nvidia-smi and the kernel's log (dmesg | grep Xid), then start this program again",
    )


def refuse_old_driver(driver: int, compiler: tuple[int, int]) -> None:
    """Say it where the driver cannot load what torch and NVRTC make: it loads its own major version's.

    Args:
        driver: as CUDA writes it, 13000 for 13.0.
        compiler: the version of CUDA that torch was built with.

    Raises:
        MachineError: the driver is too old.
    """
    if driver // 1000 < compiler[0]:
        raise MachineError(
            f"no usable GPU here: the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"and the installed torch needs CUDA {compiler[0]}.{compiler[1]}",
            hint=f"install a driver for CUDA {compiler[0]}, a torch for an older CUDA, or use --device cpu",
        )


def _version_of(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor.partition(".")[0] or 0)


def _driver_version() -> int:
    version = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    return version.value


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _no_gpu(
            "the NVIDIA driver (libcuda.so.1) is not installed",
            "use --device cpu, or install the NVIDIA driver",
        ) from error


@lru_cache(maxsize=1)
def _compiler() -> Any:
    for path in _compiler_paths():
        with contextlib.suppress(OSError):
            if path.is_absolute():
                for part in path.parent.glob("libnvrtc-builtins.so*"):  # found by name once it is loaded
                    ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
    raise MachineError(
        "NVRTC (libnvrtc.so), which comes with torch's CUDA wheels, is not there",
        hint='pip install "hasten[gpu]" with a CUDA build of torch',
    )


def _compiler_paths() -> Iterator[Path]:
    """Where torch's wheels put it, then wherever the system finds it."""
    with contextlib.suppress(ImportError):
        for base in import_module("nvidia").__path__:  # a namespace package of many wheels
            yield from sorted(Path(base).glob("**/libnvrtc.so*"), reverse=True)
    yield Path("libnvrtc.so")


def _check(code: int, what: str) -> None:
    if code == 0:
        return
    if code == _OUT_OF_MEMORY:
        raise MachineError(f"{what}: the GPU has too little free memory", hint="close what else runs on it")
    if code == _TOO_LARGE_LAUNCH:
        raise MachineError(
            f"{what}: its blocks do not fit this GPU at once", hint="another program may hold multiprocessors"
        )
    raise DeviceLost(
        f"the GPU stopped working ({what}): {_text_of_error(code)}",
        hint="run nvidia-smi to see the GPU's state, then start this program again",
    )


def _text_of_error(code: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} (CUDA error {code})"


def compiler_version() -> tuple[int, int]:
    """NVRTC's version: part of what decides a machine program."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def with_defines(source: str, defines: dict[str, int | str]) -> str:
    """The source with one #define a value in front; the order of `defines` does not matter."""
    return "".join(f"#define {name} {defines[name]}\n" for name in sorted(defines)) + source


def cubin_key(text: str, architecture: str, version: tuple[int, int]) -> str:
    """A name for the machine program: 40 hexadecimal digits of everything that decides it."""
    parts = (text, architecture, f"{version[0]}.{version[1]}", *_OPTIONS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def built(text: str, architecture: str) -> bytes:
    """The machine program of a source, from the cache or compiled now and kept.

    Raises:
        MachineError: NVRTC is missing or refuses the source.
    """
    path = cache_dir() / "cubins" / f"{cubin_key(text, architecture, compiler_version())}.cubin"
    with contextlib.suppress(OSError):
        kept = read_file(path)
        if kept[:4] == b"\x7fELF":
            return kept
    cubin = _compile(text, architecture)
    with contextlib.suppress(DiskError):  # a cache that cannot be written costs the next start some seconds
        write_atomic(path, cubin)
    return cubin


def _compile(text: str, architecture: str) -> bytes:
    compiler, program = _compiler(), ctypes.c_void_p()
    if compiler.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"decode.cu", 0, None, None):
        raise MachineError("NVRTC could not take the kernel's source")
    options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in _OPTIONS)]
    try:
        failed = compiler.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if failed:
            log = _text_of(compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog, program)
            first = log.decode(errors="replace").strip("\0 \n")[:2000]
            raise MachineError(f"the kernel does not compile for {architecture}: {first}")
        return _text_of(compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN, program)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _text_of(size_of: Any, copy: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    copy(program, buffer)
    return buffer.raw[: size.value]


class Module:
    """A machine program on the current device."""

    def __init__(self, cubin: bytes) -> None:
        self._cubin = ctypes.create_string_buffer(cubin, len(cubin))
        self._handle = ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._handle), self._cubin), "loading a kernel")

    def constants(self, name: str, count: int) -> list[int]:
        """A __constant__ array of 32-bit integers."""
        address, size = ctypes.c_void_p(), ctypes.c_size_t()
        driver, values = _driver(), (ctypes.c_int * count)()
        _check(
            driver.cuModuleGetGlobal_v2(
                ctypes.byref(address), ctypes.byref(size), self._handle, name.encode()
            ),
            name,
        )
        _check(driver.cuMemcpyDtoH_v2(values, address, 4 * count), name)
        return list(values)

    def set_constant(self, name: str, value: int) -> None:
        """Write a __constant__ 64-bit integer."""
        address, size = ctypes.c_void_p(), ctypes.c_size_t()
        found = _driver().cuModuleGetGlobal_v2(
            ctypes.byref(address), ctypes.byref(size), self._handle, name.encode()
        )
        _check(found, name)
        _check(_driver().cuMemcpyHtoD_v2(address, ctypes.byref(ctypes.c_uint64(value)), 8), name)

    def kernel(self, name: str, shared_bytes: int) -> Kernel:
        """A kernel that will use `shared_bytes` of dynamic shared memory."""
        function = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode()), name)
        _check(_driver().cuFuncSetAttribute(function, _MOST_SHARED_BYTES, shared_bytes), name)
        return Kernel(self, name, function, shared_bytes)


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to launch."""

    module: Module  # keeps it loaded
    name: str
    function: ctypes.c_void_p
    shared_bytes: int

    def resources(self) -> dict[str, int]:
        """Registers a thread at launch, and bytes a thread keeps in memory (spills among them)."""
        found = {}
        for name, attribute in (("registers", _REGISTERS), ("local_bytes", _LOCAL_BYTES)):
            value = ctypes.c_int()
            _check(_driver().cuFuncGetAttribute(ctypes.byref(value), attribute, self.function), self.name)
            found[name] = value.value
        return found

    def launch(
        self, blocks: int, threads: int, arguments: Sequence[Any], stream: int, resident: bool = True
    ) -> None:
        """Launch the kernel.

        Args:
            arguments: ctypes values, one a parameter.
            stream: a CUDA stream's handle.
            resident: all blocks at once, or not at all (a cooperative launch).

        Raises:
            MachineError: the launch is refused.
        """
        attribute = _Attribute(_COOPERATIVE, 0)
        attribute.value[0] = 1
        attributes = ctypes.pointer(attribute), int(resident)
        launch = _Launch(blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, *attributes)
        pointers = [ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in arguments]
        _check(
            _driver().cuLaunchKernelEx(
                ctypes.byref(launch), self.function, (ctypes.c_void_p * len(pointers))(*pointers), None
            ),
            self.name,
        )
