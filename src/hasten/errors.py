"""The exception tree. What a user can cause is a HastenError: what, got what, what next, a hint that works.

HastenError
├── UsageError        the request itself is wrong (exit 2)
├── ModelError        a model, file or tensor is not what it must be (exit 1)
│   └── FormatError   a file that cannot be read as the format it claims
├── TokenizerError    a tokenizer or chat template that cannot be built or applied (exit 1)
├── ArtifactError     a `.hasten` folder that is damaged, foreign or of another version (exit 1)
├── DiskError         a file that cannot be written: full, read-only or forbidden disk (exit 1)
├── MachineError      this machine lacks what was asked for (exit 1)
│   └── DeviceLost    a GPU that this process cannot use any more
├── PeerError         an engine to compare with is missing or failed (exit 1)
├── QueueFull         the engine has as many waiting requests as it may have (exit 1)
├── DeadlineError     a request that cannot be answered in its time (exit 1)
└── BudgetError       nothing met the quality or latency budget (exit 3)
"""

from __future__ import annotations


class HastenError(Exception):
    """Base of every error meant for the user.

    Args:
        message: what is wrong and what was found instead, in one or two sentences.
        hint: a command or a step that puts it right; printed after `hint:`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HastenError):
    """The request itself is wrong: a bad value, an unknown name, a prompt that does not fit."""

    exit_code = 2


class ModelError(HastenError):
    """A model, file or tensor is not what it must be."""


class FormatError(ModelError):
    """A file that cannot be read as the format it claims to be."""


class TokenizerError(HastenError):
    """A tokenizer or chat template that cannot be built or applied."""


class ArtifactError(HastenError):
    """A `.hasten` folder that is damaged, foreign or of another version."""


class DiskError(HastenError):
    """A file that cannot be written: full, read-only or forbidden disk. What was there is untouched."""


class MachineError(HastenError):
    """This machine lacks what was asked for."""


class DeviceLost(MachineError):
    """A GPU failed in the middle of its work; this process cannot use it any more."""


class PeerError(HastenError):
    """An engine to compare with is missing or failed."""


class QueueFull(HastenError):
    """As many requests wait as may wait.

    Args:
        retry_after_s: when a place is likely to be free, seconds.
    """

    def __init__(self, message: str, *, hint: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class DeadlineError(HastenError):
    """A request that cannot be answered in its time; said when it arrives, not when the time is over."""


class BudgetError(HastenError):
    """Nothing met the quality or latency budget."""

    exit_code = 3
