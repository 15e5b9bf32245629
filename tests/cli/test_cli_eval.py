"""`hasten eval --task`: documents, tables, exit codes, kept answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import main
from hasten.engine.model import LanguageModel
from hasten.quality import answers


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tiny_folder("qwen3")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call continued."""
    counts: list[int] = []
    plain = LanguageModel.continued

    def continued(self: LanguageModel, prompts: Any, *rest: Any) -> list[str]:
        counts.append(len(prompts))
        return plain(self, prompts, *rest)

    monkeypatch.setattr(LanguageModel, "continued", continued)
    return counts


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main(["eval", *arguments, "--threads", "1", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_random_model_says_nothing(
    folder: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, str(folder), "--recipe", "w4", "--task", "extract,order", "--limit", "6")
    assert (found["recipe"], found["source"], found["max_task_drop"]) == ("w4", str(folder), 0.05)
    extract, order = found["tasks"]
    assert (extract["task"], extract["questions"], extract["share"]) == ("extract", 6, 0.0)
    assert (order["task"], order["questions"], order["chance"]) == ("order", 6, 0.25)
    for one in (extract, order):
        assert one["status"] == "insufficient"
        assert one["drop_low"] <= one["drop"] <= one["drop_high"]
    assert asked == [6, 6]


def test_the_source_is_asked_once(folder: Path, asked: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    document(capsys, str(folder), "--recipe", "w4", "--task", "extract", "--limit", "4")
    document(capsys, str(folder), "--recipe", "w8", "--task", "extract", "--limit", "6")
    assert asked == [4, 4, 2, 6]


def test_budgets_that_are_not_shown_end_with_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", "w4", "--task", "copy", "--limit", "3"]
    document(capsys, str(folder), *flags, "--max-task-drop", "5%", code=3)
    assert main(["eval", str(folder), *flags]) == 0
    out, err = capsys.readouterr()
    assert "copy" in out
    assert "insufficient" in out
    assert "guessing" in err


def test_questions_longer_than_the_context_are_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (needle,) = document(capsys, str(folder), "--task", "needle", "--limit", "4")["tasks"]
    assert needle["left_out"] + needle["questions"] == 4
    assert needle["left_out"] >= 3
    assert needle["status"] == "insufficient"


def test_a_server_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def ask(self: answers.Server, question: dict[str, Any]) -> dict[str, Any]:
        seen.append(question)
        return {"text": " no idea\nand more", "logprobs": None}

    monkeypatch.setattr(answers.Server, "_ask", ask)
    found = document(capsys, "own", "--url", "http://127.0.0.1:9", "--task", "copy,order", "--limit", "3")
    copy, order = found["tasks"]
    assert (found["model"], found["source"], found["url"]) == ("own", None, "http://127.0.0.1:9")
    assert (copy["share"], copy["drop"], order["share"]) == (0.0, None, None)
    assert len(seen) == 4
    flags = ["--url", "http://127.0.0.1:9", "--against", str(folder), "--task", "copy", "--limit", "3"]
    found = document(capsys, "own", *flags)
    assert found["tasks"][0]["drop"] is not None


def test_the_help_names_every_task() -> None:
    from hasten.cli.eval import DROP, LIMIT, TASK
    from hasten.quality.tasks import TASKS

    assert f"Tasks: {', '.join(TASKS)}." in TASK
    limits = {task.limit for name, task in TASKS.items() if name != "needle"}
    assert f"{' or '.join(map(str, sorted(limits)))}, of needle {TASKS['needle'].limit}." in LIMIT
    assert f"Without it, {answers.MAX_DROP:.0%} is judged." in DROP


def test_the_page_lists_every_task() -> None:
    from hasten.quality.tasks import TASKS

    page = (Path(__file__).parents[2] / "docs" / "quality.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert [(name, int(count)) for name, count, _ in rows] == [(n, task.limit) for n, task in TASKS.items()]
    guessed = {name: re.search(r"(\d+) %$", said) for name, _, said in rows}
    chances = {name: int(found[1]) / 100 if found else 0.0 for name, found in guessed.items()}
    assert chances == {name: task.chance for name, task in TASKS.items()}
