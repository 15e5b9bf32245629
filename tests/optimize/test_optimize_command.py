"""`hasten optimize` and `hasten eval` from the outside: documents, streams, exit codes."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeWorkshop
from hasten.cli import main
from hasten.cli.flags import fraction
from hasten.core import Recipe
from hasten.errors import UsageError
from hasten.optimize import search
from hasten.quality import text as texts


@pytest.fixture(autouse=True)
def workshop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWorkshop:
    """A workshop of NumPy where the command would open the engine's."""
    made = FakeWorkshop()
    own = made.text(evaluation=4097)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "Workshop", lambda ref, options: made)
    monkeypatch.setattr(search, "default_text", lambda: own)
    monkeypatch.setattr(texts, "default_text", lambda: own)
    return made


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, workshop: FakeWorkshop) -> FakeWorkshop:
    """`hasten.load` gives models of NumPy."""

    def load(ref: str, recipe: str | None = None, **_: Any) -> Any:
        model: Any = workshop.build(Recipe.parse(recipe or "source"))
        model.name, model.tokenizer = "letters", workshop.tokenizer()
        return model

    monkeypatch.setattr("hasten.engine.model.load", load)
    monkeypatch.setattr("hasten.engine.loaded.fingerprint", lambda model: model.recipe.name)
    return workshop


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["optimize", "letters", "--max-ppl-increase", "2%", "--tokens", "4096", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert Path(document["artifact"]) == tmp_path / "letters.hasten"
    assert (tmp_path / "letters.hasten" / "report.html").exists()
    assert "layer sensitivity" in err
    assert "w5: quality" in err
    assert err.count("layer sensitivity") == 1  # plain lines where stderr is no terminal


def test_table_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--max-ppl-increase", "2%", "--tokens", "4096", "--out", "x.hasten"]
    assert main(["optimize", "letters", *asked]) == 0
    out, err = capsys.readouterr()
    for word in ("bf16 (start)", "w4-head8", "mix:2%", "chosen", "not timed", "x.hasten", "decode"):
        assert word in out
    heading, chosen = (next(line for line in out.splitlines() if w in line) for w in ("verdict", "chosen"))
    assert chosen.index("chosen") == heading.index("verdict"), "words stand on the left of their column"
    assert "hasten generate" in err


def test_budget_not_met_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "letters", "--max-ppl-increase", "0%", "--tokens", "2048"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "comes nearest" in err
    assert "hint: allow more: --max-ppl-increase" in err


def test_ctrl_c_says_how_to_go_on(workshop: FakeWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.interrupt_at = "w5"
    assert main(["optimize", "letters", "--tokens", "2048"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-ppl-increase", "lots"],
        ["--max-ppl-increase", "-1%"],
        ["--max-ppl-increase", "5"],
        ["--for", "speed"],
        ["--tokens", "0"],
        ["--text", "absent.txt"],
        ["--goal", "latency"],
        ["--for", "latncy"],
        ["--for", "cost"],
        ["--max-kl", "-1"],
        ["--max-kl", "nan"],
        ["--ttft", "500"],
        ["--ttft", "0ms"],
        ["--tpot", "fast"],
        ["--memory", "much"],
        ["--memory", "900TB"],
        ["--rate", "0"],
        ["--price-per-hour", "0"],
        ["--workload", "chats"],
        ["--workload", "decide", "--ttft", "400ms"],
        ["--time-limit", "0s"],
        ["--time-limit", "10"],
    ],
)
def test_wrong_flags_are_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "letters", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "hint:" in err
    assert "Traceback" not in err


def test_the_nearest_name_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, slip, meant in (("--for", "latncy", "latency"), ("--workload", "sumarize", "summarize")):
        assert main(["optimize", "letters", flag, slip]) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_dry_run_measures_and_writes_nothing(
    workshop: FakeWorkshop, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["optimize", "letters", "--dry-run", "--workload", "chat", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {one["recipe"] for one in document["prospects"]} >= {"w8", "w4"}
    assert document["workload"]["shared"] == 100 and document["aims"]["traffic"]["name"] == "chat"
    assert main(["optimize", "letters", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "predicted cost" in out and "nothing was measured or written" in err
    assert not workshop.built and not workshop.measured
    assert not list(tmp_path.glob("*.hasten"))


def test_what_is_asked_and_not_met_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--max-ppl-increase", "2%", "--tokens", "4096", "--tpot", "0.1ms"]
    assert main(["optimize", "letters", *asked]) == 3
    out, err = capsys.readouterr()
    assert out == "" and "the nearest:" in err and "0.1 ms asked" in err and "hint:" in err


def test_cost_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--max-ppl-increase", "2%", "--tokens", "4096", "--for", "cost", "--price-per-hour", "1.2"]
    assert main(["optimize", "letters", *asked]) == 0
    assert "A million tokens cost" in capsys.readouterr().out


def test_energy_that_cannot_be_read_is_said_before_any_work(
    workshop: FakeWorkshop,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("hasten.bench.measure._POWERCAP", tmp_path)
    assert main(["optimize", "letters", "--for", "energy"]) == 1
    assert "cannot be read here" in capsys.readouterr().err


def test_a_time_limit_leaves_the_rest_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--max-ppl-increase", "50%", "--tokens", "4096", "--time-limit", "1ms"]
    assert main(["optimize", "letters", *asked]) == 0
    out = capsys.readouterr().out
    assert "the time limit came first" in out
    assert (tmp_path / "letters.hasten" / "plan.json").exists()


def test_a_recipe_that_crashes_is_left_out_and_said(
    workshop: FakeWorkshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = FakeWorkshop.build

    def crashing(self: FakeWorkshop, recipe: Recipe) -> Any:
        if recipe.name == "w5":
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return build(self, recipe)

    monkeypatch.setattr(FakeWorkshop, "build", crashing)
    assert main(["optimize", "letters", "--max-ppl-increase", "2%", "--tokens", "4096", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "w5" not in [one["recipe"] for one in json.loads(out)["candidates"]]
    assert "w5 is given up: the process was killed by SIGSEGV" in err


@pytest.mark.parametrize(
    ("written", "value"), [("1%", 0.01), ("0.01", 0.01), (".5 %", 0.005), ("+2%", 0.02), ("0", 0.0)]
)
def test_budgets(written: str, value: float) -> None:
    assert fraction(written) == pytest.approx(value)


@pytest.mark.parametrize("written", ["", "%", "1", "1 percent", "nan", "inf", "1e-2x", "1%%"])
def test_budgets_that_cannot_be_read(written: str) -> None:
    with pytest.raises(UsageError) as caught:
        fraction(written)
    assert caught.value.hint


def test_eval_json(loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "letters", "--recipe", "w5", "--tokens", "4096", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    promised = "ppl ppl_source ppl_increase kl_mean kl_p99 top1_agreement tokens bits_per_weight"
    assert set(promised.split()) <= set(document)
    assert document["bits_per_weight"] == 5.5
    assert document["tokens"] == 4096
    assert document["ppl_increase"] == pytest.approx(document["ppl"] / document["ppl_source"] - 1)
    assert document["kl_mean"] > 0


def test_eval_of_the_reference_itself(loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "letters", "--recipe", "bf16", "--tokens", "512", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ppl_increase"] == document["kl_mean"] == 0.0
    assert document["status"] == "pass"


def test_eval_for_people(loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "letters", "--recipe", "w4", "--tokens", "2048"]) == 0
    out = capsys.readouterr().out
    for word in ("letters as w4", "4.50 bits", "perplexity", "mean KL", "verdict     fail"):
        assert word in out


def test_eval_says_how_much_text_would_decide(
    loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake's text has 4,096 letters."""
    assert main(["eval", "letters", "--recipe", "w4", "--tokens", "512"]) == 0
    out, err = capsys.readouterr()
    assert "insufficient" in out
    assert "beyond it would be seen" in out
    assert int(err.rsplit("--tokens ", 1)[1]) >= 1024
    assert main(["eval", "letters", "--recipe", "w6", "--tokens", "9999", "--max-ppl-increase", "0"]) == 3
    out, err = capsys.readouterr()
    assert ("--text FILE" in err) is ("insufficient" in out)


def test_eval_with_a_budget_that_is_not_met(loaded: FakeWorkshop) -> None:
    assert main(["eval", "letters", "--recipe", "w4", "--tokens", "2048", "--max-ppl-increase", "1%"]) == 3
    assert main(["eval", "letters", "--recipe", "w8", "--tokens", "2048", "--max-ppl-increase", "1%"]) == 0


def test_eval_of_an_artifact_needs_its_source(
    loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "x.hasten"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({"source": {"name": "own-model"}}))
    assert main(["eval", str(folder)]) == 2
    assert "--against" in capsys.readouterr().err
    assert main(["eval", str(folder), "--against", "letters", "--tokens", "512"]) == 0
    (folder / "plan.json").write_text(json.dumps({"source": {"name": "owner/model"}}))
    assert main(["eval", str(folder), "--tokens", "512"]) == 0


def test_against_names_any_model(loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str]) -> None:
    """The candidate keeps its own values; the other one is in bf16."""
    assert main(["eval", "letters", "--against", "other", "--tokens", "1024", "--json"]) == 0
    assert loaded.built == ["bf16", "source"]
    assert json.loads(capsys.readouterr().out)["status"] == "pass"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--url", "http://127.0.0.1:1"], "--task"),
        (["--limit", "3"], "--task"),
        (["--max-task-drop", "1%"], "--task"),
        (["--task", "jsn"], "--task json"),
        (["--task", "json", "--url", "http://127.0.0.1:1", "--recipe", "w4"], "drop --recipe"),
        (["--task", "json", "--max-task-drop", "5"], "--max-task-drop 5%"),
    ],
)
def test_flags_of_tasks_that_cannot_be(
    loaded: FakeWorkshop, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["eval", "letters", *flags]) == 2
    assert said in capsys.readouterr().err.split("hint:")[1]
