"""Workers, their deaths, and the interleaved comparison, with a fake engine in real processes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hasten.bench import compare as compare_module
from hasten.bench.compare import Contender, compare
from hasten.bench.figures import Steady
from hasten.bench.peers import PEERS, EngineSpec, Peer, check_device, entry_of, made_once, parse
from hasten.bench.process import PACKAGE, WorkerProcess
from hasten.core import Machine, Workload
from hasten.errors import PeerError, UsageError

HERE = str(Path(__file__).parent)
WORKLOAD = Workload(prompt=16, output=4)
FAKE = Peer(("ok",), ("json",), "fake==1", crash_hint="build it anew")


@pytest.fixture(autouse=True)
def fake_on_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, str(PACKAGE.parent)]))  # this tree in workers too


@pytest.fixture(autouse=True)
def every_round_counts(monkeypatch):
    """The fake engine's rounds take milliseconds: a busy machine disturbs some, and repeats them."""
    monkeypatch.setattr("hasten.bench.figures.SHARE", 0.0)


def spec(form="ok", name=None, batch=1):
    return EngineSpec(name or f"fake:{form}", "fake_engine", form, "src", "cache", 1, 20, batch)


def entry(form, name=None, **fields):
    return Contender(spec(form, name), FAKE, **fields)


def loaded(form="ok", python=None):
    process = WorkerProcess(f"fake:{form}", python)
    arguments = dataclasses.asdict(spec(form))
    process.ask("load", 20, spec=arguments, prepared=process.ask("prepare", 20, spec=arguments))
    return process


def test_what_an_engine_prints_does_not_disturb_the_channel():
    with loaded() as process:
        run = process.ask("run", 20, prompts=[[5] * 16], output=4)
    assert run["ids"] == [[5, 5, 5, 5]] and run["decode_tokens"] == 3


def test_a_worker_runs_without_hasten_installed():
    """The bootstrap gives the package's files alone, without its __init__."""
    with loaded(python=sys.executable) as process:
        assert process.ask("run", 20, prompts=[[5] * 16], output=2)["prompt_tokens"] == 16
    program = "import sys; sys.modules['numpy'] = None; sys.modules['hasten._native'] = None\n"
    with pytest.MonkeyPatch.context() as patch:
        from hasten.bench import process as process_module

        patch.setattr(process_module, "BOOTSTRAP", program + process_module.BOOTSTRAP)
        with loaded(python=sys.executable) as process:
            assert process.ask("check", 20, requires=["json", "no_such_module"]) == ["no_such_module"]


def test_a_crash_names_the_signal_and_the_last_words():
    with loaded("crash") as process, pytest.raises(PeerError) as caught:
        process.ask("run", 20, prompts=[[1]], output=2)
    assert "SIGABRT" in caught.value.message and "about to fall over" in caught.value.message


def test_a_hang_ends_at_the_limit_and_the_process_with_it():
    with loaded("hang") as process:
        started = time.monotonic()
        with pytest.raises(PeerError, match="no answer to 'run' within 1 s"):
            process.ask("run", 1.0, prompts=[[1]], output=2)
        assert time.monotonic() - started < 10
        assert process._process.poll() is not None
        with pytest.raises(PeerError):
            process.ask("run", 1.0, prompts=[[1]], output=2)


def test_an_error_of_the_engine_is_told_and_the_worker_lives_on():
    with loaded("raise") as process:
        with pytest.raises(PeerError, match="ValueError: no such kernel"):
            process.ask("run", 20, prompts=[[1]], output=2)
        assert process.ask("check", 20, requires=[]) == []


def test_a_python_that_does_not_exist():
    with pytest.raises(PeerError, match="cannot start") as caught:
        WorkerProcess("x", "/no/such/python")
    assert "HASTEN_PEER_PYTHON" in (caught.value.hint or "")


def test_a_paused_worker_is_stopped_and_goes_on_when_asked():
    with loaded() as process:
        process.pause()
        stat = Path(f"/proc/{process._process.pid}/stat")
        deadline = time.monotonic() + 5
        while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.ask("check", 20, requires=[]) == []


