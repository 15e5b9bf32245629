"""Decisions by a deadline: python examples/decide.py [URL [DEADLINE_MS [A_SECOND [HOW_MANY]]]]

It asks `hasten serve demo`, or another server at URL.

States of a drive come at a fixed pace, whatever became of those before. Each answer follows one schema. What
cannot be decided in time is refused at once, so that the car can do what it does without an answer: brake.
This shows a deadline at work. Nothing here is fit to drive.
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from client import ask

DEADLINE_MS, RATE, COUNT = (
    float(sys.argv[n]) if len(sys.argv) > n else usual for n, usual in ((2, 300.0), (3, 2.0), (4, 20.0))
)
ACTIONS = ["keep", "slow", "brake", "left", "right"]
SCHEMA = {"type": "object", "properties": {"action": {"enum": ACTIONS}}, "required": ["action"]}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "decision", "schema": SCHEMA | {"additionalProperties": False}},
}
RULES = f"You drive. Choose one of {', '.join(ACTIONS)}. Brake for anything nearer than 20 m. Answer in JSON."


def decide(number: int, due: float):
    draw = random.Random(number)
    state = (
        f"speed {draw.randint(20, 90)} km/h, obstacle in {draw.randint(5, 120)} m, lane {draw.choice('LMR')}"
    )
    time.sleep(max(0.0, due - time.perf_counter()))
    messages = [{"role": "system", "content": RULES}, {"role": "user", "content": state}]
    return state, ask(messages, 16, response_format=FORMAT, deadline_ms=DEADLINE_MS)


decide(-1, 0.0)  # a service that runs has the rules and the schema ready
begun = time.perf_counter()
with ThreadPoolExecutor(64) as clients:
    found = list(clients.map(lambda n: decide(n, begun + n / RATE), range(int(COUNT))))
met = refused = 0
for state, answer in found:
    in_time = answer.status == 200 and answer.whole_ms <= DEADLINE_MS
    met, refused = met + in_time, refused + (answer.status in (429, 503))
    said = (
        json.loads(answer.text)["action"] if in_time and answer.text.rstrip().endswith("}") else "no decision"
    )
    print(f"{state}: {said}, status {answer.status} after {answer.whole_ms:.0f} ms")
late = len(found) - met - refused
share = f"{100 * met / len(found):.0f} % of {len(found)} met {DEADLINE_MS:.0f} ms"
print(f"\n{share}; {refused} refused early, {late} late.")
