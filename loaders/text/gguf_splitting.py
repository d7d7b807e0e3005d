"""The ways of splitting words that GGUF files know by name (`tokenizer.ggml.pre`).

llama.cpp has the regular expressions of each name in its code (src/llama-vocab.cpp); they stem from the models' own
tokenizer.json. A byte-level BPE cuts a text by them before it merges.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

SPACE = "▁"  # how SentencePiece spells a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
NFC_KEY = "afina.tokenizer.nfc"  # whether a text is composed first: llama.cpp does not do it, so GGUF has no key for it


class Splitting(NamedTuple):
    """The pattern of each pass over the pieces of the last one, and whether a piece that is a token as it stands is
    taken without merging.

    ``exact``: llama.cpp computes what the patterns say. Where it has no regular expression for them it works with
    others, which are right for most texts: such files are read as the models' own tokenizers read a text.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    exact: bool = True


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS}|{_LINES}"
_LLAMA3_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_CAPITALS, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Words that begin at a capital, as OpenAI's o200k and Mistral's Tekken cut them.
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]*[{_SMALL}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]+[{_SMALL}]*"
_CASED_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
)
# The cased letters as DeepSeek LLM lists them, which is not quite what Unicode says today.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-"
    "ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"  # as both older DeepSeek tokenizers have it

# Of several names for the same, the plainest; ALIASES has the others.
SPLITTINGS = {
    "gpt-2": Splitting((_GPT2,)),
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": Splitting((_LLAMA3,), ignore_merges=True),
    "smaug-bpe": Splitting((_LLAMA3,)),
    "qwen2": Splitting((_QWEN2,)),
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "qwen35": Splitting(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",
        )
    ),
    "deepseek-llm": Splitting(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": Splitting((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_V3)),
    "minicpm5": Splitting((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignore_merges=True),
    "jais-2": Splitting((rf"{_LLAMA3.removesuffix(_LINES)}\s*[\r\n]+|{_LLAMA3_SPACES}|\s",)),
    "seed-coder": Splitting(
        (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",),
    ),
    "ufakzeka": Splitting((_QWEN2.removeprefix(f"{_CONTRACTIONS}|"),)),
    "bloom": Splitting((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "viking": Splitting((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    "tekken": Splitting(
        (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_SYMBOLS}|{_LINES}",), ignore_merges=True, exact=False
    ),
    "gpt-4o": Splitting(
        (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_SYMBOLS}|{_LINES}",),
        exact=False,
    ),
}
ALIASES = {
    alias: name
    for name, aliases in {
        "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais "
        "trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
        "smaug-bpe": "dbrx chatglm-bpe",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2 "
        "bailingmoe bailingmoe2 llada-moe",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "bloom": "poro-chat gpt3-finnish",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    }.items()
    for alias in aliases.split()
}


def pre_tokenizer(way: Splitting) -> pre_tokenizers.PreTokenizer:
    """Cut a text by ``way`` and spell its pieces in the 256 letters of a byte-level BPE."""
    passes = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in way.patterns]
    return pre_tokenizers.Sequence([*passes, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
