"""Which way of calling tools a model was taught, read from its chat template.

The families and where their ways are written down:

- hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one each call. Templates of Qwen 2.5,
  Qwen 3, SmolLM 3 and Hermes (https://github.com/NousResearch/Hermes-Function-Calling).
- hermes_list: the same with a JSON list between the marks. Template of SmolLM 2.
- llama: `{"name": ..., "parameters": {...}}` as the whole message, perhaps after `<|python_tag|>`. Llama
  3.1 to 3.3 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1).
- mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and mistral_args:
  `[TOOL_CALLS]name[ARGS]{...}` (https://github.com/mistralai/mistral-common).
- phi: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`. Template of Phi-4-mini.

Templates of Gemma 3, OLMo 2 and Phi-3 know no tools: these models are told of them in words (`described`), in
hermes' way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

StyleName = Literal["hermes", "hermes_list", "llama", "mistral", "mistral_args", "phi"]

_MARKS: dict[StyleName, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "hermes_list": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "phi": ("<|tool_call|>", "<|/tool_call|>"),
}


@dataclass(frozen=True)
class ToolStyle:
    """One model's way. `special` are those of its marks that decode would leave out, with their ids."""

    name: StyleName = "hermes"
    described: bool = False  # the template knows no tools: they are put into words
    spaced: bool = False  # mistral: a space between mark and list
    special: Mapping[str, int] = field(default_factory=dict)

    @property
    def opening(self) -> str:
        """What a call begins with; llama's may be missing."""
        return _MARKS[self.name][0]

    @property
    def closing(self) -> str | None:
        """What a call ends with; None where it goes on to the end of the answer."""
        return _MARKS[self.name][1] if self.name in ("hermes", "hermes_list", "phi") else None

    @property
    def bare(self) -> bool:
        """Whether an answer that is nothing but JSON is a call."""
        return self.name == "llama"

    @property
    def arguments_key(self) -> str:
        """The arguments' name in the call's JSON."""
        return "parameters" if self.name == "llama" else "arguments"

    @property
    def keep_ids(self) -> tuple[int, ...]:
        """Special tokens that a text stream must let through: `tokenizer.stream(keep=style.keep_ids)`."""
        return tuple(sorted(self.special.values()))


def tool_style(tokenizer: Tokenizer, architecture: str = "") -> ToolStyle:
    """The way of a model's chat template.

    Args:
        tokenizer: has the template, and says which marks are special tokens.
        architecture: as `ModelConfig.architecture`; decides where a template leaves it open.
    """
    name, described, spaced = _read(template_of(tokenizer.fields.chat_templates), architecture)
    ids = {mark: tokenizer.id_of(mark) for mark in _MARKS[name]}
    special = {mark: i for mark, i in ids.items() if i is not None and i in tokenizer.special_ids}
    return ToolStyle(name, described, spaced, special)


def template_of(templates: Mapping[str, str]) -> str:
    """The template that chats with tools use."""
    return templates.get("tool_use") or templates.get("default") or ""


def is_described(templates: Mapping[str, str]) -> bool:
    """Whether tools must be put into words because the template knows none."""
    return "tool_use" not in templates and _read(template_of(templates), "")[1]


def _read(template: str, architecture: str) -> tuple[StyleName, bool, bool]:
    """Style, described, spaced."""
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral", False, "[TOOL_CALLS] [" in template
    if "<|tool_call|>" in template or "<|tool|>" in template:
        return "phi", False, False
    if "<tool_call>" in template and "<function=" not in template:
        as_list = "<tool_call>[" in template.replace("\\n", "").replace(" ", "")
        return "hermes_list" if as_list else "hermes", False, False
    if "<|python_tag|>" in template or (architecture == "llama" and '"parameters"' in template):
        return "llama", False, False
    return "hermes", True, False
