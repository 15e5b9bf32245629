"""What an engine has done and holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Sums since the engine started."""

    prefix_query_tokens: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int = 0  # and found, those on disk included
    disk_hit_tokens: int = 0
    prompt_tokens: int = 0  # computed
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    requests: int = 0
    cancelled: int = 0
    refused: int = 0
    batch: int = 0  # sequences in the last step
    schedule_s: float = 0.0  # spent beside computing: choosing, bookkeeping, publishing
    step_s: float = 0.0  # all of it


@dataclass(frozen=True)
class EngineStats:
    """The counters, and what is in the engine now."""

    running: int
    waiting: int
    kv_pages: int
    kv_pages_used: int  # by sequences or the prefix cache
    kv_pages_cached: int  # by the prefix cache
    prefix_query_tokens: int
    prefix_hit_tokens: int
    disk_hit_tokens: int
    prompt_tokens: int
    output_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    steps: int
    requests: int
    cancelled: int
    refused: int
    batch: int
    schedule_s: float
    step_s: float
