"""How byte-level vocabularies cut text into words before merging: one split list a `tokenizer.ggml.pre` name.

The expressions are those of the models' own tokenizer.json files (Oniguruma syntax), the names those of GGUF
writers. Each expression splits what the ones before it left, and keeps matches and the text between them.
"""
# ruff: noqa: RUF001 - the expressions list characters of many scripts

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = _WORD + r"|\p{N}{1,3}" + _TAIL
QWEN2 = _WORD + r"|\p{N}" + _TAIL
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER_ENDING = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_START = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_LOWER_ENDING}|{_UPPER_START}|\p{{N}}{_SLASH_TAIL}"
GPT4O = rf"{_LOWER_ENDING}{_SUFFIX}|{_UPPER_START}{_SUFFIX}|\p{{N}}{{1,3}}{_SLASH_TAIL}"
_CJK_RUN = "[一-龥ࠀ-一가-퟿]+"
# DeepSeek LLM lists the cased letters of its day, by code point.
_CASED = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a
38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf
1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d
1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4
1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f
2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f
a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_DEEPSEEK_WORD = (
    rf"\s?[{''.join('-'.join(chr(int(c, 16)) for c in part.split('-')) for part in _CASED.split())}]+"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizerKind:
    """One way to cut, and what its models do where the metadata is silent."""

    splits: tuple[str, ...]
    whole_words: bool = False  # a word that is a token as it stands is not merged together (`ignore_merges`)
    add_bos: bool = False


_KINDS: dict[tuple[str, ...], PreTokenizerKind] = {
    ("default", "gpt-2", "mpt", "olmo", "jais", "phi-2"): PreTokenizerKind((GPT2,)),
    (
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "codeshell",
        "exaone",
        "minerva-7b",
    ): PreTokenizerKind((r"\p{N}", GPT2)),
    ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"): PreTokenizerKind((QWEN2,)),
    ("qwen35",): PreTokenizerKind((QWEN35,)),
    (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
    ): PreTokenizerKind((LLAMA3,), whole_words=True, add_bos=True),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): PreTokenizerKind((LLAMA3,)),
    ("tekken",): PreTokenizerKind((TEKKEN,), whole_words=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenizerKind((GPT4O,)),
    ("deepseek-llm",): PreTokenizerKind(
        (r"[\r\n]", _DEEPSEEK_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK_RUN, r"\p{N}+")
    ),
    ("deepseek-coder",): PreTokenizerKind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_RUN, r"\p{N}")),
    ("deepseek-v3",): PreTokenizerKind((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    ("falcon",): PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    ("bloom", "poro-chat", "gpt3-finnish"): PreTokenizerKind((_BLOOM,)),
    ("viking",): PreTokenizerKind((_BLOOM, r"\p{N}")),
}
KINDS: dict[str, PreTokenizerKind] = {name: kind for names, kind in _KINDS.items() for name in names}


def kind_of(name: str) -> PreTokenizerKind:
    """The kind behind a `tokenizer.ggml.pre` name.

    Raises:
        TokenizerError: the name is not known; guessing would give other tokens than the model was trained on.
    """
    try:
        return KINDS[name]
    except KeyError:
        raise TokenizerError(
            f"this model's pre-tokenizer {name!r} is not known; known are {', '.join(sorted(KINDS))}",
            hint="open the model's Hugging Face folder instead: its tokenizer.json says how to split",
        ) from None


def byte_level(kind: PreTokenizerKind) -> PreTokenizer:
    """Split as `kind` says, then spell the words in the byte alphabet."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits: list[PreTokenizer] = [Split(Regex(pattern), behavior="isolated") for pattern in kind.splits]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
