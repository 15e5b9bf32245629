"""What may be asked, as pydantic models: one pass from bytes to checked values, unknown fields refused.

Source: the OpenAI API reference, and vLLM's names for what OpenAI has no name for.
"""
