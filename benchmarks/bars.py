"""Every figure of the speed table: measures it, compares it with its bar, writes benchmarks/results/*.json.

    python benchmarks/bars.py all                              # what this machine can do
    python benchmarks/bars.py peers --peer-python PATH         # other engines installed in another Python
    python benchmarks/bars.py all --isa avx512 --peer-python PATH   # as on a processor without AMX

`--isa avx512` sets HASTEN_ISA=avx512 for ours and ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 for torch and OpenVINO
(both obey: their kernels are then named avx512_core_bf16 and brgemm_avx512_bf16 in place of ..._amx...).
llama.cpp has no such switch: PATH must then hold a build without AMX, made with the flags of
`hasten.bench.peers.llama_cpp_build.WITHOUT_AMX`. Its record lists the CPU features it was built with.

Run it on a quiet machine. Exit code 1: a bar was missed or could not be measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bar import Benchmark, Settings, record, say
from hasten.errors import HastenError

WITHOUT_ARTIFACT = ("gguf", "quality", "demo")


def benchmarks() -> dict[str, Benchmark]:
    """Subcommand -> what it measures."""
    import peers
    import quality
    import scaling
    import whole_process

    return {
        "peers": peers.measure,
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["all", *known])
    parser.add_argument("--model", default="demo", help="the source model")
    parser.add_argument("--artifact", default="demo.hasten", help="what `hasten optimize` chose within +1 %%")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-python", default=os.environ.get("HASTEN_PEER_PYTHON"))
    parser.add_argument("--isa", choices=["avx2", "avx512"], help="keep every engine to this instruction set")
    given = parser.parse_args()
    settings = Settings(given.model, given.artifact, given.threads, given.runs, given.peer_python, given.isa)
    os.environ.update(settings.environment())
    names = list(known) if given.what == "all" else [given.what]
    kept = [run(name, known[name], settings) for name in names]
    return 0 if all(kept) else 1


def run(name: str, benchmark: Benchmark, settings: Settings) -> bool:
    """One benchmark; True if all its bars were kept."""
    say(f"== {name}")
    if name not in WITHOUT_ARTIFACT and not Path(settings.artifact).exists():
        say(f"no artifact at {settings.artifact}; make it: hasten optimize demo --out {settings.artifact}")
        return False
    try:
        bars, details = benchmark(settings)
    except HastenError as error:
        say(f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return False
    say(f"written: {record(name, settings, bars, details)}")
    return all(bar.passed for bar in bars)


if __name__ == "__main__":
    sys.exit(main())
