"""What a command shows: text and documents on stdout; everything else, progress too, on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hasten.core import EngineOptions, Measurement, as_json
from hasten.errors import UsageError
from hasten.stopping import outlived

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from hasten.compress.result import Observer, Progress
    from hasten.engine.model import LanguageModel
    from hasten.engine.request import Output
    from hasten.optimize.choice import Candidate

_QUIET_S = 30.0
CALIBRATED = "What was calibrated is kept."


def console(out: bool = False) -> Console:
    """A rich console on stderr, or on stdout, for tables and progress; rich costs start-up time."""
    from rich.console import Console

    return Console(stderr=not out, highlight=False)


def emit(document: Any) -> None:
    """Write one JSON document to stdout; dataclasses of `hasten.core` become objects, None stays null."""
    sys.stdout.write(json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line for the human on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def note_device(model: LanguageModel) -> None:
    """Say which device `--device auto` took, and why; nothing where a device was named."""
    if model.device_because:
        note(f"--device auto is {model.device}: {model.device_because}")


def shown(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A figure with its unit; None is `unknown`."""
    if value is None:
        return "unknown"
    return f"{value:,.{digits}f}" + (f" {unit}" if unit else "")


def print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    bold: int = -1,
    out: bool = False,
) -> None:
    """A table on stderr, or on stdout: words on the left, figures on the right, one row in bold."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, title=title)
    for place, heading in enumerate(columns):
        figures = place > 0 and any(letter.isdecimal() for row in rows for letter in row[place])
        table.add_column(heading, no_wrap=place == 0, justify="right" if figures else "left")
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == bold else None)
    screen = console(out)
    if not screen.is_terminal:
        screen.width = 110  # a file or a pipe has no width of its own
    screen.print(table)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as plain lines, each column as wide as its widest cell: for programs and pipes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in lines)


def speeds(measured: Measurement | None) -> list[str]:
    """Decode and prefill, tokens a second, and milliseconds to the first token: medians."""
    if measured is None:
        return ["not timed"] * 3
    decode, prefill, ttft = measured.decode_tok_per_s, measured.prefill_tok_per_s, measured.ttft_ms
    return [shown(decode.median), shown(prefill.median, digits=0), shown(ttft.median, digits=0)]


def read_stdin() -> str:
    """All of stdin as text.

    Raises:
        UsageError: it holds bytes that are no UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="convert it first, for example: iconv -f LATIN1 -t UTF-8",
        ) from None


class Ticker:
    """Says what is being done: a live line in a terminal, one line a subject elsewhere."""

    def __init__(self) -> None:
        self._console = console()
        self._status: Status | None = None
        self._subject = ""
        self._began = time.monotonic()
        self._noted = self._began

    def __enter__(self) -> Ticker:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, subject: str) -> None:
        """A new piece of work."""
        self.count(subject, 0, 0)

    def count(
        self, subject: str, done: int, total: int, *, detail: str = "", seconds_left: float | None = None
    ) -> None:
        """So much of it is done; `total` 0: nobody knows. Where lines stay: one a subject and every 30 s."""
        part = f" {done} of {total}" if total else ""
        part += f", {detail}" if detail else ""
        part += f", about {_span(seconds_left)} left" if seconds_left is not None else ""
        if self._status is not None:
            from rich.markup import escape

            self._status.update(f"{escape(subject + part)} [dim]{self._seconds():.0f} s[/dim]")
        elif subject != self._subject:
            self._note(subject)
        elif part and time.monotonic() - self._noted >= _QUIET_S:
            self._note(subject + part)
        self._subject = subject

    def _note(self, text: str) -> None:
        self._noted = time.monotonic()
        note(f"[{self._seconds():5.1f} s] {text}")

    def line(self, text: str) -> None:
        """A result that stays on the screen."""
        if self._status is not None:
            from rich.markup import escape

            self._console.print(escape(text))
        else:
            note(text)

    def _seconds(self) -> float:
        return time.monotonic() - self._began


def _span(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def watched() -> Iterator[Observer]:
    """An observer whose live line appears with the first thing it is told; most recipes tell nothing."""
    opened: list[Ticker] = []
    with ExitStack() as stack:

        def tell(progress: Progress) -> None:
            if not opened:
                opened.append(stack.enter_context(Ticker()))
            show(opened[0], progress)

        yield tell


def opened(
    model: str, recipe: str | None, options: EngineOptions, adapters: Sequence[str] = ()
) -> LanguageModel:
    """`hasten.load`, its progress shown; LoRA adapters are merged."""
    from hasten.loading import load
    from hasten.models.source import with_adapters

    threads, context = options.threads, options.context
    with watched() as observer:
        ref = with_adapters(model, adapters)
        return load(ref, recipe, threads=threads, context=context, options=options, observer=observer)


def show(ticker: Ticker, progress: Progress) -> None:
    """One moment of making a model, on a ticker."""
    if progress.candidate is not None:
        ticker.line("  " + _summary(progress.candidate))
        return
    ticker.count(_subject(progress), progress.done, progress.total)


def _subject(progress: Progress) -> str:
    if progress.stage == "sensitivity":  # a hundred groups are one subject
        return "layer sensitivity"
    if progress.stage == "calibrate":
        return progress.detail
    return f"{progress.stage}: {progress.detail}"


def _summary(candidate: Candidate) -> str:
    verdict, measured = candidate.verdict, candidate.measurement
    speed = "" if measured is None else f", {measured.decode_tok_per_s.median:.1f} tok/s"
    return (
        f"{candidate.recipe.name}: {candidate.bits_per_weight:.2f} bits, "
        f"perplexity {verdict.ppl_increase:+.2%}, KL {verdict.kl_mean:.4f}: {verdict.status}{speed}"
    )


@dataclass
class Answer:
    """What came out of one stream. Times are seconds; an answer that Ctrl-C cut has `stopped` set."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    decode_s: float = 0.0
    stopped: bool = False
    ended: bool = False  # by an end-of-text token or a stop text

    @property
    def finish_reason(self) -> Literal["stop", "length", "interrupted"]:
        """Why the answer ends where it does."""
        if self.stopped:
            return "interrupted"
        return "stop" if self.ended else "length"

    @property
    def decode_tok_per_s(self) -> float | None:
        """Tokens a second after the first one; None with fewer than two tokens."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else None

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from asking to the first token; None if there was none."""
        return None if self.first_token_s is None else self.first_token_s * 1000

    def line(self) -> str:
        return (
            f"{len(self.token_ids)} tokens, first after {shown(self.ttft_ms, 'ms')}, "
            f"then {shown(self.decode_tok_per_s, 'tok/s')}"
        )


def speak(outputs: Iterable[Output], *, aloud: bool = True, patient: bool = False) -> Answer:
    """Write the text of one answer to stdout as it comes.

    Args:
        outputs: of the engine, computed as they are asked for.
        aloud: False collects the text without writing it.
        patient: Ctrl-C ends the answer instead of the program.
    """
    answer = Answer()
    start = time.perf_counter()
    try:
        for output in outputs:
            now = time.perf_counter() - start
            if output.token_ids and answer.first_token_s is None:
                answer.first_token_s = now
            answer.decode_s = now - (answer.first_token_s or now)
            answer.token_ids += output.token_ids
            answer.ended = output.finish_reason == "stop"
            _write(answer, output.text, aloud)
    except KeyboardInterrupt:
        if not patient:
            raise
        outlived()
        answer.stopped = True
    return answer


def _write(answer: Answer, piece: str, aloud: bool) -> None:
    answer.text += piece
    if aloud and piece:
        sys.stdout.write(piece)
        sys.stdout.flush()
