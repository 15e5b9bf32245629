"""A model in two processes that gloo connects, against the same executor in one: no GPU is needed."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running_models import GREEDY, answers, running

from hasten.core import ServingOptions
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import DeviceLost, HastenError, MachineError, UsageError
from hasten.models.artifact import load_artifact
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.runtime.gpu.parallel import Crew, TorchLeader, mapped_place, store_of_this_host
from hasten.runtime.sampling import SamplingOptions
from tiny_artifacts import make, mixed
from tiny_models import Tiny, prompts, save_folder

SAMPLED = SamplingOptions(0.8, top_p=0.9, seed=3, ignore_eos=True)
ROUNDING = 2e-5  # of the logits' spread: sums in another order
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
KINDS: dict[str, Tiny] = {
    "llama": Tiny("llama", "llama", SIZES | {"num_key_value_heads": 2, "vocab_size": 264}, None, 5),
    "qwen2": Tiny("qwen2", "qwen2", SIZES | {"num_key_value_heads": 1}, None, 6),  # copied, biases
    "gemma3": Tiny("gemma3", "gemma3_text", SIZES | {"num_key_value_heads": 2}, None, 7),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    def made(name: str) -> Source:
        folder = tmp_path_factory.getbasetemp() / f"parallel-{name}"
        if not folder.exists():
            save_folder(KINDS[name], folder, "bfloat16", False)
        return open_model(folder)

    return made


def on_ranks(source: Source, ranks: int, **options: Any) -> AbstractContextManager[LanguageModel]:
    """The model shared out among so many processes."""
    wanted = {"device": "torch", "context": 256, "max_sequences": 8, "tensor_parallel": ranks}
    return running(source, **(wanted | options))


def processes(model: LanguageModel) -> list[Any]:
    crew: Any = model.executor
    return [link.process for link in crew._crew.links]


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in list(KINDS)[1:])]
)
def test_two_ranks_compute_what_one_does(name: str, folders: Callable[[str], Source]) -> None:
    source, first = folders(name), [list(one) for one in prompts()]
    with on_ranks(source, 1) as one, on_ranks(source, 2) as two:
        for prompt in first[:2]:
            wanted, got = one.logits(prompt), two.logits(prompt)
            assert np.abs(got - wanted).max() < max(ROUNDING * np.abs(wanted).max(), 0.02 * wanted.std())
        assert list(two.stream(first[0], 24, GREEDY)) == list(one.stream(first[0], 24, GREEDY))


@pytest.mark.slow
def test_features_together_are_those_of_one_rank(folders: Callable[[str], Source], tmp_path: Path) -> None:
    """Prefix cache, its disk tier, chunks, drafts, preemption, sampling, log-probabilities, n."""
    source, start, stats = folders("llama"), tuple(prompts()[2]), list[Any]()
    requests = [
        Request(tuple(prompts()[0]), 100, GREEDY),
        Request(start[5:25], 95, GREEDY),
        Request(start, 40, GREEDY),
        Request((*start, 9), 40, SAMPLED, logprobs=2),
        Request((*start, 10), 30, SAMPLED),
        Request(start[:20], 20, SAMPLED, n=2),
        Request((*start, 11), 1, GREEDY, prompt_logprobs=1),
    ]
    found = {}
    for ranks in (1, 2):
        with on_ranks(source, ranks) as model:
            size = model.executor.page_bytes // ranks
        room = {"kv_gb": 6.5 * size / 1e9, "context": 128}
        with on_ranks(source, ranks, **room) as model:
            model.executor.chunk = 16
            folder = tmp_path / str(ranks)
            found[ranks] = [answers(model, requests, stats, kv_disk=folder) for _ in range(2)]
            found[ranks].append([answers(model, [one], prefix_cache=False)[0] for one in requests])
    assert all(one.preemptions > 0 for one in stats)
    assert found[1] == found[2]


def test_a_page_is_read_and_written_in_all_shares(folders: Callable[[str], Source]) -> None:
    prompt = list(prompts()[0])
    with on_ranks(folders("llama"), 2) as model:
        wanted = model.logits(prompt)
        data = model.executor.read_page(0)
        assert len(data) == model.executor.page_bytes and data.any()
        model.executor.write_page(5, data)
        model.executor.copy_page(5, 6)
        assert np.array_equal(model.executor.read_page(6), data)
        assert np.array_equal(model.logits(prompt), wanted)


def test_matrices_of_an_artifact_are_mapped_by_every_process(tmp_path: Path) -> None:
    """A follower reads the bytes itself; the leader does not send them."""
    artifact = load_artifact(make(tmp_path, "llama", mixed()))
    for name, linear in artifact.packed.linears.items():
        found = pickle.loads(pickle.dumps(mapped_place(linear)))
        assert np.array_equal(found.open().data, linear.data), name


@pytest.mark.slow
def test_a_cancelled_request_leaves_the_others_alone(folders: Callable[[str], Source]) -> None:
    prompt = tuple(prompts()[0])
    with on_ranks(folders("llama"), 2) as model:
        (alone,) = answers(model, [Request(prompt, 20, GREEDY)])
        with model.engine(ServingOptions()) as engine:
            engine.add(Request(prompt, 20, GREEDY, id="kept"))
            engine.add(Request(prompt[1:], 20, GREEDY, id="gone"))
            kept: list[int] = []
            for step in range(60):
                if step == 4:
                    assert engine.cancel("gone")
                for output in engine.step() if engine.busy else []:
                    kept += output.token_ids if output.request_id == "kept" else []
        assert kept == alone


@pytest.mark.slow
def test_a_matrix_can_be_replaced(folders: Callable[[str], Source]) -> None:
    source, prompt = folders("llama"), list(prompts()[0])
    with on_ranks(source, 1) as one, on_ranks(source, 2) as two:
        for model in (one, two):
            for name in ("layers.0.o", "layers.1.k", "embed", "head"):
                if name in model.packed.linears:
                    other = "layers.1.o" if name == "layers.0.o" else name
                    model.replace(name, model.packed.linears[other])
        wanted, got = one.logits(prompt), two.logits(prompt)
        assert np.abs(got - wanted).max() < max(ROUNDING * np.abs(wanted).max(), 0.02 * wanted.std())


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="dies"),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_lost_ends_answers_within_seconds(
    how: signal.Signals, folders: Callable[[str], Source]
) -> None:
    with on_ranks(folders("llama"), 2) as model:
        (process,) = processes(model)
        stream = model.stream(list(prompts()[0]), 200, GREEDY)
        next(stream)
        os.kill(process.pid, how)
        began = time.monotonic()
        with pytest.raises(HastenError, match="rank 1"):
            list(stream)
        assert time.monotonic() - began < 5
        with pytest.raises(MachineError, match="rank 1"):
            model.logits(list(prompts()[0]))
    assert process.wait(5) is not None


def test_the_lost_rank_is_named_where_gloo_notices_first(
    folders: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = Crew._fail

    def fails_late(crew: Crew, why: str) -> None:
        time.sleep(0.2)
        fail(crew, why)

    with on_ranks(folders("llama"), 2) as model:
        monkeypatch.setattr(Crew, "_fail", fails_late)
        (process,) = processes(model)
        stream = model.stream(list(prompts()[0]), 200, GREEDY)
        next(stream)
        process.kill()
        with pytest.raises(HastenError, match="rank 1"):
            list(stream)


def test_the_store_of_the_ranks_listens_on_this_host_alone() -> None:
    store = store_of_this_host()
    store.set("key", "value")
    assert store.get("key") == b"value"
    socket.create_connection(("127.0.0.1", store.port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", store.port), timeout=5)


def test_a_fault_of_the_leaders_gpu_is_told(
    folders: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader launches under the same guard as a model on one GPU."""

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with on_ranks(folders("llama"), 2) as model:
        executor: Any = model.executor
        assert isinstance(executor, TorchLeader)
        monkeypatch.setattr(executor._rows_in_torch.step, "run", fails)
        with pytest.raises(DeviceLost, match="unspecified launch failure"):
            list(model.stream(list(prompts()[0]), 4, GREEDY))


def test_followers_end_with_the_model_and_with_its_process(folders: Callable[[str], Source]) -> None:
    with on_ranks(folders("llama"), 2) as model:
        (process,) = processes(model)
    assert process.poll() is not None


def test_what_cannot_be_shared_out_is_refused(folders: Callable[[str], Source]) -> None:
    with pytest.raises(UsageError, match="query heads"), on_ranks(folders("llama"), 3):
        pass
    with pytest.raises(UsageError, match="runs on GPUs"), on_ranks(folders("llama"), 2, device="cpu"):
        pass
