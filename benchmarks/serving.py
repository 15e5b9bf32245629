"""The bars of serving: measures them, compares with the limit, writes benchmarks/results/serving-*.json.

    python benchmarks/serving.py all --artifact w4.hasten --peer-python PATH
    python benchmarks/serving.py turns --artifact w4.hasten

The artifact is made of the source model with recipe w4 if there is none at that path. PATH is a Python with
openvino-genai, optimum-intel and "llama-cpp-python[server]"; `--isa` is as in bars.py. The soak (soak.py) and
speculation (speculation.py) are scripts of their own. Run it on a quiet machine. Exit code 1: a bar was
missed or could not be measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bar import Benchmark, Settings, say
from bar_command import asked, measured
from hasten.errors import HastenError

RECIPE = "w4"


def benchmarks() -> dict[str, Benchmark]:
    """Subcommand -> what it measures."""
    import serving_chats
    import serving_cost
    import serving_turns

    return {
        "chats": serving_chats.measure,
        "turns": serving_turns.from_memory,
        "disk": serving_turns.from_disk,
        "zero-hit": serving_cost.zero_hit,
        "overhead": serving_cost.overhead,
        "startup": serving_cost.start,
    }


def main() -> int:
    """Run the benchmark that was asked for, or all of them."""
    known = benchmarks()
    what, settings = asked(__doc__, known, "demo-w4.hasten", "made from the source if it is not there")
    try:
        make_artifact(settings)
    except HastenError as error:
        say(f"no artifact: {error.message}")
        return 1
    names = list(known) if what == "all" else [what]
    kept = [run(name, known[name], settings) for name in names]
    return 0 if all(kept) else 1


def make_artifact(settings: Settings) -> None:
    """Pack the source model as w4 and keep it at the artifact's path, once."""
    if Path(settings.artifact).exists():
        return
    from hasten.core import Recipe
    from hasten.models.artifact import save
    from hasten.models.open import open_model
    from hasten.weights.packed import pack_model

    say(f"packing {settings.model} as {RECIPE} to {settings.artifact}")
    source = open_model(settings.model)
    save(settings.artifact, pack_model(source, Recipe.parse(RECIPE), settings.threads), source, {})


def run(name: str, benchmark: Benchmark, settings: Settings) -> bool:
    """One benchmark; True if all its bars were kept."""
    say(f"== {name}")
    return measured(f"serving-{name}", benchmark, settings)


if __name__ == "__main__":
    sys.exit(main())
