"""This Hasten against an older one that is installed in another virtual environment, in turn, in one run.

    git archive OLD_COMMIT | tar -x -C FOLDER && python -m venv VENV && VENV/bin/pip install FOLDER
    python benchmarks/against_old.py VENV/bin/python                       # about half an hour
    python benchmarks/against_old.py VENV/bin/python --rounds 3 --only decode --recipes w4 w8

Both versions run the same prompts in processes of their own, which are stopped between their turns. The order
of the two changes with each round, and rounds that other work disturbed are taken again
(`hasten.bench.figures`). A figure is the ratio of medians; its interval is a bootstrap over rounds. A bar is
PASS where the whole interval keeps it, MISS where the whole interval misses it, and UNDECIDED where the bar
lies inside the interval or there are fewer than five rounds: more `--rounds` narrow it.

The old version is asked by its own Python through this file (`--drive`), which takes the entry points that it
finds there: `LanguageModel.stream` and `stream_batch`, else `Engine` without speculation and prefix cache.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

RECIPES = ("w4", "w6", "w8", "w4-g128", "w4-asym", "source")
ROWS_BAR = {"w4": 1.15, "w4-g128": 1.5, "w4-asym": 1.5, "source": 1.5}  # 8 sequences that decode together
PARTS = ("decode", "long", "start", "memory", "server")
PROMPT, OUTPUT = 512, 64
MANY, MANY_PROMPT, MANY_OUTPUT = 8, 64, 48
MEMORY_TOKENS = 128
FEWEST = 5  # rounds: the bootstrap of fewer is narrow by chance
FIRST_TOKEN_S, SERVER_MS = 1.0, 0.3
TEXT = "What is a mutex?"


# In the process that is asked: either version ---------------------------------------------------------------


def drive() -> None:
    """Answer questions on stdin, one line of JSON each, with the hasten that this Python imports."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not break the lines
    sys.path.remove(str(Path(__file__).parent))  # none of these scripts is a module that hasten imports
    model: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        kind = question.pop("kind")
        if kind == "load":
            if model is not None:
                model.close()
            model = load(**question)
            answer: Any = {"recipe": model.recipe.name, "weight_bytes": model.weight_bytes}
        elif kind == "encode":
            answer = model.tokenizer.encode(question["text"], add_special=False)
        elif kind == "about":
            answer = about()
        else:
            answer = timed(model, **question)
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def load(ref: str, recipe: str, threads: int, context: int) -> Any:
    """Open a model; packed weights on disk are left alone: the other version has its own form of them."""
    import hasten

    more = {"store": False} if "store" in inspect.signature(hasten.load).parameters else {}
    return hasten.load(ref, recipe=recipe, threads=threads, context=context, **more)


def about() -> dict[str, Any]:
    """The version that answers, told apart by the digest of its native module."""
    import hashlib

    import hasten
    from hasten import _native

    digest = hashlib.sha256(Path(str(_native.__file__)).read_bytes()).hexdigest()
    isa = getattr(_native, "isa", lambda: "unknown")()
    return {
        "hasten": hasten.__version__,
        "native_sha256": digest,
        "python": sys.version.split()[0],
        "isa": isa,
    }


def timed(model: Any, prompts: list[list[int]], output: int) -> dict[str, float]:
    """Greedy answers past end tokens: seconds until every sequence has its first token, and of the rest."""
    seen, early = [0] * len(prompts), 0
    started = first = last = time.perf_counter()
    for which, count in tokens(model, prompts, output):
        last = time.perf_counter()
        seen[which] += count
        if not early and all(seen):
            first, early = last, sum(seen)
    return {
        "prefill": sum(map(len, prompts)) / (first - started),
        "decode": (sum(seen) - early) / (last - first),
    }


def tokens(model: Any, prompts: list[list[int]], output: int) -> Iterator[tuple[int, int]]:
    """(Which prompt, how many new tokens), as they come."""
    import hasten

    sampling = hasten.SamplingOptions(temperature=0.0, ignore_eos=True)
    if not hasattr(model, "stream_batch"):  # its `stream` would guess tokens: another comparison
        yield from engine_tokens(model, prompts, output, sampling)
    elif len(prompts) == 1:
        for _ in model.stream(prompts[0], output, sampling):
            yield 0, 1
    else:
        for which, _ in model.stream_batch(prompts, output, sampling):
            yield which, 1


def engine_tokens(
    model: Any, prompts: list[list[int]], output: int, sampling: Any
) -> Iterator[tuple[int, int]]:
    """The same from `Engine`, for versions whose models have no `stream_batch`."""
    engine_type = importlib.import_module("hasten.engine.engine").Engine
    request = importlib.import_module("hasten.engine.request").Request
    options = importlib.import_module("hasten.core").ServingOptions(prefix_cache=False, speculate=False)
    engine = engine_type(model, options)
    try:
        names = {engine.add(request(tuple(ids), output, sampling)): i for i, ids in enumerate(prompts)}
        while engine.busy:
            for news in engine.step():
                if news.token_ids:
                    yield names[news.request_id], len(news.token_ids)
    finally:
        engine.close()


