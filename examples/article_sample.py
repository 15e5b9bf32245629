"""The article's sample program, made to run: python examples/article_sample.py

Its module, quantised, pruned, compiled and cached, each step timed beside the one before.
"""

import torch

from hasten.compress.module import compress_module
from hasten.compress.module_recipe import ModuleRecipe

recipe = ModuleRecipe(bits=8, prune=0.25, compile="default", cache_mb=1, cache_policy="s3fifo")
torch.set_num_threads(1)  # calls this short gain nothing from more
image = torch.rand(1, 28 * 28, generator=torch.Generator().manual_seed(0))  # one random picture, 28 x 28

for width, size in ((128, "the article's module"), (4096, "the same, 32 times as wide")):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(784, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    fast = compress_module(module, recipe, image)
    print(f"{size}\n{fast.report}\n")

logits = fast(image)
print("output ", [round(value, 3) for value in logits[0].tolist()])
print("softmax", [round(value, 3) for value in logits.softmax(-1)[0].tolist()])
print("The output is ten logits; the softmax makes them probabilities, which add up to 1.")
print("The module was never trained, so all ten stay near 0.1: they say nothing about the picture.")
print("The cache:", fast.cache_stats(), "\nThe same picture again:", end=" ")
print(
    "the same bits," if torch.equal(fast(image), logits) else "other bits,", f"{fast.cache_stats().hits} hit"
)
