"""Where the tests of the GPU's executor compute: in plain torch, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from hasten.runtime import executor as executors

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where `--device cuda` computes in a test."""
    kind = "torch" if request.param == "cpu" else "cuda"
    monkeypatch.setitem(executors.EXECUTORS, "cuda", executors.EXECUTORS[kind])
    monkeypatch.setattr(executors, "choose_device", lambda wanted: (wanted, "in a test"))
    return str(request.param)
