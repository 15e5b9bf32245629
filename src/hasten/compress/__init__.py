"""Models made smaller, and kept as they were: quantised, pruned, distilled, written.

The package is callable, as `hasten.optimize` is: `hasten.compress` may be this module or the function, and
`hasten.compress(...)` must work either way.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from hasten.compress.compress import compress

        return compress(*args, **options)


sys.modules[__name__].__class__ = _Callable
