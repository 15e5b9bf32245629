"""What becomes of what a verb raises."""

from __future__ import annotations

import pytest

from hasten.cli.failure import guarded
from hasten.errors import Terminated


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 0)])
def test_a_signal_that_python_wrapped_is_still_a_stop(
    stop: type[BaseException], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal while a class is made: `RuntimeError: Error calling __set_name__`, before Python 3.12."""

    class Interrupts:
        def __set_name__(self, owner: type, name: str) -> None:
            raise stop

    def make() -> int:
        type("Made", (), {"one": Interrupts()})
        return 1

    assert guarded(make) == code
    assert "stopped" in capsys.readouterr().err
