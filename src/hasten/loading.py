"""`hasten.load` opens a model, `convert` writes it for another engine.

Recipes that take work (`w4-best`, `mix:1%`, a file) run once and are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hasten.core import Budget, EngineOptions, Recipe
from hasten.errors import ArtifactError, UsageError
from hasten.recipe import share_of

if TYPE_CHECKING:
    from hasten.compress.result import Observer
    from hasten.engine.model import LanguageModel
    from hasten.export import Exported
    from hasten.models.artifact import Artifact

_MIX = "mix:"
_TOKENS = 8192  # a mixture is judged on: what `hasten eval` reads unless told otherwise
_MIX_HINT = "use mix:1% for a perplexity increase of at most 1 %"


def load(
    ref: str | Path,
    recipe: str | Recipe | None = None,
    *,
    threads: int | None = None,
    context: int | None = None,
    options: EngineOptions | None = None,
    store: bool = True,
    observer: Observer | None = None,
) -> LanguageModel:
    """Open a model and make it ready to run.

    What is packed here is kept in the cache folder (docs/cache.md), when the model is let go, the process
    ends or 20 s have passed; the next `load` of the same files and recipe reads it from there. A file that
    changed is packed anew, and a cache that cannot be used costs a warning. A recipe that calibrates, prunes,
    distils or searches takes minutes the first time and is kept at once.

    Args:
        ref: an artifact (`NAME.hasten`), a folder with safetensors, a .gguf file, a hub id, or "demo".
        recipe: what to do with the weights: a name ("w4", "w8-head16", "bf16", "w4-best", "mix:1%"), the path
            of a YAML recipe file, or a Recipe; None keeps the values the files hold. An artifact has its
            recipe already.
        threads: None uses the cores this process may use.
        context: longest prompt plus output in tokens; None is the model's own, less where memory is short.
        options: the rest of the engine's options; threads and context above come first.
        store: False neither reads nor keeps packed weights; so does `HASTEN_CACHE_PACKED=0`.
        observer: told of compression, where there is any.

    Raises:
        ModelError, FormatError, ArtifactError: the model is missing, damaged or of an unsupported kind.
        UsageError: an unknown recipe, a recipe with an artifact, or options out of range.
        MachineError: the recipe needs torch, which is not installed.
        BudgetError: no mixture is within `mix:P%`.
    """
    from hasten.engine.model import load as load_plain
    from hasten.runtime.executor import choose_device

    options = options or EngineOptions()
    choose_device(options.device)  # a device that is not there is refused before minutes of work
    place, plain = prepared(ref, recipe, observer, store=store, threads=threads)
    try:
        return load_plain(place, recipe=plain, threads=threads, context=context, options=options, store=store)
    except ArtifactError:
        if place == ref or not _dropped(Path(place)):
            raise
    place, plain = prepared(ref, recipe, observer, store=store, threads=threads)
    return load_plain(place, recipe=plain, threads=threads, context=context, options=options, store=store)


def prepared(
    ref: str | Path,
    recipe: str | Recipe | None,
    observer: Observer | None = None,
    *,
    store: bool = True,
    threads: int | None = None,
) -> tuple[str | Path, str | Recipe | None]:
    """What `hasten.engine.model.load` takes for a model and a recipe.

    A recipe that is packing and no more, or none, is handed on. Any other is carried out, once: what comes of
    it is an artifact in the store, and with it no recipe. Finding that again imports no torch and opens no
    weights.

    Args:
        ref: as for `load`.
        recipe: as for `load`.
        observer: told of the work.
        store: False makes the artifact anew, in a temporary folder that goes with this process.
        threads: to work with; None: the cores this process may use.

    Raises:
        UsageError, ModelError, MachineError, BudgetError, DiskError: as `load`.
    """
    from hasten.weights.artifact import is_artifact

    if recipe is None or is_artifact(ref):  # the loader compares an artifact's recipe with this one
        return ref, recipe
    wanted = _wanted(recipe)
    if wanted is None:
        return ref, recipe
    if isinstance(wanted, Budget):
        return _mixture(ref, wanted, observer, store, threads), None
    return _made(ref, wanted, observer, store, threads), None


def convert(
    ref: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    observer: Observer | None = None,
    progress: Callable[[int, int], None] | None = None,
    said: Callable[[str], None] | None = None,
) -> Exported:
    """Write a model in another engine's format: opened, packed and written in one step.

    Args:
        ref: as for `load`; an artifact too.
        to: `FORMAT`, `FORMAT:TYPE` or `FORMAT:RECIPE`, as `hasten.export.target` reads it. Floats that are
            rounded to a type of GGUF files are rounded to bf16 before.
        out: the file or folder; None: in the working folder, by the model's name.
        force: replace what is there, in one step.
        threads: None uses the cores this process may use.
        observer: told of compression, where there is any.
        progress: called with (done, total) tensors as they are written.
        said: called with what is being done.

    Raises:
        UsageError, MachineError, ArtifactError, TokenizerError, DiskError: as `hasten.export.export`.
        ModelError, FormatError, BudgetError: as `load`.
    """
    from hasten.export import check_target, export, target, write_artifact_as
    from hasten.weights.artifact import is_artifact

    if is_artifact(ref):
        return export(ref, to, out, force=force, progress=progress, said=said)
    wanted, say = target(to), said or (lambda _: None)
    path = wanted.path(ref, out)
    check_target(wanted, path, force)
    place, plain = prepared(ref, wanted.recipe or None, observer, threads=threads)
    with TemporaryDirectory(prefix="hasten-") as folder:
        say(f"opening {ref}")
        return write_artifact_as(_opened(place, plain, Path(folder), threads), wanted, path, progress, say)


def _opened(place: str | Path, recipe: str | Recipe | None, folder: Path, threads: int | None) -> Artifact:
    """A model as an exporter takes it: an artifact, or packed in memory with its tokenizer in a folder."""
    from hasten.models.artifact import Artifact, load_artifact
    from hasten.models.open import open_model
    from hasten.models.tokenizer import Tokenizer
    from hasten.weights.artifact import is_artifact
    from hasten.weights.packed import pack_model

    if is_artifact(place):
        return load_artifact(place)
    source = open_model(place)
    parsed = Recipe.parse(recipe) if isinstance(recipe, str) else recipe or Recipe("source")
    source.tokenizer().save(folder)
    packed = pack_model(source, parsed, threads)
    return Artifact(source.name, folder, packed, Tokenizer.load(folder), {})


def _wanted(recipe: str | Recipe) -> Recipe | Budget | None:
    """A recipe that takes work, or the budget of a mixture; None where packing is all.

    Raises:
        UsageError: an unknown name, or a file that cannot be read.
    """
    if isinstance(recipe, str):
        name = recipe.strip()
        if name.startswith(_MIX):
            return _budget(name)
        try:
            recipe = Recipe.parse(name)
        except UsageError:
            from hasten.compress.recipe_file import recipe_from  # loads the reader of YAML

            return recipe_from(name)
    return None if recipe.is_plain else recipe


def _budget(name: str) -> Budget:
    """`mix:1%` -> 0.01.

    Raises:
        UsageError: no percentage above 0 and up to 100.
    """
    found = share_of(name.removeprefix(_MIX))
    if found is None or not found[1]:
        raise UsageError(f"recipe {name!r}: after mix: comes a percentage", hint=_MIX_HINT)
    if not 0 < found[0] <= 1:
        raise UsageError(
            f"recipe {name!r}: a mixture needs a budget above 0 % and up to 100 %", hint=_MIX_HINT
        )
    return Budget(found[0])


def _dropped(folder: Path) -> bool:
    """Drop a damaged entry of the store; False where the folder is none."""
    from hasten.weights.packed_store import open_store

    kept = open_store()
    if kept is None or folder.parent != kept.models:
        return False
    kept.drop(folder)
    return True


def _made(
    ref: str | Path, recipe: Recipe, observer: Observer | None, keep: bool, threads: int | None
) -> Path:
    """The folder of what a recipe makes of a model: from the store, or made now."""
    from hasten.compress.result import silent
    from hasten.optimize import calibrated
    from hasten.quality.text import default_text

    asked = calibrated.Asked(recipe, default_text())
    tell = observer or silent
    return calibrated.artifact_of(
        ref, asked, lambda: calibrated.compressed(ref, asked, tell, threads), keep=keep
    )


def _mixture(
    ref: str | Path, budget: Budget, observer: Observer | None, keep: bool, threads: int | None
) -> Path:
    """The folder of a mixture's artifact.

    Its integers are found by GPTQ. Where torch is not installed, and no such mixture was kept before, the
    integers are rounded to nearest, and plan.json says so.
    """
    from hasten.compress.result import silent
    from hasten.optimize import calibrated
    from hasten.quality.text import default_text

    text = default_text()

    def asked(method: str) -> calibrated.Asked:
        recipe = Recipe(calibrated.mixture_name(budget), method=method)
        return calibrated.Asked(recipe, text, {"mix": budget.max_ppl_increase, "judged": _TOKENS})

    def make() -> calibrated.Made:
        from hasten.optimize.search import made_mixture

        return made_mixture(ref, budget, text, _TOKENS, observer or silent, threads)

    if calibrated.torch_is_here():
        return calibrated.artifact_of(ref, asked("gptq"), make, keep=keep)
    found = calibrated.kept_artifact(ref, asked("gptq")) if keep else None
    return found or calibrated.artifact_of(ref, asked("rtn"), make, keep=keep)
