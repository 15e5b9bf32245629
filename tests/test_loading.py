"""Recipes that take work: made once, kept, found again for nothing, whatever goes wrong in between."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hasten
from hasten.cli import main
from hasten.compress.result import Progress
from hasten.core import Format, Recipe, Verdict
from hasten.errors import ArtifactError, BudgetError, UsageError
from hasten.loading import load, prepared
from hasten.models.open import open_model
from hasten.optimize import calibrated
from hasten.optimize.calibrated import Asked, Made
from hasten.optimize.choice import Candidate
from hasten.optimize.search import Search
from hasten.weights import packed_store
from hasten.weights.packed import pack_model
from hasten.weights.packed_store import open_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, switched on."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HASTEN_CACHE_PACKED", "1")
    monkeypatch.setattr(packed_store, "_said", set())
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("qwen3"), tmp_path / "model"))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the recipes that were carried out, here by rounding in place of calibrating."""
    done: list[str] = []

    def compressed(ref: Any, asked: Asked, observer: Any, threads: int | None = None) -> Made:
        observer(Progress("calibrate", "layer 1", 0, 3))
        done.append(asked.recipe.name)
        source = open_model(ref)
        as_rounded = Recipe(asked.recipe.name, asked.recipe.default, asked.recipe.head)
        return Made(pack_model(source, as_rounded, 1), source, {"compress": {"notes": []}})

    monkeypatch.setattr(calibrated, "compressed", compressed)
    return done


@pytest.mark.parametrize("recipe", [None, "w4", "w8-head16", "source", Recipe("own", Format.of(5))])
def test_packing_is_handed_on_and_nothing_is_looked_at(recipe: Any, cache: Path) -> None:
    assert prepared("no-such-model", recipe) == ("no-such-model", recipe)
    assert not cache.exists()


def test_made_once_and_kept(folder: Path, work: list[str]) -> None:
    told: list[Progress] = []
    first = hasten.load(folder, "w4-best", threads=1, observer=told.append)
    assert (first.name, first.recipe.name) == ("model", "w4-best")
    assert first.packed.linears["layers.0.q"].layout == Format.of(4)
    assert first.packed.linears["head"].layout == Format.of(8)
    assert [one.stage for one in told] == ["calibrate"]
    again = hasten.load(folder, "w4-best", threads=1, observer=told.append)
    assert work == ["w4-best"]
    assert len(told) == 1
    prompt = [5, 9, 40, 2]
    assert list(again.stream(prompt, 6)) == list(first.stream(prompt, 6))


