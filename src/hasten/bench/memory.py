"""Peak memory of this process."""

from __future__ import annotations

from pathlib import Path


def peak_rss_bytes() -> int | None:
    """This process's highest resident set, mapped files included; None where unknown.

    Source: VmHWM, proc(5). Not getrusage: its ru_maxrss starts at the size of the process that forked this
    one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None
