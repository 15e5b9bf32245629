"""Translation, an answer as long as its text: python examples/translate.py [URL [LANGUAGE]]

It asks `hasten serve demo`, or another server at URL.
"""

import statistics
import sys

from client import ask

LANGUAGE = sys.argv[2] if len(sys.argv) > 2 else "French"
TEXTS = (
    "The train to the coast leaves at half past seven from the second platform.",
    "Please keep this letter: you will need the number at the top when you call us.",
    "The bridge is closed until Friday, so take the road along the river instead.",
    "If the lamp does not light up, check the plug first and then the fuse behind the cover.",
    "Our office is open from Monday to Friday, from nine in the morning to five in the afternoon.",
)

answers = []
for text in TEXTS:
    wish = f"Translate into {LANGUAGE}. Give the translation alone.\n\n{text}"
    answer = ask([{"role": "user", "content": wish}], 2 * len(text.split()) + 32)
    answers.append(answer)
    print(f"{text}\n    {' '.join(answer.text.split())[:120]}\n    {answer.line()}")
tpot = statistics.median(answer.tpot_ms for answer in answers)
ttft = statistics.median(answer.ttft_ms for answer in answers)
share = sum(answer.whole_ms - answer.ttft_ms for answer in answers) / sum(a.whole_ms for a in answers)
print(f"\nMedians: first token {ttft:.0f} ms, then {tpot:.1f} ms a token.")
print(
    f"{100 * share:.0f} % of the time went to tokens after the first: fewer bytes a token is what helps here."
)
