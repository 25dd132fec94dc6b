"""SentencePiece BPE with byte fallback: tokenizer model `llama` of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gguf import GGUFWriter, TokenType

from ...errors import SourceError
from .files import DAMAGED, AddedToken, FastTokenizer, TokenizerFiles
from .patterns import describe_pre_tokenizer
from .vocabulary import Vocabulary, check_normalizer, classify

UNSUPPORTED = "llama.cpp runs byte-level BPE, and SentencePiece models of type BPE with byte fallback"
_PAD_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}

# Field numbers of sentencepiece_model.proto, and the value of a model trained as BPE.
_TRAINER_SPEC, _MODEL_TYPE, _BPE = 2, 3, 2
_NORMALIZER_SPEC, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 3, 4


def add_sentencepiece(files: TokenizerFiles, path: Path, n_vocab: int, writer: GGUFWriter) -> Vocabulary:
    """Add the pieces of a tokenizer.model to `writer`.

    SourceError for a damaged file, a model other than BPE or without byte fallback, and more than `n_vocab` pieces.
    """
    from sentencepiece import SentencePieceProcessor

    data, model = path.read_bytes(), SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        trainer, normalizer = (dict(_fields(_message(data, n))) for n in (_TRAINER_SPEC, _NORMALIZER_SPEC))
    except (RuntimeError, IndexError, ValueError):
        raise SourceError(f"{path}: not a SentencePiece model", DAMAGED) from None
    if trainer.get(_MODEL_TYPE) != _BPE:
        raise SourceError(f"{path}: the SentencePiece model is not of type BPE", UNSUPPORTED)
    pieces = []
    for index in range(model.vocab_size()):
        kind = TokenType.NORMAL
        if model.IsUnknown(index):
            kind = TokenType.UNKNOWN
        elif model.IsControl(index):
            kind = TokenType.CONTROL
        elif model.IsUnused(index):
            kind = TokenType.UNUSED
        elif model.IsByte(index):
            kind = TokenType.BYTE
        pieces.append((model.IdToPiece(index), model.GetScore(index), kind))
    added = {i: token for i, token in files.added.items() if i in files.listed or i >= len(pieces)}
    notes = []
    if normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1):
        notes.append("llama.cpp keeps runs of spaces, which the checkpoint's tokenizer shortens to one")
    prefix = bool(normalizer.get(_ADD_DUMMY_PREFIX, 1))
    if files.fast:
        prefix = _adds_prefix(files.fast)
    return _add(files, path, pieces, added, n_vocab, writer, prefix=prefix, notes=notes)


def add_byte_fallback(files: TokenizerFiles, fast: FastTokenizer, n_vocab: int, writer: GGUFWriter) -> Vocabulary:
    """Like `add_sentencepiece`, for the tokenizer.json that such a model is converted to.

    A token's score is the rank of the first merge that makes it, counted downwards as SentencePiece does.
    """
    check_normalizer(fast, {"Prepend", "Replace", "Precompiled", "NFC"})
    node = fast.pre_tokenizer or {}
    # A split at spaces finds none where the normalizer has replaced them.
    if node and node.get("type") != "Metaspace" and node.get("pattern") != {"String": " "}:
        shown = describe_pre_tokenizer(node)
        raise SourceError(f"{fast.path}: unknown pre-tokenizer {shown!r} of a BPE with byte fallback", UNSUPPORTED)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(fast.merges):
        ranks.setdefault(left + right, rank)
    texts = {index: text for text, index in fast.vocab.items()}
    pieces = [_pad(index) for index in range(max(texts, default=-1) + 1)]
    for index, text in texts.items():
        score = float(-ranks.get(text, len(ranks)))
        pieces[index] = (text, score, TokenType.BYTE if text in _BYTES else TokenType.NORMAL)
    special = {i: AddedToken(text, special=True) for i, text in texts.items() if text in files.special_texts}
    added = special | files.added
    return _add(files, fast.path, pieces, added, n_vocab, writer, prefix=_adds_prefix(fast), notes=[])


def _add(
    files: TokenizerFiles,
    path: Path,
    pieces: list[tuple[str, float, TokenType]],
    added: Mapping[int, AddedToken],
    n_vocab: int,
    writer: GGUFWriter,
    *,
    prefix: bool,
    notes: list[str],
) -> Vocabulary:
    if len(pieces) > n_vocab:
        raise SourceError(f"{path}: {len(pieces)} tokens, but vocab_size in config.json is {n_vocab}")
    if not {text for text, _, _ in pieces} >= _BYTES:
        raise SourceError(f"{path}: no byte fallback: <0x00> to <0xFF> are not in the vocabulary", UNSUPPORTED)
    pieces = pieces + [_pad(index) for index in range(len(pieces), n_vocab)]
    for index, token in added.items():
        # Checkpoints often name tokens that their embedding has no rows for.
        if index < n_vocab:
            text, kind = classify(token, files.special_texts)
            pieces[index] = (text, _ADDED_SCORE, kind)
    tokens, scores, types = map(list, zip(*pieces, strict=True))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    return Vocabulary(tokens, space_prefix=prefix, notes=notes)


def _pad(index: int) -> tuple[str, float, TokenType]:
    return f"[PAD{index}]", _PAD_SCORE, TokenType.UNUSED


def _adds_prefix(fast: FastTokenizer) -> bool:
    """Whether text gets a leading space, by the normalizer or the pre-tokenizer."""
    steps = fast.normalizer.get("normalizers", [fast.normalizer])
    node = fast.pre_tokenizer or {}
    metaspace = node.get("type") == "Metaspace" and node.get("prepend_scheme", "always") != "never"
    return metaspace or any(step.get("type") == "Prepend" for step in steps)


def _message(data: bytes, number: int) -> bytes:
    """The last submessage `number` of a protobuf message."""
    return {n: value for n, value in _fields(data) if isinstance(value, bytes)}.get(number, b"")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message, fixed-size values as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
