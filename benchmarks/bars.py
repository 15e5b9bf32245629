"""Every figure of the speed table: measures it, compares it with its bar, writes benchmarks/results/*.json.

    python benchmarks/bars.py all                              # what this machine can do
    python benchmarks/bars.py peers --peer-python PATH         # other engines installed in another Python
    python benchmarks/bars.py all --isa avx512 --peer-python PATH   # as on a processor without AMX

`--isa avx512` sets HASTEN_ISA=avx512 for ours and ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 for torch and OpenVINO
(both obey: their kernels are then named avx512_core_bf16 and brgemm_avx512_bf16 in place of ..._amx...).
llama.cpp has no such switch: PATH must then hold a build without AMX, made with the flags of
`hasten.bench.peers.llama_cpp.WITHOUT_AMX`. Its record lists the CPU features it was built with.

Run it on a quiet machine. Exit code 1: a bar was missed or could not be measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bar import Benchmark, Settings, say
from bar_command import asked, measured

WITHOUT_ARTIFACT = ("equal", "gguf", "quality", "demo")


def benchmarks() -> dict[str, Benchmark]:
    """Subcommand -> what it measures."""
    import equal_quality
    import peers
    import quality
    import scaling
    import whole_process

    return {
        "peers": peers.measure,
        "equal": equal_quality.measure,
        "batch": scaling.batch,
        "context": scaling.context,
        "startup": whole_process.startup,
        "memory": whole_process.memory,
        "gguf": whole_process.gguf,
        "quality": quality.measure,
        "demo": whole_process.make_demo,
    }


def main() -> int:
    """Run the benchmark that was asked for, or all of them."""
    known = benchmarks()
    what, settings = asked(__doc__, known, "demo.hasten", "what `hasten optimize` chose within +1 %%")
    names = list(known) if what == "all" else [what]
    kept = [run(name, known[name], settings) for name in names]
    return 0 if all(kept) else 1


def run(name: str, benchmark: Benchmark, settings: Settings) -> bool:
    """One benchmark; True if all its bars were kept."""
    say(f"== {name}")
    if name not in WITHOUT_ARTIFACT and not Path(settings.artifact).exists():
        say(f"no artifact at {settings.artifact}; make it: hasten optimize demo --out {settings.artifact}")
        return False
    return measured(name, benchmark, settings)


if __name__ == "__main__":
    sys.exit(main())
