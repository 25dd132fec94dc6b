"""GGUF tensor types: sizes, what fits a row length, and what stock llama.cpp falls back to."""

from __future__ import annotations

from collections.abc import Iterable

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

QType = GGMLQuantizationType

FLOAT_TYPES = (QType.F32, QType.F16, QType.BF16)

# Types offered by default for rows of a multiple of 256 weights, and for other rows of a multiple of
# 32. Ollama refuses IQ and TQ types, so these two lists stay inside what both programs run.
K_TYPES = (QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0)
LEGACY_TYPES = (QType.Q4_0, QType.Q5_0, QType.Q5_1, QType.Q8_0)

# Everything the encoder writes into an expert stack when asked by name.
EXPERT_TYPES = (*K_TYPES[:-1], *LEGACY_TYPES[:-1], QType.IQ4_NL, QType.Q8_0)

# Bits a weight is rounded to, scales left out: the "b" of the paper's 2^(-2b).
NOMINAL_BITS = {
    QType.Q2_K: 2,
    QType.Q3_K: 3,
    QType.Q4_0: 4,
    QType.IQ4_NL: 4,
    QType.Q4_K: 4,
    QType.Q5_0: 5,
    QType.Q5_1: 5,
    QType.Q5_K: 5,
    QType.Q6_K: 6,
    QType.Q8_0: 8,
    QType.F16: 16,
    QType.BF16: 16,
    QType.F32: 32,
}

# llama.cpp's own substitution when a row is not a multiple of 256 (`llama-quantize`, tensor_type_fallback).
STOCK_FALLBACK = {
    QType.Q2_K: QType.Q4_0,
    QType.Q3_K: QType.Q4_0,
    QType.Q4_K: QType.Q5_0,
    QType.Q5_K: QType.Q5_1,
    QType.Q6_K: QType.Q8_0,
}

# The file label (`general.file_type`) whose name is nearest to a given majority type.
_FTYPES = {
    QType.F32: LlamaFileType.ALL_F32,
    QType.F16: LlamaFileType.MOSTLY_F16,
    QType.BF16: LlamaFileType.MOSTLY_BF16,
    QType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    QType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    QType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    QType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    QType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    QType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    QType.Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    QType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    QType.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
    QType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
}


def block_size(qtype: QType) -> int:
    """Weights per block."""
    return GGML_QUANT_SIZES[qtype][0]


def type_size(qtype: QType) -> int:
    """Bytes per block."""
    return GGML_QUANT_SIZES[qtype][1]


def bpw(qtype: QType) -> float:
    """Stored bits per weight, scales included."""
    return type_size(qtype) * 8 / block_size(qtype)


def fits(qtype: QType, n_cols: int) -> bool:
    """Whether rows of `n_cols` weights divide into whole blocks of `qtype`."""
    return n_cols % block_size(qtype) == 0


def row_bytes(qtype: QType, n_cols: int) -> int:
    """Bytes of one row of `n_cols` weights; ValueError when the row is not a whole number of blocks."""
    if not fits(qtype, n_cols):
        raise ValueError(f"{qtype.name} needs rows of a multiple of {block_size(qtype)}, found {n_cols}")
    return n_cols // block_size(qtype) * type_size(qtype)


def candidates(n_cols: int, allowed: Iterable[QType] | None = None) -> tuple[QType, ...]:
    """Types an expert stack with rows of `n_cols` may take, smallest first.

    With `allowed` the user's own choice is filtered by what fits. Otherwise the K-quants and Q8_0 for
    multiples of 256, the 32-weight types for other multiples of 32, and F16 for what no quantised
    type fits. May be empty only when `allowed` leaves nothing.
    """
    if allowed is not None:
        pool = tuple(q for q in allowed if fits(q, n_cols))
    elif fits(QType.Q4_K, n_cols):
        pool = K_TYPES
    elif fits(QType.Q8_0, n_cols):
        pool = LEGACY_TYPES
    else:
        pool = (QType.F16,)
    return tuple(sorted(set(pool), key=lambda q: (bpw(q), q.value)))


def stock_substitute(qtype: QType, n_cols: int) -> QType:
    """The type llama.cpp's quantiser writes when asked for `qtype` on rows of `n_cols`."""
    if fits(qtype, n_cols):
        return qtype
    substitute = STOCK_FALLBACK.get(qtype, QType.IQ4_NL)
    return substitute if fits(substitute, n_cols) else QType.F16


def parse_qtype(name: str) -> QType:
    """`q4_k`, `Q4_K` -> QType; ValueError listing the known names otherwise."""
    known = (*EXPERT_TYPES, *FLOAT_TYPES)
    for qtype in known:
        if qtype.name == name.strip().upper():
            return qtype
    raise ValueError(f"unknown type {name!r}; known: {', '.join(q.name for q in known)}")


def file_type(bytes_by_type: dict[QType, int]) -> LlamaFileType:
    """The ftype label for a mixed file: the one named after the type that holds most of its bytes."""
    return _FTYPES.get(max(bytes_by_type, key=lambda q: (bytes_by_type[q], -q.value)), LlamaFileType.GUESSED)
