"""Decode GGUF blocks with Triton: one program per group of blocks, any byte alignment.

Layouts are the structs of ggml-common.h; `half` is an IEEE float16, and naive.py, the twin, spells them out. A
decoder takes the pointer p_b [B, 1, 1] to each block, the groups o_g [1, G, 1] of its scales and the weights
o_w [1, G, L], counted from the block's start, and gives float32 [B, G, L].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import IQ4_NL_VALUES, BlockFormat

# Weights per program: 16 per thread.
_WEIGHTS = 2048
_WARPS = 4

# The 16 table entries, one byte each.
_IQ4_NL_LOW = tl.constexpr(int.from_bytes([v & 255 for v in IQ4_NL_VALUES[:8]], "little", signed=True))
_IQ4_NL_HIGH = tl.constexpr(int.from_bytes([v & 255 for v in IQ4_NL_VALUES[8:]], "little", signed=True))


@triton.jit
def _byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def _signed(p):
    return tl.load(p).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _half(p):
    b_bits = tl.load(p).to(tl.uint16) | (tl.load(p + 1).to(tl.uint16) << 8)
    return b_bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibbles(p_qs, o_w):
    # qs[16]: w = i in the low, w = i + 16 in the high nibble of qs[i]
    return (_byte(p_qs + o_w % 16) >> (o_w // 16 * 4)) & 15


@triton.jit
def _five_bits(p_qh, p_qs, o_w):
    # qh[4]: bit w of a 32-bit word
    b_high = (_byte(p_qh + o_w // 8) >> (o_w % 8)) & 1
    return (_nibbles(p_qs, o_w) | (b_high << 4)).to(tl.float32)


@triton.jit
def _pairs(p_qs, o_w):
    # qs[64]: bits 2s.. of qs[32h + i] are w = 128h + 32s + i
    return (_byte(p_qs + o_w // 128 * 32 + o_w % 32) >> (o_w // 32 % 4 * 2)) & 3


@triton.jit
def _q4_0(p_b, o_g, o_w):
    """block_q4_0 { half d; u8 qs[16]; }"""
    return _half(p_b) * (_nibbles(p_b + 2, o_w) - 8).to(tl.float32)


@triton.jit
def _iq4_nl(p_b, o_g, o_w):
    """block_iq4_nl { half d; u8 qs[16]; }"""
    b_q = _nibbles(p_b + 2, o_w)
    b_v = tl.where(b_q < 8, _IQ4_NL_LOW, _IQ4_NL_HIGH) >> (b_q % 8 * 8).to(tl.int64)
    return _half(p_b) * b_v.to(tl.int8).to(tl.float32)


@triton.jit
def _q5_0(p_b, o_g, o_w):
    """block_q5_0 { half d; u8 qh[4]; u8 qs[16]; }"""
    return _half(p_b) * (_five_bits(p_b + 2, p_b + 6, o_w) - 16)


@triton.jit
def _q5_1(p_b, o_g, o_w):
    """block_q5_1 { half d, m; u8 qh[4]; u8 qs[16]; }"""
    return _half(p_b) * _five_bits(p_b + 4, p_b + 8, o_w) + _half(p_b + 2)


@triton.jit
def _q8_0(p_b, o_g, o_w):
    """block_q8_0 { half d; i8 qs[32]; }"""
    return _half(p_b) * _signed(p_b + 2 + o_w)


@triton.jit
def _q2_k(p_b, o_g, o_w):
    """block_q2_K { u8 scales[16]; u8 qs[64]; half d, dmin; }"""
    # [B, 16, 1]
    b_s = _byte(p_b + o_g)
    b_d = _half(p_b + 80) * (b_s & 15).to(tl.float32)
    b_m = _half(p_b + 82) * (b_s >> 4).to(tl.float32)
    # [B, 16, 16]
    return b_d * _pairs(p_b + 16, o_w).to(tl.float32) - b_m


@triton.jit
def _q3_k(p_b, o_g, o_w):
    """block_q3_K { u8 hmask[32]; u8 qs[64]; u8 scales[12]; half d; }"""
    # [B, 16, 1]
    b_low = (_byte(p_b + 96 + o_g % 8) >> (o_g // 8 * 4)) & 15
    b_high = (_byte(p_b + 104 + o_g % 4) >> (o_g // 4 * 2)) & 3
    b_d = _half(p_b + 108) * ((b_low | (b_high << 4)) - 32).to(tl.float32)
    # [B, 16, 16]
    b_h = (_byte(p_b + o_w % 32) >> (o_w // 32)) & 1
    return b_d * ((_pairs(p_b + 32, o_w) | (b_h << 2)) - 4).to(tl.float32)


@triton.jit
def _scales_k4(p_b, o_g):
    # { half d, dmin; u8 scales[12]; } -> d * sc, dmin * mn: [B, 8, 1]
    b_0 = _byte(p_b + 4 + o_g % 4)
    b_1 = _byte(p_b + 8 + o_g % 4)
    b_2 = _byte(p_b + 12 + o_g % 4)
    b_sc = tl.where(o_g < 4, b_0 & 63, (b_2 & 15) | ((b_0 >> 6) << 4))
    b_mn = tl.where(o_g < 4, b_1 & 63, (b_2 >> 4) | ((b_1 >> 6) << 4))
    return _half(p_b) * b_sc.to(tl.float32), _half(p_b + 2) * b_mn.to(tl.float32)


@triton.jit
def _nibbles_k4(p_qs, o_w):
    # qs[128]: w = 64c + i in the low, w = 64c + 32 + i in the high nibble of qs[32c + i]
    return (_byte(p_qs + o_w // 64 * 32 + o_w % 32) >> (o_w // 32 % 2 * 4)) & 15


@triton.jit
def _q4_k(p_b, o_g, o_w):
    """block_q4_K { half d, dmin; u8 scales[12]; u8 qs[128]; }"""
    b_d, b_m = _scales_k4(p_b, o_g)
    # [B, 8, 32]
    return b_d * _nibbles_k4(p_b + 16, o_w).to(tl.float32) - b_m


@triton.jit
def _q5_k(p_b, o_g, o_w):
    """block_q5_K { half d, dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]; }"""
    b_d, b_m = _scales_k4(p_b, o_g)
    # [B, 8, 32]
    b_high = (_byte(p_b + 16 + o_w % 32) >> (o_w // 32)) & 1
    return b_d * (_nibbles_k4(p_b + 48, o_w) | (b_high << 4)).to(tl.float32) - b_m


@triton.jit
def _q6_k(p_b, o_g, o_w):
    """block_q6_K { u8 ql[128]; u8 qh[64]; i8 scales[16]; half d; }"""
    # [B, 16, 1]
    b_d = _half(p_b + 208) * _signed(p_b + 192 + o_g)
    # [B, 16, 16]
    b_low = (_byte(p_b + o_w // 128 * 64 + o_w % 64) >> (o_w // 64 % 2 * 4)) & 15
    return b_d * ((b_low | (_pairs(p_b + 128, o_w) << 4)) - 32).to(tl.float32)


@triton.jit
def round_to_bf16(b_x):
    # Spelled out because a plain cast truncates in Triton's interpreter; ties go to even, NaN stays.
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x).to(tl.bfloat16)


@triton.jit(do_not_specialize=["n_blocks"])
def _dequantize_kernel(
    p_blocks,
    p_out,
    n_blocks,
    decode: tl.constexpr,
    type_size: tl.constexpr,
    block_size: tl.constexpr,
    n_groups: tl.constexpr,
    per_program: tl.constexpr,
):
    # [B, 1, 1]
    i_b = (tl.program_id(0).to(tl.int64) * per_program + tl.arange(0, per_program))[:, None, None]
    m_b = i_b < n_blocks
    # Blocks past the end read the last one again; only the store is masked.
    p_b = p_blocks + tl.minimum(i_b, n_blocks - 1) * type_size
    # [1, G, 1], [1, G, L]
    o_g = tl.arange(0, n_groups)[None, :, None]
    o_w = o_g * (block_size // n_groups) + tl.arange(0, block_size // n_groups)[None, None, :]
    # [B, G, L]
    b_x = decode(p_b, o_g, o_w)
    if p_out.dtype.element_ty == tl.bfloat16:
        b_x = round_to_bf16(b_x)
    tl.store(p_out + i_b * block_size + o_w, b_x.to(p_out.dtype.element_ty), mask=m_b)


# The decoder of each type and the number of groups with a scale of their own.
_DECODERS = {
    "Q4_0": (_q4_0, 1),
    "Q5_0": (_q5_0, 1),
    "Q5_1": (_q5_1, 1),
    "Q8_0": (_q8_0, 1),
    "Q2_K": (_q2_k, 16),
    "Q3_K": (_q3_k, 16),
    "Q4_K": (_q4_k, 8),
    "Q5_K": (_q5_k, 8),
    "Q6_K": (_q6_k, 16),
    "IQ4_NL": (_iq4_nl, 1),
}

# Whether these kernels run in Triton's interpreter, which alone takes CPU tensors.
INTERPRETED = not isinstance(_dequantize_kernel, triton.JITFunction)


def launch(blocks: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> None:
    """Decode contiguous uint8 [n_rows, row_bytes] into contiguous float `out` [n_rows, n_cols]; nothing is checked."""
    n_blocks = blocks.numel() // fmt.type_size
    if n_blocks == 0:
        return
    decode, n_groups = _DECODERS[fmt.name]
    per_program = _WEIGHTS // fmt.block_size
    grid = (triton.cdiv(n_blocks, per_program),)
    with torch.cuda.device_of(blocks):
        _dequantize_kernel[grid](
            blocks,
            out,
            n_blocks,
            decode=decode,
            type_size=fmt.type_size,
            block_size=fmt.block_size,
            n_groups=n_groups,
            per_program=per_program,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
            # Each operation rounds once, as in gguf's numpy.
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
        )
