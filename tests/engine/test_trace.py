"""Traces: what comes back, what they do not tell, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hasten.engine.request import Request, Usage
from hasten.engine.trace import TraceModel, TraceWriter, read_trace
from hasten.errors import DiskError, FormatError, UsageError

MODEL = TraceModel("tiny", 32, 1000, 64, 3, True, 1.0, 0.01)
USAGE = Usage(0, 5, 0, 0, 0, 0, queue_ms=100.0, ttft_ms=350.0, e2e_ms=1000.0)


def write(path: Path, *requests: tuple[Request, list[list[int]]], model: TraceModel = MODEL) -> None:
    writer = TraceWriter(path)
    for request, outputs in requests:
        writer.add(model, request, outputs, USAGE)
    writer.close()


def same(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if differs.size else length


def test_marks_agree_as_far_as_texts_do(tmp_path: Path) -> None:
    text = list(range(1, 50))
    other = [*text[:20], 999, *text[21:]]
    write(
        tmp_path / "t",
        (Request(tuple(text)), [[7, 8, 9], [7, 5]]),
        (Request(tuple(other)), [[]]),
        (Request((*text, 7, 8, 9, 10)), [[]]),
        (Request(tuple(text), salt="another"), [[]]),
    )
    one, two, turn, salted = (r for r in read_trace(tmp_path / "t").requests)
    assert len(one.prompt) == 49 and [len(o) for o in one.outputs] == [3, 2]
    assert same(one.prompt, two.prompt) == 20 and (one.prompt[21:] != two.prompt[21:]).all()
    assert same(np.concatenate([one.prompt, one.outputs[0]]), turn.prompt) == 52
    assert one.outputs[0][0] == one.outputs[1][0] and one.outputs[0][1] != one.outputs[1][1]
    assert same(one.prompt, salted.prompt) == 0
    assert one.cached_tokens == 5 and one.prefill_s == pytest.approx(0.25)
    assert one.ended - one.arrived == pytest.approx(1, abs=1e-3)
    assert one.started - one.arrived == pytest.approx(0.1, abs=1e-3)


def test_a_trace_tells_no_token(tmp_path: Path) -> None:
    """The same requests recorded twice have nothing in common: there is nothing to look up."""
    request = (Request(tuple(range(40)), salt="s3cret"), [[1, 2]])
    for name in "ab":
        write(tmp_path / name, request)
    texts = [(tmp_path / name).read_text() for name in "ab"]
    assert "s3cret" not in texts[0] and "[0, 1, 2" not in texts[0]
    first, second = (read_trace(tmp_path / name).requests[0].prompt for name in "ab")
    assert (first != second).mean() > 0.9
    repeated = TraceWriter(tmp_path / "c")
    repeated.add(MODEL, Request((5,) * 40), [[]], USAGE)
    repeated.close()
    assert len(set(read_trace(tmp_path / "c").requests[0].prompt.tolist())) > 35, "equal tokens look equal"


def test_recordings_are_appended_one_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path / "t", (Request((1, 2, 3)), [[4]]))
    first, second = read_trace(tmp_path / "t").requests
    assert second.ended > first.ended and same(first.prompt, second.prompt) < 3


def test_the_model_with_most_requests_or_the_one_named(tmp_path: Path) -> None:
    other = TraceModel("other", 32, 500, 64, 3, False, 1.0, 0.01)
    write(tmp_path / "t", (Request((1,)), [[4]]), (Request((2,)), [[4]]))
    write(tmp_path / "t", (Request((1,)), [[4]]), model=other)
    assert read_trace(tmp_path / "t").model == MODEL
    assert read_trace(tmp_path / "t", "other").model == other
    with pytest.raises(UsageError, match="nobody") as caught:
        read_trace(tmp_path / "t", "nobody")
    assert "other, tiny" in str(caught.value.hint)


def test_what_it_took_to_compute_a_token(tmp_path: Path) -> None:
    write(tmp_path / "t", (Request(tuple(range(30))), [[4]]))
    assert read_trace(tmp_path / "t").seconds_per_token == pytest.approx(0.25 / 25)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(path, (Request((1, 2)), [[4]]), (Request((1, 2)), [[4]]))
    path.write_bytes(path.read_bytes()[:-9])
    assert len(read_trace(path).requests) == 1


@pytest.mark.parametrize(
    "text", ["", "{}\n", "[1]\n", "hello\n", '{"hasten_trace": 99}\n', '{"hasten_trace": 1}\n']
)
def test_no_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(FormatError) as caught:
        read_trace(tmp_path / "t")
    assert caught.value.hint


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(path, (Request((1, 2)), [[4]]))
    lines = path.read_text().splitlines()
    record = json.loads(lines[2])
    for wrong in ({**record, "prompt": "!"}, {**record, "ended": None}, {"request": "tiny"}):
        path.write_text("\n".join([*lines[:2], json.dumps(wrong)]) + "\n")
        with pytest.raises(FormatError, match="line 3"):
            read_trace(path)
    path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    with pytest.raises(FormatError, match="describes"):
        read_trace(path)


def test_missing_files_and_forbidden_places(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(DiskError):
        TraceWriter(tmp_path / "no" / "folder")


def test_a_full_disk_ends_the_recording(caplog: pytest.LogCaptureFixture) -> None:
    writer = TraceWriter("/dev/full")
    for _ in range(3):
        writer.add(MODEL, Request((1, 2)), [[4]], USAGE)
    writer.close()
    assert [record.message for record in caplog.records] == ["the trace ends here"]
