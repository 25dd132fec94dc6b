"""Lay scales and codes out as GGUF blocks: the inverse of `dequantize.naive`, where the layouts are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import BlockFormat


@dataclass(frozen=True)
class Fields:
    """What n blocks hold: codes q uint8 [n, block_size], counted from the lowest, halves d float16 [n, 1], scales of
    groups sc int8 [n, n_groups]; affine types also dmin and mn, of which a weight is made less."""

    q: Tensor
    d: Tensor
    sc: Tensor
    dmin: Tensor | None = None
    mn: Tensor | None = None


def pack(fields: Fields, fmt: BlockFormat) -> Tensor:
    """Blocks uint8 [n, type_size]."""
    parts = _PACKERS[fmt.name](fields)
    return torch.cat([part.flatten(1).contiguous().view(torch.uint8) for part in parts], dim=1)


def _join(fields: Tensor, width: int) -> Tensor:
    """Bytes of fields of `width` bits, lowest first: [..., 8 / width, k] -> [..., k]."""
    out = fields[..., 0, :]
    for i in range(1, fields.shape[-2]):
        out = out | fields[..., i, :] << width * i
    return out


def _nibbles(q: Tensor) -> Tensor:
    return _join((q & 15).view(-1, 2, 16), 4)


def _fifth_bits(q: Tensor) -> Tensor:
    return _join((q >> 4).view(-1, 4, 8).transpose(1, 2), 1)


def _scales_k4(f: Fields) -> Tensor:
    assert f.mn is not None
    sc, mn = f.sc.view(torch.uint8), f.mn.view(torch.uint8)
    (sc_0, sc_1), (mn_0, mn_1) = sc.split(4, dim=1), mn.split(4, dim=1)
    return torch.cat([sc_0 | sc_1 >> 4 << 6, mn_0 | mn_1 >> 4 << 6, sc_1 & 15 | (mn_1 & 15) << 4], dim=1)


def _q4_0(f: Fields) -> list[Tensor]:
    return [f.d, _nibbles(f.q)]


def _q5_0(f: Fields) -> list[Tensor]:
    return [f.d, _fifth_bits(f.q), _nibbles(f.q)]


def _q5_1(f: Fields) -> list[Tensor]:
    assert f.dmin is not None
    return [f.d, -f.dmin, _fifth_bits(f.q), _nibbles(f.q)]


def _q8_0(f: Fields) -> list[Tensor]:
    return [f.d, f.q - 127]


def _q2_k(f: Fields) -> list[Tensor]:
    assert f.mn is not None and f.dmin is not None
    return [(f.sc | f.mn << 4), _join(f.q.view(-1, 2, 4, 32), 2), f.d, f.dmin]


def _q3_k(f: Fields) -> list[Tensor]:
    sc = (f.sc + 32).view(torch.uint8)
    low, high = _join((sc & 15).view(-1, 2, 8), 4), _join((sc >> 4).view(-1, 4, 4), 2)
    return [_join((f.q >> 2).view(-1, 8, 32), 1), _join((f.q & 3).view(-1, 2, 4, 32), 2), low, high, f.d]


def _q4_k(f: Fields) -> list[Tensor]:
    assert f.dmin is not None
    return [f.d, f.dmin, _scales_k4(f), _join(f.q.view(-1, 4, 2, 32), 4)]


def _q5_k(f: Fields) -> list[Tensor]:
    assert f.dmin is not None
    return [f.d, f.dmin, _scales_k4(f), _join((f.q >> 4).view(-1, 8, 32), 1), _join((f.q & 15).view(-1, 4, 2, 32), 4)]


def _q6_k(f: Fields) -> list[Tensor]:
    return [_join((f.q & 15).view(-1, 2, 2, 64), 4), _join((f.q >> 4).view(-1, 2, 4, 32), 2), f.sc, f.d]


_PACKERS = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _q4_0,
}
