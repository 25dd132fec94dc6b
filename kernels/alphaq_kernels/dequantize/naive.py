"""Decode GGUF blocks in plain torch, on any device: the twin that the kernels are checked against.

Layouts are the structs of ggml-common.h; `half` is an IEEE float16, bytes are little-endian, weight `w` counts from
the start of its block. A decoder takes blocks [n, type_size] and gives float32 of n * block_size weights in order.
"""

from __future__ import annotations

import torch

from ..formats import IQ4_NL_VALUES, BlockFormat


def dequantize_naive(blocks: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """Decode uint8 [n_rows, row_bytes] to `dtype` [n_rows, n_cols]."""
    n_rows, row_bytes = blocks.shape
    x = _DECODERS[fmt.name](blocks.reshape(-1, fmt.type_size))
    return x.reshape(n_rows, row_bytes // fmt.type_size * fmt.block_size).to(dtype)


def _half(b: torch.Tensor, at: int) -> torch.Tensor:
    """The half at byte `at` of each block: [n, type_size] -> float32 [n, 1]."""
    # A fresh copy, since a view as float16 of the blocks themselves needs an even address.
    return b[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(b: torch.Tensor, width: int) -> torch.Tensor:
    """Split bytes into fields of `width` bits, lowest first: [..., k] -> [..., 8 / width, k]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=b.device)
    return (b.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    """block_q4_0 { half d; u8 qs[16]; }: x = d * (q - 8).

    qs[i] holds w = i in its low and w = i + 16 in its high nibble.
    """
    q = _fields(b[:, 2:18], 4).flatten(1)
    return _half(b, 0) * (q.float() - 8)


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    """block_iq4_nl { half d; u8 qs[16]; }: x = d * kvalues_iq4nl[q], nibbles as in block_q4_0."""
    values = torch.tensor(IQ4_NL_VALUES, dtype=torch.float32, device=b.device)
    return _half(b, 0) * values[_fields(b[:, 2:18], 4).flatten(1).long()]


def _five_bits(qh: torch.Tensor, qs: torch.Tensor) -> torch.Tensor:
    """Nibbles qs [n, 16] as in block_q4_0 plus bit 4 from bit w of the 32-bit word qh [n, 4]: -> float32 [n, 32]."""
    high = _fields(qh, 1).transpose(1, 2).flatten(1)
    return (_fields(qs, 4).flatten(1) | high << 4).float()


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    """block_q5_0 { half d; u8 qh[4]; u8 qs[16]; }: x = d * (q - 16)."""
    return _half(b, 0) * (_five_bits(b[:, 2:6], b[:, 6:22]) - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    """block_q5_1 { half d, m; u8 qh[4]; u8 qs[16]; }: x = d * q + m."""
    return _half(b, 0) * _five_bits(b[:, 4:8], b[:, 8:24]) + _half(b, 2)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    """block_q8_0 { half d; i8 qs[32]; }: x = d * q."""
    return _half(b, 0) * b[:, 2:34].view(torch.int8).float()


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    """block_q2_K { u8 scales[16]; u8 qs[64]; half d, dmin; }: x = d * sc * q - dmin * mn.

    scales[g] holds sc in its low and mn in its high nibble for the 16 weights of group g. Weights go by halves of
    128 and quarters of 32: bits 2s..2s+1 of qs[32h + i] are w = 128h + 32s + i.
    """
    sc, mn = _fields(b[:, :16], 4).float().unsqueeze(-1).unbind(1)
    q = _fields(b[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    d, dmin = _half(b, 80)[..., None], _half(b, 82)[..., None]
    return d * sc * q - dmin * mn


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    """block_q3_K { u8 hmask[32]; u8 qs[64]; u8 scales[12]; half d; }: x = d * (sc - 32) * (q - 4 * (1 - h)).

    q lies in qs as in block_q2_K; h is bit w / 32 of hmask[w % 32]. sc of group g = w / 16 has 6 bits: the low four
    are nibble g / 8 of scales[g % 8], the high two bits 2(g / 4).. of scales[8 + g % 4].
    """
    low = _fields(b[:, 96:104], 4).flatten(1)
    high = _fields(b[:, 104:108], 2).flatten(1)
    sc = (low | high << 4).float().unsqueeze(-1) - 32
    q = _fields(b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    h = _fields(b[:, :32], 1).reshape(-1, 16, 16).float()
    return _half(b, 108)[..., None] * sc * (q - 4 * (1 - h))


def _scales_k4(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d * sc and dmin * mn, each float32 [n, 8, 1], of { half d, dmin; u8 scales[12]; }, as in get_scale_min_k4.

    Groups g < 4: sc and mn are the low 6 bits of scales[g] and scales[4 + g]. Groups g >= 4: their low four bits
    are the nibbles of scales[4 + g], their high two bits the top bits of scales[g - 4] and scales[g].
    """
    s_0, s_1, s_2 = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    sc = torch.cat([s_0 & 63, (s_2 & 15) | (s_0 >> 6) << 4], dim=1)
    mn = torch.cat([s_1 & 63, (s_2 >> 4) | (s_1 >> 6) << 4], dim=1)
    return (_half(b, 0) * sc.float()).unsqueeze(-1), (_half(b, 2) * mn.float()).unsqueeze(-1)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    """block_q4_K { half d, dmin; u8 scales[12]; u8 qs[128]; }: x = d * sc * q - dmin * mn, groups of 32.

    qs[32c + i] holds w = 64c + i in its low and w = 64c + 32 + i in its high nibble.
    """
    scale, minimum = _scales_k4(b)
    q = _fields(b[:, 16:144].reshape(-1, 4, 32), 4).reshape(-1, 8, 32).float()
    return scale * q - minimum


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    """block_q5_K { half d, dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]; }: block_q4_K with a fifth bit.

    Bit 4 of weight w is bit w / 32 of qh[w % 32].
    """
    scale, minimum = _scales_k4(b)
    low = _fields(b[:, 48:176].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    q = (low | _fields(b[:, 16:48], 1) << 4).float()
    return scale * q - minimum


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    """block_q6_K { u8 ql[128]; u8 qh[64]; i8 scales[16]; half d; }: x = d * sc * (q - 32), groups of 16.

    In half h of 128 weights, nibble s of ql[64h + i], i < 64, is the low part of w = 128h + 64s + i, and bits
    2s..2s+1 of qh[32h + i], i < 32, are the high part of w = 128h + 32s + i.
    """
    low = _fields(b[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _fields(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    sc = b[:, 192:208].view(torch.int8).float()
    return (_half(b, 208) * sc)[..., None] * ((low | high << 4).float() - 32)


_DECODERS = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}
