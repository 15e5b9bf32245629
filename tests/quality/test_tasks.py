"""Tasks: their questions, what counts as right, and verdicts on subjects whose skill is known."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.quality import sandbox
from hasten.quality.answers import TaskResult, at_least, judge, reached, wilson
from hasten.quality.tasks import NEEDLE_LENGTHS, TASKS, Draw, Task, names_of, runs, wanted_of

NAMES = sorted(TASKS)
LIKELIHOODS = [name for name in NAMES if TASKS[name].questions(name, 1)[0].choices]
ANSWERS = {q.prompt: q.answer for n in NAMES for q in TASKS[n].questions(n, TASKS[n].limit)}
LOCKED = sandbox.run("") != "impossible"


class Skilled:
    """A subject that answers a share of questions rightly, and the others with what is surely wrong.

    Which ones is drawn from the prompt and `seed`, so two subjects of one seed fail on the same questions.
    """

    identity: str | None = None

    def __init__(self, skill: float, seed: int = 0, context: int | None = None) -> None:
        self.skill, self.seed, self.context = skill, seed, context
        self.answers = ANSWERS
        self.asked: list[str] = []

    def length(self, text: str) -> int:
        return len(text.split())

    def _knows(self, prompt: str) -> bool:
        self.asked.append(prompt)
        return random.Random(f"{self.seed} {prompt}").random() < self.skill

    def texts(
        self, prompts: Sequence[str], most_tokens: int, stop: tuple[str, ...], told: Callable[[int], None]
    ) -> list[str]:
        told(len(prompts))
        return [self.answers[one] if self._knows(one) else " no idea" for one in prompts]

    def likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], told: Callable[[int], None]
    ) -> list[list[float]] | None:
        rows = []
        for prompt, some in zip(prompts, choices, strict=True):
            knows = self._knows(prompt)
            rows.append([-1.0 if (one == self.answers[prompt]) == knows else -2.0 for one in some])
        return rows


class Guessing(Skilled):
    """Every choice is as good as another, and texts are empty."""

    def texts(self, prompts: Sequence[str], *_: object) -> list[str]:
        return ["" for _ in prompts]

    def likelihoods(self, prompts: Sequence[str], choices: Sequence[Sequence[str]], _: object) -> list:
        pairs = zip(prompts, choices, strict=True)
        return [[random.Random(f"{prompt} {one}").random() for one in some] for prompt, some in pairs]


class Silent(Skilled):
    """A server without probabilities of prompts."""

    def likelihoods(self, *_: object) -> None:
        return None


def one(subject: Skilled, name: str, **more: object) -> TaskResult:
    return judge(subject, [name], **more)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_the_same_whatever_the_limit(name: str) -> None:
    some, more = TASKS[name].questions(name, 5), TASKS[name].questions(name, TASKS[name].limit)
    assert [q.prompt for q in some] == [q.prompt for q in more[:5]]
    assert len({q.prompt for q in more}) >= 0.98 * len(more), "questions that come twice prove nothing"


def test_the_questions_of_this_version() -> None:
    """Figures of two versions are compared: a question that changes needs another name of its task."""
    import hashlib

    whole = "".join(q.prompt + q.answer + "".join(q.choices) for n in NAMES for q in TASKS[n].questions(n, 8))
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] == "efc87241d9ede889"


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_right_and_another_is_not(name: str) -> None:
    if name == "code" and not LOCKED:
        pytest.skip("this system cannot lock a process in")
    questions = TASKS[name].questions(name, 12)
    for question in questions:
        assert question.is_right(question.answer)
        assert not question.is_right(" no idea")
        if question.choices:
            assert question.choices.count(question.answer) == 1
            assert len(set(question.choices)) == len(question.choices) == round(1 / TASKS[name].chance)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_no_questions(name: str) -> None:
    task = TASKS[name]
    shown = {task.make(Draw.of(name, -1 - place)).prompt for place in range(task.examples)}
    assert len(shown) == task.examples
    assert not shown & {task.make(Draw.of(name, place)).prompt for place in range(task.limit)}


@pytest.mark.parametrize("name", NAMES)
def test_examples_come_first_and_end_as_answers_end(name: str) -> None:
    task = TASKS[name]
    question, bare = task.questions(name, 1)[0], task.make(Draw.of(name, 0))
    head = question.prompt.removesuffix(bare.prompt).removeprefix(task.lead)
    first = task.make(Draw.of(name, -1))
    assert head.startswith(f"{first.prompt}{first.answer}\n" if task.examples else "")
    assert not any(stop in first.answer for stop in task.stop), "an answer would be cut"
    assert not question.prompt.endswith(" "), "a blank belongs to the token behind it"


def test_arithmetic_is_right() -> None:
    checked = 0
    for question in TASKS["arithmetic"].questions("arithmetic", 200):
        if found := re.search(r"What is ([\d +*-]+)\?\nAnswer:$", question.prompt):
            assert int(question.answer) == eval(found[1])
            checked += 1
    assert checked > 100


def test_sorted_lists_are_sorted() -> None:
    for question in TASKS["sort"].questions("sort", 50):
        given = question.prompt.rsplit("List: ", 1)[1].split("\n")[0].split(", ")
        right = question.answer.strip().split(", ")
        assert sorted(given) == sorted(right)
        assert right == (sorted(given, key=int) if given[0].isdigit() else sorted(given))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ('{"number": 1, "city": "Rome", "count": 2, "thing": "saw", "month": "May"}', True),
        ('  {"city": "Rome", "number": 1, "count": 2, "thing": "saw", "month": "May"}\n', True),
        ('{"number": "1", "city": "Rome", "count": 2, "thing": "saw", "month": "May"}', False),
        ('{"number": true, "city": "Rome", "count": 2, "thing": "saw", "month": "May"}', False),
        ('{"number": 1, "city": "Rome", "count": 2, "thing": "banana", "month": "May"}', False),
        ('{"number": 1, "city": "Rome", "count": 2, "thing": ["saw"], "month": "May"}', False),
        ('{"number": 1, "city": "Rome", "count": 2, "thing": "saw"}', False),
        ('{"number": 1, "city": "Rome", "count": 2, "thing": "saw", "month": "May", "more": 1}', False),
        ("[1]", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_held_to_its_schema(said: str, right: bool) -> None:
    assert TASKS["json"].questions("json", 1)[0].is_right(said) is right


@pytest.mark.skipif(not LOCKED, reason="this system cannot lock a process in")
def test_code_is_run() -> None:
    question = TASKS["code"].questions("code", 1)[0]
    assert question.is_right(question.answer)
    assert not question.is_right("    return None")
    assert not question.is_right("    import os; os._exit(0)")
    assert not runs("import socket; socket.socket()")


def test_code_that_cannot_be_locked_in_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "run", lambda program: "impossible")
    with pytest.raises(UsageError, match="lock") as caught:
        one(Skilled(1.0), "code", limit=2)
    assert caught.value.hint


def test_needles_lie_at_every_depth_of_every_length() -> None:
    questions = TASKS["needle"].questions("needle", 20)
    assert len({q.group for q in questions}) == 20
    for question, (depth, length) in zip(
        questions, itertools.product((0, 0.25, 0.5, 0.75, 1), NEEDLE_LENGTHS), strict=True
    ):
        text, asked = question.prompt.split("\n\n")
        number = question.answer.strip()
        assert text.count(number) == 1
        assert number not in asked
        assert text.index(number) / len(text) == pytest.approx(depth, abs=0.06)
        words = len(text.split())
        assert 0.75 * length < words < length


def test_texts_with_needles_begin_alike() -> None:
    """A prefix cache computes the shared part once."""
    first, second = (TASKS["needle"].questions("needle", 20)[place].prompt for place in (15, 19))
    shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert shared > 0.7 * len(first)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "code" or LOCKED])
def test_who_knows_all_passes_and_who_knows_nothing_fails(name: str) -> None:
    count = 6 if name == "code" else 20
    source = Skilled(1.0)
    assert one(source, name, limit=count, source=source, max_drop=0.5).status == "pass"
    lost = one(Skilled(0.0), name, limit=count, source=source)
    assert lost.status == "fail"
    assert (lost.share, lost.share_source, lost.drop, lost.changed) == (0.0, 1.0, 1.0, count)


def test_a_source_that_guesses_says_nothing() -> None:
    for name in (*LIKELIHOODS, "arithmetic"):
        found = one(Guessing(0.0), name, source=Guessing(0.0))
        assert found.status == "insufficient", name
        assert "guessing" in found.because
        assert one(Guessing(0.0), name).status == "insufficient"
        assert found.share == pytest.approx(found.chance, abs=0.12)


def test_few_questions_without_a_change_are_no_proof() -> None:
    assert one(Skilled(0.9), "copy", limit=5, source=Skilled(0.9)).status == "insufficient"
    found = one(Skilled(0.9), "extract", source=Skilled(0.9))
    assert (found.drop, found.changed, found.status) == (0.0, 0, "pass")
    assert found.drop_low is not None
    assert found.drop_low < 0 < found.drop_high  # type: ignore[operator]


def test_same_failures_are_what_makes_it_narrow() -> None:
    paired = one(Skilled(0.66), "extract", source=Skilled(0.7))
    apart = one(Skilled(0.66, seed=1), "extract", source=Skilled(0.7))
    assert paired.drop_high - paired.drop_low < 0.6 * (apart.drop_high - apart.drop_low)  # type: ignore


def test_a_drop_is_found() -> None:
    found = one(Skilled(0.5), "extract", source=Skilled(0.9))
    assert found.status == "fail"
    assert found.drop_low <= found.drop <= found.drop_high  # type: ignore[operator]
    assert found.drop == pytest.approx(0.4, abs=0.1)


def test_interval_of_a_drop_holds_the_truth_about_19_times_in_20() -> None:
    from hasten.quality.answers import drop_interval

    rng = np.random.default_rng(0)
    for lost, won, count in ((0.1, 0.05, 200), (0.02, 0.02, 100), (0.3, 0.1, 50), (0.01, 0.0, 200)):
        held = 0
        for seed in range(100):
            draws = rng.choice([1.0, -1.0, 0.0], count, p=[lost, won, 1 - lost - won])
            sure = drop_interval(draws, seed=seed)
            held += sure.low <= lost - won <= sure.high
        assert held >= 91, (lost, won, count, held)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_is_the_textbook(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_questions_that_do_not_fit_are_left_out() -> None:
    found = one(Skilled(1.0, context=2500), "needle", source=Skilled(1.0))
    assert (found.questions, found.left_out) == (10, 10)
    assert set(found.groups or ()) == {
        f"{length:,} tokens, {depth} deep"
        for length in (1024, 2048)
        for depth in ("0%", "25%", "50%", "75%", "100%")
    }
    nothing = one(Skilled(1.0, context=100), "needle")
    assert (nothing.share, nothing.status, nothing.left_out) == (None, "insufficient", 20)


def test_a_server_without_probabilities_is_not_judged_by_choices() -> None:
    found = one(Silent(1.0), "knowledge", source=Skilled(1.0))
    assert (found.share, found.status) == (None, "insufficient")
    assert "probabilities" in found.because
    assert one(Silent(1.0), "copy", source=Skilled(1.0), max_drop=0.2).status == "pass"


def test_shares_are_held_against_a_share() -> None:
    found = one(Skilled(0.9), "extract")
    assert found.status == "pass"
    assert at_least(found, 0.5) == "pass"
    assert at_least(found, 0.99) == "fail"
    assert at_least(found, 0.9) == "insufficient"
    choices = one(Skilled(0.9), "knowledge")
    assert at_least(choices, 0.2) == "insufficient"  # guessing reaches it


def test_several_shares_are_wanted() -> None:
    good, bad = Skilled(0.95), Skilled(0.3)
    status, found = reached(good, {"extract": 0.8, "copy": 0.7})
    assert (status, [one.task for one in found]) == ("pass", ["extract", "copy"])
    status, found = reached(bad, {"extract": 0.8, "copy": 0.7})
    assert (status, [one.task for one in found]) == ("fail", ["extract"])
    assert reached(good, {"extract": 0.8, "copy": 0.95})[0] == "insufficient"
    assert reached(good, {}) == ("pass", ())


@pytest.mark.parametrize(
    ("written", "wanted"),
    [("json:90%", ("json", 0.9)), (" copy : 0.5", ("copy", 0.5)), ("code:1", ("code", 1))],
)
def test_wanted_shares(written: str, wanted: tuple[str, float]) -> None:
    assert wanted_of(written) == wanted


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("json", "json:90%"),
        ("json:", "json:90%"),
        ("json:2", "json:90%"),
        ("json:0", "json:90%"),
        ("knowledge:20%", "knowledge:90%"),  # guessing gives 25 %
        ("all:90%", "90%"),
        ("jsn:90%", "json"),
        ("", "--task"),
    ],
)
def test_wanted_shares_that_cannot_be(written: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        wanted_of(written)
    assert hint in (caught.value.hint or "")


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    judge(Skilled(1.0), ["copy"], 3, step=lambda *news: told.append(news))
    assert told[-1] == ("copy", 3, 3)


@pytest.mark.parametrize(
    ("written", "names"), [("all", tuple(TASKS)), ("json", ("json",)), (" json, copy,json", ("json", "copy"))]
)
def test_names(written: str, names: tuple[str, ...]) -> None:
    assert names_of(written) == names


@pytest.mark.parametrize(("written", "near"), [("jsn", "json"), ("", "all"), ("copy,xyzzy", "all")])
def test_names_that_no_task_has(written: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        names_of(written)
    assert near in (caught.value.hint or "")


def test_no_questions_are_too_few() -> None:
    with pytest.raises(UsageError):
        judge(Skilled(1.0), ["copy"], 0)


def test_a_new_task_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.quality.tasks import Question

    def parrot(draw: Draw) -> Question:
        word = str(draw.randint(0, 10**9))
        return Question(f"Parrot, say {word}:", f" {word}")

    monkeypatch.setitem(TASKS, "parrot", Task("one word", parrot))

    class Parrot(Skilled):
        def texts(self, prompts: Sequence[str], *_: object) -> list[str]:
            return [" " + prompt.rsplit(" ", 1)[1].rstrip(":") for prompt in prompts]

    assert one(Parrot(1.0), "parrot").share == 1.0
