"""The closed loop: measure, decide, verify, write.

The package is callable: Python binds a package's name on its parent when a submodule is first imported, so
`hasten.optimize` may be this module or the function, and `hasten.optimize(...)` must work either way.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from hasten.optimize.search import optimize

        return optimize(*args, **options)


sys.modules[__name__].__class__ = _Callable
