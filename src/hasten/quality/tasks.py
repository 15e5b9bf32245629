"""Small tasks of our own that show what a model can still do: questions, and what is right.

Every question is made from the number of its place in the task, so question 17 is the same for every limit,
machine and version of Python's `random`. Nothing is quoted: lists of words, rules and numbers make them all.
Models of all kinds read the same text: two or three worked examples, then the question, continued as plain
text without a chat template. So base models, chat models and servers of other engines answer the same.

    A new task: a function from a random source to a `Question`, and a line in `TASKS`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.errors import UsageError
from hasten.quality import sandbox
from hasten.recipe import share_of


class Draw(random.Random):
    """A random source of one question; `place` is the question's number in its task."""

    place = 0

    @classmethod
    def of(cls, name: str, place: int) -> Draw:
        """Seeded by a digest of both, which is the same everywhere."""
        seed = hashlib.sha256(f"{name} {place}".encode()).digest()
        draw = cls(int.from_bytes(seed[:8], "big"))
        draw.place = place
        return draw


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right."""

    prompt: str
    answer: str  # the right continuation, as the worked examples show it
    choices: tuple[str, ...] = ()  # judged by likelihood; `answer` is one of them
    check: Callable[[str], bool] | None = None  # of the continuation; None: it must be `answer`
    group: str = ""  # questions of one group are counted together too

    def is_right(self, said: str) -> bool:
        """Whether a continuation, or the choice that was taken, is right."""
        return said.strip() == self.answer.strip() if self.check is None else self.check(said)


@dataclass(frozen=True)
class Task:
    """A kind of question."""

    what: str  # for people
    make: Callable[[Draw], Question]
    lead: str = ""  # what the text opens with
    examples: int = 2
    chance: float = 0.0  # share of right answers that guessing gives
    limit: int = 100  # questions unless told otherwise
    most_tokens: int = 24  # of an answer
    stop: tuple[str, ...] = ("\n",)  # texts that end it

    def questions(self, name: str, count: int) -> tuple[Question, ...]:
        """The first `count` questions, each with its worked examples."""
        shown = [self.make(Draw.of(name, -1 - place)) for place in range(self.examples)]
        head = self.lead + "".join(f"{one.prompt}{one.answer}\n\n" for one in shown)
        made = (self.make(Draw.of(name, place)) for place in range(count))
        return tuple(replace(one, prompt=head + one.prompt) for one in made)


# Choices by likelihood ------------------------------------------------------------------------------------

KINDS = {
    "animal": "dog cat horse cow sheep pig lion tiger bear wolf rabbit mouse goat duck hen",
    "fruit": "apple pear plum cherry banana grape lemon orange peach mango fig melon",
    "colour": "red blue green yellow black white brown pink purple grey",
    "tool": "hammer saw drill wrench chisel file axe spade rake pliers",
    "vehicle": "car bus train bicycle lorry boat ship plane tram van",
    "garment": "coat shirt hat glove sock scarf dress skirt boot belt",
}
CAPITALS = (
    "France Paris Italy Rome Spain Madrid Germany Berlin Japan Tokyo China Beijing Russia Moscow Egypt Cairo "
    "Greece Athens Austria Vienna Portugal Lisbon Norway Oslo Sweden Stockholm Finland Helsinki "
    "Poland Warsaw Hungary Budapest Turkey Ankara Canada Ottawa Peru Lima Cuba Havana Kenya Nairobi "
    "Iraq Baghdad Ireland Dublin Denmark Copenhagen Thailand Bangkok"
)
_MORE = {
    "instrument": "trumpet violin piano flute drum guitar harp cello organ banjo",
    "vegetable": "carrot onion potato cabbage turnip spinach leek celery radish beetroot",
    "bird": "eagle sparrow owl raven robin swan pigeon parrot crow hawk",
    "metal": "iron copper silver gold zinc lead tin nickel platinum aluminium",
    "sport": "tennis football rugby hockey boxing golf rowing fencing cricket basketball",
    "insect": "ant bee wasp moth beetle fly mosquito butterfly grasshopper cockroach",
    "tree": "oak birch pine willow maple beech cedar spruce poplar elm",
    "drink": "tea coffee beer wine milk juice lemonade cider whisky water",
}
_WORDS = {kind: words.split() for kind, words in {**KINDS, **_MORE}.items()}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words}
_CITIES = dict(zip(CAPITALS.split()[::2], CAPITALS.split()[1::2], strict=True))


def _chosen(draw: Draw, question: str, right: str, wrong: Sequence[str]) -> Question:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return Question(
        f"Question: {question}\nAnswer:", f" {right}", choices=tuple(f" {choice}" for choice in choices)
    )


def _knowledge(draw: Draw) -> Question:
    """In turn: a capital or its country, the kind of a word twice, and a word that goes with two others.

    Words and countries come in a fixed order without repetition, as far as they go.
    """
    turn, way = divmod(draw.place, 4)
    if way == 0:
        asks_city, number = divmod(turn % (2 * len(_CITIES)), len(_CITIES))
        land = _shuffled(_CITIES)[number]
        others = draw.sample([one for one in sorted(_CITIES) if one != land], 3)
        if asks_city:
            wrong = [_CITIES[one] for one in others]
            return _chosen(draw, f"What is the capital of {land}?", _CITIES[land], wrong)
        return _chosen(draw, f"In which country is the city of {_CITIES[land]}?", land, others)
    if way < 3:
        word = _shuffled(_KIND_OF)[(2 * turn + way) % len(_KIND_OF)]
        kinds = draw.sample([kind for kind in sorted(_WORDS) if kind != _KIND_OF[word]], 3)
        return _chosen(draw, f"What kind of thing is this: {word}?", _KIND_OF[word], kinds)
    kind, *others = draw.sample(sorted(_WORDS), 4)
    right, first, second = draw.sample(_WORDS[kind], 3)
    wrong = [draw.choice(_WORDS[one]) for one in others]
    return _chosen(draw, f"Which word belongs with {first} and {second}?", right, wrong)


def _shuffled(words: Iterable[str]) -> list[str]:
    """Always in the same order."""
    found = sorted(words)
    Draw.of("order of words", 0).shuffle(found)
    return found


PEOPLE = "farmer teacher doctor driver painter baker sailor singer lawyer nurse"
PLACES = "garden kitchen station harbour library market forest office"
_PEOPLE, _PLACES = PEOPLE.split(), PLACES.split()


def _grammar(draw: Draw) -> Question:
    """The form of a verb, four words away from its subject: two choices."""
    first, second = draw.sample(_PEOPLE, 2)
    place, plural = draw.choice(_PLACES), draw.random() < 0.5
    forms = draw.choice([("is", "are"), ("was", "were"), ("has", "have"), ("goes", "go"), ("knows", "know")])
    subject, other = (f"{first}s", second) if plural else (first, f"{second}s")
    way = draw.choice(["behind", "near", "beside", "in front of"])
    text = f"Sentence: The {subject} {way} the {other} from the {place}"
    return Question(text, f" {forms[plural]}", choices=tuple(f" {form}" for form in forms))


def _order(draw: Draw) -> Question:
    """Which of four numbers is the largest or the smallest."""
    numbers = draw.sample(range(100, 1000), 4)
    most = draw.random() < 0.5
    right = max(numbers) if most else min(numbers)
    listed = ", ".join(map(str, numbers))
    wrong = [str(one) for one in numbers if one != right]
    return _chosen(draw, f"Which is the {'largest' if most else 'smallest'}: {listed}?", str(right), wrong)


# Exact answers --------------------------------------------------------------------------------------------


def _arithmetic(draw: Draw) -> Question:
    """A sum, a difference, a product, or a story of two steps."""
    a, b, c = draw.randint(12, 99), draw.randint(11, 89), draw.randint(2, 9)
    which = draw.randrange(4)
    if which == 0:
        return Question(f"Question: What is {a} + {b}?\nAnswer:", f" {a + b}")
    if which == 1:
        return Question(f"Question: What is {a + b} - {b}?\nAnswer:", f" {a}")
    if which == 2:
        return Question(f"Question: What is {a} * {c}?\nAnswer:", f" {a * c}")
    thing, more = draw.choice(_WORDS["fruit"]), draw.randint(3, 30)
    story = f"A box holds {c} bags of {a} {thing} seeds, and {more} more seeds. How many seeds is that?"
    return Question(f"Question: {story}\nAnswer:", f" {c * a + more}")


def _everything() -> list[str]:
    return sorted({word for words in _WORDS.values() for word in words} | set(_PEOPLE) | set(_PLACES))


def _code_word(draw: Draw, length: int) -> str:
    return "".join(draw.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(length))


def _copy(draw: Draw) -> Question:
    """A line of made-up words and numbers, said again."""
    parts = [draw.choice([_code_word(draw, 5), str(draw.randint(100, 99999))]) for _ in range(6)]
    line = " ".join(parts)
    return Question(f"Line: {line}\nCopy:", f" {line}")


def _sort(draw: Draw) -> Question:
    """Words or numbers, put in order."""
    if draw.random() < 0.5:
        numbers = draw.sample(range(10, 100), draw.randint(4, 7))
        given, right = [*map(str, numbers)], [*map(str, sorted(numbers))]
    else:
        words = draw.sample(_everything(), draw.randint(4, 6))
        given, right = words, sorted(words)
    return Question(f"List: {', '.join(given)}\nSorted:", f" {', '.join(right)}")


MONTHS = "January February March April May June July August September October November December"
_MONTHS = MONTHS.split()


def _order_record(draw: Draw) -> dict[str, Any]:
    return {
        "person": draw.choice(_PEOPLE),
        "city": draw.choice(sorted(_CITIES.values())),
        "number": draw.randint(1000, 9999),
        "count": draw.randint(2, 40),
        "thing": draw.choice(_WORDS["tool"]),
        "day": draw.randint(1, 28),
        "month": draw.choice(_MONTHS),
    }


def _letter(draw: Draw, one: Mapping[str, Any]) -> str:
    """What a record says, in one of several orders."""
    parts = [
        f"It goes to {one['city']}.",
        f"Its number is {one['number']}.",
        f"It should be there on {one['day']} {one['month']}.",
    ]
    draw.shuffle(parts)
    thing = str(one["thing"])
    ending = {"s": "", "h": "es"}.get(thing[-1], "s")  # pliers, wrenches, saws
    return f"The {one['person']} asked for {one['count']} {thing}{ending}. {' '.join(parts)}"


def _extract(draw: Draw) -> Question:
    """One fact out of a letter."""
    one = _order_record(draw)
    asked, right = draw.choice(
        [
            ("order number", str(one["number"])),
            ("city", one["city"]),
            ("date", f"{one['day']} {one['month']}"),
            ("quantity", str(one["count"])),
        ]
    )
    return Question(f"Letter: {_letter(draw, one)}\nAsked: {asked}\nAnswer:", f" {right}")


# JSON -----------------------------------------------------------------------------------------------------

_KEYS: Mapping[str, tuple[str, ...] | type] = {
    "number": int,
    "city": str,
    "count": int,
    "thing": tuple(_WORDS["tool"]),
    "month": tuple(_MONTHS),
}


def _conforms(said: str) -> bool:
    """Whether a text is one JSON object with exactly `_KEYS`, each of its type or one of its words."""
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or value.keys() != _KEYS.keys():
        return False
    return all(
        value[key] in kind if isinstance(kind, tuple) else type(value[key]) is kind
        for key, kind in _KEYS.items()
    )


def _json(draw: Draw) -> Question:
    """A letter as a JSON object: judged is its form, not whether each value is the letter's."""
    one = _order_record(draw)
    right = json.dumps({key: one[key] for key in _KEYS})
    return Question(f"Letter: {_letter(draw, one)}\nJSON:", f" {right}", check=lambda said: _conforms(said))


