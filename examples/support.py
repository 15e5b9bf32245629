"""Customer service, long instructions and short turns: python examples/support.py [URL]

It asks `hasten serve demo`, or another server at URL.
"""

from client import ask

PRODUCTS = ("kettle", "toaster", "blender", "grinder", "heater", "fan", "scale", "oven", "mixer", "juicer")
RULES = "\n".join(
    f"{number}. The {name} has article number {4700 + number}, {number % 3 + 1} years of warranty and costs "
    f"{19 + 7 * number} euros. It is returned within {14 + number} days in its box; spare parts come from "
    f"the workshop in {2 + number % 5} days. A {name} that smells of smoke is never repaired at home."
    for number, name in enumerate(PRODUCTS, start=1)
)
SYSTEM = f"You answer customers of a shop in one or two sentences, by these rules alone:\n{RULES}"
CUSTOMERS = (
    ("How long is the warranty of the kettle?", "And what does it cost?"),
    ("My heater smells of smoke. What shall I do?", "Can I repair it myself?"),
    ("I want to return a blender.", "The box is gone. Does that matter?"),
    ("Which article number has the oven?", "When would a spare part be here?"),
)

cached = prompts = 0
for customer, turns in enumerate(CUSTOMERS, start=1):
    chat = [{"role": "system", "content": SYSTEM}]
    for turn in turns:
        chat.append({"role": "user", "content": turn})
        answer = ask(chat, 48)
        chat.append({"role": "assistant", "content": answer.text})
        print(f"customer {customer}: {turn}\n    {' '.join(answer.text.split())[:100]}\n    {answer.line()}")
        cached, prompts = cached + answer.cached, prompts + answer.prompt
share = 100 * cached / max(1, prompts)
print(
    f"\n{share:.0f} % of all prompt tokens were cached: the instructions were computed once, for everybody."
)
