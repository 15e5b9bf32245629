"""What each step of the article's sample does to modules of two sizes, for docs/article.md.

    python benchmarks/article_module.py --rounds 60

The module is the article's (784 inputs, ReLU, 10 outputs) with random weights: time and size are those of a
trained one, the differences of pruning are not (a trained module has neurons that matter less). One thread,
all steps of a case in turn in every round.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from bar import Settings, record, say
from hasten.compress.module import compress_module
from hasten.compress.module_recipe import ModuleRecipe
from hasten.errors import HastenError

WHOLE = ModuleRecipe(bits=8, prune=0.25, compile="default", cache_mb=8)
CASES = {  # name: width, batch, recipe
    "article, batch 1": (128, 1, WHOLE),
    "article, batch 256": (128, 256, WHOLE),
    "wide, batch 1": (4096, 1, WHOLE),
    "wide, batch 256": (4096, 256, WHOLE),
    "wide, zeros": (4096, 1, ModuleRecipe(prune=0.5, prune_kind="weights")),
    "wide, int8 alone": (4096, 1, ModuleRecipe(bits=8)),
    "wide, int8 alone, batch 256": (4096, 256, ModuleRecipe(bits=8)),
}


def main() -> int:
    """Measure all cases and write results/article_module.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    details = {"torch": torch.__version__, "cases": {}}
    for name, (width, batch, recipe) in CASES.items():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
        try:
            report = compress_module(module, recipe, torch.rand(batch, 784), rounds=given.rounds).report
        except HastenError as wrong:
            say(f"{name}: {wrong}\nhint: {wrong.hint}")
            return wrong.exit_code
        print(f"{name}\n{report}\n", flush=True)
        details["cases"][name] = {"recipe": recipe, "report": report}
    settings = Settings("article module", "", 1, given.rounds, None, None)
    say(f"written: {record('article_module', settings, [], details)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
