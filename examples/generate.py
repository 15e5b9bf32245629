"""Generate from Python: python examples/generate.py [MODEL]"""

import sys

import hasten

model = hasten.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
questions = ["What is a mutex?", "Name three sorting algorithms."]
for question, answer in zip(questions, model.generate(questions, max_new_tokens=48), strict=True):
    print(f"> {question}\n{answer.text}\n[{answer.decode_tok_per_s:.0f} tokens/s, {answer.finish_reason}]\n")
model.close()
