"""`hasten eval`: what a recipe costs in quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.console import CALIBRATED, Ticker, emit, note, note_device, show
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
    from hasten.quality.text import Text

KEPT = f"Nothing was changed. {CALIBRATED}"

BUDGET = "Budget such as 1% or 0.01; if given and not met, the exit code is 3. Without it, 1% is judged."
BudgetOption = Annotated[str | None, optional("--max-ppl-increase", "P", BUDGET)]
AGAINST = "The source to compare an artifact with. Default: the one it was made from."
AgainstOption = Annotated[str | None, optional("--against", "MODEL", AGAINST)]


def command(
    model: ModelArgument,
    recipe: RecipeOption = None,
    max_ppl_increase: BudgetOption = None,
    tokens: TokensOption = 8192,
    text: TextOption = None,
    against: AgainstOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what a recipe costs in quality against the source model.

    Perplexity, KL divergence and top-1 agreement against the source in bf16 on the same engine, paired,
    with a 95 % interval. The verdict is pass, fail, or insufficient where the text is too short to tell.
    """
    from hasten.loading import load
    from hasten.quality.text import default_text, text_from_file

    budget = Budget(fraction(max_ppl_increase)) if max_ppl_increase is not None else Budget()
    judged = text_from_file(text) if text is not None else default_text()
    source = _source(model, against)
    options = EngineOptions(threads=threads, max_sequences=1, device=device, gpu_memory=gpu_memory)
    with Ticker() as ticker:
        ticker.say("the source in bf16: loading")
        reference = load(source, "bf16", options=options)
        note_device(reference)
        ticker.say("the candidate: loading")
        options = replace(options, device=reference.device)  # one engine judges both
        candidate = load(model, recipe, options=options, observer=lambda progress: show(ticker, progress))
        verdict = _verdict(candidate, reference, judged, tokens, budget, ticker)
    document = _document(candidate, verdict, judged, budget)
    if json:
        emit(document)
    else:
        _print(document, verdict)
    if max_ppl_increase is not None and verdict.status != "pass":
        raise typer.Exit(3)


def _verdict(
    candidate: LanguageModel,
    reference: LanguageModel,
    judged: Text,
    tokens: int,
    budget: Budget,
    ticker: Ticker,
) -> Verdict:
    from hasten.quality.divergence import OtherVocabulary, Pieces, Reference, evaluate, same_words
    from hasten.quality.text import windows

    theirs, ours, rows = reference.tokenizer, candidate.tokenizer, reference.config.vocab
    cut = windows(judged.evaluation, theirs, tokens=tokens)
    if rows == candidate.config.vocab and same_words(theirs, ours):
        held = Reference(reference, cut)
    else:
        ticker.say(f"vocabularies of {rows:,} and {candidate.config.vocab:,}: judged by the source's tokens")
        held = OtherVocabulary(reference, cut, Pieces.of(theirs, ours, rows))
    return evaluate(candidate, held, budget, lambda done, total: ticker.count("comparing", done, total))


def _source(model: str, against: str | None) -> str:
    """The model to compare with: MODEL itself, or what an artifact was made from.

    Raises:
        UsageError: an artifact whose source is not known, or --against without an artifact.
    """
    from hasten.weights.artifact import is_artifact

    if not is_artifact(model):
        if against is not None:
            raise UsageError(
                f"--against is for artifacts; {model} is a source itself",
                hint=f"hasten eval {model} --recipe w8",
            )
        return model
    if against is not None:
        return against
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


def _print(document: dict[str, Any], verdict: Verdict) -> None:
    import sys

    low, high = verdict.ppl_increase_low, verdict.ppl_increase_high
    sys.stdout.write(
        f"{document['model']} as {document['recipe']}, {document['bits_per_weight']:.2f} bits a weight\n"
        f"perplexity  {verdict.ppl:.3f}, source {verdict.ppl_source:.3f}: {verdict.ppl_increase:+.2%} "
        f"(95 %: {low:+.2%} to {high:+.2%})\n"
        f"divergence  mean KL {verdict.kl_mean:.5f}, p99 {verdict.kl_p99:.4f} nats; "
        f"same top token {verdict.top1_agreement:.1%}\n"
        f"verdict     {verdict.status} at {document['max_ppl_increase']:+.4g} over {verdict.tokens:,} tokens "
        f"of {document['text']['name']}\n"
    )
    if verdict.status == "insufficient":
        note(f"hint: more text narrows the interval: --tokens {verdict.tokens * 4}")
