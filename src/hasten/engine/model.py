"""`load` opens a model; `LanguageModel` generates with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hasten.core import EngineOptions, Recipe, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.loaded import LoadedModel
from hasten.engine.request import Request
from hasten.errors import UsageError
from hasten.runtime.executor import check_recipe, choose_device
from hasten.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from hasten.models.source import Source
    from hasten.weights.packed import PackedModel


@dataclass(frozen=True)
class Completion:
    """One prompt's continuation. Times are of the batch it ran in."""

    text: str
    token_ids: list[int]  # the end token, if it came, included
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    ttft_ms: float | None  # None: no token was asked for
    decode_tok_per_s: float | None  # None: fewer than two tokens


class LanguageModel(LoadedModel):
    """A loaded model that generates. Made by `hasten.load`.

    Not for several threads at once: while one computes, a second one gets a UsageError. Load one model for
    each thread, or share one through `AsyncEngine` or `hasten serve`.
    """

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        chat: bool = True,
    ) -> list[Completion]:
        """Continue prompts, all together.

        Args:
            prompts: texts; with `chat` each is one user message put through the model's chat template.
            max_new_tokens: most tokens a prompt gets, 0 or more.
            temperature, top_k, top_p, min_p, seed: see `SamplingOptions`; temperature 0 is greedy.
            chat: False continues the text as it stands.

        Returns:
            One Completion a prompt, in order.

        Raises:
            UsageError: an empty prompt, one longer than the context, or an option outside its range.
            TokenizerError: `chat`, and the model has no chat template.
        """
        if isinstance(prompts, str):
            raise UsageError(
                "generate() takes a list of prompts, got one string", hint="model.generate([prompt])"
            )
        sampling = SamplingOptions(temperature, top_k, top_p, min_p, seed)
        ids = [self._encode(prompt, chat) for prompt in prompts]
        started = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in ids]
        times: list[list[float]] = [[] for _ in ids]
        requests = [Request(tuple(one), max_new_tokens, sampling, id=str(i)) for i, one in enumerate(ids)]
        with self.engine(ServingOptions(prefix_cache=False)) as engine:
            for output in engine.run(requests):
                which, now = int(output.request_id), time.perf_counter() - started
                tokens[which] += output.token_ids
                times[which] += [now] * len(output.token_ids)
        return [self._completion(*one) for one in zip(ids, tokens, times, strict=True)]

    def continued(
        self,
        prompts: Sequence[str],
        most_tokens: int,
        stop: tuple[str, ...] = (),
        told: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Greedy continuations of plain texts, what prompts share computed once.

        Args:
            prompts: texts, continued as they stand.
            most_tokens: most tokens of each continuation.
            stop: texts that end one; they are not part of it.
            told: called with the number of continuations that are done.

        Raises:
            UsageError: an empty prompt, or one that leaves no room in the context.
        """
        texts, done = [""] * len(prompts), 0
        requests = [
            Request(tuple(self._encode(prompt, chat=False)), most_tokens, stop=stop, id=str(number))
            for number, prompt in enumerate(prompts)
        ]
        with self.engine(ServingOptions()) as engine:
            for output in engine.run(requests):
                texts[int(output.request_id)] += output.text
                if output.finish_reason is not None:
                    done += 1
                    if told is not None:
                        told(done)
        return texts

    def _encode(self, prompt: str, chat: bool) -> list[int]:
        if not prompt:
            raise UsageError(
                "the prompt is empty", hint='give some text: model.generate(["What is a mutex?"])'
            )
        if chat:
            return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return self.tokenizer.encode(prompt)

    def _completion(self, ids: list[int], tokens: list[int], times: list[float]) -> Completion:
        stopped = bool(tokens) and tokens[-1] in self.tokenizer.eos_ids
        span = times[-1] - times[0] if len(times) > 1 else 0.0
        return Completion(
            text=self.tokenizer.decode(tokens),
            token_ids=tokens,
            prompt_tokens=len(ids),
            finish_reason="stop" if stopped else "length",
            ttft_ms=1000 * times[0] if times else None,
            decode_tok_per_s=(len(times) - 1) / span if span > 0 else None,
        )

    def engine(self, options: ServingOptions | None = None) -> Engine:
        """An engine for many requests that come and go, with prefix cache and speculation: docs/engine.md.

        Raises:
            UsageError: another engine's prefix cache is open on this model.
        """
        return Engine(self, options)

    def stream(
        self, ids: Sequence[int], max_new_tokens: int, sampling: SamplingOptions | None = None
    ) -> Iterator[int]:
        """Continue token ids from an empty cache; new ids as they come, the end token included.

        Args:
            ids: the prompt, all of it.
            max_new_tokens: 0 or more; ends earlier at an end token or where the context is full.
            sampling: how tokens are chosen; None is greedy.

        Raises:
            UsageError: at once, for an empty prompt, what is no token id, a negative count, or a prompt that
                leaves no room in the context.
            HastenError: from the iterator, if the answer failed.
        """
        request = Request(tuple(ids), max_new_tokens, sampling or SamplingOptions())
        return self.engine(ServingOptions(prefix_cache=False)).tokens(request)


def load(
    ref: str | Path,
    recipe: str | Recipe | None = None,
    *,
    threads: int | None = None,
    context: int | None = None,
    options: EngineOptions | None = None,
    store: bool = True,
) -> LanguageModel:
    """Open a model and make it ready to run.

    What is packed here is kept in the cache folder (docs/cache.md), when the model is let go, the process
    ends or 20 s have passed; the next `load` of the same files and recipe reads it from there. A file that
    changed is packed anew, and a cache that cannot be used costs a warning.

    Args:
        ref: an artifact (`NAME.hasten`), a folder with safetensors, a .gguf file, a hub id, or "demo".
        recipe: what to do with the weights, a name ("w4", "w8-head16", "bf16") or a Recipe; None keeps the
            values the files hold. An artifact has its recipe already; one in fp8 or mxfp4, for which the CPU
            engine has no kernels, is decoded while it loads with "bf16".
        threads: None uses the cores this process may use.
        context: longest prompt plus output in tokens; None is the model's own, less where memory is short.
        options: the rest of the engine's options; threads and context above come first.
        store: False neither reads nor keeps packed weights; so does `HASTEN_CACHE_PACKED=0`.

    Raises:
        ModelError, FormatError, ArtifactError: the model is missing, damaged or of an unsupported kind.
        UsageError: an unknown recipe, a recipe with an artifact, or options out of range.
        MachineError: `options.device` is "cuda", and there is no usable GPU.
    """
    base = options or EngineOptions()
    wanted = replace(
        base,
        threads=threads if threads is not None else base.threads,
        context=context if context is not None else base.context,
    )
    choose_device(wanted.device)  # or refuse it before anything is read
    from hasten.models.artifact import load_artifact
    from hasten.weights.artifact import is_artifact
    from hasten.weights.packed import decoded

    if is_artifact(ref):
        artifact = load_artifact(ref)
        chosen, packed = artifact.packed.recipe.name, artifact.packed
        asked = recipe.name if isinstance(recipe, Recipe) else recipe
        if asked == "bf16" and any(linear.layout.table for linear in packed.linears.values()):
            packed = decoded(packed)
        elif asked not in (None, chosen):
            raise UsageError(
                f"{ref} is an artifact, packed as {chosen!r} already; it cannot become another recipe",
                hint="give the source model with --recipe, or drop --recipe",
            )
        return LanguageModel(packed, artifact.tokenizer, artifact.name, wanted)
    parsed = Recipe.parse(recipe) if isinstance(recipe, str) else recipe or Recipe("source")
    check_recipe(wanted.device, parsed)
    return _load_source(ref, parsed, wanted, store)


def _load_source(ref: str | Path, recipe: Recipe, options: EngineOptions, store: bool) -> LanguageModel:
    """A model from the store, or packed now and stored later."""
    from hasten.models.artifact import find_packed, keep_later
    from hasten.models.source import locate
    from hasten.weights.packed_store import open_store

    place = locate(ref)
    kept = open_store() if store else None
    found, origin = find_packed(kept, place, recipe) if kept is not None else (None, None)
    if found is not None:
        return LanguageModel(found.packed, found.tokenizer, place.name, options)
    from hasten.models.open import open_place
    from hasten.weights.packed import pack_model

    source = open_place(place)
    model = load_packed(pack_model(source, recipe, options.threads), source, options)
    if kept is not None and origin is not None:
        keep_later(kept, origin, model.packed, source, owner=model)
    return model


def load_packed(packed: PackedModel, source: Source, options: EngineOptions | None = None) -> LanguageModel:
    """Run a model that was packed in memory."""
    return LanguageModel(packed, source.tokenizer(), source.name, options or EngineOptions())
