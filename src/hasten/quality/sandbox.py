"""Runs a program that a model wrote, so that it can compute and do nothing else.

The program runs in a process of its own: isolated Python without site packages, an empty folder, no
environment. Before it starts, the process gives up for good what it does not need:

- by limits: processor seconds, memory, open files, bytes of a file (0);
- by a filter in the kernel (seccomp, Linux 3.17 and later) that lets pass the calls of `_CALLS` and answers
  every other one with "not permitted". None of them opens a socket, starts or signals a process, or changes,
  makes or removes a file; files can be opened to read alone.

What it reads goes nowhere: what it prints is thrown away. Where the filter cannot be installed,
nothing is run. This file is started as a script too, so it imports nothing of Hasten.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["right", "wrong", "stopped", "impossible"]

_CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "pread64": 17, "readv": 19, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
        "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89,
        "gettimeofday": 96, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "sigaltstack": 131,
        "gettid": 186, "futex": 202, "getdents64": 217, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "readlinkat": 267, "newfstatat": 262, "getrandom": 318,
        "statx": 332, "rseq": 334, "membarrier": 324, "getrusage": 98, "times": 100,
    },
    "aarch64": {
        "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226,
        "munmap": 215, "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "pread64": 67, "readv": 65, "faccessat": 48, "sched_yield": 124, "mremap": 216, "madvise": 233,
        "dup": 23, "nanosleep": 101, "getpid": 172, "exit": 93, "uname": 160, "getcwd": 17,
        "gettimeofday": 169, "getuid": 174, "getgid": 176, "geteuid": 175, "getegid": 177,
        "sigaltstack": 132, "gettid": 178, "futex": 98, "getdents64": 61, "clock_gettime": 113,
        "clock_getres": 114, "clock_nanosleep": 115, "exit_group": 94, "readlinkat": 78, "newfstatat": 79,
        "getrandom": 278, "statx": 291, "rseq": 293, "membarrier": 283, "getrusage": 165, "times": 153,
    },
}  # fmt: skip
_OPENAT = {"x86_64": 257, "aarch64": 56}
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # linux/seccomp.h; refuse with EPERM
_SET_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES, _DIE_WITH_PARENT = 22, 2, 38, 1  # linux/prctl.h
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OUTPUT = 65_536  # bytes of a program's output that are read
_NO_LOCK = "no filter "


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    cpu_s: int = 4
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20  # address space, the interpreter's included


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end.

    Costs 30 to 60 ms of start-up.

    Args:
        program: Python source. It is right where it ends without an exception.
        limits: None: the usual ones.

    Returns:
        "right"; "wrong": an exception, or an exit by the program itself; "stopped": a limit was reached;
        "impossible": this system cannot lock a process in (no Linux, or no seccomp), so nothing was run.
    """
    limits = limits or Limits()
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return "impossible"
    word = secrets.token_hex(16)  # said at the end: a program cannot end early and pass
    job = json.dumps([program, word, limits.cpu_s, limits.memory_bytes]).encode()
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="hasten-sandbox-") as folder:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        said = _heard(child, job, limits.wall_s)
    if said == (_NO_LOCK + word).encode():
        return "impossible"
    if child.returncode < 0:
        return "stopped"
    return "right" if child.returncode == 0 and said.endswith(word.encode()) else "wrong"


def _heard(child: subprocess.Popen[bytes], job: bytes, wall_s: float) -> bytes:
    """What a process says, after `job` was given to it; it is killed where it takes or says too much."""
    assert child.stdin is not None
    assert child.stdout is not None
    timer = threading.Timer(wall_s, child.kill)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(job)
        said = child.stdout.read(_OUTPUT)
        if len(said) == _OUTPUT:  # Hasten's own word is shorter
            child.kill()
        child.wait()  # or until the timer ends it
        return said
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        child.stdout.close()


def _child() -> None:
    """In the new process: read the job, give everything up, run the program."""
    program, word, cpu_s, memory = json.loads(sys.stdin.buffer.read())
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(kind, (most, most))
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  what the program prints
    if not _lock_in():
        os.write(1, (_NO_LOCK + word).encode())
        os._exit(1)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    os.write(1, word.encode())


def _lock_in() -> bool:
    """Install the filter in this process, for good; False where the system refuses."""
    filter_ = _filter(platform.machine())
    steps = ctypes.create_string_buffer(filter_, len(filter_))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    whole = Program(len(filter_) // 8, ctypes.addressof(steps))
    system = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if system.prctl(_DIE_WITH_PARENT, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero) != 0:
        return False
    if system.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) != 0:
        return False
    place = ctypes.c_ulong(ctypes.addressof(whole))
    return bool(system.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), place, zero, zero) == 0)


def _filter(machine: str) -> bytes:
    """The filter as steps of 8 bytes: code, jump if true, jump if false, value (linux/filter.h)."""
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    steps = [
        (load, 0, 0, 4),  # the architecture that the call belongs to
        (equal, 1, 0, _ARCH[machine]),
        (end, 0, 0, _KILL),
        (load, 0, 0, 0),  # the number of the call
        (equal, 0, 4, _OPENAT[machine]),
        (load, 0, 0, 32),  # the flags a file is opened with: the third argument, its lower half
        (any_bit, 0, 1, _WRITING),
        (end, 0, 0, _REFUSE),
        (end, 0, 0, _ALLOW),
    ]
    for number in sorted(_CALLS[machine].values()):
        steps += [(equal, 0, 1, number), (end, 0, 0, _ALLOW)]
    steps.append((end, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


if __name__ == "__main__":
    _child()
