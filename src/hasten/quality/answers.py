"""Who answers the questions of a task, the answers that are kept, and what they are worth.

A model of this process and a server are asked the same two things: continue a text greedily, and say how
likely some continuations are. So an engine of others behind OpenAI's API is judged by the same code as a
model that Hasten runs.

Candidate and source answer the same questions, so the difference of their shares of right answers is paired.
A task that the source itself does no better than by guessing says nothing about a candidate: `insufficient`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

import hasten
from hasten.cache import cache_dir, read_record, write_record
from hasten.core import Status
from hasten.errors import DiskError, PeerError, UsageError
from hasten.quality.divergence import (
    Doubles,
    Floats,
    Interval,
    Runnable,
    Z,
    interval,
    log_softmax,
    within,
    worst,
)
from hasten.quality.tasks import TASKS, Question, Task, names_of
from hasten.quality.text import Encoder

_log = logging.getLogger("hasten.quality")

Told = Callable[[int], None]
"""Told how many are done."""
Step = Callable[[str, int, int], None]
"""Told the task and who answers, questions that are answered, and questions in all."""
Bools = npt.NDArray[np.bool_]
Q = TypeVar("Q")
A = TypeVar("A")


class Subject(Protocol):
    """Who answers."""

    @property
    def identity(self) -> str | None:
        """Names what answers so exactly that its answers may be kept; None: they are not."""
        ...

    @property
    def context(self) -> int | None:
        """Longest prompt plus answer, in its tokens; None: unknown, and everything is asked."""
        ...

    def length(self, text: str) -> int:
        """Tokens of a text; only asked where `context` is known."""
        ...

    def texts(self, prompts: Sequence[str], most_tokens: int, stop: tuple[str, ...], told: Told) -> list[str]:
        """Greedy continuations of at most `most_tokens`, each up to the first text of `stop`."""
        ...

    def likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], told: Told
    ) -> list[list[float]] | None:
        """Natural log-probability of each choice behind its prompt; None: it gives none."""
        ...


class Continuing(Runnable, Protocol):
    """What is needed of a model; `hasten.engine.model.LanguageModel` is one."""

    @property
    def tokenizer(self) -> Encoder: ...

    @property
    def context(self) -> int: ...

    def hidden_before(
        self, opening: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Floats]: ...

    def continued(
        self, prompts: Sequence[str], most_tokens: int, stop: tuple[str, ...], told: Told
    ) -> list[str]: ...


class InProcess:
    """A loaded model.

    Args:
        model: it stays the caller's.
        identity: `hasten.engine.loaded.fingerprint` of it; None keeps no answers.
    """

    def __init__(self, model: Continuing, identity: str | None = None) -> None:
        self._model = model
        self.identity = identity

    @property
    def context(self) -> int:
        return self._model.context

    def length(self, text: str) -> int:
        return len(self._model.tokenizer.encode(text))

    def texts(self, prompts: Sequence[str], most_tokens: int, stop: tuple[str, ...], told: Told) -> list[str]:
        return self._model.continued(prompts, most_tokens, stop, told)

    def likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], told: Told
    ) -> list[list[float]]:
        found = []
        for done, (prompt, some) in enumerate(zip(prompts, choices, strict=True)):
            told(done)
            found.append(self._likelihoods(prompt, some))
        told(len(prompts))
        return found

    def _likelihoods(self, prompt: str, choices: Sequence[str]) -> list[float]:
        encode = self._model.tokenizer.encode
        opening, wholes = encode(prompt), [encode(prompt + choice) for choice in choices]
        start = min(_shared(opening, whole) for whole in wholes)
        behind = [whole[start:] for whole in wholes]
        hidden = np.concatenate(self._model.hidden_before(opening[:start], behind))  # [R, E]
        tokens = [token for one in behind for token in one]
        scores = log_softmax(self._model.logits_of(hidden))[np.arange(len(tokens)), tokens]
        return [float(part.sum()) for part in np.split(scores, np.cumsum([len(one) for one in behind])[:-1])]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Server:
    """A model behind OpenAI's completions API: `hasten serve`, vLLM, llama-server and others.

    Args:
        url: of the server, with or without `/v1`.
        model: its name there.
        together: requests under way at once.

    `HASTEN_API_KEY` is sent as the key where it is set.
    """

    identity: str | None = None
    context: int | None = None

    def __init__(self, url: str, model: str, together: int = 8) -> None:
        base = url.rstrip("/")
        self._place = f"{base if base.endswith('/v1') else base + '/v1'}/completions"
        self._model = model
        self._together = together

    def length(self, text: str) -> int:
        return len(text) // 4

    def texts(self, prompts: Sequence[str], most_tokens: int, stop: tuple[str, ...], told: Told) -> list[str]:
        asked = [{"prompt": prompt, "max_tokens": most_tokens, "stop": list(stop)[:4]} for prompt in prompts]
        return [_until(str(one["text"]), stop) for one in self._all(asked, told)]

    def likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], told: Told
    ) -> list[list[float]] | None:
        pairs = [(prompt, choice) for prompt, some in zip(prompts, choices, strict=True) for choice in some]
        asked = [
            {"prompt": prompt + choice, "max_tokens": 1, "echo": True, "logprobs": 1}
            for prompt, choice in pairs
        ]
        if asked and self._sum(self._ask(asked[0]), *pairs[0]) is None:
            return None
        each = len(asked) // max(len(prompts), 1)
        answered = self._all(asked, lambda done: told(done // max(each, 1)))
        flat = [self._sum(one, *pair) for one, pair in zip(answered, pairs, strict=True)]
        found, place = [], 0
        for some in choices:
            row = [score for score in flat[place : place + len(some)] if score is not None]
            if len(row) < len(some):
                return None
            found.append(row)
            place += len(some)
        return found

    def _sum(self, answer: Any, prompt: str, choice: str) -> float | None:
        """Log-probability of the choice's tokens, where the answer says the prompt again; None: none said."""
        told = answer.get("logprobs") or {}
        offsets, scores = told.get("text_offset") or (), told.get("token_logprobs") or ()
        if not str(answer.get("text", "")).startswith(prompt):
            return None
        inside = range(len(prompt), len(prompt) + len(choice))
        taken = [score for at, score in zip(offsets, scores, strict=False) if at in inside]
        if not taken or any(score is None for score in taken):
            return None
        return float(sum(taken))

    def _all(self, asked: Sequence[dict[str, Any]], told: Told) -> list[Any]:
        found = []
        with ThreadPoolExecutor(self._together) as pool:
            for done, one in enumerate(pool.map(self._ask, asked)):
                told(done)
                found.append(one)
        told(len(asked))
        return found

    def _ask(self, question: dict[str, Any]) -> Any:
        """One completion: the first choice of the answer.

        Raises:
            PeerError: no server there, an error of the server, or an answer without choices.
        """
        body = json.dumps({"model": self._model, "temperature": 0, **question}).encode()
        key = os.environ.get("HASTEN_API_KEY", "")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        try:
            request = urllib.request.Request(self._place, body, headers)
            with urllib.request.urlopen(request, timeout=_WAIT_S) as response:
                return json.loads(response.read())["choices"][0]
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise PeerError(
                f"{self._place} answered {error.code}: {said[:300]}",
                hint="give the model the name that the server has: GET /v1/models lists them",
            ) from error
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise PeerError(
                f"{self._place} gives no completion: {error}",
                hint="start it first, for example: hasten serve MODEL --port 8000",
            ) from error


