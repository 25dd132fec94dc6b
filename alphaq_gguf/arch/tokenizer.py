"""A Hugging Face tokenizer as `tokenizer.ggml.*` metadata.

The pre-tokenizer id that llama.cpp needs is derived from the tokenizer's own splitting regex, so a
fine-tune with a changed vocabulary keeps working.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from ..errors import SourceError
from .base import read_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# llama.cpp's pre-tokenizer id by the regex of the Split step in tokenizer.json.
PRE_TOKENIZERS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}": "llama-bpe",
}


# llama.cpp prepends BOS for these ids unless told otherwise; a tokenizer that says nothing adds none.
_BOS_BY_DEFAULT = {"llama-bpe"}


def add_tokenizer(directory: Path, n_vocab: int, writer: GGUFWriter, pre_tokenizer: str | None = None) -> None:
    """Add the byte-level BPE tokenizer of `directory` to `writer`, padded to `n_vocab` tokens.

    `pre_tokenizer` overrides the id derived from the regex. SourceError names the missing file, an
    unknown kind of tokenizer, or an unknown regex.
    """
    path = directory / "tokenizer.json"
    try:
        data = read_json(path)
    except FileNotFoundError:
        hint = "download the whole repository"
        raise SourceError(f"{path} is missing: the model has no fast tokenizer", hint) from None
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise SourceError(
            f"{path}: tokenizer of type {model.get('type')!r} is not supported", "supported: byte-level BPE"
        )
    vocab: dict[int, str] = {index: token for token, index in model.get("vocab", {}).items()}
    added: dict[int, dict[str, Any]] = {entry["id"]: entry for entry in data.get("added_tokens", [])}
    largest = max([*vocab, *added], default=-1)
    if largest >= n_vocab:
        raise SourceError(
            f"{path}: token id {largest} does not fit the model's vocabulary of {n_vocab} (vocab_size in config.json)"
        )
    tokens, types = [], []
    for index in range(n_vocab):
        if index in added:
            token = added[index]["content"]
            control = added[index].get("special") or _looks_special(token)
            tokens.append(token)
            types.append(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        elif index in vocab:
            tokens.append(vocab[index])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    pre = pre_tokenizer or _derive_pre_tokenizer(data.get("pre_tokenizer") or {}, path)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(directory, load_merges=True, n_vocab=n_vocab)
    special.add_to_gguf(writer, quiet=True)
    if pre in _BOS_BY_DEFAULT and "bos" not in special.add_special_token:
        writer.add_add_bos_token(False)


def _looks_special(token: str) -> bool:
    """Markers such as <|im_start|> are control tokens even where a tokenizer forgot to flag them."""
    return token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>"))


def _derive_pre_tokenizer(node: dict[str, Any], path: Path) -> str:
    steps = node.get("pretokenizers", [node]) if node.get("type") == "Sequence" else [node]
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[patterns[0]]
    shown = patterns[0] if patterns else "+".join(map(str, kinds))
    raise SourceError(
        f"{path}: unknown pre-tokenizer {shown!r}",
        "name llama.cpp's equivalent with --pre-tokenizer, for example --pre-tokenizer qwen2",
    )