_JSON_LEAD = (
    "Each letter as a JSON object with exactly these keys: number and count are integers, city is a string, "
    f"thing is one of {', '.join(_WORDS['tool'])}, month is the name of a month.\n\n"
)

# Code -----------------------------------------------------------------------------------------------------

_KEPT: Mapping[str, Callable[[int, int], bool]] = {
    "even": lambda x, k: x % 2 == 0,
    "odd": lambda x, k: x % 2 == 1,
    "positive": lambda x, k: x > 0,
    "negative": lambda x, k: x < 0,
    "divisible by {k}": lambda x, k: x % k == 0,
    "larger than {k}": lambda x, k: x > k,
    "smaller than {k}": lambda x, k: x < k,
}
_MADE: Mapping[str, Callable[[int, int], int]] = {
    "numbers": lambda x, k: x,
    "squares of the numbers": lambda x, k: x * x,
    "doubles of the numbers": lambda x, k: 2 * x,
    "absolute values of the numbers": lambda x, k: abs(x),
}
_ENDED: Mapping[str, Callable[[list[int]], Any]] = {
    "the sum of": sum,
    "how many there are of": len,
    "a list of": list,
    "a list, in ascending order, of": sorted,
    "the largest, or None if there is none, of": lambda values: max(values, default=None),
}


