"""One verb from its arguments to its exit code: the parser, the call, and what is said of an exception.

A verb's module has a function `command`, or one of the verb's name where it holds several (`SHARED_HOMES`).
One with verbs of its own (`hasten cache ls`) has `SUBCOMMANDS` too, name -> function; `command` is then only
its description. typer parses; its own way of printing errors and of
swallowing Ctrl-C is left out. It is imported when a verb is run: `hasten --help` answers without it.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

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
    except KeyboardInterrupt as stop:  # while the error was being told, or on its way here
        if last:
            _end_once()
        code = _say(exit_code(stop), "\nstopped.")
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
    known = _FLAGS_OF_OTHERS.get(str(getattr(error, "option_name", "")))
    if known is not None:
        hint = f"that is {known} here; "
    return _say(2, f"error: {message[:1].lower()}{message[1:]}", f"{hint}see: hasten {verb} --help")


_VERBS_OF_OTHERS = {
    "run": "chat MODEL, or generate MODEL -p TEXT",
    "server": "serve MODEL",
    "list": "cache ls",
    "ls": "cache ls",
    "rm": "cache clear",
    "create": "optimize MODEL, or compress MODEL",
    "quantize": "convert MODEL --to gguf:q4_k_m, or optimize MODEL",
    "download": "pull ID",
    "complete": "generate MODEL -p TEXT",
    "benchmark": "bench MODEL",
    "perplexity": "eval MODEL --text FILE",
    "version": "--version",
}
_FLAGS_OF_OTHERS = {
    **dict.fromkeys(("-m", "--model-path", "--hf-repo", "-hf"), "the first argument"),
    **dict.fromkeys(("-c", "--ctx-size", "--max-model-len", "--num-ctx", "--max-context"), "--context"),
    **dict.fromkeys(("-t", "--num-threads", "--n-threads"), "--threads"),
    **dict.fromkeys(("--temp",), "--temperature"),
    **dict.fromkeys(("--n-predict", "--max-tokens", "--num-predict", "--max-length"), "-n"),
    **dict.fromkeys(("--tensor-parallel-size", "-tp", "--tp"), "--tensor-parallel"),
    **dict.fromkeys(("--gpu-memory-utilization",), "--gpu-memory"),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), "--device cuda: all layers or none"),
    **dict.fromkeys(("--served-model-name", "--alias", "-a"), "NAME=MODEL"),
    **dict.fromkeys(("--quantization", "--dtype", "--load-format"), "--recipe"),
    **dict.fromkeys(("--lora", "--lora-modules"), "--adapter"),
    **dict.fromkeys(("--parallel", "-np", "--max-num-seqs", "-b"), "--max-sequences"),
    **dict.fromkeys(("--system-prompt", "-sys"), "--system"),
}
"""Of llama.cpp, Ollama and vLLM; docs/coming-from.md has their commands side by side."""


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
    module = sys.modules.get(home_of(verb))
    return str(getattr(module, "KEPT", "Nothing was changed."))


def _say(code: int, text: str, hint: str | None = None) -> int:
    sys.stderr.write(text + "\n" + (f"hint: {hint}\n" if hint else ""))
    return code


def with_standard_streams() -> None:
    """Point standard streams that are closed (`>&-`, some service managers) at nothing; see `_Remarks`.

    Python has None in their place, and the next file that is opened would get the number of stdout, into
    which native code writes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    raw = _Remarks(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


class _Remarks(io.FileIO):
    """stderr: what cannot be written there (a full disk, a reader that left) ends no work of an hour."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


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
    if name in _VERBS_OF_OTHERS:
        return UsageError(f"unknown verb {name!r}", hint=f"that is here: hasten {_VERBS_OF_OTHERS[name]}")
    hint = f"did you mean {near[0]}? see: hasten --help" if near else f"verbs are {', '.join(verbs)}"
    return UsageError(f"unknown verb {name!r}", hint=hint)


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


OLDER_NAMES = {"export": "convert"}
"""Names that verbs had, which go on working; no help lists them."""
SHARED_HOMES = {"compare": "results", "report": "results", "pull": "show"}
"""Verbs that stand in a file with others, each as a function of its name."""


def home_of(verb: str) -> str:
    return f"hasten.cli.{SHARED_HOMES.get(verb) or OLDER_NAMES.get(verb, verb)}"


def command_of(verb: str) -> Callable[..., object]:
    """The function of a verb: its annotations are the flags, its docstring is the help."""
    found: Callable[..., object] = getattr(
        import_module(home_of(verb)), verb if verb in SHARED_HOMES else "command"
    )
    return found


def run(verb: str, arguments: list[str]) -> int:
    """Parse the arguments and run the verb. Returns its exit code; every error is raised."""
    import typer

    own, name = subcommands_of(verb), f"hasten {verb}"
    if own and not arguments:
        arguments = ["--help"]
    if own and arguments[0] in own:
        parser, name, arguments = subparser_of(verb, arguments[0]), f"{name} {arguments[0]}", arguments[1:]
    else:
        parser = parser_of(verb)
    try:
        with parser.make_context(name, list(arguments)) as context:
            _check_numbers(parser, context)
            parser.invoke(context)
    except typer.Exit as stop:
        return int(stop.exit_code)
    return 0


def _check_numbers(parser: Any, context: Any) -> None:
    """Python reads "nan" and "inf" as numbers, and no bound of a flag holds NaN off.

    Raises:
        UsageError: a flag has such a value.
    """
    for flag in parser.params:
        value = context.params.get(flag.name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise UsageError(f"{flag.opts[0]} must be a finite number, got {one}", hint="leave it out")


def parser_of(verb: str) -> Any:
    """The typer command of a verb, or a group of its subcommands."""
    command, own = command_of(verb), subcommands_of(verb)
    return _parser(own, command) if own else _parser({verb: command})


def subcommands_of(verb: str) -> Mapping[str, Callable[..., object]]:
    """A verb's own verbs by name; none for most."""
    found: Mapping[str, Callable[..., object]] = getattr(import_module(home_of(verb)), "SUBCOMMANDS", {})
    return found


def subparser_of(verb: str, name: str) -> Any:
    """The typer command of one of a verb's own verbs."""
    return _parser({name: subcommands_of(verb)[name]})


def _parser(
    commands: Mapping[str, Callable[..., object]], described_by: Callable[..., object] | None = None
) -> Any:
    import typer
    from typer.main import get_command

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    if described_by is not None:
        app.callback(context_settings=_SETTINGS)(described_by)
    for name, function in commands.items():
        app.command(name=name, context_settings=_SETTINGS)(function)
    return get_command(app)
