"""The frame: what stands between an exception and the user."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from hasten import cli
from hasten.cli import frame
from hasten.cli.frame import parser_of
from hasten.errors import BudgetError, FormatError, UsageError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a verb `boom` of a function."""

    def make(action: Any, kept: str | None = None) -> None:
        def command() -> None:
            """Boom."""
            action()

        module = ModuleType("boom")
        module.command = command  # type: ignore[attr-defined]
        if kept:
            module.KEPT = kept  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "hasten.cli.boom", module)
        monkeypatch.setitem(cli.VERBS, "boom", "Boom.")

    return make


def raiser(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("no such thing", hint="try that"), 2, "error: no such thing\nhint: try that\n"),
        (FormatError("torn file"), 1, "error: torn file\n"),
        (BudgetError("nothing fits", hint="allow 2%"), 3, "error: nothing fits\nhint: allow 2%\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            1,
            "error: No space left on device: /x\nhint: free",
        ),
        (MemoryError(), 1, "error: out of memory\nhint: "),
    ],
)
def test_errors_become_a_message_a_hint_and_a_code(
    verb: Any, capsys: Any, error: Any, code: int, text: str
) -> None:
    verb(raiser(error))
    assert cli.main(["boom"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(text)


def test_an_unexpected_error_is_two_lines_and_a_traceback_on_request(
    verb: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb(raiser(ValueError("seven\nlines")))
    monkeypatch.delenv("HASTEN_DEBUG", raising=False)
    assert cli.main(["boom"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[0] == "error: unexpected ValueError: seven lines"
    assert "HASTEN_DEBUG=1" in err.splitlines()[1]
    assert len(err.splitlines()) == 2
    monkeypatch.setenv("HASTEN_DEBUG", "1")
    assert cli.main(["boom"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(verb: Any, capsys: Any) -> None:
    verb(raiser(KeyboardInterrupt()), kept="Run it again to resume.")
    assert cli.main(["boom"]) == 130
    assert capsys.readouterr().err == "\nstopped. Run it again to resume.\n"


def test_a_real_ctrl_c() -> None:
    """The signal itself, in a process of its own: no traceback, exit code 130."""
    script = (
        "import signal, sys, time, hasten.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever runs the tests may ignore it
        "def wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "c.overview = wait\nsys.exit(c.main(['--help']))"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        assert program.stderr.read() == "\nstopped. Nothing was changed.\n"
    assert program.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "did you mean generate?"),
        (["--verison"], "unknown option --verison"),
        (["generate", "m", "--promt", "x"], "did you mean --prompt?"),
        (["generate"], "missing argument"),
        (["generate", "m", "-p", "x", "-n", "-1"], "-n"),
        (["generate", "m", "-p", "x", "-n", "many"], "-n"),
        (["generate", "m", "-p", "x", "--threads", "0"], "--threads"),
        (["generate", "m", "-p", "\udcff"], "argument 4 is not valid UTF-8: \\xff"),
        (["run", "m"], "hasten chat MODEL"),
        (["serve", "m", "--max-model-len", "9"], "that is --context here"),
        (["generate", "m", "-p", "x", "--temp", "1"], "that is --temperature here"),
        (["generate", "-m", "m"], "that is the first argument here"),
    ],
)
def test_usage_errors_exit_with_two(capsys: Any, arguments: list[str], message: str) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "hint: " in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error() -> None:
    """`hasten --help | true`: quiet, whatever the pipe's size."""
    script = "import sys, hasten.cli as c; c.overview = lambda: 'x' * 10**6; sys.exit(c.main(['--help']))"
    program = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait(30) == 141


def test_help_lists_every_verb_and_imports_nothing_heavy(capsys: Any) -> None:
    script = (
        "import sys, hasten.cli; code = hasten.cli.main(['--help']);"
        "heavy = {'typer', 'rich', 'numpy', 'torch', 'tokenizers', 'hasten._native'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # a hang, not a benchmark
    for name in cli.VERBS:
        assert f"  {name} " in done.stdout


def test_running_a_verb_loads_no_more_than_it_needs() -> None:
    """Parsing a verb's flags: neither rich nor pydantic (0.1 s each), nor what loads a model."""
    script = (
        "import sys, hasten.cli; code = hasten.cli.main(['generate', 'none', '-p', ' ']);"
        "heavy = {'rich', 'pydantic', 'torch', 'huggingface_hub', 'jinja2', 'tokenizers'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the prompt is empty" in done.stderr


def test_version_and_no_arguments(capsys: Any) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hasten 0.")
    for none in ([], ["help"]):
        assert cli.main(none) == 0
        assert capsys.readouterr().out == cli.overview()
    assert cli.main(["help", "show"]) == 0
    assert "hasten show" in capsys.readouterr().out


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_as_good_as_none(closed: str) -> None:
    command = f"{sys.executable} -m hasten show no-such-model {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "unexpected" not in done.stderr
    assert ("error: " in done.stderr) == ("2>&-" not in closed)
    version = subprocess.run(["sh", "-c", f"{sys.executable} -m hasten --help {closed}"], check=False)
    assert version.returncode == 0


@pytest.mark.parametrize("flags", frame._FLAGS_OF_OTHERS.values())
def test_what_others_call_a_flag_is_one_of_ours(flags: str) -> None:
    flag = flags.split(":")[0].split(" ")[0]
    if flag.startswith("-"):
        known = [opt for verb in ("serve", "generate") for one in parser_of(verb).params for opt in one.opts]
        assert flag in known


def test_remarks_that_cannot_be_written_end_no_work() -> None:
    """stderr on a full disk, or with a reader that left."""
    command = f"{sys.executable} -m hasten cache ls"
    for to in ("2>/dev/full", "2> >(true)"):
        done = subprocess.run(["bash", "-c", f"{command} {to}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0
    wrong = f"{sys.executable} -m hasten show no-such-model 2>/dev/full"
    assert subprocess.run(["bash", "-c", wrong], check=False).returncode == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("flag", ["--kv-gb", "--drain-s", "--max-body-mb"])
def test_numbers_that_are_none_are_refused(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert cli.main(["serve", "no-such-model", f"{flag}={value}"]) == 2
    assert f"error: {flag} must be a finite number, got {value}" in capsys.readouterr().err
