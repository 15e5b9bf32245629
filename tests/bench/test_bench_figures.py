"""Stats, samples, prompts and fractions: the arithmetic of a benchmark."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.bench import figures as sample_module
from hasten.bench.figures import Sample, TokenClock, paired_ratio, percentile
from hasten.bench.measure import PromptRing, check, default_text, measurement_of, with_ceilings
from hasten.core import Machine, Recipe, Workload, as_json
from hasten.errors import PeerError, UsageError
from hasten.machine.probe import stat_of
from hasten.speed.cost import Cost, cost, kv_read_bytes
from specs import changed, spec

values = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=20)


@given(values, st.floats(0, 1))
def test_percentile_is_numpys(runs, fraction):
    assert percentile(runs, fraction) == pytest.approx(np.quantile(runs, fraction), rel=1e-9)


def test_stat_of_no_runs_is_a_usage_error():
    with pytest.raises(UsageError, match="at least one run"):
        stat_of([])


@given(values)
def test_a_paired_ratio_ignores_what_slows_a_round_for_both(runs):
    ratio = paired_ratio([2 * v for v in runs], runs, resamples=50)
    assert (
        ratio.median == pytest.approx(2) and ratio.low == pytest.approx(2) and ratio.high == pytest.approx(2)
    )


def test_the_interval_of_a_ratio_holds_the_median_and_widens_with_noise():
    calm = paired_ratio([10, 10.1, 9.9, 10, 10], [5, 5, 5.1, 4.9, 5])
    noisy = paired_ratio([10, 14, 7, 10, 12], [5, 5, 6, 3, 5])
    assert calm.low <= calm.median <= calm.high
    assert noisy.high - noisy.low > 3 * (calm.high - calm.low)


def test_a_ratio_needs_the_same_rounds():
    with pytest.raises(UsageError, match="2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


def clock_at(monkeypatch, prompts, arrivals):
    """A finished sample whose tokens came at the given (seconds, sequence)."""
    times = iter([100.0, *(100.0 + when for when, _ in arrivals)])
    monkeypatch.setattr(sample_module.time, "perf_counter", lambda: next(times))
    clock = TokenClock(prompts)
    for token, (_, sequence) in enumerate(arrivals):
        clock.push(sequence, token)
    return clock.finish()


def test_one_sequence(monkeypatch):
    run = clock_at(monkeypatch, [[1] * 8], [(2.0, 0), (2.5, 0), (3.0, 0), (4.0, 0)])
    assert (run.ttft_s, run.prefill_tok_per_s) == (2.0, 4.0)
    assert run.decode_tok_per_s == pytest.approx(3 / 2)  # (output - 1) / (first to last)
    assert run.tpot_ms == pytest.approx(2000 / 3)
    assert run.ids == ((0, 1, 2, 3),)


def test_a_batch_is_timed_from_the_moment_all_have_begun(monkeypatch):
    arrivals = [(1.0, 0), (1.5, 0), (2.0, 1), (3.0, 0), (3.0, 1), (4.0, 0), (4.0, 1)]
    run = clock_at(monkeypatch, [[1] * 4, [2] * 4], arrivals)
    assert run.ttft_s == 2.0 and run.prompt_tokens == 8
    assert (run.decode_tokens, run.decode_s) == (4, 2.0)
    assert run.decode_tok_per_s == 2.0 and run.tpot_ms == 1000.0


@pytest.mark.parametrize(
    ("arrivals", "said"), [([(1.0, 0)], "sequence 1"), ([(1.0, 0), (1.0, 1)], "first token")]
)
def test_a_run_without_decode_is_an_error(monkeypatch, arrivals, said):
    with pytest.raises(PeerError, match=said):
        clock_at(monkeypatch, [[1], [1]], arrivals)


def test_a_sample_survives_json():
    run = Sample(8, 0.5, 3, 0.25, ((1, 2), (3,)))
    assert Sample.from_json(as_json(run)) == run


@given(st.integers(1, 50), st.integers(1, 80), st.integers(1, 4))
def test_prompts_have_the_length_asked_and_do_not_repeat_soon(size, length, batch):
    ring = PromptRing(range(size))
    rounds = [ring.round(n, Workload(length, 2, batch)) for n in range(3)]
    assert all(len(p) == length for r in rounds for p in r)
    assert rounds == [PromptRing(range(size)).round(n, Workload(length, 2, batch)) for n in range(3)]
    if 3 * batch * length <= size:
        starts = [p[0] for r in rounds for p in r]
        assert len(set(starts)) == len(starts)


def test_the_text_is_the_same_every_time_and_long_enough():
    assert default_text() == default_text()
    assert len(default_text()) > 300_000


@pytest.mark.parametrize("workload", [Workload(0, 8), Workload(8, 1), Workload(8, 8, 0)])
def test_a_workload_that_cannot_be_measured(workload):
    with pytest.raises(UsageError) as caught:
        check(workload)
    assert caught.value.hint


CONFIG = spec(
    architecture="qwen2",
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    context_length=64,
    tied_head=True,
)


def test_cost_counts_weights_once_and_the_head_once_a_prompt():
    asked = cost(CONFIG, Workload(prompt=10, output=4, batch=3), Recipe.parse("w4"), 1000)
    layer = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 32
    assert asked.prompt_int8_ops == 2 * (2 * layer * 10 + 100 * 16)
    kv = 2 * 2 * (2 * 32) * 2.0 * (10 + 4 / 2)  # layers, K and V, padded heads, bytes, context
    assert asked.weight_bytes + asked.kv_bytes == 1000 + 3 * kv


def test_a_sliding_layer_reads_its_window_only():

    slides = changed(CONFIG, sliding_window=5, sliding_layers=(True, False))
    assert kv_read_bytes(slides, 20, False) == kv_read_bytes(CONFIG, 20, False) * (5 + 20) / 40


def machine(**ceilings):
    return Machine("cpu", ("scalar",), 1, None, None, None, None, **ceilings)


def test_fractions_of_the_ceilings():
    asked = Cost(5 * 10**8, 5e8, 0, 0, 0, prompt_int8_ops=1.5e9, prompt_bf16_ops=5e8, prompt_attention_ops=7)
    load = Workload(prompt=100, output=8, batch=2)
    here = machine(read_gb_per_s=20.0, int8_tops=1.0)
    assert asked.read_fraction(30.0, load, here) == pytest.approx(0.75)  # 15 steps a second, 1 GB each
    assert asked.int8_fraction(1000.0, load, here) == pytest.approx(0.02)  # 10 prompts a second
    assert replace(asked, prompt_int8_ops=0.0).int8_fraction(1000.0, load, here) is None
    assert asked.read_fraction(30.0, load, machine()) is None


def test_unknown_ceilings_stay_unknown_in_the_measurement():
    run = Sample(8, 0.5, 3, 0.25, ((1, 2),))
    form = {
        "engine": "e",
        "version": "1",
        "form": "w4",
        "weight_bytes": None,
        "threads": 2,
        "peak_rss_bytes": None,
    }
    measured = measurement_of([run, run], Workload(8, 4), **form)
    assert measured.prefill_tok_per_s.median == 16 and measured.prefill_tok_per_s.n == 2
    assert measured.ttft_ms.median == 500
    assert with_ceilings(measured, Cost(1, 1, 1, 1, 1, 1, 1, 1), machine()).fraction_of_read_ceiling is None
