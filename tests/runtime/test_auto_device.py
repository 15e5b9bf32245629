"""`device="auto"`: a GPU where it runs this model, else the CPU, and why."""

from __future__ import annotations

from typing import Any

import pytest
from executor_models import options, packed

from hasten.core import EngineOptions, Recipe
from hasten.errors import HastenError, MachineError, ModelError, UsageError
from hasten.runtime import executor as executors
from hasten.runtime.executor import EXECUTORS, check_recipe, open_executor
from hasten.runtime.gpu.executor import TorchExecutor
from hasten.weights.packed import PackedModel


class Small(TorchExecutor):
    """A GPU without memory, that knows no recipe but bf16."""

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        raise MachineError("the weights take 16 GB", hint="use a smaller model")

    @staticmethod
    def check(recipe: Recipe) -> None:
        if recipe.name != "bf16":
            raise UsageError(f"the GPU does not run {recipe.name}", hint="use bf16")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a class the device "cuda"; the machine has one then."""

    def there(kind: str) -> None:
        monkeypatch.setitem(EXECUTORS, "cuda", f"{__name__}:{kind}")
        monkeypatch.setattr(executors, "choose_device", lambda wanted: ("cuda", "Some GPU"))

    return there


def test_a_gpu_that_runs_the_model_is_taken(gpu: Any) -> None:
    gpu("TorchExecutor")
    found = open_executor(packed("qwen3"), options("auto"))
    assert (found.device, found.because, found.name) == ("cuda", "Some GPU", "torch")


@pytest.mark.parametrize(
    ("kind", "name", "recipe", "why"),
    [
        ("TorchExecutor", "olmo2", "bf16", "olmo2"),
        ("Small", "qwen3", "bf16", "the weights take 16 GB"),
        ("Small", "qwen3", "w4", "the weights take 16 GB"),
    ],
)
def test_what_a_gpu_does_not_run_goes_to_the_cpu(
    gpu: Any, kind: str, name: str, recipe: str, why: str
) -> None:
    gpu(kind)
    found = open_executor(packed(name, recipe), options("auto"))
    assert found.device == "cpu" and why in found.because
    assert list(found.hidden(executors.CachedSequence(), [1, 2, 3]).shape) == [3, 64]


def test_a_device_that_was_named_is_the_only_one(gpu: Any) -> None:
    gpu("TorchExecutor")
    with pytest.raises(ModelError, match="olmo2"):
        open_executor(packed("olmo2"), options("cuda"))
    found = open_executor(packed("qwen3"), options("cuda"))
    assert (found.device, found.because) == ("cuda", "")


def test_a_recipe_is_refused_only_where_no_device_runs_it(gpu: Any) -> None:
    gpu("Small")
    check_recipe("auto", Recipe.parse("w4"))
    with pytest.raises(UsageError, match="the GPU does not run w4"):
        check_recipe("cuda", Recipe.parse("w4"))
    with pytest.raises(UsageError, match="CPU engine"):
        check_recipe("auto", Recipe.parse("fp8-e4m3"))


def test_both_refusals_are_told(gpu: Any) -> None:
    gpu("Small")
    with pytest.raises(HastenError, match=r"context.*and on the GPU: the weights take 16 GB") as both:
        open_executor(packed("qwen3"), options("auto", context=100_000))
    assert both.value.hint
