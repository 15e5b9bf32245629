"""Fills every block of figures in the documents from the records: `python docs/benchmarks.py`.

A block stands between `<!-- figures: NAME -->` and `<!-- figures end -->`; NAME is an entry of `TABLES`. For
figures inside sentences see prose_figures.py. With `--check` it writes nothing and says what is not in step:
a test runs that. A new record needs a line in `TABLES` and a block in docs/benchmarks.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_tables as gpu
import prose_figures
import readme_table
import record_tables as cpu
from records import Record, about, goals_table, names, read

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- figures: ([^>]+) -->\n).*?(<!-- figures end -->)", re.DOTALL)

TABLES: dict[str, Callable[[Record], str]] = {
    "equal": cpu.equal,
    "peers": cpu.peers,
    "bench-w4-llama-q4_0-zen5": cpu.bench,
    "bench-w4-llama-q4_0-vnni": cpu.bench,
    "context": cpu.scaled,
    "batch": cpu.scaled,
    "startup": cpu.whole,
    "gguf": cpu.whole,
    "memory": goals_table,
    "neighbour": cpu.neighbour,
    "speculation": cpu.speculation,
    "serving-chats": cpu.chats,
    "serving-turns": cpu.turns,
    "serving-disk": cpu.turns,
    "serving-zero-hit": cpu.zero_hit,
    "serving-overhead": cpu.overhead,
    "serving-startup": cpu.whole,
    "serving-soak": cpu.soak,
    "hostile": cpu.attacks,
    "bounded-memory": goals_table,
    "lm_eval_choices": cpu.choices,
    "quantisers": cpu.judged,
    "quantise": cpu.made,
    "mixture": cpu.mixture,
    "int8_cache": cpu.one_verdict,
    "prune": cpu.pruned,
    "distil-pruned": cpu.distilled,
    "distil-quantised": cpu.distilled,
    "exports": cpu.exported,
    "gpu-bars": gpu.gpu_bars,
    "gpu-two": gpu.gpu_two,
    "gpu-persistent": gpu.persistent,
    "gpu-batch": gpu.batch_step,
    "kernels": cpu.kernels,
    "against_old_decode": goals_table,
    "against_old_long": goals_table,
    "against_old_start": goals_table,
    "against_old_start_decode_memory_server": goals_table,
    "article_module": cpu.modules,
    "predict": cpu.predicted,
    "judgements": cpu.judgements,
}
"""Record -> what makes its table."""
MADE_BY = {
    "bench-w4-llama-q4_0-zen5": "hasten bench demo --recipe w4 --against llama.cpp:q4_0",
    "bench-w4-llama-q4_0-vnni": "hasten bench demo --recipe w4 --against llama.cpp:q4_0",
    "exports": "python benchmarks/exports.py ARTIFACT",
    "lm_eval_choices": "python benchmarks/lm_eval_choices.py",
}
"""Commands of records that do not hold theirs."""
SPECIAL: dict[str, Callable[[], str]] = {
    "goals that were not reached": cpu.missed,
    "tiny models": lambda: gpu.persistent_tiny(read("gpu-persistent")),
    "README": partial(readme_table.results, "en"),
    "README.zh-CN": partial(readme_table.results, "zh"),
}
"""Blocks that are not one record."""


def block(name: str) -> str:
    """What belongs between the marks of a block.

    Raises:
        KeyError: no table has that name.
    """
    if name in SPECIAL:
        return SPECIAL[name]()
    record = read(name)
    return f"{about(name, record, MADE_BY.get(name, ''))}\n{TABLES[name](record)}"


def filled(text: str) -> str:
    """A document with all of its blocks, and all figures in its sentences, made anew."""
    return prose_figures.filled(BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[3]}", text))


def documents() -> list[Path]:
    """Documents that have figures from records."""
    pages = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if "<!-- figure" in page.read_text(encoding="utf-8")]


def wrong() -> list[str]:
    """What is not in step: records without a table or a block, and documents that must be made anew."""
    page = set(BLOCK.findall((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")))
    missing = set(TABLES) - {name for _, name, _ in page}
    said = [f"{name}: needs a record and a line in TABLES" for name in sorted(set(names()) ^ set(TABLES))]
    said += [f"{name}: needs a block in docs/benchmarks.md" for name in sorted(missing)]
    return said + [
        f"{document.name}: run `make docs`"
        for document in documents()
        if filled(text := document.read_text(encoding="utf-8")) != text
    ]


def main() -> int:
    """Fill the blocks, or with --check say what is not in step."""
    if sys.argv[1:] == ["--check"]:
        said = wrong()
        sys.stdout.write("\n".join(said))
        return 1 if said else 0
    for document in documents():
        before = document.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            document.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
