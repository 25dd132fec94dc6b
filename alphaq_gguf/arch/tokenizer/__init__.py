"""A Hugging Face tokenizer as `tokenizer.*` metadata, as llama.cpp's own converter writes it."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter

from ...errors import SourceError
from ..base import TokenizerRules
from .bpe import add_byte_level
from .files import TokenizerFiles
from .patterns import ADDS_BOS, is_byte_level
from .special import add_special_tokens
from .spm import UNSUPPORTED, add_byte_fallback, add_sentencepiece
from .vocabulary import Vocabulary

__all__ = ["add_tokenizer"]


def add_tokenizer(
    directory: Path,
    n_vocab: int,
    writer: GGUFWriter,
    pre_tokenizer: str | None = None,
    rules: TokenizerRules | None = None,
) -> list[str]:
    """Add the tokenizer of `directory` to `writer`, padded to `n_vocab` tokens.

    `pre_tokenizer` overrides the name derived from tokenizer.json. Returns what llama.cpp will do otherwise than
    the checkpoint's tokenizer, one line each. SourceError names the missing or damaged file, an unknown kind of
    tokenizer, or an unknown way of splitting text.
    """
    rules = rules or TokenizerRules()
    files = TokenizerFiles(directory)
    vocabulary = _add_vocabulary(files, n_vocab, writer, pre_tokenizer, rules)
    ids: dict[str, int] = {}
    for index, text in enumerate(vocabulary.tokens):
        if ids.setdefault(text, index) != index:
            raise SourceError(f"{directory}: tokens {ids[text]} and {index} are both {text!r}, which llama.cpp refuses")
    configured = files.config.get("add_prefix_space")
    is_sentencepiece = vocabulary.space_prefix is not None
    prefix = configured if isinstance(configured, bool) else vocabulary.space_prefix
    if (rules.space_prefix and isinstance(configured, bool)) or (is_sentencepiece and not prefix):
        writer.add_add_space_prefix(bool(prefix))
    add_special_tokens(files, ids, n_vocab, writer, fallback=rules.special, adds_bos=vocabulary.pre in ADDS_BOS)
    swallowing = [token.text for token in files.added.values() if token.swallows]
    if swallowing:
        shown = ", ".join(swallowing[:3]) + (" ..." if len(swallowing) > 3 else "")
        vocabulary.notes.append(f"llama.cpp keeps spaces next to {shown}, which the checkpoint's tokenizer drops")
    return vocabulary.notes


def _add_vocabulary(
    files: TokenizerFiles, n_vocab: int, writer: GGUFWriter, pre_tokenizer: str | None, rules: TokenizerRules
) -> Vocabulary:
    fast = files.fast
    if fast and fast.is_bpe and (fast.pre_tokenizer is None or is_byte_level(fast.pre_tokenizer)):
        return add_byte_level(files, fast, n_vocab, writer, pre_tokenizer, rules.preferred)
    if files.sentencepiece:
        return add_sentencepiece(files, files.sentencepiece, n_vocab, writer)
    if fast is None:
        names = "tokenizer.model, and vocab.json with merges.txt"
        raise SourceError(
            f"{files.directory / 'tokenizer.json'} is missing, and so are {names}", "download the whole repository"
        )
    if not fast.is_bpe or not fast.model.get("byte_fallback"):
        raise SourceError(f"{fast.path}: tokenizer of type {fast.model.get('type')!r} is not supported", UNSUPPORTED)
    return add_byte_fallback(files, fast, n_vocab, writer)
