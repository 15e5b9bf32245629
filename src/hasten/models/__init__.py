"""Opening models: folders, hub ids, GGUF files and the demo; their configuration, tensors and tokenizer."""