def test_peak_memory_is_the_workers_own():
    with loaded() as small, loaded("big") as big:
        mine, its = small.ask("peak_rss", 20), big.ask("peak_rss", 20)
    assert mine < 100e6 and its - mine > 150e6


def test_engines_take_turns_and_the_faster_one_wins():
    said = []
    result = compare([Contender(spec("ok")), entry("slow")], WORKLOAD, 3, say=said.append)
    assert result.model == "fake" and not result.failed
    assert result.subject.measurement.decode_tok_per_s.n == 3
    assert (
        result.subject.measurement.engine == "hasten"
        and result.peers["fake:slow"].measurement.engine == "fake"
    )
    assert result.ratios["fake:slow"]["decode"].median > 1.5
    ours, theirs = result.subject.samples, result.peers["fake:slow"].samples
    assert [s.ids for s in ours] == [s.ids for s in theirs]  # the same prompts, another one each round
    assert len({s.ids for s in ours}) == 3
    assert result.subject.continuation == " ".join([str(ours[0].ids[0][0])] * 4)
    assert said[-1] == "round 3 of 3"


def test_a_round_in_place_of_a_disturbed_one_is_called_extra(monkeypatch):
    def one_more(take, rates, runs, say):
        rounds = tuple(take(number + 1) for number in range(runs + 1))
        return Steady(rounds[1:], 1, True)

    monkeypatch.setattr(compare_module, "steady", one_more)
    said = []
    compare([Contender(spec("ok"))], WORKLOAD, 1, say=said.append)
    assert said[-2:] == ["round 1 of 1", "extra round 1"]


def test_the_order_rotates(monkeypatch):
    asked = []
    real = compare_module._take_turn

    def noted(seat, *rest):
        asked.append(seat.contender.spec.format)
        real(seat, *rest)

    monkeypatch.setattr(compare_module, "_take_turn", noted)
    compare([Contender(spec("ok")), entry("slow")], WORKLOAD, 2)
    assert asked == ["ok", "slow", "slow", "ok", "ok", "slow"]


@pytest.mark.parametrize("form", ["crash", "raise", "fails-later", "unpreparable"])
def test_a_failing_peer_does_not_take_the_others_with_it(form):
    result = compare([Contender(spec("ok")), entry(form), entry("slow")], WORKLOAD, 3)
    if form == "crash":
        assert result.failed["fake:crash"].hint == "build it anew"
    assert list(result.failed) == [f"fake:{form}"] and list(result.peers) == ["fake:slow"]
    assert result.peers["fake:slow"].measurement.decode_tok_per_s.n == 3


def test_our_own_failure_is_an_error():
    with pytest.raises(PeerError, match="no such kernel"):
        compare([Contender(spec("raise")), entry("ok")], WORKLOAD, 1)


def test_a_missing_peer_says_how_to_install_it():
    gone = dataclasses.replace(FAKE, requires=("json", "no_such_module"), install_env="A=1")
    with pytest.raises(PeerError, match="no_such_module") as caught:
        compare([Contender(spec("ok")), Contender(spec("slow"), gone)], WORKLOAD, 1)
    assert caught.value.hint == "A=1 python -m pip install fake==1"


def test_batches_and_ceilings():
    here = Machine("cpu", ("scalar",), 1, None, None, None, None, read_gb_per_s=1.0, int8_tops=None)
    workload = Workload(8, 4, batch=3)
    result = compare([Contender(spec("ok", batch=3))], workload, 2, machine=here)
    measured = result.subject.measurement
    assert len(result.subject.samples[0].ids) == 3
    steps = measured.decode_tok_per_s.median / 3
    assert measured.fraction_of_read_ceiling == pytest.approx(steps * 1e6 / 1e9)
    assert measured.fraction_of_int8_ceiling is None


