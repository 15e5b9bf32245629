"""Prompts of exactly N token ids, the same for every engine and never the same twice in a run."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.core import Workload
from hasten.errors import UsageError

TEXT_CHARACTERS = 400_000
"""How much of the default text is tokenized at most: about 100k tokens, tokenized in well under a second."""


def default_text() -> str:
    """The prose and code of `pydoc_data.topics`, which every CPython carries, in sorted order of topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARACTERS]


def check(workload: Workload) -> Workload:
    """The workload, if it can be measured.

    Raises:
        UsageError: a length below its smallest useful value.
    """
    for name, value, least in (
        ("prompt", workload.prompt, 1),
        ("output", workload.output, 2),
        ("batch", workload.batch, 1),
    ):
        if value < least:
            raise UsageError(
                f"--{name} must be at least {least}, got {value}",
                hint=f"use --{name} {least} or more"
                + (": one token has no decode time" if name == "output" else ""),
            )
    return workload


class PromptRing:
    """Cuts prompts out of one long list of ids.

    Every prompt starts where the one before ended, wrapping at the end. So each round's prompts are new to
    the engines and no prefix cache can answer for the prefill, yet every run of the program gives the same
    ids.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("the benchmark text gave no tokens", hint="check the model's tokenizer")
        self.ids = list(ids)

    def prompt(self, index: int, length: int) -> list[int]:
        """Prompt number `index` of `length` ids."""
        start = index * length % len(self.ids)
        ring = self.ids[start:] + self.ids[:start]
        while len(ring) < length:
            ring += ring
        return ring[:length]

    def round(self, number: int, workload: Workload) -> list[list[int]]:
        """The prompts of one round: `batch` lists of `prompt` ids."""
        first = number * workload.batch
        return [self.prompt(first + i, workload.prompt) for i in range(workload.batch)]
