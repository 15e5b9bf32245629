"""Hasten makes a language model fast on your hardware, within the quality you can accept, and proves both.

    import hasten

    model = hasten.load("demo", recipe="w8")
    print(model.generate(["What is a mutex?"], max_new_tokens=64)[0].text)

The names below are the whole public interface. Each is imported when it is first used: `import hasten` is
instant.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as typing has it, whose import takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from hasten.compress.compress import compress
    from hasten.core import EngineOptions, Format, Recipe
    from hasten.engine.model import Completion, LanguageModel
    from hasten.errors import HastenError
    from hasten.loading import load
    from hasten.machine.probe import probe
    from hasten.optimize.prospect import OptimizeResult
    from hasten.optimize.search import optimize
    from hasten.runtime.sampling import SamplingOptions

__version__ = "0.1.0"

# Public name -> the module that defines it. At most twelve; tests/test_public.py counts.
_HOME = {
    "load": "hasten.loading",
    "optimize": "hasten.optimize.search",
    "compress": "hasten.compress.compress",
    "probe": "hasten.machine.probe",
    "LanguageModel": "hasten.engine.model",
    "Completion": "hasten.engine.model",
    "SamplingOptions": "hasten.runtime.sampling",
    "Recipe": "hasten.core",
    "Format": "hasten.core",
    "EngineOptions": "hasten.core",
    "OptimizeResult": "hasten.optimize.prospect",
    "HastenError": "hasten.errors",
}

__all__ = [  # noqa: RUF022  in the order a reader meets them
    "load",
    "optimize",
    "compress",
    "probe",
    "LanguageModel",
    "Completion",
    "SamplingOptions",
    "Recipe",
    "Format",
    "EngineOptions",
    "OptimizeResult",
    "HastenError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