_WAIT_S = 600.0


def _until(text: str, stop: tuple[str, ...]) -> str:
    """A text up to the first of its stop texts: OpenAI's API takes four of them, and some servers none."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


def kept_answers(
    subject: Subject,
    asked: Sequence[Any],
    questions: Sequence[Q],
    answer: Callable[[Sequence[Q], Told], Sequence[A] | None],
    told: Told,
) -> list[A] | None:
    """Answers to all questions: those that were kept, and the others computed now and kept.

    Args:
        subject: who answers; without an identity nothing is kept.
        asked: what the answers depend on beside question and subject.
        questions: as JSON can hold them.
        answer: computes answers to some of them; None: it cannot.
        told: how many are done.
    """
    names = [hashlib.sha256(json.dumps(one).encode()).hexdigest()[:32] for one in questions]
    key = {"subject": subject.identity, "asked": list(asked), "version": hasten.__version__}
    path = _place(key) if subject.identity is not None else None
    had: dict[str, A] = (read_record(path, key) if path is not None else None) or {}
    missing = [place for place, name in enumerate(names) if name not in had]
    if missing:
        before = len(questions) - len(missing)
        new = answer([questions[place] for place in missing], lambda done: told(before + done))
        if new is None:
            return None
        had |= {names[place]: one for place, one in zip(missing, new, strict=True)}
        if path is not None:
            _keep(path, key, had)
    told(len(questions))
    return [had[name] for name in names]


def _place(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "answers" / f"{name}.json"


def _keep(path: Path, key: dict[str, Any], answers: dict[str, Any]) -> None:
    try:
        write_record(path, key, answers)
    except (DiskError, OSError) as error:
        _log.warning("answers are not kept: %s", error)


# Verdicts -------------------------------------------------------------------------------------------------

MAX_DROP = 0.05
"""How much the share of right answers may fall unless told otherwise: 5 points."""
_FLOOR = 0.05
"""A share of right answers that is not surely above this says nothing where guessing never hits."""
_MADE_UP = math.sqrt(0.5)


@dataclass(frozen=True)
class TaskResult:
    """What one task found. Shares are of right answers, 0 to 1, with 95 % intervals."""

    task: str
    status: Status  # against the source: how far the share may fall
    questions: int
    left_out: int  # longer than the model's context
    chance: float
    share: float | None  # None: nothing could be asked
    low: float | None = None
    high: float | None = None
    share_source: float | None = None  # None: there is no source to compare with
    drop: float | None = None  # the source's share minus this one, of the same questions
    drop_low: float | None = None
    drop_high: float | None = None
    drop_detectable: float | None = None  # smallest drop beyond the limit that 9 of 10 such samples show
    changed: int | None = None  # questions that only one of the two answers rightly
    groups: Mapping[str, tuple[int, int]] | None = None  # right, asked
    because: str = ""


def judge(
    candidate: Subject,
    names: Sequence[str],
    limit: int | None = None,
    *,
    source: Subject | None = None,
    max_drop: float = MAX_DROP,
    step: Step = lambda task, done, total: None,
) -> tuple[TaskResult, ...]:
    """Asks a candidate the questions of some tasks and judges its answers.

    Args:
        candidate: who is judged.
        names: of tasks.
        limit: questions of each task; None: each task's own number.
        source: who it is held against, asked the same questions; None: `status` says only whether the share
            is surely better than guessing (`pass`) or not (`insufficient`).
        max_drop: most that the share of right answers may fall below the source's.
        step: told of progress, for both.

    Returns:
        One result a task, in order.

    Raises:
        UsageError: an unknown task, a limit below 1, or code cannot be locked in here.
        PeerError: a server that does not answer.
    """
    names = names_of(",".join(names))
    if limit is not None and limit < 1:
        raise UsageError(f"cannot judge on {limit} questions", hint="give --limit 100")
    found = []
    for name in names:
        asked = TASKS[name].questions(name, limit or TASKS[name].limit)
        fit = [one for one in asked if _fits(one, TASKS[name], candidate, source)]
        ours = theirs = None
        if source is not None:
            theirs = _right(source, name, fit, partial(step, f"{name}, the source"))
        if source is None or theirs is not None:
            ours = _right(candidate, name, fit, partial(step, name))
        found.append(_result(name, fit, len(asked) - len(fit), ours, theirs, max_drop))
    return tuple(found)


def at_least(result: TaskResult, share: float) -> Status:
    """Holds one result against a share of right answers: is it surely reached, or surely missed?

    Where the share asked for is no more than guessing gives, or nothing could be asked: `insufficient`.
    """
    if result.low is None or result.high is None or share <= result.chance:
        return "insufficient"
    if result.low >= share:
        return "pass"
    return "fail" if result.high < share else "insufficient"


def short_of(result: TaskResult, share: float) -> str:
    """That a share is missed, or not surely reached, in words."""
    if result.share is None or result.low is None or result.high is None:
        return f"{result.task}: {result.because}; {share:.3g} of the answers must be right"
    return (
        f"{result.task}: {result.share:.0%} of {result.questions} answers are right "
        f"({result.low:.0%} to {result.high:.0%}); the lower end must reach {share:.3g}"
    )


def reached(
    subject: Subject,
    wanted: Mapping[str, float],
    limit: int | None = None,
    *,
    step: Step = lambda task, done, total: None,
) -> tuple[Status, tuple[TaskResult, ...]]:
    """Whether a subject surely has the least shares of right answers that are wanted of tasks.

    Args:
        subject: who is asked.
        wanted: task -> least share, 0 to 1; `hasten.quality.tasks.wanted_of` reads one.
        limit, step, and what is raised: as for `judge`.

    Returns:
        `pass` where every share is surely reached, `fail` where one is surely missed, else `insufficient`;
        and what each task found. Tasks behind one that failed are not asked.
    """
    found: list[TaskResult] = []
    statuses: list[Status] = []
    for name, share in wanted.items():
        found += judge(subject, [name], limit, step=step)
        statuses.append(at_least(found[-1], share))
        if statuses[-1] == "fail":
            break
    return worst(statuses), tuple(found)


def _fits(question: Question, task: Task, *subjects: Subject | None) -> bool:
    text = question.prompt + max(question.choices, key=len, default="")
    return all(
        one.context is None or one.length(text) + task.most_tokens <= one.context
        for one in subjects
        if one is not None
    )


def _right(
    subject: Subject, name: str, asked: Sequence[Question], step: Callable[[int, int], None]
) -> Bools | None:
    """Which questions are answered rightly, [N]; None: the subject cannot be asked such questions."""
    task, prompts = TASKS[name], [one.prompt for one in asked]

    def told(done: int) -> None:
        step(done, len(asked))

    if asked and asked[0].choices:
        scored = kept_answers(
            subject, (name, "likelihoods"), [(one.prompt, *one.choices) for one in asked],
            lambda some, step: subject.likelihoods([q[0] for q in some], [q[1:] for q in some], step), told,
        )  # fmt: skip
        if scored is None:
            return None
        said = [one.choices[int(np.argmax(row))] for one, row in zip(asked, scored, strict=True)]
    else:
        texts = kept_answers(
            subject, (name, task.most_tokens, *task.stop), prompts,
            lambda some, step: subject.texts(some, task.most_tokens, task.stop, step), told,
        )  # fmt: skip
        said = list(texts or ())
    return np.array([one.is_right(text) for one, text in zip(asked, said, strict=True)], np.bool_)


def _result(
    name: str,
    asked: Sequence[Question],
    left_out: int,
    ours: Bools | None,
    theirs: Bools | None,
    max_drop: float,
) -> TaskResult:
    chance, count = TASKS[name].chance, len(asked)
    base = TaskResult(name, "insufficient", count, left_out, chance, None)
    if not asked:
        return replace(base, because="every question is longer than the context")
    if ours is None:
        return replace(base, because="the server gives no probabilities of a prompt's tokens")
    low, high = wilson(int(ours.sum()), count)
    base = replace(base, share=float(ours.mean()), low=low, high=high, groups=_groups(asked, ours))
    if theirs is None:
        if low > max(chance, _FLOOR):
            return replace(base, status="pass", because="better than guessing; no source to compare with")
        return replace(base, because="not surely better than guessing")
    drop = theirs.astype(np.float64) - ours
    sure = drop_interval(drop)
    base = replace(
        base,
        share_source=float(theirs.mean()),
        drop=float(drop.mean()),
        drop_low=min(sure.low, drop.mean()),
        drop_high=max(sure.high, drop.mean()),
        drop_detectable=sure.detectable,
        changed=int((ours != theirs).sum()),
    )
    if wilson(int(theirs.sum()), count)[0] <= max(chance, _FLOOR):
        return replace(base, because="the source itself is not surely better than guessing")
    status = within(sure.low, sure.high, max_drop)
    because = "the limit lies inside the interval: more questions narrow it"
    return replace(base, status=status, because=because if status == "insufficient" else "")


def drop_interval(drop: Doubles, *, seed: int = 0) -> Interval:
    """The mean of paired differences of right answers, [N] of -1, 0 and 1, with its interval.

    Two made-up questions are added, one won and one lost, weighed so that they add the variance that Agresti
    and Min (2005) add: few changes, or none at all, must not look like certainty.
    """
    return interval(np.append(drop, (_MADE_UP, -_MADE_UP)), seed=seed)


def _groups(asked: Sequence[Question], right: Bools) -> dict[str, tuple[int, int]] | None:
    found: dict[str, tuple[int, int]] = {}
    for one, is_right in zip(asked, right, strict=True):
        if one.group:
            had = found.get(one.group, (0, 0))
            found[one.group] = (had[0] + bool(is_right), had[1] + 1)
    return found or None


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): honest for few questions and near 0 and 1."""
    share, square = right / count, Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)
