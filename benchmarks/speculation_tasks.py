"""Prompts to measure speculation with: three kinds of answer repeat their prompt, one does not."""

from __future__ import annotations

from pydoc_data.topics import topics

EDITS = (
    (
        "rename the variable `total` to `amount`",
        '''def invoice(lines, discount, tax_rate):
    """Sum of an invoice's lines, discounted, taxed, with what each customer owes."""
    total = 0.0
    owed = {}
    for customer, quantity, price in lines:
        if quantity < 0 or price < 0:
            raise ValueError(f"a line of {quantity} at {price}")
        cost = quantity * price
        total += cost
        owed[customer] = owed.get(customer, 0.0) + cost
    if discount:
        total = total * (1.0 - discount)
        owed = {name: cost * (1.0 - discount) for name, cost in owed.items()}
    tax = total * tax_rate
    total += tax
    return {"total": round(total, 2), "tax": round(tax, 2), "owed": owed}
''',
    ),
    (
        "add type hints to every argument and return value",
        '''class Queue:
    """First in, first out, with a limit."""

    def __init__(self, limit):
        self.limit = limit
        self.items = []
        self.dropped = 0

    def push(self, item):
        if len(self.items) >= self.limit:
            self.dropped += 1
            return False
        self.items.append(item)
        return True

    def pop(self):
        if not self.items:
            return None
        return self.items.pop(0)

    def drain(self, handler):
        handled = 0
        while self.items:
            handler(self.items.pop(0))
            handled += 1
        return handled
''',
    ),
    (
        "replace the print calls by logging.info calls and import logging",
        """import csv
import sys


def load(path):
    rows = []
    with open(path, newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if not row["name"]:
                print("line", number, "has no name")
                continue
            rows.append({"name": row["name"].strip(), "city": row["city"].strip(), "age": int(row["age"])})
    print("read", len(rows), "rows from", path)
    return rows


def by_city(rows):
    cities = {}
    for row in rows:
        cities.setdefault(row["city"], []).append(row["name"])
    print("found", len(cities), "cities")
    return cities


if __name__ == "__main__":
    for city, names in by_city(load(sys.argv[1])).items():
        print(city, ", ".join(names))
""",
    ),
)
QUOTED = ("truth", "dynamic-features", "import", "execmodel")
RECORDS = (
    "Ada Brown, 34, lives in Leeds and works as a surveyor; her number is 555-0142. "
    "Tom Okafor, 41, lives in Bristol and works as a baker; his number is 555-0178. "
    "Mei Lin, 29, lives in Cardiff and works as a nurse; her number is 555-0113. "
    "Jon Berg, 52, lives in Hull and works as a ferry pilot; his number is 555-0190. "
    "Rosa Diaz, 38, lives in York and works as a teacher; her number is 555-0125. "
    "Ivo Novak, 47, lives in Derby and works as a printer; his number is 555-0166.",
    "Order 1001: 3 oak shelves to Lisbon, paid 240.00 EUR on 2024-03-02. "
    "Order 1002: 1 pine desk to Porto, paid 310.50 EUR on 2024-03-02. "
    "Order 1003: 12 steel hooks to Faro, paid 36.00 EUR on 2024-03-03. "
    "Order 1004: 2 glass lamps to Braga, paid 98.40 EUR on 2024-03-05. "
    "Order 1005: 6 cork mats to Coimbra, paid 54.00 EUR on 2024-03-05. "
    "Order 1006: 4 wool rugs to Evora, paid 512.00 EUR on 2024-03-06.",
    "router-1 runs version 4.2 in rack A3, last seen at 10:04, load 0.31. "
    "router-2 runs version 4.2 in rack A4, last seen at 10:05, load 0.28. "
    "switch-7 runs version 2.9 in rack B1, last seen at 09:58, load 0.75. "
    "switch-8 runs version 2.9 in rack B2, last seen at 10:05, load 0.66. "
    "store-1 runs version 7.0 in rack C1, last seen at 10:01, load 0.12. "
    "store-2 runs version 7.1 in rack C2, last seen at 10:03, load 0.19.",
)
QUESTIONS = (
    "Why is the sky blue during the day and red in the evening? Explain it to a child.",
    "Give me some advice for a first visit to a big city in winter.",
    "What is the difference between a process and a thread? When would you use which?",
    "Tell me a short story about a lighthouse keeper who finds a letter.",
    "How do vaccines work, and why do some need to be repeated?",
    "Write an e-mail to a neighbour who plays the trumpet at night.",
)


def tasks() -> dict[str, list[str]]:
    """Workload -> user messages."""
    return {
        "edit": [
            f"Here is some Python code. {what[0].upper()}{what[1:]}. Change nothing else. "
            f"Answer with the whole code and nothing else.\n\n```python\n{code}```"
            for what, code in EDITS
        ],
        "summarise": [
            "Summarise the text below: quote its most important sentences word for word, one a line, "
            f"each in quotation marks.\n\n{passage(name)}"
            for name in QUOTED
        ],
        "structured": [
            "Extract every record of this text as a JSON array of objects, one object a record, the same "
            f"keys in each. Answer with the JSON alone.\n\n{text}"
            for text in RECORDS
        ],
        "chat": list(QUESTIONS),
    }


def passage(topic: str, characters: int = 2400) -> str:
    """The beginning of a topic of the Python reference, whole paragraphs."""
    text = topics[topic].strip()
    end = text.rfind("\n\n", 0, characters)
    return text[: end if end > 0 else characters]