def _code(draw: Draw) -> Question:
    """A function over a list of integers, from its signature and docstring; run against examples."""
    k = draw.randint(2, 6)
    end, made, kept = draw.choice([*_ENDED]), draw.choice([*_MADE]), draw.choice([*_KEPT])
    said = f"Return {end} the {made} in the list that are {kept.format(k=k)}."

    def expected(values: Sequence[int]) -> Any:
        return _ENDED[end]([_MADE[made](x, k) for x in values if _KEPT[kept](x, k)])

    lists = [[draw.randint(-9, 12) for _ in range(draw.randint(0, 8))] for _ in range(5)]
    signature = f'def f(numbers):\n    """{said}\n\n'
    signature += f"    >>> f({lists[0]})\n    {expected(lists[0])}\n" + '    """\n'
    tests = "".join(f"assert f({one}) == {expected(one)!r}\n" for one in lists)
    body = {"the sum of": "sum([{}])", "how many there are of": "len([{}])", "a list of": "[{}]"}
    ways = {"a list, in ascending order, of": "sorted([{}])"}
    whole = {**body, **ways}.get(end, "max([{}], default=None)")
    return Question(
        signature,
        f"    return {whole.format(_comprehension(made, kept, k))}",
        check=lambda said: runs(f"{signature}{said}\n\n{tests}"),
    )


