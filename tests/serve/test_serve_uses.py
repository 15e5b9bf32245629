"""The article's uses in `examples`, each against a server of a tiny model."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import client_server
import pytest

import tiny_models

FOLDER = Path(__file__).parents[2] / "examples"
CONTEXT = 16_384


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[client_server.Server]:
    """A tiny model whose every letter is a token, with room for the uses' prompts."""
    longer = {"max_position_embeddings": CONTEXT}
    model = tiny_models.Tiny("llama", "llama", longer, "llama", 102)
    folder = tiny_models.save_folder(model, tmp_path_factory.mktemp("uses") / client_server.NAME)
    with client_server.running(folder, "--context", str(CONTEXT)) as running:
        yield running


def use(server: client_server.Server, name: str, *arguments: str) -> str:
    """What a use prints."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), server.url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lines(printed: str) -> list[tuple[int, int, int]]:
    """(tokens in, of them cached, tokens out) of every answer."""
    found = re.findall(r"(\d+) tokens in, (\d+) of them cached, (\d+) out", printed)
    return [(int(sent), int(cached), int(given)) for sent, cached, given in found]


def test_support_computes_its_instructions_once(server: client_server.Server) -> None:
    answers = lines(printed := use(server, "support"))
    assert len(answers) == 8
    assert answers[0][1] == 0
    for sent, cached, given in answers[1:]:
        assert cached > 0.8 * sent > 1000
        assert 0 < given <= 48
    assert int(re.findall(r"(\d+) % of all prompt tokens were cached", printed)[0]) > 70


def test_translations_spend_their_time_on_answers(server: client_server.Server) -> None:
    printed = use(server, "translate", "German")
    answers = lines(printed)
    assert len(answers) == 5
    assert all(given > 0 for _, _, given in answers)
    assert re.search(r"Medians: first token \d+ ms, then [\d.]+ ms a token", printed)
    assert float(re.findall(r"(\d+) % of the time went to tokens after the first", printed)[0]) > 0


def test_summaries_compute_what_is_new_of_a_growing_text(server: client_server.Server) -> None:
    answers = lines(use(server, "summarize", "3"))
    assert len(answers) == 3
    for (before, _, _), (sent, cached, _) in itertools.pairwise(answers):
        assert sent > before
        assert (
            0.9 * before < cached < sent
        )  # the whole text of the part before, but for its last page and the wish


def test_decisions_meet_a_deadline_or_are_refused(server: client_server.Server) -> None:
    printed = use(server, "decide", "60000", "50", "6")
    assert "100 % of 6 met 60000 ms; 0 refused early, 0 late." in printed
    hopeless = use(server, "decide", "1", "50", "6")
    met, refused, late = map(
        int, re.findall(r"(\d+) % of 6 met 1 ms; (\d+) refused early, (\d+) late", hopeless)[0]
    )
    assert met == 0
    assert refused + late == 6


def test_a_use_without_a_server_says_how_to_start_one() -> None:
    command = [sys.executable, str(FOLDER / "translate.py"), "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "start one with hasten serve demo" in done.stderr
    assert "Traceback" not in done.stderr