def test_ctrl_c_and_even_a_killed_driver_leave_no_worker(tmp_path):
    program = f"""
import signal, sys, time; sys.path.insert(0, {HERE!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from test_bench_compare import loaded
with loaded() as process:
    process.pause()
    print(process._process.pid, flush=True)
    time.sleep(60)
"""
    for ending in (signal.SIGINT, signal.SIGKILL):
        driver = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert driver.stdout is not None
        worker = int(driver.stdout.readline())
        driver.send_signal(ending)
        driver.wait(20)
        driver.stdout.close()
        deadline = time.monotonic() + 10
        while alive(worker):
            assert time.monotonic() < deadline, f"worker survives {ending}"
            time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_names_of_peers():
    assert parse("llama.cpp:q8_0")[2] == "q8_0"
    assert parse("transformers")[2] == "bf16"
    for wrong in ("tgi", "llama.cpp:q9_9", ""):
        with pytest.raises(UsageError) as caught:
            parse(wrong)
        assert caught.value.hint
    assert entry_of("llama.cpp").install_command("python").endswith("llama-cpp-python==0.3.36")


def test_every_line_of_the_table_is_a_peer():
    for name, module in PEERS.items():
        found = parse(name)
        assert found[2] == found[1].formats[0]
        assert callable(importlib.import_module(module).prepare)
        assert callable(importlib.import_module(module).load)


@pytest.mark.parametrize(("device", "peers"), [("cpu", ["vllm"]), ("cuda", ["llama.cpp", "openvino"])])
def test_a_peer_that_a_device_is_nothing_for_is_refused(device, peers):
    for name in peers:
        with pytest.raises(UsageError, match=f"{name} is timed on") as refused:
            check_device(name, entry_of(name), device)
        assert "--device" in refused.value.hint and "transformers" in refused.value.hint
    check_device("transformers", entry_of("transformers"), device)


def test_peers_compute_where_ours_does(monkeypatch):
    """Told "auto", ours says what it took, and why; the peers follow."""
    monkeypatch.setenv("FAKE_DEVICE", "cpu")
    said, ours = [], Contender(dataclasses.replace(spec("ok"), device="auto"))
    found = compare([ours, entry("slow")], WORKLOAD, 1, say=said.append)
    assert "--device auto is cpu: a test wants it" in said
    assert found.subject.measurement.device == found.peers["fake:slow"].measurement.device == "cpu"
    monkeypatch.setenv("FAKE_DEVICE", "cuda")
    found = compare([ours, entry("slow")], WORKLOAD, 1)
    assert "fake:slow is timed on cpu here" in found.failed["fake:slow"].message
    assert found.subject.measurement.device == "cuda"


class FakeVllmEngine:
    """Steps as vLLM's does: a token for every request, all tokens so far in each output."""

    def __init__(self):
        self.running, self.asked = {}, []

    def add_request(self, name, prompt, params):
        self.asked.append((prompt["prompt_token_ids"], params))
        self.running[name] = []

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        outputs = []
        for name, ids in list(self.running.items()):
            ids.append(len(ids) + 7)
            answer = SimpleNamespace(token_ids=tuple(ids))
            outputs.append(SimpleNamespace(request_id=name, outputs=[answer]))
            if len(ids) == self.asked[0][1]["max_tokens"]:
                del self.running[name]
        return outputs


