"""Summaries, long texts in and few words out: python examples/summarize.py [URL [PARTS]]

It asks `hasten serve demo`, or another server at URL.

A text grows part by part, and each time all of it is summed up. What was there before is cached.
"""

import sys
from pydoc_data.topics import topics

from client import ask

PARTS = int(sys.argv[2]) if len(sys.argv) > 2 else 5
paragraphs = topics["compound"].split("\n\n")  # every Python has this text: its manual on compound statements
text = ""
for part in range(PARTS):
    text += "\n\n".join(paragraphs[8 * part : 8 * part + 8]) + "\n\n"
    # What stays the same comes first and the wish last, so that the whole text of the part before is found.
    prompt = f"{text}\nSum up the text above in one sentence."
    answer = ask([{"role": "user", "content": prompt}], 40)
    if answer.status != 200:
        sys.exit(f"status {answer.status}: {answer.text[:300]}")
    print(f"part {part + 1}: {' '.join(answer.text.split())[:110]}\n    {answer.line()}")
    new = answer.prompt - answer.cached
    print(f"    computed {new} of {answer.prompt} prompt tokens: {1000 * new / answer.ttft_ms:,.0f} a second")
