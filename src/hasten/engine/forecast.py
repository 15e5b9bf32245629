"""When an answer will be done, from what steps have taken so far."""

from __future__ import annotations

_NEW = 0.2  # weight of the newest measurement
_OUTLIER = 4.0  # it counts at most as so many times what was expected: the machine may have been stopped
_DOUBT = 0.9


class Forecast:
    """Running means of a prompt token's and a decode step's time."""

    def __init__(self) -> None:
        self.prefill_s: float | None = None  # a prompt token
        self._decode_s: dict[int, float] = {}  # a step, by sequences in it

    def observe(self, prompt_tokens: int, sequences: int, seconds: float) -> None:
        """A step computed so many prompt tokens beside one token of each of `sequences`."""
        if prompt_tokens == 0:
            self._decode_s[sequences] = _mix(self._decode_s.get(sequences), seconds)
            return
        rest = seconds - (self.decode_s(sequences) or 0.0 if sequences else 0.0)
        if rest > 0:
            self.prefill_s = _mix(self.prefill_s, rest / prompt_tokens)

    def decode_s(self, sequences: int) -> float | None:
        """Seconds of a decode step, measured with the nearest number of sequences; None before the first."""
        if not self._decode_s:
            return None
        if sequences in self._decode_s:
            return self._decode_s[sequences]
        nearest = min(self._decode_s, key=lambda n: (abs(n - sequences), n))
        return self._decode_s[nearest]

    def finish_s(self, prompt_tokens: int, steps: int, sequences: int) -> float | None:
        """Seconds for so many prompt tokens and then decode steps; None: nothing measured yet."""
        step = self.decode_s(sequences)
        if self.prefill_s is None or step is None:
            return None
        return prompt_tokens * self.prefill_s + steps * step

    def doubt(self) -> None:
        """Believe a little less in slowness: what is refused is never measured."""
        self.prefill_s = None if self.prefill_s is None else _DOUBT * self.prefill_s
        self._decode_s = {sequences: _DOUBT * s for sequences, s in self._decode_s.items()}


def _mix(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW) * old + _NEW * min(new, _OUTLIER * old)