def test_vllm_is_stepped_token_by_token_with_the_memory_that_is_free(monkeypatch):
    from hasten.bench.peers import vllm as peer

    made, engine = [], FakeVllmEngine()
    cuda = SimpleNamespace(mem_get_info=lambda: (60 << 30, 80 << 30))
    module = SimpleNamespace(
        __version__="0.33",
        LLM=lambda **options: made.append(options) or SimpleNamespace(llm_engine=engine),
        SamplingParams=lambda **options: options,
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.13"))
    wanted = dataclasses.replace(spec("fp8", "vllm:fp8", 2), device="cuda")
    running = peer.load(wanted, "/models/x")
    assert made[0]["model"] == "/models/x" and made[0]["quantization"] == "fp8"
    assert made[0]["gpu_memory_utilization"] == pytest.approx(0.9 * 0.75)
    assert not made[0]["enable_prefix_caching"] and made[0]["max_model_len"] == wanted.context
    for _ in range(2):
        run = running.generate([[1, 2], [3, 4]], 3)
        assert run.ids == ((7, 8, 9), (7, 8, 9)) and run.prompt_tokens == 4 and run.decode_tokens == 4
    assert [prompt for prompt, _ in engine.asked] == [[1, 2], [3, 4]] * 2
    assert engine.asked[0][1] == {
        "temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "detokenize": False
    }  # fmt: skip


def test_transformers_computes_on_the_device(tiny_folder):
    from hasten.bench.peers import hf_transformers

    wanted = dataclasses.replace(spec("bf16", "transformers"), device="cpu")
    running = hf_transformers.load(wanted, str(tiny_folder("llama")))
    assert next(running._model.parameters()).device.type == "cpu"
    assert len(running.generate([[5, 6, 7]], 3).ids[0]) == 3


def test_a_new_peer_is_one_file_and_one_line(tmp_path, monkeypatch):
    """From the name in `--against` to a figure, with an engine the package has never heard of."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setitem(PEERS, "fake", "fake_engine")
    monkeypatch.setattr(compare_module, "peer_source", lambda ref: Path("src"))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    asked = compare_module.Request("src", WORKLOAD, against=("fake:ok",), threads=1)
    (_, theirs) = compare_module._contenders(asked)
    found = compare([entry("ok", name="ours"), theirs], WORKLOAD, 1)
    assert found.peers["fake:ok"].measurement.decode_tok_per_s.median > 0
    with pytest.raises(UsageError, match="no format 'q9'"):
        parse("fake:q9")


def test_what_is_made_once_is_made_once_and_whole(tmp_path):
    target = tmp_path / "deep" / "file"
    calls = []

    def make(path):
        calls.append(path)
        path.write_text("whole")

    assert made_once(target, make) == made_once(target, make) == target
    assert len(calls) == 1 and target.read_text() == "whole"

    def fail(path):
        path.mkdir()
        (path / "part").write_text("x")
        raise PeerError("stopped")

    with pytest.raises(PeerError):
        made_once(tmp_path / "folder", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_request_becomes_contenders(tmp_path, monkeypatch):
    from hasten.bench import compare as bout_module

    monkeypatch.setattr(bout_module, "peer_source", lambda ref: Path(f"/models/{ref}"))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    against = ("llama.cpp:q8_0", "transformers", "llama.cpp:q8_0")
    request = bout_module.Request(
        "x.hasten", Workload(16, 4, 2), against=against, source="demo", threads=3, peer_python="/p/python"
    )
    ours, llama, torch = bout_module._contenders(request)
    assert (ours.peer, ours.python, ours.spec.source, ours.spec.format) == (None, None, "x.hasten", "")
    assert (llama.spec.source, llama.spec.format, llama.python) == ("/models/demo", "q8_0", "/p/python")
    assert torch.spec.name == "transformers" and torch.spec.format == "bf16"
    assert {c.spec.context for c in (ours, llama, torch)} == {20} and llama.spec.threads == 3


def test_a_forced_instruction_set_has_its_own_ceiling(monkeypatch):
    from hasten.bench.compare import usable_ceilings
    from hasten.core import Ceiling, Stat

    rounds = Stat(1.0, 1.0, 1.0, 1)
    rates = {"avx2": 0.5, "avx512": 2.0, "amx": 9.0}
    here = Machine("cpu", ("scalar", *rates), 1, None, None, None, None, int8_tops=9.0)
    here = dataclasses.replace(here, ceilings=tuple(Ceiling(i, "int8", r, rounds) for i, r in rates.items()))
    monkeypatch.delenv("HASTEN_ISA", raising=False)
    assert usable_ceilings(here).int8_tops == 9.0
    monkeypatch.setenv("HASTEN_ISA", "avx512")
    assert usable_ceilings(here).int8_tops == 2.0
    monkeypatch.setenv("HASTEN_ISA", "scalar")
    assert usable_ceilings(here).int8_tops is None
