"""How a byte-level tokenizer splits text into words, and what llama.cpp calls that.

The splitting is read from the steps of tokenizer.json itself, so a fine-tune with a changed vocabulary
keeps working.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    symbols = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{symbols}|{_SPACES}"


def _cased_words(suffix: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = _words(r"\p{N}")
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
CL100K = _words(r"\p{N}{1,3}")
O200K = _cased_words(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}")
TEKKEN = _cased_words("", r"\p{N}")
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
DIGIT, DIGITS, DIGIT_TRIPLES = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"

# As escapes, because several of these characters have a canonical equivalent that breaks the ranges.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_ASCII_SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    DIGIT,
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)
DEEPSEEK_V3 = (
    DIGIT_TRIPLES,
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)


def _canonical(regex: str) -> str:
    """One spelling for regexes that differ in how they write line breaks or composed characters."""
    return unicodedata.normalize("NFC", regex).replace("\r", r"\r").replace("\n", r"\n")


# llama.cpp's names by the regexes that split in turn; names of one row differ in the flags below or in nothing.
_NAMES = {
    tuple(map(_canonical, regexes)): names
    for regexes, names in {
        (GPT2,): ("gpt-2", "olmo"),
        (DIGIT, GPT2): ("refact",),
        (QWEN2,): ("qwen2",),
        (QWEN35,): ("qwen35",),
        (CL100K,): ("llama-bpe", "dbrx", "glm4"),
        (O200K,): ("gpt-4o", "llama4"),
        (TEKKEN,): ("tekken",),
        DEEPSEEK_LLM: ("deepseek-llm",),
        DEEPSEEK_CODER: ("deepseek-coder",),
        DEEPSEEK_V3: ("deepseek-v3",),
        (BAILING,): ("bailingmoe",),
        (SEED,): ("seed-coder",),
        (DIGIT_TRIPLES, _words(DIGITS)): ("minicpm5",),
    }.items()
}
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}

# llama.cpp takes a word that is a token whole, without merging, for these names.
IGNORES_MERGES = _LLAMA3 | {"minicpm5", "youtu", "glm4", "glm5", "tekken", "granite-embed-multi-97m"}

# llama.cpp prepends BOS for these names unless told otherwise.
ADDS_BOS = _LLAMA3 | {"tekken", "chameleon"}


def derive_pre_tokenizer(node: dict[str, Any], *, ignore_merges: bool, preferred: Sequence[str] = ()) -> str | None:
    """llama.cpp's name for the pre-tokenizer `node` of tokenizer.json, None when it has none that is known to agree.

    Among names that split alike, one with the same `ignore_merges` comes first, then one of `preferred`.
    """
    regexes = [_regex(step) for step in _steps(node)]
    if None in regexes:
        return None
    names = _NAMES.get(tuple(regex for regex in regexes if regex), ())
    ranked = sorted(names, key=lambda name: ((name in IGNORES_MERGES) != ignore_merges, name not in preferred))
    return ranked[0] if ranked else None


def describe_pre_tokenizer(node: dict[str, Any]) -> str:
    """The steps of `node` in one line."""
    steps = _steps(node)
    return " + ".join(str((step.get("pattern") or {}).get("Regex") or step.get("type")) for step in steps) or "none"


def is_byte_level(node: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer turns bytes into letters, as GPT-2 does."""
    return any(step.get("type") == "ByteLevel" for step in _steps(node))


def _steps(node: dict[str, Any]) -> list[dict[str, Any]]:
    if node.get("type") != "Sequence":
        return [node] if node else []
    return [step for child in node.get("pretokenizers") or [] for step in _steps(child)]


def _regex(step: dict[str, Any]) -> str | None:
    """The regex whose matches `step` isolates: empty when it splits nothing, None when it does something else."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2 if step.get("use_regex", True) else ""
        case {"type": "Digits"}:
            return DIGIT if step.get("individual_digits") else DIGITS
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return _canonical(regex)
        # Dropping what does not match is isolating matches, where a regex leaves nothing unmatched.
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return _canonical(regex) if regex.endswith(r"|\s+") else None
    return None
