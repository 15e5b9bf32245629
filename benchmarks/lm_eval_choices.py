"""lm-eval on 300 questions of our own: through the server, and through its own transformers backend.

    HASTEN_LM_EVAL=/path/to/bin/lm_eval python benchmarks/lm_eval_choices.py FOLDER [--out DIR]

FOLDER is a Hugging Face folder that both open: `hasten convert FILE.gguf --to compressed-tensors:bf16` writes
one. Compared are the answers that have the highest log-likelihood, of four: the server in bf16, and the
backend in bf16 and in float32. Samples that --out holds already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bar import RESULTS, say
from hasten.core import SCHEMA_VERSION
from hasten.quality.tasks import CAPITALS, KINDS

FACTS = """Ice is frozen|water|milk|sand|oil
A week has this many days:|seven|five|nine|ten
The sun rises in the|east|west|north|south
Bees make|honey|milk|bread|wool
Wool comes from|sheep|fish|trees|snakes
Plants need light from the|sun|moon|sea|soil
A spider has this many legs:|eight|six|four|ten
Water boils when it is|hot|cold|dry|still
The opposite of up is|down|left|over|near
Fish breathe with|gills|lungs|skin|wings
Paper is made from|wood|iron|glass|salt
A triangle has this many sides:|three|four|five|six
We hear with our|ears|eyes|feet|hands
Magnets attract|iron|wood|paper|glass
Night comes after|day|spring|lunch|rain"""
SUMS = 110  # questions of each of the first two kinds
TASK = """task: own_easy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def questions() -> list[dict[str, Any]]:
    """Sums, words of a kind, capitals and plain facts, always the same: question, choices, answer."""
    r, rows = random.Random(7), []

    def add(question: str, right: str, wrong: Sequence[str]) -> None:
        choices = [right, *wrong]
        r.shuffle(choices)
        rows.append({"question": question, "choices": choices, "answer": choices.index(right)})

    for _ in range(SUMS):
        a, b, way = r.randint(2, 60), r.randint(2, 40), r.choice(["plus", "minus", "times"])
        right = {"plus": a + b, "minus": a - b, "times": a * b}[way]
        near = (right + 1, right - 1, right + 10, right - 10, right + 2, a + b + 3, right * 2)
        add(f"What is {a} {way} {b}?", str(right), [*map(str, r.sample([w for w in near if w != right], 3))])
    groups = {kind: words.split() for kind, words in KINDS.items()}
    for _ in range(SUMS):
        kind = r.choice(list(groups))
        right = r.choice(groups[kind])
        wrong = [r.choice(groups[one]) for one in r.sample([k for k in groups if k != kind], 3)]
        if r.random() < 0.5:
            add(f"Which of these is a kind of {kind}?", right, wrong)
        else:
            others = ", ".join(r.sample([w for w in groups[kind] if w != right], 2))
            add(f"Which word belongs with {others}?", right, wrong)
    names = CAPITALS.split()
    capitals = dict(zip(names[::2], names[1::2], strict=True))
    for land, city in capitals.items():
        add(f"What is the capital of {land}?", city, r.sample([c for c in capitals.values() if c != city], 3))
        add(f"In which country is the city of {city}?", land, r.sample([c for c in capitals if c != land], 3))
    for line in FACTS.splitlines():
        fact, right, *wrong = line.split("|")
        add(fact, right, wrong)
        add(f"Complete the sentence. {fact}", right, wrong)
    return rows


def run(name: str, model: str, arguments: str, batch: int, folder: Path) -> list[list[float]]:
    """Log-likelihoods of each question's choices, by lm-eval or from samples that are there."""
    out = folder / name
    if not list(out.rglob("samples_*.jsonl")):
        say(name)
        command = [os.environ["HASTEN_LM_EVAL"], "--model", model, "--model_args", arguments]
        command += ["--tasks", "own_easy", "--include_path", str(folder), "--batch_size", str(batch)]
        command += ["--device", "cpu", "--log_samples", "--output_path", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
    rows = [json.loads(line) for line in max(out.rglob("samples_*.jsonl")).read_text().splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    assert [row["doc"] for row in rows] == questions(), f"{out} has other questions"
    return [[float(answer[0][0]) for answer in row["resps"]] for row in rows]


def served(model: Path, folder: Path) -> list[list[float]]:
    """The same through `hasten serve` in bf16."""
    if list((folder / "server").rglob("samples_*.jsonl")):
        return run("server", "", "", 1, folder)
    command = [sys.executable, "-m", "hasten", "serve", f"own={model}", "--recipe", "bf16", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            arguments = f"base_url={url}/v1/completions,model=own,tokenizer={model},num_concurrent=4"
            return run("server", "local-completions", arguments, 4, folder)
        finally:
            server.terminate()


def compared(one: list[list[float]], other: list[list[float]]) -> dict[str, Any]:
    """How often both choose alike, in all questions and in those that are no sums, and what else differs."""
    same = [int(np.argmax(a)) == int(np.argmax(b)) for a, b in zip(one, other, strict=True)]
    off = np.concatenate([np.subtract(a, b) for a, b in zip(one, other, strict=True)])
    lost = [max(a) - a[int(np.argmax(b))] for a, b in zip(one, other, strict=True)]
    return {
        "questions": len(same),
        "same_choice": sum(same),
        "without_sums": len(same) - SUMS,
        "same_choice_without_sums": sum(same[SUMS:]),
        "mean_difference": float(np.abs(off).mean()),
        "largest_difference": float(np.abs(off).max()),
        "largest_margin_where_they_differ": max(lost),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the samples; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        asked = folder / "questions.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in questions()))
        (folder / "own_easy.yaml").write_text(TASK.format(questions=asked))
        model = arguments.model.resolve()
        found = {"server": served(model, folder)}
        for kind in ("bfloat16", "float32"):
            found[kind] = run(kind, "hf", f"pretrained={model},dtype={kind}", 16, folder)
    pairs = (("server", "bfloat16"), ("server", "float32"), ("bfloat16", "float32"))
    rows = [{"one": a, "other": b, **compared(found[a], found[b])} for a, b in pairs]
    place = RESULTS / "lm_eval_choices.json"
    models = json.loads(place.read_text())["models"] if place.is_file() else {}
    record = {"schema_version": SCHEMA_VERSION, "models": {**models, model.name: rows}}
    place.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