# Here: this version -----------------------------------------------------------------------------------------


class Version:
    """One of the two: a process that keeps a model, and the command line."""

    def __init__(self, name: str, python: str) -> None:
        from hasten.bench.process import die_with_parent

        self.name = name
        self.python = python
        self.environment = dict(os.environ)
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed version has its bytecode
        if name == "old":  # it must find its own installed package
            self.environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, __file__, "--drive"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            preexec_fn=die_with_parent,  # a stopped process would outlive a comparison that is killed
        )
        self.about = self.ask("about")

    def ask(self, kind: str, **question: Any) -> Any:
        """One question; the process runs only until it has answered."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"kind": kind, **question}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} version's process ended: see its error above")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def run(self, *arguments: str) -> Any:
        """A `hasten` command as a whole process: wall time, peak memory, output."""
        from whole_process import process

        command = [
            self.python,
            "-m",
            "hasten",
        ]  # run elsewhere: `-m` looks for modules in the folder it runs in
        return process(command, *arguments, cwd=Path(tempfile.gettempdir()), environment=self.environment)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Row:
    """One figure of the comparison; `ratio` is new over old, or the figure itself where only new counts."""

    name: str
    unit: str
    new: float
    old: float | None
    ratio: Any
    limit: float | None = None  # None: shown, not judged
    at_least: bool = True
    disturbed: int = 0
    verdict: str = field(default="")

    def judged(self) -> Row:
        """With PASS, MISS or UNDECIDED by where the interval lies."""
        if self.limit is None:
            return replace(self, verdict="-")
        kept, missed = self.ratio.low >= self.limit, self.ratio.high < self.limit
        if not self.at_least:
            kept, missed = self.ratio.high <= self.limit, self.ratio.low > self.limit
        if self.ratio.n < FEWEST:
            return replace(self, verdict="UNDECIDED")
        return replace(self, verdict="PASS" if kept else "MISS" if missed else "UNDECIDED")

    @property
    def passed(self) -> bool:
        """Whether the whole interval keeps the bar."""
        return self.verdict == "PASS"

    def line(self) -> str:
        """One line of the table."""
        old = "" if self.old is None else f"{self.old:.4g}"
        interval = f"{self.ratio.median:.3f} [{self.ratio.low:.3f}, {self.ratio.high:.3f}]"
        bar = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return (
            f"{self.name:<44}{self.new:>9.4g}{old:>9} {self.unit:<6}{interval:>25}{self.ratio.n:>4}"
            f"{self.disturbed:>4}  {bar:<8}{self.verdict}"
        )


class Comparison:
    """Both versions and what is measured of them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.new = Version("new", sys.executable)
        self.old = Version("old", given.old_python)
        self.rows: list[Row] = []
        self.details: dict[str, Any] = {"new": self.new.about, "old": self.old.about}

    def close(self) -> None:
        """End both processes."""
        self.new.close()
        self.old.close()

    def add(self, row: Row, values: Any) -> None:
        """A row, and the rounds it was made from."""
        from bar import say

        self.rows.append(row.judged())
        self.details[row.name] = values
        say(self.rows[-1].line())

    def paired(self, rounds: int, take: Callable[[Version, int], dict[str, float]]) -> dict[str, Any]:
        """Rounds of both versions, in changing order, after one that warms up: figure -> the two lists."""
        from bar import say
        from hasten.bench.figures import steady

        def one(number: int) -> list[dict[str, float]]:
            pair = [self.new, self.old] if number % 2 else [self.old, self.new]
            found = {version.name: take(version, number) for version in pair}
            return [found["new"], found["old"]]

        one(0)
        found = steady(one, lambda pair: [*pair[0].values(), *pair[1].values()], rounds, say)
        lists = {
            name: [[pair[i][name] for pair in found.rounds] for i in (0, 1)] for name in found.rounds[0][0]
        }
        return {**lists, "disturbed": found.disturbed}

    def ratio_row(
        self, name: str, unit: str, lists: Sequence[list[float]], limit: float | None, **more: Any
    ) -> None:
        """A ratio of new over old."""
        from hasten.bench.figures import paired_ratio

        new, old = (statistics.median(values) for values in lists)
        row = Row(name, unit, new, old, paired_ratio(*lists), limit, **more)
        self.add(row, {"new": lists[0], "old": lists[1]})

    def decode(self, recipe: str) -> None:
        """Batch 1 at a prompt of 512, and 8 sequences together; for w4 a long prompt too."""
        from hasten.bench.measure import PromptRing, default_text

        given, is_long = self.given, recipe == "w4" and "long" in self.given.only
        context = given.long + OUTPUT if is_long else PROMPT + OUTPUT
        for version in (self.new, self.old):
            version.ask("load", ref=given.model, recipe=recipe, threads=given.threads, context=context)
        ring = PromptRing(self.new.ask("encode", text=default_text()))

        def run(rounds: int, count: int, prompt: int, output: int, *figures: str) -> dict[str, Any]:
            def take(version: Version, number: int) -> dict[str, float]:
                prompts = [ring.prompt(number * count + i, prompt) for i in range(count)]
                found = version.ask("run", prompts=prompts, output=output)
                return {figure: found[figure] for figure in figures}

            return self.paired(rounds, take)

        if "decode" in given.only:
            found = run(given.rounds, 1, PROMPT, OUTPUT, "decode", "prefill")
            lost = {"disturbed": found["disturbed"]}
            self.ratio_row(f"{recipe}: decode, batch 1", "tok/s", found["decode"], 1.0, **lost)
            self.ratio_row(f"{recipe}: prefill of {PROMPT}", "tok/s", found["prefill"], 1.0, **lost)
            found = run(given.rounds, MANY, MANY_PROMPT, MANY_OUTPUT, "decode")
            what, limit = f"{recipe}: decode, {MANY} together", ROWS_BAR.get(recipe)
            self.ratio_row(what, "tok/s", found["decode"], limit, disturbed=found["disturbed"])
        if is_long:
            found = run(min(given.rounds, max(FEWEST, given.rounds // 2)), 1, given.long, 2, "prefill")
            what = f"{recipe}: prefill of {given.long}"
            self.ratio_row(what, "tok/s", found["prefill"], 1.4, disturbed=found["disturbed"])

    def processes(self, folder: Path) -> None:
        """Whole processes on an artifact that each version wrote: start to first token, peak memory."""
        from hasten.bench.figures import paired_ratio

        threads = ("--threads", str(self.given.threads))
        artifacts = {}
        for version in (self.new, self.old):
            artifacts[version.name] = str(folder / f"{version.name}.hasten")
            version.run("compress", self.given.model, "--recipe", "w4", "--out", artifacts[version.name])

        def generate(version: Version, count: int) -> Any:
            return version.run("generate", artifacts[version.name], "-p", TEXT, "-n", str(count), *threads)

        if "start" in self.given.only:
            found = self.paired(self.given.rounds, lambda v, _: {"rate": 1 / generate(v, 1).wall_s})
            new, old = ([1 / rate for rate in rates] for rates in found["rate"])
            lost = {"disturbed": found["disturbed"], "at_least": False}
            alone = paired_ratio(new, [1.0] * len(new))
            what = "artifact: start to first token"
            row = Row(what, "s", statistics.median(new), statistics.median(old), alone, FIRST_TOKEN_S, **lost)
            self.add(row, {"new": new, "old": old})
            self.ratio_row(f"{what}, new / old", "s", [new, old], None, **lost)
        if "memory" in self.given.only:
            peaks: list[list[float]] = [[], []]
            for _ in range(3):
                for version, seen in zip((self.new, self.old), peaks, strict=True):
                    seen.append(generate(version, MEMORY_TOKENS).peak_rss_bytes / 1e6)
            self.ratio_row("artifact: peak memory, new / old", "MB", peaks, None, at_least=False)

    def server(self, artifact: str) -> None:
        """What this version's server adds to a token at batch 1, over its engine."""
        import serving_cost
        from bar import Settings
        from hasten.bench.figures import paired_ratio

        given = self.given
        settings = Settings(given.model, artifact, given.threads, max(1, given.rounds // 4), None, None)
        _, details = serving_cost.overhead(settings)
        for label, found in details.items():
            pairs = found["token_pairs_ms"]
            figure = paired_ratio(pairs, [1.0] * len(pairs))
            what = f"server adds to a token, {label} prompt"
            self.add(Row(what, "ms", figure.median, None, figure, SERVER_MS, at_least=False), pairs)


def compare(given: argparse.Namespace) -> int:
    """Measure what was asked for, print the table, write the record."""
    from bar import Settings, record, say

    both = Comparison(given)
    try:
        if {"decode", "long"} & set(given.only):
            for recipe in given.recipes:
                both.decode(recipe)
        with tempfile.TemporaryDirectory(prefix="against-old-") as folder:
            if {"start", "memory", "server"} & set(given.only):
                both.processes(Path(folder))
            if "server" in given.only:
                both.server(str(Path(folder) / "new.hasten"))
    finally:
        both.close()
    print(f"{'':<44}{'new':>9}{'old':>9}{'':<7}{'ratio or figure':>25}{'n':>4}{'bad':>4}  bar")
    settings = Settings(given.model, "", given.threads, given.rounds, None, None)
    parts = "" if set(given.only) == set(PARTS) else "_" + "_".join(given.only)
    say(f"written: {record('against_old' + parts, settings, both.rows, both.details)}")
    return int(any(row.verdict == "MISS" for row in both.rows))


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_python", nargs="?", help="Python of the environment with the older hasten")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--long", type=int, default=8000, help="tokens of the long prompt")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive()
        return 0
    if not given.old_python:
        parser.error("give the Python of an environment in which the older hasten is installed")
    return compare(given)


if __name__ == "__main__":
    sys.exit(main())
