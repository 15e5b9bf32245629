"""From an exception to what the user reads on stderr, and to the exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable

from hasten.errors import HastenError, UsageError
from hasten.stopping import exit_code, stop_of

REPORT_TO = "the issue tracker of Hasten"
READER_GONE = 141


def _end_once() -> None:
    """A second signal while the process ends would kill it in the middle, with another exit code."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)


def guarded(action: Callable[[], int], *, verb: str = "", last: bool = False) -> int:
    """Run `action`; whatever it raises becomes a few lines on stderr and an exit code.

    `last`: the process ends with it.
    """
    try:
        code = _explained(action, verb, last)
    except KeyboardInterrupt as stop:  # while the error was being told
        code = exit_code(stop)
    if last:
        _end_once()
    return code


def _explained(action: Callable[[], int], verb: str, last: bool) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # stdout is UTF-8 whatever the locale says
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = action()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_stdout()
        return READER_GONE
    except KeyboardInterrupt as stop:
        return _stopped(stop, verb, last)
    except Exception as error:  # noqa: BLE001  the last line of defence: a user never meets a traceback
        if os.environ.get("HASTEN_DEBUG"):
            import traceback

            traceback.print_exc()
        wrapped = stop_of(error)
        return _explain(error, verb) if wrapped is None else _stopped(wrapped, verb, last)


def _stopped(stop: KeyboardInterrupt, verb: str, last: bool) -> int:
    if last:
        _end_once()
    return _say(exit_code(stop), f"\nstopped. {_kept(verb)}")


def _explain(error: Exception, verb: str) -> int:
    if isinstance(error, HastenError):
        return _say(error.exit_code, f"error: {error.message}", error.hint)
    if hasattr(error, "format_message"):  # typer's, and click's under older typers
        return _usage(error, verb)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return _say(1, f"error: {error.strerror}{where}", _system_hint(error))
    if isinstance(error, MemoryError):
        return _say(1, "error: out of memory", "use a smaller recipe (--recipe w4) or a shorter --context")
    text = " ".join(str(error).split()) or "no message"
    return _say(
        1,
        f"error: unexpected {type(error).__name__}: {text}",
        f"this is a fault of Hasten: run again with HASTEN_DEBUG=1 and send the traceback to {REPORT_TO}",
    )


def _usage(error: Exception, verb: str) -> int:
    message = str(error.format_message()).strip()  # type: ignore[attr-defined]
    message = message.split(" (Possible options")[0].split(" Did you mean")[0]
    possible = sorted(getattr(error, "possibilities", None) or [])
    hint = f"did you mean {possible[0]}? " if possible else ""
    return _say(2, f"error: {message[:1].lower()}{message[1:]}", f"{hint}see: hasten {verb} --help")


def _system_hint(error: OSError) -> str | None:
    import errno

    hints = {
        errno.ENOSPC: "free some space, or choose another folder",
        errno.EACCES: "choose a place you may read and write",
        errno.EROFS: "choose a place that is not read-only",
        errno.ENOENT: "check the path",
    }
    return hints.get(error.errno or 0)


def _kept(verb: str) -> str:
    """What a stopped verb leaves behind: the `KEPT` of its module, if that was imported by then."""
    from hasten.cli import VERBS

    module = sys.modules.get(VERBS[verb].module) if verb in VERBS else None
    return str(getattr(module, "KEPT", "Nothing was changed."))


def _say(code: int, text: str, hint: str | None = None) -> int:
    sys.stderr.write(text + "\n" + (f"hint: {hint}\n" if hint else ""))
    return code


def _discard_stdout() -> None:
    """Point stdout at nothing, so that Python's flush at exit does not fail a second time."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())


def check_text(arguments: list[str]) -> None:
    """Arguments must be text.

    Raises:
        UsageError: one of them holds bytes that are no UTF-8 (Python carries those as lone surrogates).
    """
    for position, argument in enumerate(arguments, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            raise UsageError(
                f"argument {position} is not valid UTF-8: {shown}",
                hint="convert it, for example with iconv -f LATIN1 -t UTF-8, or rename the file",
            ) from None


def unknown_verb(name: str, verbs: list[str]) -> UsageError:
    """The error for a verb that does not exist, with the nearest name that does."""
    import difflib

    near = difflib.get_close_matches(name, verbs, n=1, cutoff=0.5)
    if name.startswith("-"):
        return UsageError(f"unknown option {name}", hint="see: hasten --help")
    hint = f"did you mean {near[0]}? see: hasten --help" if near else f"verbs are {', '.join(verbs)}"
    return UsageError(f"unknown verb {name!r}", hint=hint)
