"""Strings in many scripts, the same ones every time: what tokenizers are compared on."""

from __future__ import annotations

import random

_TEXT = {
    "latin": "the quick brown fox don't I'll they've café naïve Größe ångström žluťoučký ŁÓDŹ İstanbul ﬁ Ǆ",
    "chinese": "你好 世界 语言模型 推理速度 中华人民共和国 繁體字 𠮷野家 。 ， 「」",
    "japanese": "こんにちは カタカナ 日本語のテキスト ｶﾞｷﾞ 々 ー 〜 食べる",
    "korean": "안녕하세요 대한민국 한국어 ㅋㅋㅋ 각",
    "arabic": "مرحبا بالعالم اللغة العربية ١٢٣ ، ؟ مُحَمَّد لا إله",
    "hebrew": "שלום עולם בְּרֵאשִׁית ירושלים ״",
    "devanagari": "नमस्ते दुनिया हिन्दी १२३ क्षत्रिय ।",
    "thai": "สวัสดีชาวโลก ภาษาไทย ๑๒๓ น้ำ กำลัง",
    "cyrillic": "Привет мир Ёлка ЩУКА їжак ћ Ѣ",
    "greek": "Γειά σου Κόσμε ΟΔΥΣΣΕΥΣ ά ᾳ ΐ",
}
_WORDS = {name: text.split() for name, text in _TEXT.items()} | {
    "emoji": ["😀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇯🇵", "❤️", "☃", "🧑🏻‍💻"],
    "marks": [
        "e\u0301",
        "a\u0308\u0323",
        "\u0915\u094d\u0937",
        "Z\u0351\u036b\u0343",
        "\u1100\u1161\u11a8",
        "\u212b",
    ],
    "digits": ["0", "42", "1234567", "3.14159", "1,000,000", "²³", "½", "Ⅻ", "٣", "2024-01-31", "0xDEADBEEF"],
    "punctuation": [
        "!",
        "...",
        "—",
        "“”",
        "(a)",
        "[b]",
        "{c}",
        "a/b",
        "a\\b",
        "``",
        "'S",
        "'re",
        "<>",
        "$€¥",
        "§",
        "~",
    ],
    "code": [
        "def f(x):\n    return x**2",
        "\tif (a == b) {\n\t\treturn;\n\t}",
        "for i in range(10):\n        pass\n\n",
    ],
    "spaces": [
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\r\n",
        "\n\n\n",
        " \n ",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\ufeff",
    ],
    "control": [
        "\x00",
        "\x01",
        "\x07",
        "\x1b[0m",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufffd",
        "\ue000",
        "\U0010ffff",
    ],
    "pieces": ["\u2581", "\u2581the", "<0x41>", "<0x0A>", "Ġthe", "Ċ"],
}


def samples(specials: tuple[str, ...] = (), count: int = 1000, seed: int = 7) -> list[str]:
    """`count` strings; about a tenth of them hold one of `specials` inside."""
    rng = random.Random(seed)
    scripts = list(_WORDS)
    texts = ["", " ", "  a", "a  ", "\n", " \n", *specials, *(f"x{token} y" for token in specials)]
    while len(texts) < count:
        chosen = rng.sample(scripts, rng.choice((1, 1, 2, 3)))
        parts: list[str] = []
        for _ in range(rng.randint(1, 12)):
            parts.append(rng.choice(_WORDS[rng.choice(chosen)]))
            parts.append(rng.choice((" ", " ", " ", "", "", "  ", "\n")))
        if specials and rng.random() < 0.1:
            parts.insert(rng.randint(0, len(parts)), rng.choice(specials))
        if rng.random() < 0.1:
            parts.insert(0, rng.choice(_WORDS["spaces"]))
        texts.append("".join(parts))
    return texts[:count]


def corpus() -> list[str]:
    """Text to train tiny vocabularies on: other strings than `samples()`, without what no trainer takes."""
    return [text.replace("\x00", "") for text in samples(count=600, seed=11) if text.strip()]