def _comprehension(made: str, kept: str, k: int) -> str:
    value = dict(zip(_MADE, ("x", "x * x", "2 * x", "abs(x)"), strict=True))[made]
    tests = ("x % 2 == 0", "x % 2 == 1", "x > 0", "x < 0", f"x % {k} == 0", f"x > {k}", f"x < {k}")
    return f"{value} for x in numbers if {dict(zip(_KEPT, tests, strict=True))[kept]}"


def runs(program: str) -> bool:
    """Whether a program ends without a fault, locked in.

    Raises:
        UsageError: this system cannot lock it in.
    """
    outcome = sandbox.run(program)
    if outcome == "impossible":
        raise UsageError(
            "the task code runs programs that a model wrote, and this system cannot lock them in",
            hint="judge other tasks, or run on Linux with seccomp: x86-64 or 64-bit ARM",
        )
    return outcome == "right"


# Long context ---------------------------------------------------------------------------------------------

NEEDLE_LENGTHS = (1024, 2048, 4096, 8000)
"""Tokens of a text with a needle, about: a word of these sentences is a little more than a token."""
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_WORDS_A_TOKEN = 0.8


def _needle(draw: Draw) -> Question:
    """A number that is said once, at some depth of a long text of made-up sentences.

    The sentences are those of every such text, so texts begin alike up to their needles: a prefix cache
    computes what they share once.
    """
    length = NEEDLE_LENGTHS[draw.place % len(NEEDLE_LENGTHS)]
    depth = _DEPTHS[draw.place // len(NEEDLE_LENGTHS) % len(_DEPTHS)]
    person, place, number = draw.choice(_PEOPLE), draw.choice(_PLACES), str(draw.randint(10_000, 99_999))
    idle, sentences, words = Draw.of("idle", 0), [], 0
    while words < length * _WORDS_A_TOKEN:
        sentences.append(_idle(idle))
        words += sentences[-1].count(" ") + 1
    secret = f"The secret number of the {person} in the {place} is {number}."
    sentences.insert(round(depth * len(sentences)), secret)
    asked = f"\n\nQuestion: What is the secret number of the {person} in the {place}?\nAnswer:"
    return Question(
        f"Text: {' '.join(sentences)}{asked}",
        f" {number}",
        check=lambda said: number in said,
        group=f"{length:,} tokens, {depth:.0%} deep",
    )


def _idle(draw: Draw) -> str:
    """A sentence that says nothing of numbers."""
    first, second = draw.sample(_PEOPLE, 2)
    thing = draw.choice(_WORDS[draw.choice(("tool", "fruit", "garment"))])
    verb = draw.choice(["gave", "showed", "sold", "lent", "brought"])
    when = draw.choice(["In the morning", "Later", "After lunch", "On the way home", "That evening"])
    colour = draw.choice(_WORDS["colour"])
    return f"{when} the {first} near the {draw.choice(_PLACES)} {verb} a {colour} {thing} to the {second}."


_CODE_STOP = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert", "\n#", "\n\n\n", "```")

TASKS: dict[str, Task] = {
    "knowledge": Task("kinds of things and capitals, one of four", _knowledge, chance=0.25, limit=200),
    "grammar": Task("the form of a verb, one of two", _grammar, chance=0.5, limit=200),
    "order": Task("the largest or smallest of four numbers", _order, chance=0.25, limit=200),
    "arithmetic": Task("sums, products and short stories, exactly", _arithmetic, examples=4, limit=200),
    "copy": Task("a line of made-up words said again, exactly", _copy, most_tokens=64),
    "sort": Task("words and numbers in order, exactly", _sort, examples=4, most_tokens=48),
    "extract": Task("one fact out of a letter, exactly", _extract, examples=4, limit=200),
    "json": Task("a letter as JSON that fits a schema", _json, _JSON_LEAD, most_tokens=80),
    "code": Task("a function that passes its tests", _code, most_tokens=120, stop=_CODE_STOP),
    "needle": Task("a number in 1,000 to 8,000 tokens of text", _needle, examples=0, limit=20),
}
"""Every task by name."""


def names_of(text: str) -> tuple[str, ...]:
    """`NAME[,NAME]`, or `all`, as names of tasks.

    Raises:
        UsageError: a name that no task has.
    """
    if text.strip() == "all":
        return tuple(TASKS)
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    strange = next((name for name in names if name not in TASKS), None)
    if strange is not None or not names:
        near = difflib.get_close_matches(strange or "", TASKS, 1)
        raise UsageError(
            f"there is no task {strange or text!r}; tasks are {', '.join(TASKS)}",
            hint=f"--task {near[0]}" if near else "--task all, or names with commas between them",
        )
    return names


def wanted_of(text: str) -> tuple[str, float]:
    """`NAME:SHARE`, such as `json:90%` or `json:0.9`, as a task and the least share of right answers.

    Raises:
        UsageError: another form, a name that no task has, or a share that guessing reaches or none can.
    """
    name, _, share = text.partition(":")
    (task,) = names_of(name.strip() or "?")[:1]
    found = share_of(share)
    if found is None or not TASKS[task].chance < found[0] <= 1 or name.strip() == "all":
        least = f"above {TASKS[task].chance:.0%}, which guessing gives, " if TASKS[task].chance else ""
        raise UsageError(
            f"{text!r} must be a task and a share of right answers {least}up to 100 %",
            hint=f"for example {task}:90%",
        )
    return task, found[0]
