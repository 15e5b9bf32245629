"""Print tokens as they come: python examples/stream.py [MODEL]"""

import sys

import hasten

model = hasten.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
prompt = model.tokenizer.encode_chat([{"role": "user", "content": "Explain recursion in two sentences."}])
text = model.tokenizer.stream()  # holds back bytes until they make a whole character
sampling = hasten.SamplingOptions(temperature=0.7, top_p=0.9, seed=1)
for token in model.stream(prompt, max_new_tokens=64, sampling=sampling):
    if token not in model.tokenizer.eos_ids:
        print(text.push(token), end="", flush=True)
print(text.flush())
