"""`compress_module`: what each step does to a plain torch module, and what it refuses."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from hasten.compress import module_layers
from hasten.compress.module import compress_module
from hasten.compress.module_layers import Int8Linear
from hasten.compress.module_recipe import ModuleRecipe
from hasten.errors import MachineError, ModelError, UsageError


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def run(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = module(*inputs)
    assert isinstance(result, torch.Tensor)
    return result


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def test_int8_is_close_and_four_times_smaller() -> None:
    module = mlp(64, 128, 64)
    fast = compress_module(module, ModuleRecipe(bits=8), X, rounds=1)
    assert [type(part) for part in fast.module] == [Int8Linear, nn.ReLU, Int8Linear]  # type: ignore[arg-type]
    error = relative(fast(X), run(module, X))
    assert 0 < error < 0.02
    first, last = fast.report.stages
    assert last.relative_difference == pytest.approx(error, rel=1e-3)
    assert last.max_difference == pytest.approx(float((fast(X) - run(module, X)).abs().max()), rel=1e-3)
    assert 3.5 < first.bytes / last.bytes < 4
    assert first.bytes == sum(p.numel() for p in module.parameters()) * 4


def test_the_module_itself_is_untouched() -> None:
    module = mlp(64, 32, 8).train()
    before = copy.deepcopy(module.state_dict())
    fast = compress_module(module, ModuleRecipe(bits=8, prune=0.5, cache_mb=1), X, rounds=1)
    assert module.training and not fast.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert isinstance(module[0], nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (40, 64)])
def test_int8_linear_takes_what_linear_takes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 24, bias=len(shape) != 3).to(dtype)
    x = torch.randn(shape).to(dtype)
    ours, theirs = run(Int8Linear(linear), x), run(linear, x)
    assert ours.dtype == dtype and ours.shape == theirs.shape
    if x.numel():
        assert relative(ours.float(), theirs.float()) < 0.03


def test_a_row_is_rounded_by_its_own_scale() -> None:
    layer = Int8Linear(nn.Linear(64, 24))
    large = torch.cat([X[:1], X[1:] * 1e6])
    assert torch.equal(run(layer, large)[0], run(layer, X)[0])
    assert torch.equal(run(layer, torch.zeros(1, 64)), layer.bias[None])  # type: ignore[index]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_int8_does_not_hide_what_is_not_finite(wrong: float) -> None:
    x = X.clone()
    x[2, 7] = wrong
    y = run(Int8Linear(nn.Linear(64, 24)), x)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def test_without_vnni_weights_stay_where_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(64, 24)
    full = Int8Linear(linear)
    state, saved = full.state_dict(), io.BytesIO()
    torch.save(full, saved)
    monkeypatch.setattr(module_layers, "exact_levels", lambda: 64)
    reduced = Int8Linear(linear)
    assert int(reduced.weight_int8.abs().max()) == 64
    assert relative(run(reduced, X), run(linear, X)) < 0.03
    if full.levels > 64:
        with pytest.raises(MachineError, match="VNNI"):
            reduced.load_state_dict(state)
        saved.seek(0)
        with pytest.raises(MachineError, match="VNNI"):
            torch.load(saved, weights_only=False)


def test_sums_are_exact_on_every_kind_of_processor() -> None:
    """oneDNN limited to AVX2: products of full int8 values saturate there, which the probe must notice."""
    code = (
        "import torch; from hasten.compress.module_layers import exact_levels as most; n = most();"
        "a = torch.full((3, 784), 127, dtype=torch.int8); b = torch.full((5, 784), n, dtype=torch.int8);"
        "assert (torch._int_mm(a, b.t()) == 127 * n * 784).all(); print(n)"
    )
    command = ["env", "ONEDNN_MAX_CPU_ISA=AVX2", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_layers_that_must_stay_are_named() -> None:
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    tied = nn.Linear(32, 32)
    module = nn.Sequential(encoder, hooked, tied, nn.Tanh(), tied)
    fast = compress_module(module, ModuleRecipe(bits=8), torch.randn(2, 5, 32), rounds=1)
    skipped = " ".join(fast.report.stages[-1].skipped)
    assert "0.linear1 (TransformerEncoderLayer" in skipped and "1 (has hooks" in skipped
    assert "0.self_attn.out_proj (is a NonDynamicallyQuantizableLinear" in skipped
    assert fast.module[2] is fast.module[4]  # type: ignore[index]
    assert isinstance(fast.module[2], Int8Linear)  # type: ignore[index]
    assert fast.report.stages[-1].relative_difference < 0.05


def test_channels_make_smaller_dense_layers() -> None:
    module = mlp(64, 100, 50, 8)
    fast = compress_module(module, ModuleRecipe(prune=0.3), X, rounds=1)
    shapes = [tuple(part.weight.shape) for part in fast.module if isinstance(part, nn.Linear)]  # type: ignore[union-attr]
    assert shapes == [(70, 64), (35, 70), (8, 35)]
    assert fast.report.stages[-1].bytes < 0.7 * fast.report.stages[0].bytes


def test_the_weakest_channels_go() -> None:
    """Neurons that do nothing go first: the output stays to the last rounding."""
    module = mlp(64, 40, 8)
    first, second = module[0], module[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    with torch.no_grad():
        second.weight[:, :10] = 0  # used by nobody
        first.weight[30:] = 0  # says nothing
        first.bias[30:] = 0
    fast = compress_module(module, ModuleRecipe(prune=0.5), X, rounds=1)
    assert torch.allclose(fast(X), run(module, X), atol=1e-6)
    assert fast.module[0].weight.shape == (20, 64)  # type: ignore[index, union-attr]


def test_channels_stay_where_removing_one_changes_others() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.chain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), self.inner, nn.ReLU(), nn.Linear(64, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = self.chain(self.inner(x))
            assert isinstance(result, torch.Tensor)
            return result

    softmax = nn.Sequential(nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 8))
    prelu = nn.Sequential(nn.Linear(64, 64), nn.PReLU(64), nn.Linear(64, 8))
    for module in (Shared(), softmax, prelu):
        with pytest.raises(UsageError, match="nothing to prune"):
            compress_module(module, ModuleRecipe(prune=0.5), X)


def test_nested_chains_are_one_chain() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(64, 32), nn.GELU()), nn.Sequential(nn.Linear(32, 8)))
    fast = compress_module(module, ModuleRecipe(prune=0.5), X, rounds=1)
    assert fast.module[0][0].weight.shape == (16, 64)  # type: ignore[index, union-attr]


def test_weights_one_by_one_are_zeros_of_the_same_size() -> None:
    module = mlp(64, 32, 8)
    fast = compress_module(module, ModuleRecipe(prune=0.5, prune_kind="weights"), X, rounds=1)
    first = fast.module[0]  # type: ignore[index]
    assert isinstance(first, nn.Linear)
    zero = first.weight == 0
    assert int(zero.sum()) == 64 * 32 // 2
    original = module[0].weight.detach().abs()  # type: ignore[union-attr, operator]
    assert original[zero].max() <= original[~zero].min()
    assert fast.report.stages[0].bytes == fast.report.stages[1].bytes
    assert "multiplied all the same" in str(fast.report)


def test_the_report_has_a_row_and_a_line_for_each_step() -> None:
    recipe = ModuleRecipe(bits=8, prune=0.25, cache_mb=1)
    fast = compress_module(mlp(64, 128, 8), recipe, X, rounds=3)
    names = ["as it was", "pruned", "int8", "cache, new input", "cache, seen input"]
    assert [stage.name for stage in fast.report.stages] == names
    text = str(fast.report)
    assert all(text.count(f"\n{name}") == 1 and f"- {name}: " in text for name in names)
    assert all(stage.seconds.n == 3 and stage.seconds.median > 0 for stage in fast.report.stages)
    assert fast.report.input == "5x64" and fast.report.speedup > 0
    assert fast.cache_stats().entries == fast.cache_stats().hits == 0  # what was measured is gone


def test_a_compressed_module_can_be_saved_and_copied() -> None:
    fast = compress_module(mlp(64, 32, 8), ModuleRecipe(bits=8, cache_mb=1), X, rounds=1)
    fast(X)
    saved = io.BytesIO()
    torch.save(fast, saved)
    saved.seek(0)
    for again in (torch.load(saved, weights_only=False), copy.deepcopy(fast)):
        assert torch.equal(again(X), fast(X)) and again.cache is not fast.cache
        with torch.no_grad():
            fast.module[0].bias.add_(1)  # type: ignore[index, union-attr, operator]
        assert again.cache_stats().misses == 1 and not torch.equal(again(X), fast(X))
        with torch.no_grad():
            fast.module[0].bias.sub_(1)  # type: ignore[index, union-attr, operator]
        assert str(again.report) == str(fast.report)


@pytest.mark.slow
def test_compiled_gives_the_same() -> None:
    module = mlp(64, 32, 8)
    fast = compress_module(module, ModuleRecipe(compile="default", cache_mb=1), X, rounds=1)
    assert torch.allclose(fast(X), run(module, X), atol=1e-5)
    assert fast.report.stages[1].setup_s > 0.01
    assert sorted(fast.state_dict()) == sorted(f"module.{name}" for name in module.state_dict())


def test_a_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def fails(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(MachineError, match="no C\\+\\+ compiler") as wrong:
        compress_module(mlp(64, 8), ModuleRecipe(compile="default"), X)
    assert wrong.value.hint and "g++" in wrong.value.hint


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 4}, "bits"),
        ({"prune": 1.0}, "prune"),
        ({"prune": -0.1}, "prune"),
        ({"prune": float("nan")}, "prune"),
        ({"prune_kind": "layers"}, "prune_kind"),
        ({"compile": "fastest"}, "compile mode"),
        ({"cache_mb": -1}, "cache_mb"),
        ({"cache_mb": float("inf")}, "cache_mb"),
        ({"cache_policy": "mru"}, "cache policy 'mru'"),
    ],
)
def test_wrong_recipes(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as wrong:
        ModuleRecipe(**options)
    assert wrong.value.hint


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2


@pytest.mark.parametrize(
    ("module", "recipe", "calibration", "match"),
    [
        (nn.Conv1d(5, 5, 1), ModuleRecipe(bits=8), X, "no Linear layer"),
        (nn.Conv1d(5, 5, 1), ModuleRecipe(prune=0.5), X, "nothing to prune"),
        (nn.Linear(64, 8), ModuleRecipe(prune=0.5), X, "nothing to prune"),
        (mlp(64, 8, 4), ModuleRecipe(prune=0.01), X, "nothing to prune"),
        (nn.Conv1d(5, 5, 1), ModuleRecipe(prune=0.5, prune_kind="weights"), X, "nothing to prune"),
        (Draws(), ModuleRecipe(cache_mb=1), X, "two outputs for one input"),
        (Counts(), ModuleRecipe(cache_mb=1), X, "buffers"),
        (nn.Linear(64, 8), ModuleRecipe(cache_mb=1e-4), X, "0.0001 MB"),
        (nn.Linear(64, 8).to("meta"), ModuleRecipe(), X, "on meta"),
        (nn.Linear(64, 8), ModuleRecipe(), [1.0], "tensors of one call"),
        (nn.Linear(64, 8), "w8", X, "ModuleRecipe"),
        ("demo", ModuleRecipe(), X, "torch.nn.Module"),
    ],
)
def test_what_cannot_be_done_is_said(module: Any, recipe: Any, calibration: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match) as wrong:
        compress_module(module, recipe, calibration)
    assert wrong.value.hint


def test_a_calibration_that_does_not_fit_is_said() -> None:
    with pytest.raises(ModelError, match="does not run on the calibration input") as wrong:
        compress_module(mlp(64, 8), ModuleRecipe(bits=8), torch.rand(2, 63))
    assert wrong.value.hint and "calibration" in wrong.value.hint
    with pytest.raises(UsageError, match="rounds"):
        compress_module(mlp(64, 8), ModuleRecipe(bits=8), X, rounds=0)


def test_lazy_layers_have_their_shape_by_then() -> None:
    fast = compress_module(nn.Sequential(nn.LazyLinear(8)), ModuleRecipe(bits=8), X, rounds=1)
    assert fast(X).shape == (5, 8)


def test_importing_needs_no_torch_and_its_absence_is_said() -> None:
    code = (
        "import sys; import hasten.compress.module as m\n"
        "from hasten.compress.module_recipe import ModuleRecipe\n"
        "assert 'torch' not in sys.modules; m.find_spec = lambda name: None\n"
        "try: m.compress_module(object(), ModuleRecipe(), None)\n"
        "except Exception as e: print(type(e).__name__, e.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.strip() == "MachineError pip install 'hasten[compress]'", done.stderr
