"""Texts that tokenizers disagree about, and a Hypothesis strategy that strings their parts together."""

from __future__ import annotations

from hypothesis import strategies

_SPACES = ["\t", "\n", "\v", "\f", "\r", "\r\n", "\x1c", "\x1f", " ", "\x85", "\xa0", "\u1680", "\u180e"]
_SPACES += [*map(chr, range(0x2000, 0x200C)), "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff"]
_DIGITS = ["0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "๐๑๒๓๔๕๖๗๘๙", "０１２３４５６７８９", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗", "½⅓Ⅷⅷ①②³₄"]
_CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
_WRITTEN = {case(text) for text in _CONTRACTIONS for case in (str.lower, str.upper, str.title, str.swapcase)}
_EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷🇯", "👍🏽👍🏿", "1️⃣#️⃣*️⃣", "❤️‍🔥", "🙂🙂🙂", "☺☺️", "🧑🏻‍🤝‍🧑🏿", "\U000e0067\U000e007f"]
_MARKS = [
    "e\u0301",
    "\u0301",
    " \u0301x",
    "a\u0308\u0323\u0301",
    "ế",
    "e\u0302\u0301",
    "ﬁ",
    "Å\u212b",
    "Ω\u2126",
    "İi̇ıI",
    "ẞß",
]
_MARKS += [
    "Z" + "\u0317\u0320\u0353" * 8,
    "क\u094dष\u093f",
    "నా\u0c4d",
    "ไทยน\u0e49ำ",
    "한국어 ᄒ\u1161ᆫ각",
    "\u0f40\u0f72",
]
_SCRIPTS = [
    "Hello мир 世界 שלום مرحبا नमस्ते ไทย",
    "\u202bאבג abc\u202c \u2067x\u2069",
    "日本語のテキスト、中文。「かな」",
    "ᏣᎳᎩ ꮳꮃꭹ ა Ა Ǆǅǆ",
]
_SCRIPTS += ["𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ｆｕｌｌ ⓦⓘⓓⓔ", "𐐷𐓏 𓀀 𠀀𠮷", "x²+y₁≤√∞ ∀ε>0", "₿1,234.56 €٫٬", "“quotes” ‘s’ ’s don’t", "…—–‐‑"]
_CONTROLS = [
    "\x00",
    "a\x00b",
    "\x01\x02\x1b[0m",
    "\x7f\x80\x9f",
    "\ue000\uf8ff",
    "\U0010fffd",
    "\ufdd0\ufffe\uffff",
    "\ufffd",
]
_SPECIALS = [
    "<|im_start|>",
    "<|im_|>end|>",
    "< |im_end|>",
    "<s>",
    "</s>",
    "<unk>",
    "<bos>",
    "<0x0A>",
    "[PAD7]",
    "[MASK]",
    "▁a▁▁b",
]
_SPECIALS += ["<|endoftext|>", "<think>", "</tool_call>", "<start_of_turn>", "<|eot_id|>", "ĠHello", "##ing"]
PARTS = [*_SPACES, *_DIGITS, *sorted(_WRITTEN), *_EMOJI, *_MARKS, *_SCRIPTS, *_CONTROLS, *_SPECIALS]

TEXTS = [
    "", *PARTS,
    *(space * 3 + "x" + space + "\n" + space * 2 for space in _SPACES),
    *(f"a{space}b{space}{space}c" for space in _SPACES),
    " \t\n\r\n \r\v\f  x \u3000\u00a0 y\n\n\n", "   lead", "trail   ", "\n \n  \n", "a  b   c    d     e",
    *(" ".join(digits[:size] for size in range(1, 8)) for digits in _DIGITS), "v1.2.3 10,000,000 0x1F 1e-5 3/4",
    *(f"I{end} they{end}x {end} 9{end}" for end in sorted(_WRITTEN)),
    "a" * 300, " " * 300, "\n" * 70, "!" * 100, "中" * 60, "é" * 60, "🙂" * 30, "=-" * 40,
    "def f(x):\n\treturn {'a': x**2}  # ok\n\n\nif __name__ == '__main__':", "https://x.y/z?a=b&c=%20d#e_f",
    "WORDSinCamelCase snake_case kebab-case ÀÉÎÕÜ àéîõü Straße",
]  # fmt: skip

# Parts and single characters of every kind (no lone surrogates, which no tokenizer takes), next to each other.
AWKWARD = strategies.lists(
    strategies.sampled_from(PARTS) | strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=12,
).map("".join)
