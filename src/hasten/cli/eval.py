"""`hasten eval`: what a recipe costs in quality, by text and by tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.console import CALIBRATED, Ticker, emit, note, note_device, print_table, show
from hasten.cli.flags import (
    DeviceOption,
    GpuMemoryOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    TextOption,
    ThreadsOption,
    TokensOption,
    fraction,
    optional,
)
from hasten.core import SCHEMA_VERSION, Budget, EngineOptions, Verdict, as_json
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel
    from hasten.quality.answers import InProcess, TaskResult
    from hasten.quality.text import Text

KEPT = f"Nothing was changed. {CALIBRATED}"

BUDGET = "Budget such as 1% or 0.01; if given and not met, the exit code is 3. Without it, 1% is judged."
BudgetOption = Annotated[str | None, optional("--max-ppl-increase", "P", BUDGET)]
AGAINST = (
    "The model to compare with, in bf16. Default: what an artifact was made from; for other models, the "
    "model itself."
)
AgainstOption = Annotated[str | None, optional("--against", "MODEL", AGAINST)]
TASK = (
    "Judge by tasks instead of by text: names with commas between them, or all. Tasks: knowledge, grammar, "
    "order, arithmetic, copy, sort, extract, json, code, needle."
)
TaskOption = Annotated[str | None, optional("--task", "NAME,...", TASK)]
LIMIT = "Questions of each task. Default: 100 or 200, of needle 20."
LimitOption = Annotated[int | None, optional("--limit", "N", LIMIT, min=1)]
DROP = (
    "Most points that the share of right answers may fall, such as 5% or 0.05; if given and not shown, the "
    "exit code is 3. Without it, 5% is judged."
)
DropOption = Annotated[str | None, optional("--max-task-drop", "P", DROP)]
URL = (
    "Ask a server with OpenAI's completions API instead, such as http://127.0.0.1:8000; MODEL is its name "
    "there. It is compared only where --against names a model."
)
UrlOption = Annotated[str | None, optional("--url", "URL", URL)]


def command(
    model: ModelArgument,
    recipe: RecipeOption = None,
    max_ppl_increase: BudgetOption = None,
    tokens: TokensOption = 8192,
    text: TextOption = None,
    against: AgainstOption = None,
    task: TaskOption = None,
    limit: LimitOption = None,
    max_task_drop: DropOption = None,
    url: UrlOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what a recipe costs in quality against the source model.

    Perplexity, KL divergence and top-1 agreement against the source in bf16 on the same engine, paired,
    with a 95 % interval. The verdict is pass, fail, or insufficient where the text is too short to tell.

    With --task: shares of right answers to questions of Hasten's own, paired with the source's answers,
    which are computed once and kept. Servers of other engines are judged by the same questions with --url.
    """
    options = EngineOptions(threads=threads, max_sequences=1, device=device, gpu_memory=gpu_memory)
    if task is not None:
        drop = fraction(max_task_drop, "--max-task-drop") if max_task_drop is not None else None
        asked = _Asked(model, recipe, against, url, limit, drop, replace(options, max_sequences=8))
        met = _judge_tasks(asked, task, as_document=json)
        wanted = max_task_drop is not None
    else:
        _need_task(url, limit, max_task_drop)
        budget = Budget(fraction(max_ppl_increase)) if max_ppl_increase is not None else Budget()
        met = _judge_text(model, recipe, against, budget, (text, tokens), options, as_document=json)
        wanted = max_ppl_increase is not None
    if wanted and not met:
        raise typer.Exit(3)


def _need_task(url: str | None, limit: int | None, drop: str | None) -> None:
    """Refuse flags of tasks where no task is named.

    Raises:
        UsageError: one of them was given.
    """
    if url is not None:
        raise UsageError(
            "--url needs --task: a server does not show its whole distributions, so it is judged by tasks",
            hint="add --task knowledge,json,code, or --task all",
        )
    for flag, value in (("--limit", limit), ("--max-task-drop", drop)):
        if value is not None:
            raise UsageError(f"{flag} needs --task: it says how tasks are judged", hint="add --task all")


# By text --------------------------------------------------------------------------------------------------