def test_what_it_depends_on_is_in_the_key(
    folder: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, _ = prepared(folder, "w4-best")
    assert prepared(folder, Recipe.parse("w4-best"))[0] == start
    assert prepared(folder, "w4-gptq-head8")[0] != start
    monkeypatch.setattr(calibrated, "METHOD_VERSION", calibrated.METHOD_VERSION + 1)
    assert prepared(folder, "w4-best")[0] != start
    monkeypatch.undo()
    assert len(work) == 3


def test_another_text_is_another_model(
    folder: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.quality import text as texts

    start, _ = prepared(folder, "w4-best")
    own = texts.Text("own", "calibration", "evaluation")
    monkeypatch.setattr(texts, "default_text", lambda: own)
    assert prepared(folder, "w4-best")[0] != start
    assert len(work) == 2


def test_another_model_is_another_entry(
    folder: Path, work: list[str], tiny_folder: Callable[..., Path]
) -> None:
    assert prepared(folder, "w4-best")[0] != prepared(tiny_folder("llama"), "w4-best")[0]
    copied = Path(shutil.copytree(folder, folder.parent / "copy"))
    assert prepared(copied, "w4-best")[0] == prepared(folder, "w4-best")[0]
    assert len(work) == 2


def test_finding_it_again_imports_no_torch_and_packs_nothing(folder: Path, work: list[str]) -> None:
    prepared(folder, "w4-best")
    script = (
        "import sys, hasten\n"
        "model = hasten.load(sys.argv[1], 'w4-best', threads=1)\n"
        "heavy = {'torch', 'yaml', 'hasten.models.open', 'hasten.optimize.search'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else model.recipe.name != 'w4-best')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("switch", ["store", "environment"])
def test_without_a_store_it_goes_with_the_process(
    folder: Path, work: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    if switch == "environment":
        monkeypatch.setenv("HASTEN_CACHE_PACKED", "0")
    model = hasten.load(folder, "w4-best", threads=1, store=switch != "store")
    assert model.recipe.name == "w4-best"
    assert not (cache / "packed").exists()


def test_a_damaged_entry_is_made_anew(folder: Path, work: list[str]) -> None:
    place, _ = prepared(folder, "w4-best")
    weights = Path(place) / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-70] ^= 0x10
    weights.write_bytes(data)
    assert hasten.load(folder, "w4-best", threads=1).recipe.name == "w4-best"
    assert work == ["w4-best", "w4-best"]


def test_damage_to_the_users_own_artifact_is_said(folder: Path, work: list[str], tmp_path: Path) -> None:
    place, _ = prepared(folder, "w4-best")
    own = Path(shutil.copytree(place, tmp_path / "own.hasten"))
    (own / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError):
        load(own)
    assert own.exists()


def test_stopped_half_way_leaves_nothing_that_could_be_found(
    folder: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "compressed", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, "w4-best")
    store = open_store()
    assert store is not None
    assert store.entries() == []
    assert hasten.load(folder, "w4-best", threads=1).recipe.name == "w4-best"


def test_two_at_once(folder: Path, work: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)
    make = calibrated.compressed

    def slow(*arguments: Any) -> Made:
        found = make(*arguments)
        both.wait()  # neither is kept before both are made
        return found

    monkeypatch.setattr(calibrated, "compressed", slow)
    places: list[Any] = []
    threads = [
        threading.Thread(target=lambda: places.append(prepared(folder, "w4-best")[0])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(work) == 2
    assert places[0] == places[1]
    store = open_store()
    assert store is not None
    assert [store.verify(entry) for entry in store.entries()] == [None]


def test_an_artifact_has_its_recipe_already(folder: Path, work: list[str]) -> None:
    place, _ = prepared(folder, "w4-best")
    assert prepared(place, "w4-best") == (place, "w4-best")
    assert hasten.load(place, "w4-best", threads=1).recipe.name == "w4-best"
    for other in ("mix:1%", "w5-best", "w8"):
        with pytest.raises(UsageError, match="artifact"):
            hasten.load(place, other, threads=1)
    assert work == ["w4-best"]


def test_recipe_files(folder: Path, tmp_path: Path, work: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("default: w4\nhead: w8\nmethod: gptq\n")
    model = hasten.load(folder, str(file), threads=1)
    assert model.packed.linears["layers.1.down"].layout == Format.of(4)
    assert hasten.load(folder, str(file), threads=1).recipe.name == model.recipe.name
    assert len(work) == 1
    with pytest.raises(UsageError, match="absent"):
        hasten.load(folder, str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    "name", ["mix:abc", "mix:-1%", "mix:0%", "mix:", "mix:1", "mix:200%", "mix:nan%", "mix"]
)
def test_mixtures_that_mean_nothing(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        hasten.load("no-such-model", name)  # said before the model is looked for
    assert "mix:1%" in (caught.value.hint or "")
    assert main(["generate", str(folder), "-p", "x", "--recipe", name]) == 2
    assert "hint:" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["mix:5%", "mix: 5 %", "mix:5.0%", "mix:+5%"])
def test_a_budget_has_one_name(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten import loading

    seen: list[Any] = []
    monkeypatch.setattr(loading, "_mixture", lambda ref, budget, *_: seen.append(budget) or Path("x"))
    assert prepared("letters", written) == (Path("x"), None)
    assert calibrated.mixture_name(seen[0]) == "mix:5%"


def test_eval_compares_with_the_source(
    folder: Path, work: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(folder), "--recipe", "w4-best", "--tokens", "512", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["model"], document["recipe"]) == ("model", "w4-best")
    assert document["kl_mean"] > 0
    assert "layer 1" in err


def test_generate_shows_the_work_once(
    folder: Path, work: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "generate",
        str(folder),
        "-p",
        "abc",
        "--raw",
        "-n",
        "4",
        "--recipe",
        "w4-best",
        "--threads",
        "1",
    ]
    assert main(asked) == 0
    first = capsys.readouterr()
    assert "layer 1" in first.err
    assert "[w4-best]" in first.err
    assert main(asked) == 0
    second = capsys.readouterr()
    assert "layer 1" not in second.err
    assert first.out == second.out


def test_serve_prepares_before_anyone_can_ask(folder: Path, work: list[str]) -> None:
    from hasten.cli.serve import _prepared

    refs, left = _prepared({"a": str(folder), "b": str(folder)}, "w4-best")
    assert left is None
    assert work == ["w4-best"]
    assert refs["a"] == refs["b"] != str(folder)
    assert _prepared({"a": "no-such-model"}, "w4") == ({"a": "no-such-model"}, "w4")


class TestMixture:
    """`mix:P%` on a real tiny model, rounded to nearest."""

    @pytest.fixture(autouse=True)
    def without_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hasten import loading

        monkeypatch.setattr(loading, "_TOKENS", 1024)
        monkeypatch.setattr(calibrated, "torch_is_here", lambda: False)

    def test_searched_once_and_kept(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Progress] = []
        monkeypatch.setattr("hasten.machine.probe.load_or_measure", None)  # no ceilings: nothing is timed
        place, left = prepared(folder, "mix:30%", told.append, threads=1)
        assert left is None
        assert {one.stage for one in told} >= {"sensitivity", "recipes"}
        count = len(told)
        assert prepared(folder, "mix:30%", told.append, threads=1)[0] == place
        assert len(told) == count
        model = hasten.load(place, threads=1)
        assert (model.recipe.name, model.name) == ("mix:30%", "model")
        assert model.bits_per_weight < 16
        plan = json.loads((Path(place) / "plan.json").read_text())
        assert plan["verdict"]["status"] == "pass"
        assert any("torch is not installed" in reason for reason in plan["because"])
        assert {"kl_at_4_bits", "kl", "layout"} <= set(plan["sensitivity"][0])
        for layer in range(3):  # what an export stores as one matrix has one layout
            for parts in ("qkv", ("gate", "up")):
                linears = model.packed.linears
                assert len({linears[f"layers.{layer}.{part}"].layout for part in parts}) == 1

    def test_where_nothing_may_be_lost_nothing_is_narrowed(self, folder: Path) -> None:
        place, _ = prepared(folder, "mix:0.000001%", threads=1)
        model = hasten.load(place, threads=1)
        reasons = json.loads((Path(place) / "plan.json").read_text())["because"]
        narrowed = {n for n, linear in model.packed.linears.items() if linear.layout.bits < 16}
        assert bool(narrowed) != any("Nothing narrower" in reason for reason in reasons)

    def test_a_budget_that_nothing_meets(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        verdict = Verdict("fail", 8.1, 8.0, 0.012, 0.011, 0.013, 0.01, 0.1, 0.9, 1024)
        nearest = Candidate(Recipe("mix:1%"), 5.5, 100, verdict)
        monkeypatch.setattr(Search, "mixture", lambda self: nearest)
        with pytest.raises(BudgetError, match="no mixture is within") as caught:
            prepared(folder, "mix:1%", threads=1)
        assert caught.value.hint == "allow more: mix:1.4%"
        assert caught.value.exit_code == 3


class TestCalibrated:
    """The real thing on a tiny model: GPTQ for the search, layer after layer for what is kept."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hasten import loading
        from hasten.compress import calibration

        monkeypatch.setattr(loading, "_TOKENS", 1024)
        monkeypatch.setattr(calibration, "TOKENS", 2048)

    def test_w4_best(self, folder: Path) -> None:
        told: list[Progress] = []
        model = hasten.load(folder, "w4-best", threads=1, observer=told.append)
        assert {one.stage for one in told} == {"calibrate"}
        assert model.recipe.name == "w4-best"
        assert model.bits_per_weight < 6
        plain = hasten.load(folder, "w4-head8", threads=1)
        differ = [
            n for n, one in model.packed.linears.items() if (one.data != plain.packed.linears[n].data).any()
        ]
        assert "layers.0.q" in differ  # calibrated integers are others than the nearest ones
        assert "head" not in differ  # and 8 bits are rounded

    def test_a_mixture_stopped_half_way_goes_on(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from hasten.compress.quantise import layerwise as linears

        made_linears: list[str] = []
        real, stop_after = linears.gptq, [5]

        def counted(*arguments: Any) -> Any:
            if len(made_linears) == stop_after[0]:
                raise KeyboardInterrupt
            made_linears.append(arguments[-1])
            return real(*arguments)

        monkeypatch.setattr(linears, "gptq", counted)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, "mix:30%", threads=1)
        first = list(made_linears)
        made_linears.clear()
        stop_after[0] = -1
        place, _ = prepared(folder, "mix:30%", threads=1)
        assert first and made_linears
        assert made_linears[0] != first[0]  # the probe of the first group was kept
        plan = json.loads((Path(place) / "plan.json").read_text())
        assert plan["verdict"]["status"] == "pass"
        assert plan["sensitivity_method"] == "gptq"
        assert not any("torch" in reason for reason in plan["because"])
        model = hasten.load(place, threads=1)
        assert model.recipe.name == "mix:30%"
        assert model.bits_per_weight < 16
