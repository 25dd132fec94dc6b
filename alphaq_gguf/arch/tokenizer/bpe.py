"""Byte-level BPE, as GPT-2 introduced it: tokenizer model `gpt2` of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from gguf import GGUFWriter, TokenType

from ...errors import SourceError
from .files import FastTokenizer, TokenizerFiles
from .patterns import IGNORES_MERGES, derive_pre_tokenizer, describe_pre_tokenizer
from .vocabulary import Vocabulary, check_normalizer, classify


def add_byte_level(
    files: TokenizerFiles,
    fast: FastTokenizer,
    n_vocab: int,
    writer: GGUFWriter,
    pre_tokenizer: str | None,
    preferred: Sequence[str],
) -> Vocabulary:
    """Add tokens, types, merges and the pre-tokenizer's name to `writer`.

    SourceError for a splitting or a normalizer that llama.cpp has no equivalent of, and for ids beyond `n_vocab`.
    """
    pre = pre_tokenizer or _derive(fast, preferred)
    check_normalizer(fast, {"NFC"})
    vocab = {index: text for text, index in fast.vocab.items()}
    largest = max([*vocab, *files.added], default=-1)
    if largest >= n_vocab:
        raise SourceError(
            f"{fast.path}: token id {largest} does not fit the model's vocabulary of {n_vocab}"
            " (vocab_size in config.json)"
        )
    tokens, types = [f"[PAD{index}]" for index in range(n_vocab)], [TokenType.UNUSED] * n_vocab
    for index, text in vocab.items():
        tokens[index] = text
        types[index] = TokenType.CONTROL if text in files.special_texts else TokenType.NORMAL
    for index, token in files.added.items():
        tokens[index], types[index] = classify(token, files.special_texts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # A space inside a merge would look like the one between its halves.
    writer.add_token_merges([" ".join(half.replace(" ", "\u0120") for half in merge) for merge in fast.merges])
    words = [text for index, text in vocab.items() if index not in files.added]
    return Vocabulary(tokens, pre, notes=_differing_merges(fast, pre, words))


def find_unmergeable(tokens: Iterable[str], merges: Iterable[tuple[str, str]]) -> list[str]:
    """The tokens that merging their characters does not give back."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    never = len(ranks)
    found = []
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            candidates = [ranks.get(pair, never) for pair in pairwise(parts)]
            best = min(candidates)
            if best == never:
                found.append(token)
                break
            at = candidates.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return found


def _derive(fast: FastTokenizer, preferred: Sequence[str]) -> str:
    hint = "name llama.cpp's equivalent with --pre-tokenizer, for example --pre-tokenizer qwen2"
    node = fast.pre_tokenizer
    if node is None:
        raise SourceError(f"{fast.path}: without a tokenizer.json nothing says how text is split", hint)
    name = derive_pre_tokenizer(node, ignore_merges=bool(fast.model.get("ignore_merges")), preferred=preferred)
    if name is None:
        raise SourceError(f"{fast.path}: unknown pre-tokenizer {describe_pre_tokenizer(node)!r}", hint)
    return name


def _differing_merges(fast: FastTokenizer, pre: str, tokens: Sequence[str]) -> list[str]:
    """Says so when one of llama.cpp and the checkpoint takes whole words that the other builds from pieces."""
    ours, theirs = bool(fast.model.get("ignore_merges")), pre in IGNORES_MERGES
    odd = find_unmergeable(tokens, fast.merges) if ours != theirs else []
    if not odd:
        return []
    whole, pieces = ("the checkpoint's tokenizer", "llama.cpp") if ours else ("llama.cpp", "the checkpoint's tokenizer")
    shown = ", ".join(map(repr, odd[:3])) + (" ..." if len(odd) > 3 else "")
    return [f"pre-tokenizer {pre}: {len(odd)} words are one token for {whole} and several for {pieces}: {shown}"]