def _judge_text(
    model: str,
    recipe: str | None,
    against: str | None,
    budget: Budget,
    judged: tuple[Path | None, int],
    options: EngineOptions,
    *,
    as_document: bool,
) -> bool:
    """Compare, print; whether the budget is met. `judged`: the user's text, and tokens to read of it."""
    from hasten.loading import load
    from hasten.quality.text import default_text, text_from_file

    path, tokens = judged
    text = text_from_file(path) if path is not None else default_text()
    source = _source(model, against)
    with Ticker() as ticker:
        ticker.say("the source in bf16: loading")
        reference = load(source, "bf16", options=options)
        note_device(reference)
        ticker.say("the candidate: loading")
        options = replace(options, device=reference.device)  # one engine judges both
        candidate = load(model, recipe, options=options, observer=lambda progress: show(ticker, progress))
        verdict = _verdict(candidate, reference, text, tokens, budget, ticker)
    document = _document(candidate, verdict, text, budget)
    if as_document:
        emit(document)
    else:
        _print(document, verdict, budget, tokens)
    return verdict.status == "pass"


def _verdict(
    candidate: LanguageModel,
    reference: LanguageModel,
    judged: Text,
    tokens: int,
    budget: Budget,
    ticker: Ticker,
) -> Verdict:
    from hasten.engine.loaded import fingerprint
    from hasten.quality.divergence import OtherVocabulary, Pieces, Reference, States, evaluate, same_words
    from hasten.quality.text import windows

    theirs, ours, rows = reference.tokenizer, candidate.tokenizer, reference.config.vocab
    cut = windows(judged.evaluation, theirs, tokens=tokens)
    states = States(fingerprint(reference), reference.name)
    if rows == candidate.config.vocab and same_words(theirs, ours):
        held = Reference(reference, cut, states=states)
    else:
        ticker.say(f"vocabularies of {rows:,} and {candidate.config.vocab:,}: judged by the source's tokens")
        held = OtherVocabulary(reference, cut, Pieces.of(theirs, ours, rows), states)
    return evaluate(candidate, held, budget, lambda done, total: ticker.count("comparing", done, total))


def _source(model: str, against: str | None) -> str:
    """The model to compare with: the one that was named, what an artifact was made from, or MODEL itself.

    Raises:
        UsageError: an artifact whose source is not known.
    """
    from hasten.weights.artifact import is_artifact

    if against is not None:
        return against
    if not is_artifact(model):
        return model
    from hasten.models.source import ADAPTER
    from hasten.weights.artifact import made_from

    origin = made_from(model)
    ref = str(origin.get("ref") or origin.get("name") or "an unknown model")
    place = Path(ref.split(ADAPTER)[0])  # without the adapters that were merged
    if ref == "demo" or (place.exists() if place.is_absolute() else "/" in ref):  # a hub id has a slash
        return ref
    raise UsageError(
        f"{model} was made from {ref}, which is not to be found",
        hint=f"hasten eval {model} --against PATH_OF_THE_SOURCE",
    )


def _document(candidate: LanguageModel, verdict: Verdict, judged: Text, budget: Budget) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": candidate.name,
        "recipe": candidate.recipe.name,
        "device": candidate.device,
        "bits_per_weight": candidate.bits_per_weight,
        **as_json(verdict),
        "max_ppl_increase": budget.max_ppl_increase,
        "text": {"name": judged.name, "sha256": judged.sha256},
    }


def _print(document: dict[str, Any], verdict: Verdict, budget: Budget, asked: int) -> None:
    """For people. `asked`: tokens that were to be read."""
    import sys

    low, high = verdict.ppl_increase_low, verdict.ppl_increase_high
    sys.stdout.write(
        f"{document['model']} as {document['recipe']}, {document['bits_per_weight']:.2f} bits a weight\n"
        f"perplexity  {verdict.ppl:.3f}, source {verdict.ppl_source:.3f}: {verdict.ppl_increase:+.2%} "
        f"(95 %: {low:+.2%} to {high:+.2%})\n"
        f"divergence  mean KL {verdict.kl_mean:.5f}, p99 {verdict.kl_p99:.4f} nats; "
        f"same top token {verdict.top1_agreement:.1%}\n"
        f"verdict     {verdict.status} at {document['max_ppl_increase']:+.4g} over {verdict.tokens:,} tokens "
        f"of {document['text']['name']}; {verdict.ppl_detectable:.2%} beyond it would be seen\n"
    )
    if verdict.status == "insufficient":
        _hint(verdict, budget, asked)


