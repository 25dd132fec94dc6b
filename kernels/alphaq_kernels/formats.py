"""The GGUF block types that the kernels read: names, ids and sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFormat:
    """One block type: `block_size` weights in `type_size` bytes; `type_id` is its number in `enum ggml_type`."""

    name: str
    type_id: int
    block_size: int
    type_size: int


FORMATS = (
    BlockFormat("Q4_0", 2, 32, 18),
    BlockFormat("Q5_0", 6, 32, 22),
    BlockFormat("Q5_1", 7, 32, 24),
    BlockFormat("Q8_0", 8, 32, 34),
    BlockFormat("Q2_K", 10, 256, 84),
    BlockFormat("Q3_K", 11, 256, 110),
    BlockFormat("Q4_K", 12, 256, 144),
    BlockFormat("Q5_K", 13, 256, 176),
    BlockFormat("Q6_K", 14, 256, 210),
    BlockFormat("IQ4_NL", 20, 32, 18),
)

# `kvalues_iq4nl` of ggml-common.h: what the 16 codes of IQ4_NL stand for.
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_BY_KEY: dict[int | str, BlockFormat] = {key: f for f in FORMATS for key in (f.type_id, f.name)}


def find_format(qtype: int | str) -> BlockFormat:
    """The format with this ggml type id (a `gguf.GGMLQuantizationType` is one) or this name.

    Raises ValueError for any other type.
    """
    found = _BY_KEY.get(qtype)
    if found is None:
        known = ", ".join(f.name for f in FORMATS)
        raise ValueError(f"unknown block type {qtype!r}: expected one of {known}, or its ggml type id")
    return found
