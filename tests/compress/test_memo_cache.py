"""MemoCache: an output is given again only where running the module would give the same."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import torch
from torch import nn

from hasten.compress import compressed_module
from hasten.compress.compressed_module import MemoCache
from hasten.core import CachePolicy
from hasten.errors import UsageError

NAN = float("nan")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2).eval()


def cached(module: nn.Module, capacity: int = 1 << 20, policy: CachePolicy = "lru") -> Any:
    cache = MemoCache(module.eval(), capacity, policy)

    def call(*args: Any, **kwargs: Any) -> Any:
        return cache.call(module, args, kwargs)

    call.cache = cache  # type: ignore[attr-defined]
    return call


def hits(call: Any) -> int:
    return int(call.cache.stats().hits)


class Double(nn.Module):
    def forward(self, x: Any, *rest: Any, **named: Any) -> Any:
        return x * 2


X = torch.tensor([[1.0, -2.0, 3.0, 0.5]])


def test_the_same_input_hits_and_gives_the_same_bits() -> None:
    module = linear()
    call = cached(module)
    first = call(X)
    assert torch.equal(call(X.clone()), first) and torch.equal(first, module(X))
    assert (hits(call), call.cache.stats().misses, call.cache.stats().entries) == (1, 1, 1)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
        (torch.tensor([NAN]), torch.tensor([NAN]).neg()),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(2, 0), torch.zeros(0, 2)),
        (torch.arange(4.0).reshape(2, 2), torch.tensor([[0.0, 2.0], [1.0, 3.0]]).t()),
        (torch.ones(2, 2), torch.ones(1, 1).expand(2, 2)),
        (torch.tensor([True]), torch.tensor([1], dtype=torch.uint8)),
    ],
    ids=["-0.0", "one bit", "nan sign", "dtype", "half", "shape", "empty", "strides", "expanded", "bool"],
)
def test_what_differs_is_another_input(one: torch.Tensor, two: torch.Tensor) -> None:
    call = cached(Double())
    for x in (one, two, one, two):
        y = call(x)
        assert y.dtype == (x * 2).dtype and y.shape == x.shape
        assert (
            y.contiguous().view(-1).view(torch.uint8).equal((x * 2).contiguous().view(-1).view(torch.uint8))
        )
    assert call.cache.stats().misses == 2 and hits(call) == 2


def test_a_nan_is_equal_to_itself() -> None:
    call = cached(Double())
    assert call(torch.tensor([NAN, 1.0])).isnan()[0]
    assert call(torch.tensor([NAN, 1.0])).isnan()[0]
    assert hits(call) == 1


def test_equal_values_on_the_same_strides_hit() -> None:
    call = cached(Double())
    wide = torch.arange(16.0).reshape(4, 4)
    call(wide[:, ::2])
    assert torch.equal(call(wide.clone()[:, ::2]), wide[:, ::2] * 2)
    assert hits(call) == 1


def test_plain_arguments_count_by_value_kind_and_name() -> None:
    call = cached(Double())
    for _ in range(2):
        for args, kwargs in (
            ((X, 1), {}), ((X, True), {}), ((X, 1.0), {}), ((X, "1"), {}), ((X, None), {}),
            ((X,), {"a": 1}), ((X,), {"b": 1}), ((X, -0.0), {}), ((X, 0.0), {}),
        ):  # fmt: skip
            call(*args, **kwargs)
    assert call.cache.stats().misses == 9 and hits(call) == 9
    call(X, a=1, b=2)
    call(X, b=2, a=1)
    assert hits(call) == 10


def test_the_caller_may_write_to_inputs_and_outputs() -> None:
    call = cached(linear())
    x = X.clone()
    kept = call(x).clone()
    call(X).zero_()
    call(x).zero_()
    assert torch.equal(call(X), kept)
    x.zero_()
    assert torch.equal(call(X), kept)
    assert not torch.equal(call(x), kept)


def test_nested_outputs_come_back_whole() -> None:
    class Many(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"a": [x + 1, (x * 2, None)], "n": 3}

    call = cached(Many())
    one, two = call(X), call(X)
    assert hits(call) == 1 and two["n"] == 3 and two["a"][1][1] is None
    assert isinstance(two["a"], list) and isinstance(two["a"][1], tuple)
    assert torch.equal(one["a"][1][0], two["a"][1][0])


def test_what_it_has_no_bytes_of_goes_past_it() -> None:
    module = Double()
    call = cached(module)
    call(X, [X])
    call(X, object())
    module.train()
    call(X)
    module.eval()
    with torch.enable_grad():
        call(X)
    with torch.autocast("cpu"):
        call(X)
    assert call.cache.stats().bypassed == 5 and call.cache.stats().entries == 0


def test_training_mode_of_any_part_goes_past_it() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).eval()
    call = cached(module)
    assert torch.equal(call(X), call(X))
    module[1].train()
    assert not torch.equal(call(X), call(X))
    assert hits(call) == 1


def _in_place(module: nn.Module) -> None:
    module[0].bias.add_(1)  # type: ignore[index, union-attr, operator]


def _load(module: nn.Module) -> None:
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})


def _replace(module: nn.Module) -> None:
    module[0].bias = nn.Parameter(torch.ones(4))  # type: ignore[index, union-attr]


def _data(module: nn.Module) -> None:
    module[0].bias.data = torch.ones(4)  # type: ignore[index, union-attr]


def _turn(module: nn.Module) -> None:
    module[0].weight.data = module[0].weight.data.t()  # type: ignore[index, union-attr]


def _part(module: nn.Module) -> None:
    module[0] = nn.Linear(4, 4).eval()  # type: ignore[index, operator]


def _activation(module: nn.Module) -> None:
    module[1] = nn.Tanh().eval()  # type: ignore[index, operator]


def _optimiser(module: nn.Module) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    with torch.enable_grad():
        module(X).sum().backward()
    optimiser.step()


def _buffer(module: nn.Module) -> None:
    module[2].running_mean.add_(1)  # type: ignore[index, union-attr, operator]


@pytest.mark.parametrize(
    "change", [_in_place, _load, _replace, _data, _turn, _part, _activation, _optimiser, _buffer]
)
def test_a_changed_module_is_never_answered_for(change: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.BatchNorm1d(4)).eval()
    call = cached(module)
    before = call(X)
    change(module)
    after = call(X)
    assert torch.equal(after, module(X)) and not torch.equal(after, before)
    assert call.cache.stats().dropped == 1 and hits(call) == 0


def test_addresses_that_come_again_are_not_taken_for_the_old() -> None:
    module = linear()
    call = cached(module)
    for value in range(50):  # each is freed before the next is made, often at the same address
        module.bias = nn.Parameter(torch.full((2,), float(value)))
        assert torch.equal(call(X), module(X))


def test_a_module_that_changes_while_it_runs_is_not_kept() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        calls: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    call = cached(Counts().eval())
    assert [float(call(torch.ones(()))) for _ in range(3)] == [1, 2, 3]
    assert call.cache.stats().entries == 0


def test_a_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_module, "_digest", lambda _: b"same")
    call = cached(Double())
    for _ in range(2):
        for value in (1.0, 2.0):
            assert float(call(torch.tensor(value))) == 2 * value
    assert hits(call) == 1  # the first stays


@pytest.mark.parametrize("policy", get_args(CachePolicy))
def test_every_policy_keeps_to_the_capacity(policy: CachePolicy) -> None:
    call = cached(Double(), capacity=6000, policy=policy)
    for value in [*range(40), *range(40)]:
        x = torch.full((16,), float(value))
        assert torch.equal(call(x), x * 2)
        assert call.cache.stats().bytes <= 6000
    stats = call.cache.stats()
    assert stats.evicted == stats.misses - stats.entries > 0
    assert 5 <= stats.entries <= 9


def test_lru_lets_the_longest_unused_go_and_lfu_the_least_used() -> None:
    small, often, new = (torch.full((16,), float(value)) for value in range(3))
    for policy, gone in (("lru", often), ("lfu", small)):
        call = cached(Double(), capacity=1500, policy=policy)  # room for two
        for x in (often, often, often, small, new):
            call(x)
        assert call.cache.stats().evicted == 1
        before = call.cache.stats().misses
        call(gone)
        assert call.cache.stats().misses == before + 1, policy


def test_an_output_larger_than_the_cache_is_counted() -> None:
    call = cached(Double(), capacity=1000)
    call(torch.ones(1000))
    assert call.cache.stats().too_large == 1 and call.cache.stats().bytes == 0


def test_clear_forgets() -> None:
    call = cached(Double())
    call(X)
    call.cache.clear()
    call(X)
    assert hits(call) == 0 and call.cache.stats().misses == 2


def test_wrong_capacity_or_policy() -> None:
    with pytest.raises(UsageError, match="byte"):
        MemoCache(linear(), 0)
    with pytest.raises(UsageError, match="policy"):
        MemoCache(linear(), 100, "mru")  # type: ignore[arg-type]


def test_threads_get_their_own_answers() -> None:
    call = cached(Double(), capacity=8000, policy="s3fifo")
    wrong: list[float] = []

    def work(seed: int) -> None:
        values = torch.randint(0, 30, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            for value in values:
                x = torch.full((8,), float(value))
                if not torch.equal(call(x), x * 2):
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = call.cache.stats()
    assert not wrong and stats.hits + stats.misses == 1600 and stats.bytes <= 8000