def _hint(verdict: Verdict, budget: Budget, asked: int) -> None:
    """How to get a verdict."""
    from hasten.quality.divergence import tokens_needed
    from hasten.quality.text import WINDOW

    needed = tokens_needed(verdict, budget) or verdict.tokens * 4
    if verdict.tokens + WINDOW <= asked:
        note(f"hint: the whole text was read; give a longer one, of some {needed:,} tokens: --text FILE")
    else:
        note(f"hint: more text narrows the interval: --tokens {needed}")


# By tasks -------------------------------------------------------------------------------------------------


class _Asked:
    """Who is asked, and what a share may fall."""

    def __init__(
        self,
        model: str,
        recipe: str | None,
        against: str | None,
        url: str | None,
        limit: int | None,
        drop: float | None,
        options: EngineOptions,
    ) -> None:
        from hasten.quality.answers import MAX_DROP

        self.model, self.recipe, self.url, self.limit = model, recipe, url, limit
        self.drop = MAX_DROP if drop is None else drop
        self.options = options
        if url is not None and recipe is not None:
            raise UsageError(
                f"--recipe {recipe} cannot be applied to a server: it answers with the weights that it has",
                hint="drop --recipe, or drop --url",
            )
        self.source = against if url is not None else _source(model, against)

    def opened(self, ref: str, recipe: str | None, ticker: Ticker) -> tuple[LanguageModel, InProcess]:
        """A model, and the same as one who answers."""
        from hasten.engine.loaded import fingerprint
        from hasten.loading import load
        from hasten.quality.answers import InProcess

        ticker.say(f"{ref} as {recipe or 'it is'}: loading")
        model = load(ref, recipe, options=self.options, observer=lambda progress: show(ticker, progress))
        note_device(model)
        self.options = replace(self.options, device=model.device)  # one engine judges both
        return model, InProcess(model, fingerprint(model))


def _judge_tasks(asked: _Asked, names: str, *, as_document: bool) -> bool:
    """Ask, print; whether every task is within the limit."""
    from hasten.quality.answers import Server, judge
    from hasten.quality.tasks import names_of

    chosen = names_of(names)
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "model": asked.model}
    with Ticker() as ticker:
        source = asked.opened(asked.source, "bf16", ticker)[1] if asked.source is not None else None
        if asked.url is not None:
            candidate: Any = Server(asked.url, asked.model)
            document |= {"url": asked.url}
        else:
            model, candidate = asked.opened(asked.model, asked.recipe, ticker)
            document |= {"model": model.name, "recipe": model.recipe.name, "device": model.device}
            document |= {"bits_per_weight": model.bits_per_weight}
        found = judge(candidate, chosen, asked.limit, source=source, max_drop=asked.drop, step=ticker.count)
    if as_document:
        tasks = [as_json(one) for one in found]
        emit({**document, "source": asked.source, "max_task_drop": asked.drop, "tasks": tasks})
    else:
        _print_tasks(found, asked.drop)
    return all(one.status == "pass" for one in found)


def _print_tasks(found: Sequence[TaskResult], drop: float) -> None:
    paired = any(one.drop is not None for one in found)
    title = "right answers" + (f"; verdict: fell by at most {drop:.3g} of all" if paired else "")
    columns = ["task", "questions", "right", "(95 %)"]
    columns += ["source", "change", "(95 %)"] if paired else []
    rows = [_row(one, paired) for one in found]
    print_table(title, [*columns, "verdict"], rows, out=True)
    said: dict[str, list[str]] = {}
    for one in found:
        left = f"{one.left_out} questions are longer than the context" if one.left_out else ""
        for reason in filter(None, (one.because, left)):
            said.setdefault(reason, []).append(one.task)
    for reason, tasks in said.items():
        note(f"{', '.join(tasks)}: {reason}")


def _row(one: TaskResult, paired: bool) -> list[str]:
    def share(value: float | None, sign: str = "") -> str:
        return "unknown" if value is None else f"{value:{sign}.1%}"

    row = [one.task, str(one.questions), share(one.share), f"{share(one.low)} to {share(one.high)}"]
    if paired:
        change = [None if value is None else 0.0 - value for value in (one.drop, one.drop_high, one.drop_low)]
        shown = [share(value, "+") for value in change]
        row += [share(one.share_source), shown[0], f"{shown[1]} to {shown[2]}"]
    return [*row, one.status]
