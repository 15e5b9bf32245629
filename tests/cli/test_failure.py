"""What becomes of what a verb raises."""

from __future__ import annotations

import pytest

from hasten.cli.failure import guarded
from hasten.errors import Terminated


def test_a_signal_that_python_wrapped_is_still_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C while a class is made: `RuntimeError: Error calling __set_name__`, before Python 3.12."""

    class Interrupts:
        def __set_name__(self, owner: type, name: str) -> None:
            raise stop

    for stop, code in ((KeyboardInterrupt(), 130), (Terminated(), 0)):

        def make() -> int:
            type("Made", (), {"one": Interrupts()})
            return 1

        assert guarded(make) == code
        assert "stopped" in capsys.readouterr().err
