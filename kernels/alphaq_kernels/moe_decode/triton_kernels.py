"""The experts of few tokens with Triton: two launches, each of dot products of packed rows with a vector.

A thread takes whole *units* of a row: 16 weights in each of n_s streams, s = 0.., that lie in the same bytes or share
scales, so that it decodes each scale once. Units of neighbouring threads are neighbours in the row, and a thread takes
the same unit of n_r rows, so that it converts x once for all of them. Tensors are [L, 1], one unit a thread, or [L, 4],
the bytes of a word, which stay within the thread: nothing is exchanged before the sum over a row. L threads are n_u
units of n_g rows.

The bytes of a unit are loaded as words of 16 bytes where the layout has them aligned, else of 4 or 2. All blocks of
GGUF keep multiples of 2, and only Q4_K and Q5_K of 16; `PackedExperts.to_planar` aligns the others.

A code q of n bits becomes a float without a conversion, which is slow: put below the exponent of 2^e, its bits are
the float 2^e + q. 2^e times the sum of x, some factor above the sum of q x, is subtracted from the dot product. That
costs 2 or 3 bits of float32, and 5 where, for x of 16 bits, two codes of 4 bits share one shift (not `exact`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dequantize.triton_kernels import round_to_bf16
from ..formats import IQ4_NL_VALUES
from ..packed import Activation, PackedExperts

# Triton calls jitted functions with plain values for constants, unrolls static_range and knows the lengths of tuples.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false, reportAttributeAccessIssue=false

# The 16 table entries plus 128, one byte each.
IQ4_NL_LOW = tl.constexpr(int.from_bytes([v + 128 for v in IQ4_NL_VALUES[:8]], "little", signed=True))
IQ4_NL_HIGH = tl.constexpr(int.from_bytes([v + 128 for v in IQ4_NL_VALUES[8:]], "little", signed=True))

# The bits of 1.0, given to the kernels at run time: as a constant it would cost an instruction a weight.
_ONE = 127 << 23


@triton.jit
def at_field(b, start: tl.constexpr, plane: tl.constexpr, size: tl.constexpr):
    """Where a field lies: `size` bytes from `start` of a block on, or, planar, after `plane` bytes of every block."""
    if len(b) == 1:
        return b[0] + start
    else:
        return b[0] + b[2] * plane + b[1] * size


@triton.jit
def _load(p, dtype: tl.constexpr, o=0):
    return tl.load(p.to(tl.pointer_type(dtype)) + o)


@triton.jit
def load_byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def load_half(p):
    return _load(p, tl.float16).to(tl.float32)


@triton.jit
def _word(p, j: tl.constexpr, align: tl.constexpr):
    """The `j`th 32 bits from p [L, 1] on, a multiple of `align` bytes."""
    if align == 16:
        # One load of 16 bytes serves all j: the selection is among registers, at compile time.
        o_j = tl.arange(0, 4)[None, :]
        return tl.sum(tl.where(o_j == j, _load(p, tl.int32, o_j), 0), 1, keep_dims=True)
    elif align == 4:
        return _load(p, tl.int32, j)
    else:
        return _load(p, tl.uint16, 2 * j).to(tl.int32) | (_load(p, tl.uint16, 2 * j + 1).to(tl.int32) << 16)


@triton.jit
def _word_of(b, start: tl.constexpr, plane: tl.constexpr, size: tl.constexpr, o, j: tl.constexpr, align: tl.constexpr):
    """As `_word`, from byte o of a field on; `align` is that of blocks, planes are aligned to their size."""
    return _word(at_field(b, start, plane, size) + o, j, align if len(b) == 1 else min(size, 16))


# Codes: bytes 4j.. of stream s of unit i_v of a block -> a word [L, 1] with one code in each byte, from its lowest bit
# on, or, of "shared" types, with the codes of all streams, the first in the lowest bits.


@triton.jit
def _codes_q4(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q4_0, block_iq4_nl { half d; u8 qs[16]; }"""
    return _word_of(b, 2, 0, 16, 0, j, 2)


