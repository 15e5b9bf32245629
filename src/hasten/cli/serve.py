"""`hasten serve`: the OpenAI API on one model or several."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from hasten.cli.console import watched
from hasten.cli.flags import AdapterOption, RecipeOption, argument, fill, optional, parameters, with_flags
from hasten.core import EngineOptions, ServingOptions
from hasten.serve.options import ServeOptions, names_of

KEPT = "The server is down; what ran was cancelled."

ModelsArgument = Annotated[
    list[str] | None,
    argument(
        "[MODEL]...",
        "What to serve: artifacts, GGUF files, Hugging Face folders, hub ids, or demo. "
        "NAME=MODEL gives it another name.",
    ),
]
ModelOption = Annotated[
    list[str] | None, optional("--model", "MODEL", "The same as an argument, repeatable.")
]


def command(
    models: ModelsArgument = None,
    model: ModelOption = None,
    recipe: RecipeOption = None,
    adapter: AdapterOption = None,
    **flags: Any,
) -> None:
    """Serve models with the OpenAI API, chat page included.

    Prints one line with the address when requests are answered. SIGTERM or Ctrl-C stops it: what runs then
    gets --drain-s seconds to finish. Without --api-key everybody who reaches the address is let in.
    """
    from hasten.runtime.executor import choose_device

    engine = fill(EngineOptions, flags)
    choose_device(engine.device)  # a device that is not there is refused before anything else
    from hasten.models.source import with_adapters
    from hasten.serve.server import ServeSetup, serve

    named = names_of([*(models or ()), *(model or ())])
    refs, left = _prepared({n: with_adapters(ref, adapter or ()) for n, ref in named.items()}, recipe)
    setup = ServeSetup(
        refs=refs,
        options=fill(ServeOptions, flags),
        engine=engine,
        serving=fill(ServingOptions, flags),
        recipe=left,
    )
    serve(setup, _announce)


def _prepared(refs: dict[str, str], recipe: str | None) -> tuple[dict[str, str], str | None]:
    """The models with a recipe that takes work carried out before anyone can ask for them, and what is left
    to do when they are loaded."""
    from hasten.loading import prepared

    left, found = None, {}
    with watched() as observer:
        for name, ref in refs.items():
            place, plain = prepared(ref, recipe, observer)
            found[name] = str(place)
            left = left if plain is None else recipe
    return found, left


def _announce(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


with_flags(
    command,
    [
        *parameters(ServeOptions, {"api_keys": "HASTEN_API_KEY"}),
        *parameters(EngineOptions),
        *parameters(ServingOptions),
    ],
)
