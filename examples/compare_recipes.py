"""What each width costs in bytes: python examples/compare_recipes.py [MODEL]"""

import sys

import hasten

ref = sys.argv[1] if len(sys.argv) > 1 else "demo"
for name in ("w8", "w6", "w4"):
    model = hasten.load(ref, recipe=name)
    answer = model.generate(["def fibonacci(n):"], max_new_tokens=24, chat=False)[0]
    size = f"{model.weight_bytes / 1e6:5.0f} MB read a token, {model.bits_per_weight:.2f} bits a weight"
    print(f"{name}: {size}\n    {answer.text.strip()!r}")
    model.close()
