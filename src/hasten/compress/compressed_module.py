"""A torch module after its recipe: runs like the one it came from, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hasten.compress.memo_cache import MemoCache, MemoStats
from hasten.compress.module_recipe import ModuleRecipe
from hasten.compress.module_report import ModuleReport
from hasten.errors import MachineError


class CompressedModule(nn.Module):
    """What `compress_module` gives back: takes the module's own arguments, records no gradients.

    `module` is the compressed module itself, `report` what was done to it and what that changed. Saving and
    copying keep both; compiled code and kept outputs are made again.
    """

    report: ModuleReport
    run: Callable[..., Any]  # the module, compiled if the recipe says so; past the cache, with gradients

    def __init__(self, module: nn.Module, recipe: ModuleRecipe) -> None:
        super().__init__()
        self.module = module
        self.recipe = recipe
        self.cache: MemoCache | None = None
        self.new_cache()
        self._compile()
        self.train(module.training)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The compressed module's output; from the cache where the same call was there before."""
        if self.cache is None:
            return self.run(*args, **kwargs)
        return self.cache.call(self.run, args, kwargs)

    def new_cache(self) -> None:
        """Begin with an empty cache and counts of 0."""
        if self.recipe.cache_mb:
            capacity = max(1, round(self.recipe.cache_mb * 1e6))
            self.cache = MemoCache(self.module, capacity, self.recipe.cache_policy)

    def cache_stats(self) -> MemoStats:
        """Hits, misses and the rest; all 0 where there is no cache."""
        return MemoStats() if self.cache is None else self.cache.stats()

    def _compile(self) -> None:
        """torch.compile works at the first call."""
        run: Callable[..., Any] = self.module
        if self.recipe.compile is not None:
            try:
                run = torch.compile(self.module, mode=self.recipe.compile)
            except RuntimeError as wrong:
                raise MachineError(
                    f"torch.compile does not work here: {wrong}", hint="leave compile out of the recipe"
                ) from wrong
        object.__setattr__(self, "run", run)  # not as a part: the state dict would hold everything twice

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("run", "cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cache = None
        self.new_cache()
        self._compile()