@triton.jit
def _fifth_bits(b_qh, s: tl.constexpr, j: tl.constexpr):
    # Bits 0..3 go to bits 4, 12, 20, 28.
    return ((((b_qh >> (16 * s + 4 * j)) & 15) * 0x00204081) & 0x01010101) << 4


@triton.jit
def _codes_q5_0(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q5_0 { half d; u8 qh[4]; u8 qs[16]; }"""
    b_low = (_word_of(b, 6, 0, 16, 0, j, 2) >> (4 * s)) & 0x0F0F0F0F
    return b_low | _fifth_bits(_word_of(b, 2, 16, 4, 0, 0, 2), s, j)


@triton.jit
def _codes_q5_1(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q5_1 { half d, m; u8 qh[4]; u8 qs[16]; }"""
    b_low = (_word_of(b, 8, 0, 16, 0, j, 4) >> (4 * s)) & 0x0F0F0F0F
    return b_low | _fifth_bits(_word_of(b, 4, 16, 4, 0, 0, 4), s, j)


@triton.jit
def _codes_q8_0(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q8_0 { half d; i8 qs[32]; }, codes plus 128"""
    return _word_of(b, 2, 0, 32, 16 * s, j, 2) ^ -0x7F7F7F80


@triton.jit
def _codes_q2_k(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q2_K { u8 scales[16]; u8 qs[64]; half d, dmin; }"""
    return _word_of(b, 16, 0, 64, i_v * 16, j, 4)


@triton.jit
def _codes_q3_k(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q3_K { u8 hmask[32]; u8 qs[64]; u8 scales[12]; half d; }"""
    b_low = (_word_of(b, 32, 0, 64, i_v * 16, j, 2) >> (2 * s)) & 0x03030303
    b_h = _word_of(b, 0, 64, 32, i_v % 2 * 16, j, 2) >> (i_v // 2 * 4)
    return b_low | (((b_h >> s) << 2) & 0x04040404)


@triton.jit
def _codes_q4_k(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q4_K { half d, dmin; u8 scales[12]; u8 qs[128]; }"""
    return _word_of(b, 16, 0, 128, i_v * 16, j, 16)


@triton.jit
def _codes_q5_k(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q5_K { half d, dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]; }"""
    b_low = (_word_of(b, 48, 0, 128, i_v * 16, j, 16) >> (4 * s)) & 0x0F0F0F0F
    b_h = _word_of(b, 16, 128, 32, i_v % 2 * 16, j, 16) >> (i_v // 2 * 2)
    return b_low | (((b_h >> s) << 4) & 0x10101010)


@triton.jit
def _codes_q6_k(b, i_v, s: tl.constexpr, j: tl.constexpr):
    """block_q6_K { u8 ql[128]; u8 qh[64]; i8 scales[16]; half d; }"""
    b_low = _word_of(b, 0, 0, 128, i_v // 2 * 64 + i_v % 2 * 16 + s % 2 * 32, j, 2) >> (s // 2 * 4)
    b_high = _word_of(b, 128, 128, 64, i_v * 16, j, 2) >> (2 * s)
    return (b_low & 0x0F0F0F0F) | ((b_high << 4) & 0x30303030)


# Scales: d and m, [n_u] each, of stream s of unit i_v of a block: weights are d * q - m.


@triton.jit
def _scales_q4_0(b, i_v, s: tl.constexpr):
    b_d = load_half(at_field(b, 0, 16, 2))
    return b_d, b_d * 8


@triton.jit
def _scales_iq4_nl(b, i_v, s: tl.constexpr):
    b_d = load_half(at_field(b, 0, 16, 2))
    return b_d, b_d * 128


@triton.jit
def _scales_q5_0(b, i_v, s: tl.constexpr):
    b_d = load_half(at_field(b, 0, 20, 2))
    return b_d, b_d * 16


@triton.jit
def _scales_q5_1(b, i_v, s: tl.constexpr):
    p_d = at_field(b, 0, 20, 4)
    return load_half(p_d), -load_half(p_d + 2)


@triton.jit
def _scales_q8_0(b, i_v, s: tl.constexpr):
    b_d = load_half(at_field(b, 0, 32, 2))
    return b_d, b_d * 128


@triton.jit
def _scales_q2_k(b, i_v, s: tl.constexpr):
    b_s = load_byte(at_field(b, 0, 64, 16) + i_v // 2 * 8 + 2 * s + i_v % 2)
    p_d = at_field(b, 80, 80, 4)
    return load_half(p_d) * (b_s & 15).to(tl.float32), load_half(p_d + 2) * (b_s >> 4).to(tl.float32)


@triton.jit
def _scales_q3_k(b, i_v, s: tl.constexpr):
    p_s = at_field(b, 96, 96, 12) + 2 * (s % 2) + i_v % 2
    b_low = load_byte(p_s + 4 * (s // 2)) >> (i_v // 2 * 4)
    b_high = load_byte(p_s + 8) >> (i_v // 2 * 4 + s // 2 * 2)
    b_d = load_half(at_field(b, 108, 108, 2)) * (((b_low & 15) | ((b_high & 3) << 4)) - 32).to(tl.float32)
    return b_d, b_d * 4


@triton.jit
def _scales_k4(b, i_v, s: tl.constexpr, plane: tl.constexpr):
    # { half d, dmin; u8 scales[12]; }: s = 0 and 1 are bytes g and g + 1, at once, of three words, g = 2 * (i_v // 2)
    b_0 = _word_of(b, 0, plane, 16, 0, 1, 16) >> (i_v // 2 % 2 * 16)
    b_1 = _word_of(b, 0, plane, 16, 0, 2, 16) >> (i_v // 2 % 2 * 16)
    b_2 = _word_of(b, 0, plane, 16, 0, 3, 16) >> (i_v // 2 % 2 * 16)
    b_sc = tl.where(i_v < 4, b_0 & 0x3F3F, (b_2 & 0x0F0F) | ((b_0 >> 2) & 0x3030))
    b_mn = tl.where(i_v < 4, b_1 & 0x3F3F, ((b_2 >> 4) & 0x0F0F) | ((b_1 >> 2) & 0x3030))
    b_dd = _word_of(b, 0, plane, 16, 0, 0, 16)
    b_d = b_dd.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    b_dmin = (b_dd >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_d * ((b_sc >> (8 * s)) & 63).to(tl.float32), b_dmin * ((b_mn >> (8 * s)) & 63).to(tl.float32)


@triton.jit
def _scales_q4_k(b, i_v, s: tl.constexpr):
    return _scales_k4(b, i_v, s, 128)


@triton.jit
def _scales_q5_k(b, i_v, s: tl.constexpr):
    return _scales_k4(b, i_v, s, 160)


@triton.jit
def _scales_q6_k(b, i_v, s: tl.constexpr):
    b_sc = tl.load(at_field(b, 192, 192, 16) + i_v // 2 * 8 + 2 * s + i_v % 2).to(tl.int8, bitcast=True)
    b_d = load_half(at_field(b, 208, 208, 2)) * b_sc.to(tl.float32)
    return b_d, b_d * 32


@triton.constexpr_function
def _exponent(s, n_bits, shared, exact):
    """e of the float 2^e + q that a code becomes: n bits, or twice as many where two streams share one shift."""
    return n_bits if exact or not shared or s % 2 else 2 * n_bits


@triton.constexpr_function
def _shift(s, n_bits, shared, exact):
    """How far a byte at bit 0 goes left so that the code of stream s lies where `_exponent` has it."""
    if not shared:
        return 23 - n_bits
    return 23 - n_bits * (s + 1) if exact else 23 - 2 * n_bits * (s // 2 + 1)


@triton.jit
def _read_vector(p_x, m_u):
    """16 of x from p_x [L, 1] on: 4 times [L, 4]"""
    b_x = ()
    for j in tl.static_range(4):
        o_x = 4 * j + tl.arange(0, 4)[None, :]
        b_x += (tl.load(p_x + o_x, mask=m_u, other=0).to(tl.float32),)
    return b_x


@triton.jit
def _dot_unit(
    b,
    i_v,
    b_x,
    b_sum,
    one,
    s: tl.constexpr,
    codes: tl.constexpr,
    scales: tl.constexpr,
    n_bits: tl.constexpr,
    shared: tl.constexpr,
    exact: tl.constexpr,
    table: tl.constexpr,
):
    """One stream of units times b_x, whose sum is b_sum: [L, 1]"""
    e: tl.constexpr = _exponent(s, n_bits, shared, exact)
    mask: tl.constexpr = (2**n_bits - 1) << (23 - e)
    b_dot = 0.0
    for j in tl.static_range(4):
        # [L, 4]
        b_q = codes(b, i_v, s, j) >> (8 * tl.arange(0, 4)[None, :])
        if table:
            b_q = (b_q >> (4 * s)) & 15
            b_q = (tl.where(b_q < 8, IQ4_NL_LOW, IQ4_NL_HIGH) >> (b_q % 8 * 8).to(tl.int64)).to(tl.int32)
        b_q = (b_q << _shift(s, n_bits, shared, exact)) & mask
        b_dot += (b_q | (one + (e << 23))).to(tl.float32, bitcast=True) * b_x[j]
    b_d, b_m = scales(b, i_v, s)
    return b_d * (tl.sum(b_dot, 1, keep_dims=True) - 2**e * b_sum) - b_m * b_sum


@triton.jit
def _dot_packed(
    b_y,
    a,
    codes: tl.constexpr,
    scales: tl.constexpr,
    n_bits: tl.constexpr,
    shared: tl.constexpr,
    type_size: tl.constexpr,
    n_v: tl.constexpr,
    n_s: tl.constexpr,
    planar: tl.constexpr,
    exact: tl.constexpr,
    n_u: tl.constexpr,
    table: tl.constexpr = False,
):
    """As `_dot`, of blocks of n_v units of n_s streams."""
    p_w, i_r, n_rows, p_x, n_cols, one = a
    n_units = n_cols // (16 * n_s)
    n_b = n_units // n_v
    for i_0 in range(0, n_units, n_u):
        # [L, 1]
        i_u = i_0 + (tl.arange(0, b_y[0].shape[0]) % n_u)[:, None]
        m_u = i_u < n_units
        i_u = tl.minimum(i_u, n_units - 1)
        i_v = i_u % n_v
        i_b = i_u // n_v
        p_u = p_x + (i_u * 32 if n_v == 1 else i_u // 2 * (32 * n_s) + i_u % 2 * 16)
        for s in tl.static_range(n_s):
            b_x = _read_vector(p_u + s * (16 if n_v == 1 else 32), m_u)
            b_sum = tl.sum(b_x[0] + b_x[1] + b_x[2] + b_x[3], 1, keep_dims=True)
            b_z = ()
            for r in tl.static_range(len(b_y)):
                if planar:
                    b = (p_w, i_r[r] * n_b + i_b, n_rows.to(tl.int64) * n_b)
                else:
                    b = (p_w + i_r[r] * (n_b * type_size) + i_b * type_size,)
                b_z += (b_y[r] + _dot_unit(b, i_v, b_x, b_sum, one, s, codes, scales, n_bits, shared, exact, table),)
            b_y = b_z
    return b_y


@triton.jit
def _dot_float(b_y, a, dtype: tl.constexpr, n_u: tl.constexpr):
    """As `_dot`, of floats."""
    p_w, i_r, _, p_x, n_cols, _ = a
    p_w = p_w.to(tl.pointer_type(dtype))
    # [L, 4]
    o_c = (tl.arange(0, b_y[0].shape[0]) % n_u * 4)[:, None] + tl.arange(0, 4)[None, :]
    for i_c in range(0, n_cols, 4 * n_u):
        m_c = i_c + o_c < n_cols
        b_x = tl.load(p_x + i_c + o_c, mask=m_c, other=0).to(tl.float32)
        b_z = ()
        for r in tl.static_range(len(b_y)):
            p_row = p_w + i_r[r] * n_cols
            b_w = tl.load(p_row + i_c + o_c, mask=m_c, other=0).to(tl.float32)
            b_z += (b_y[r] + tl.sum(b_w * b_x, 1, keep_dims=True),)
        b_y = b_z
    return b_y


@triton.jit
def _row(r: tl.constexpr, n_r: tl.constexpr, n_g: tl.constexpr):
    """The first of the n_g rows that are the `r`th of a program."""
    return (tl.program_id(1).to(tl.int64) * n_r + r) * n_g


@triton.jit
def _dot_type(b_y, a, type_id: tl.constexpr, planar: tl.constexpr, exact: tl.constexpr, n_u: tl.constexpr):
    """Rows i_r times x, of a = (p_w, i_r, n_rows, p_x, n_cols, one), added to the partial sums b_y, n_r times [L, 1]"""
    if type_id == 0:
        return _dot_float(b_y, a, tl.float32, n_u)
    elif type_id == 1:
        return _dot_float(b_y, a, tl.float16, n_u)
    elif type_id == 30:
        return _dot_float(b_y, a, tl.bfloat16, n_u)
    elif type_id == 2:
        return _dot_packed(b_y, a, _codes_q4, _scales_q4_0, 4, True, 18, 1, 2, planar, exact, n_u)
    elif type_id == 6:
        return _dot_packed(b_y, a, _codes_q5_0, _scales_q5_0, 5, False, 22, 1, 2, planar, exact, n_u)
    elif type_id == 7:
        return _dot_packed(b_y, a, _codes_q5_1, _scales_q5_1, 5, False, 24, 1, 2, planar, exact, n_u)
    elif type_id == 8:
        return _dot_packed(b_y, a, _codes_q8_0, _scales_q8_0, 8, False, 34, 1, 2, planar, exact, n_u)
    elif type_id == 10:
        return _dot_packed(b_y, a, _codes_q2_k, _scales_q2_k, 2, True, 84, 4, 4, planar, exact, n_u)
    elif type_id == 11:
        return _dot_packed(b_y, a, _codes_q3_k, _scales_q3_k, 3, False, 110, 4, 4, planar, exact, n_u)
    elif type_id == 12:
        return _dot_packed(b_y, a, _codes_q4_k, _scales_q4_k, 4, True, 144, 8, 2, planar, exact, n_u)
    elif type_id == 13:
        return _dot_packed(b_y, a, _codes_q5_k, _scales_q5_k, 5, False, 176, 8, 2, planar, exact, n_u)
    elif type_id == 14:
        return _dot_packed(b_y, a, _codes_q6_k, _scales_q6_k, 6, False, 210, 4, 4, planar, exact, n_u)
    elif type_id == 20:
        return _dot_packed(b_y, a, _codes_q4, _scales_iq4_nl, 8, False, 18, 1, 2, planar, exact, n_u, True)


@triton.jit
def _dot(
    p_w,
    p_x,
    n_rows,
    n_cols,
    one,
    type_id: tl.constexpr,
    planar: tl.constexpr,
    exact: tl.constexpr,
    n_r: tl.constexpr,
    n_g: tl.constexpr,
    n_u: tl.constexpr,
):
    """The rows of a program times x: n_r numbers or, if n_g > 1, n_r times [n_g]"""
    i_r = ()
    b_y = ()
    for r in tl.static_range(n_r):
        i_g = _row(r, n_r, n_g) + tl.arange(0, n_g * n_u) // n_u
        # Rows past the end read the last one again.
        i_r += (tl.minimum(i_g, n_rows - 1)[:, None],)
        b_y += (tl.zeros([n_g * n_u, 1], tl.float32),)
    b_y = _dot_type(b_y, (p_w, i_r, n_rows, p_x, n_cols, one), type_id, planar, exact, n_u)
    y = ()
    for r in tl.static_range(n_r):
        if n_g == 1:
            y += (tl.sum(b_y[r]),)
        else:
            y += (tl.sum(tl.reshape(b_y[r], [n_g, n_u]), 1),)
    return y


# Triton's passes take time that grows with the cube of a function; of several types, each is compiled on its own.
_dot_apart = triton.jit(noinline=True)(_dot.fn)


@triton.constexpr_function
def alignment_of(type_id, planar):
    # What `packed.find_alignment` asks for, where it matters to a load.
    return 16 if planar or type_id in (0, 1, 12, 13, 30) else 2


@triton.jit
def _zeros(n_r: tl.constexpr, n_g: tl.constexpr):
    y = ()
    for _ in tl.static_range(n_r):
        y += (tl.zeros([n_g], tl.float32) if n_g > 1 else tl.full([], 0, tl.float32),)
    return y


@triton.jit
def _rows(r: tl.constexpr, n_r: tl.constexpr, n_g: tl.constexpr):
    """The rows that `_dot` gives as its `r`th."""
    if n_g == 1:
        return _row(r, n_r, n_g)
    else:
        return _row(r, n_r, n_g) + tl.arange(0, n_g)


@triton.jit
def _dot_expert(
    experts,
    i_e,
    n_rows,
    p_x,
    n_cols,
    one,
    types: tl.constexpr,
    planar: tl.constexpr,
    exact: tl.constexpr,
    n_r: tl.constexpr,
    n_g: tl.constexpr,
    n_u: tl.constexpr,
):
    """The rows of expert i_e of experts = (p_data, p_offsets, p_types, p_bias) times x, with bias: as `_dot`"""
    p_data, p_offsets, p_types, p_bias = experts
    offset = tl.load(p_offsets + i_e)
    if len(types) == 1:
        p_w = p_data + tl.multiple_of(offset, alignment_of(types[0], planar))
        y = _dot(p_w, p_x, n_rows, n_cols, one, types[0], planar, exact, n_r, n_g, n_u)
    else:
        type_id = tl.load(p_types + i_e)
        y = _zeros(n_r, n_g)
        for i in tl.static_range(len(types)):
            if type_id == types[i]:
                p_w = p_data + tl.multiple_of(offset, alignment_of(types[i], planar))
                y = _dot_apart(p_w, p_x, n_rows, n_cols, one, types[i], planar, exact, n_r, n_g, n_u)
    if p_bias is not None:
        z = ()
        for r in tl.static_range(n_r):
            i_g = _rows(r, n_r, n_g)
            z += (y[r] + tl.load(p_bias + i_e * n_rows + i_g, mask=i_g < n_rows, other=0),)
        y = z
    return y


@triton.jit
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def activate(gate, up, alpha, limit, name: tl.constexpr):
    if name == "silu":
        return gate / (1 + tl.exp(-gate)) * up
    elif name == "gelu":
        return 0.5 * gate * (1 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up
    elif name == "relu":
        return tl.maximum(gate, 0) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate / (1 + tl.exp(-alpha * gate)) * (up + 1)


@triton.jit(do_not_specialize=["n_rows", "n_chosen", "one"])
def _gate_up_kernel(
    p_x,
    p_chosen,
    p_gate,
    p_gate_offsets,
    p_gate_types,
    p_gate_bias,
    p_up,
    p_up_offsets,
    p_up_types,
    p_up_bias,
    p_h,
    n_chosen,
    n_rows,
    n_cols,
    one,
    alpha,
    limit,
    activation: tl.constexpr,
    gate_types: tl.constexpr,
    gate_planar: tl.constexpr,
    up_types: tl.constexpr,
    up_planar: tl.constexpr,
    exact: tl.constexpr,
    n_r: tl.constexpr,
    n_g: tl.constexpr,
    n_u: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    i_e = tl.load(p_chosen + i_p).to(tl.int64)
    p_x += i_p // n_chosen * n_cols
    gates = (p_gate, p_gate_offsets, p_gate_types, p_gate_bias)
    ups = (p_up, p_up_offsets, p_up_types, p_up_bias)
    gate = _dot_expert(gates, i_e, n_rows, p_x, n_cols, one, gate_types, gate_planar, exact, n_r, n_g, n_u)
    up = _dot_expert(ups, i_e, n_rows, p_x, n_cols, one, up_types, up_planar, exact, n_r, n_g, n_u)
    for r in tl.static_range(n_r):
        i_g = _rows(r, n_r, n_g)
        h = activate(gate[r], up[r], alpha, limit, activation)
        tl.store(p_h + i_p * n_rows + i_g, h, mask=i_g < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_chosen", "one"])
def _down_kernel(
    p_h,
    p_chosen,
    p_weights,
    p_down,
    p_down_offsets,
    p_down_types,
    p_down_bias,
    p_out,
    n_chosen,
    n_rows,
    n_cols,
    one,
    types: tl.constexpr,
    planar: tl.constexpr,
    exact: tl.constexpr,
    n_r: tl.constexpr,
    n_g: tl.constexpr,
    n_u: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    downs = (p_down, p_down_offsets, p_down_types, p_down_bias)
    y = _zeros(n_r, n_g)
    for i_k in range(n_chosen):
        i_p = i_t * n_chosen + i_k
        i_e = tl.load(p_chosen + i_p).to(tl.int64)
        weight = tl.load(p_weights + i_p)
        y_k = _dot_expert(downs, i_e, n_rows, p_h + i_p * n_cols, n_cols, one, types, planar, exact, n_r, n_g, n_u)
        z = ()
        for r in tl.static_range(n_r):
            z += (y[r] + weight * y_k[r],)
        y = z
    for r in tl.static_range(n_r):
        i_g = _rows(r, n_r, n_g)
        y_r = y[r]
        if p_out.dtype.element_ty == tl.bfloat16:
            y_r = round_to_bf16(y_r)
        tl.store(p_out + i_t * n_rows + i_g, y_r.to(p_out.dtype.element_ty), mask=i_g < n_rows)


# Whether these kernels run in Triton's interpreter, which alone takes CPU tensors.
INTERPRETED = not isinstance(_down_kernel, triton.JITFunction)

# n_r, n_g, n_u and warps of a program. Many rows a thread share the work on x; few, or more warps a row, keep more
# programs in flight. The interpreter pays by the operation, however long.
if INTERPRETED:
    _SHAPES = [(2, 64, 8, 1)]
else:
    _SHAPES = [(8, 1, 32, 1), (4, 1, 32, 1), (2, 1, 32, 1), (4, 1, 64, 2), (4, 1, 128, 4), (2, 1, 128, 4)]
_CONFIGS = [triton.Config({"n_r": r, "n_g": g, "n_u": u}, num_warps=warps) for r, g, u, warps in _SHAPES]


def _tuned(kernel: triton.JITFunction, key: list[str]):
    return triton.autotune(_CONFIGS, ["n_rows", "n_cols", *key])(kernel)


_gate_up = _tuned(_gate_up_kernel, ["gate_types", "gate_planar", "up_types", "up_planar", "exact"])
_down = _tuned(_down_kernel, ["types", "planar", "exact"])


def launch(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
    activation: Activation,
    h: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fill `out` [T, H], by way of `h` float32 [T, K, I]; nothing is checked."""
    n_tokens, n_chosen = chosen.shape
    with torch.cuda.device_of(x):
        _gate_up[lambda meta: (n_tokens * n_chosen, triton.cdiv(gate.n_rows, meta["n_r"] * meta["n_g"]))](
            x,
            chosen,
            *tensors_of(gate),
            *tensors_of(up),
            h,
            n_chosen,
            gate.n_rows,
            gate.n_cols,
            _ONE,
            activation.alpha,
            activation.limit,
            activation=activation.name,
            gate_types=gate.types,
            gate_planar=gate.planar,
            up_types=up.types,
            up_planar=up.planar,
            exact=x.dtype == torch.float32,
            enable_fp_fusion=True,
        )
        _down[lambda meta: (n_tokens, triton.cdiv(down.n_rows, meta["n_r"] * meta["n_g"]))](
            h,
            chosen,
            gates,
            *tensors_of(down),
            out,
            n_chosen,
            down.n_rows,
            down.n_cols,
            _ONE,
            types=down.types,
            planar=down.planar,
            exact=x.dtype == torch.float32,
            enable_fp_fusion=True,
        )


def tensors_of(experts: PackedExperts) -> tuple[torch.Tensor | None, ...]:
    return experts.data, experts.offsets, experts.type_ids, experts.bias
