"""What the answers of one call cost: for `usage`, the metrics and the log line."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hasten.engine.request import Output, Usage

if TYPE_CHECKING:
    from hasten.serve.call import Call
    from hasten.serve.metrics import Metrics


class Tally:
    """Takes every output as it passes; counts when an answer ends, not with each token."""

    def __init__(self, metrics: Metrics, model: str, call: Call) -> None:
        self._metrics = metrics
        self._model = model
        self._call = call
        self._last: dict[tuple[int, int], float] = {}
        self._gaps: dict[tuple[int, int], list[float]] = {}
        self._prompts: dict[int, Usage] = {}
        self._output_tokens = 0
        self._is_new = True
        call.fields["model"] = model

    def remembered(self) -> None:
        """The outputs to come were computed for an earlier call: the times in them are not this one's."""
        self._is_new = False
        self._metrics.answered_from_memory(self._model)
        self._call.fields["response_cache"] = "hit"

    def take(self, which: int, output: Output) -> None:
        """One output of request `which`."""
        now, key = time.perf_counter(), (which, output.index)
        if key in self._last:
            self._gaps.setdefault(key, []).append(now - self._last[key])
        self._last[key] = now
        if output.finish_reason is None:
            return
        if self._is_new:
            self._metrics.finished(self._model, output.finish_reason, output.usage, self._gaps.pop(key, ()))
        if output.usage is not None:
            self._prompts.setdefault(which, output.usage)
            self._output_tokens += output.usage.output_tokens
            self._log(output.finish_reason, output.usage)

    def _log(self, reason: str, usage: Usage) -> None:
        fields = self._call.fields
        fields["finish_reason"] = reason
        fields["prompt_tokens"] = self.prompt_tokens
        fields["cached_tokens"] = self.cached_tokens
        fields["output_tokens"] = self._output_tokens
        if not self._is_new:
            return
        fields["queue_ms"] = round(usage.queue_ms, 2)
        if usage.ttft_ms is not None:
            fields["ttft_ms"] = round(usage.ttft_ms, 2)
        for name in ("drafted_tokens", "accepted_tokens", "preemptions"):
            if getattr(usage, name):
                fields[name] = fields.get(name, 0) + getattr(usage, name)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; a prompt with several answers counts once."""
        return sum(usage.prompt_tokens for usage in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        """Of them, found in the prefix cache."""
        return sum(usage.cached_tokens for usage in self._prompts.values())

    @property
    def output_tokens(self) -> int:
        """Of all answers that have ended."""
        return self._output_tokens

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object of chat and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
