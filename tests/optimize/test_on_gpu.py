"""The search and the judge on a GPU: its executor in plain torch on a CPU stands in for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hasten
from hasten.cli import main
from hasten.core import Accelerator, EngineOptions, Recipe, Workload
from hasten.errors import MachineError
from hasten.optimize.choice import WORKLOADS
from hasten.optimize.search import Effort
from hasten.optimize.sensitivity import OFFERS
from hasten.optimize.workshop import Workshop
from hasten.quality.text import default_text
from hasten.runtime import executor as executors
from hasten.runtime.gpu import driver
from hasten.runtime.gpu.executor import TorchExecutor
from hasten.weights.packed import PackedModel

GPU = Accelerator("Some GPU", 80 << 30, "9.0", 4000.0, 800.0, 1500.0, 50.0, 50.0, 3.0, 9.0)


class Refusing(TorchExecutor):
    """A GPU that is too small for anything."""

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        raise MachineError("the weights take 16 GB")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes a class the device "cuda"; "auto" finds it."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))

    def there(kind: str) -> None:
        monkeypatch.setitem(executors.EXECUTORS, "cuda", f"{__name__}:{kind}")
        card = driver.Device("Some GPU", (9, 0), 132, 1 << 17)
        monkeypatch.setattr(driver, "current_device", lambda: card)
        monkeypatch.setattr("hasten.machine.probe.gpu_ceilings", lambda _: (GPU,))

    return there


def test_a_search_on_a_gpu_tries_what_it_runs_and_judges_there(
    gpu: Callable[[str], None],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu("TorchExecutor")
    monkeypatch.setitem(WORKLOADS, "latency", Workload(32, 4))
    whole = OFFERS["cuda"]
    monkeypatch.setitem(OFFERS, "cuda", replace(whole, uniform=("source", "fp8", "w4"), menu=whole.menu[:3]))
    text = tmp_path / "text"
    text.write_text(default_text().evaluation[:30_000])
    said: list[str] = []
    found = hasten.optimize(
        tiny_folder("llama-wide"), 20.0, out=tmp_path / "out.hasten", threads=1, device="auto", text=text,
        calibrate=False,
        effort=Effort(tokens=1024, runs=1, sensitivity_seconds=1.0),
        observer=lambda progress: said.append(progress.detail),
    )  # fmt: skip
    names = [c.recipe.name for c in found.candidates]
    assert names[:2] == ["fp8", "w4"]
    assert "--device auto is cuda: Some GPU" in said
    assert found.plan.options.device == "cuda" and found.machine.accelerators == (GPU,)
    timed = [c.measurement for c in found.candidates if c.measurement is not None]
    assert timed and {one.device for one in timed} == {"cuda"}
    assert all(one.fraction_of_read_ceiling and one.fraction_of_gpu_ceiling for one in timed)
    model = hasten.load(tmp_path / "out.hasten", options=EngineOptions(threads=1, context=256, device="cuda"))
    assert model.device == "cuda" and list(model.stream([5, 6, 7], 4))
    assert "Some GPU" in (tmp_path / "out.hasten" / "report.html").read_text()


def test_auto_settles_on_the_cpu_where_the_gpu_refuses_the_source(
    gpu: Callable[[str], None], tiny_folder: Callable[..., Path]
) -> None:
    gpu("Refusing")
    workshop = Workshop(tiny_folder("llama"), EngineOptions(threads=1, device="auto"))
    built: Any = workshop.settle(Recipe.parse("bf16"))
    assert workshop.options.device == built.device == "cpu"
    assert workshop.device_because == "the weights take 16 GB"


def test_eval_judges_on_the_device(
    gpu: Callable[[str], None], tiny_folder: Callable[..., Path], capsys: Any
) -> None:
    gpu("TorchExecutor")
    flags = ["--recipe", "w4", "--tokens", "1024", "--threads", "1", "--device", "auto", "--json"]
    assert main(["eval", str(tiny_folder("llama")), *flags]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["device"] == "cuda" and document["kl_mean"] > 0
    assert "--device auto is cuda: Some GPU" in shown.err
