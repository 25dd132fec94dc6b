"""The experts of many tokens with Triton: tokens grouped by expert, tiles of weights decoded in registers for a dot.

One program multiplies `block_n` rows of one expert's weights with at most `block_m` of the tokens that chose it. The
weights are the left operand, so that an expert of few tokens does not leave the tensor cores' rows empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..moe_decode.triton_kernels import (
    IQ4_NL_HIGH,
    IQ4_NL_LOW,
    activate,
    alignment_of,
    at_field,
    load_byte,
    load_half,
    tensors_of,
)
from ..packed import Activation, PackedExperts

# Triton calls jitted functions with plain values for constants, and unrolls static_range itself.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

# A unit is 16 bytes of codes in a row, and what other bytes add to them; i_v counts the units of a block. Its weights
# fall into streams of 16, s counting them, by the bits that hold them. A decoder takes where the units' blocks lie, as
# `at_field` has it, i_v [1, U, 1] and o_l [1, 1, 16], and gives the codes q int32 [N, U, 16] of one stream and d and m,
# each float32 [N, U, 1]: w = d * q - m.


@triton.jit
def _nibbles(p_qs, s: tl.constexpr):
    return (load_byte(p_qs) >> (4 * s)) & 15


@triton.jit
def _fifth_bits(p_qh, o_l, s: tl.constexpr):
    return ((load_byte(p_qh + 2 * s + o_l // 8) >> (o_l % 8)) & 1) << 4


@triton.jit
def _q4_0(b, i_v, o_l, s: tl.constexpr):
    """block_q4_0 { half d; u8 qs[16]; }"""
    b_d = load_half(at_field(b, 0, 16, 2))
    return _nibbles(at_field(b, 2, 0, 16) + o_l, s), b_d, b_d * 8


@triton.jit
def _iq4_nl(b, i_v, o_l, s: tl.constexpr):
    """block_iq4_nl { half d; u8 qs[16]; }, codes are values plus 128"""
    b_q, b_d, _ = _q4_0(b, i_v, o_l, s)
    b_v = tl.where(b_q < 8, IQ4_NL_LOW, IQ4_NL_HIGH) >> (b_q % 8 * 8).to(tl.int64)
    return b_v.to(tl.int32) & 255, b_d, b_d * 128


@triton.jit
def _q5_0(b, i_v, o_l, s: tl.constexpr):
    """block_q5_0 { half d; u8 qh[4]; u8 qs[16]; }"""
    b_d = load_half(at_field(b, 0, 20, 2))
    return _nibbles(at_field(b, 6, 0, 16) + o_l, s) | _fifth_bits(at_field(b, 2, 16, 4), o_l, s), b_d, b_d * 16


@triton.jit
def _q5_1(b, i_v, o_l, s: tl.constexpr):
    """block_q5_1 { half d, m; u8 qh[4]; u8 qs[16]; }"""
    p_d = at_field(b, 0, 20, 4)
    b_q = _nibbles(at_field(b, 8, 0, 16) + o_l, s) | _fifth_bits(at_field(b, 4, 16, 4), o_l, s)
    return b_q, load_half(p_d), -load_half(p_d + 2)


@triton.jit
def _q8_0(b, i_v, o_l, s: tl.constexpr):
    """block_q8_0 { half d; i8 qs[32]; }, codes plus 128"""
    b_d = load_half(at_field(b, 0, 32, 2))
    return load_byte(at_field(b, 2, 0, 32) + 16 * s + o_l) ^ 128, b_d, b_d * 128


@triton.jit
def _q2_k(b, i_v, o_l, s: tl.constexpr):
    """block_q2_K { u8 scales[16]; u8 qs[64]; half d, dmin; }"""
    b_s = load_byte(at_field(b, 0, 64, 16) + i_v // 2 * 8 + 2 * s + i_v % 2)
    b_q = (load_byte(at_field(b, 16, 0, 64) + i_v * 16 + o_l) >> (2 * s)) & 3
    p_d = at_field(b, 80, 80, 4)
    return b_q, load_half(p_d) * (b_s & 15).to(tl.float32), load_half(p_d + 2) * (b_s >> 4).to(tl.float32)


@triton.jit
def _q3_k(b, i_v, o_l, s: tl.constexpr):
    """block_q3_K { u8 hmask[32]; u8 qs[64]; u8 scales[12]; half d; }"""
    i_g = i_v // 2 * 8 + 2 * s + i_v % 2
    p_s = at_field(b, 96, 96, 12)
    b_low = (load_byte(p_s + i_g % 8) >> (i_g // 8 * 4)) & 15
    b_high = (load_byte(p_s + 8 + i_g % 4) >> (i_g // 4 * 2)) & 3
    b_d = load_half(at_field(b, 108, 108, 2)) * ((b_low | (b_high << 4)) - 32).to(tl.float32)
    b_h = (load_byte(at_field(b, 0, 64, 32) + i_v % 2 * 16 + o_l) >> (i_v // 2 * 4 + s)) & 1
    b_q = (load_byte(at_field(b, 32, 0, 64) + i_v * 16 + o_l) >> (2 * s)) & 3
    return b_q | (b_h << 2), b_d, b_d * 4


@triton.jit
def _scales_k4(p_b, i_v, s: tl.constexpr):
    # { half d, dmin; u8 scales[12]; }
    i_g = i_v // 2 * 2 + s
    b_0 = load_byte(p_b + 4 + i_g % 4)
    b_1 = load_byte(p_b + 8 + i_g % 4)
    b_2 = load_byte(p_b + 12 + i_g % 4)
    b_sc = tl.where(i_g < 4, b_0 & 63, (b_2 & 15) | ((b_0 >> 6) << 4))
    b_mn = tl.where(i_g < 4, b_1 & 63, (b_2 >> 4) | ((b_1 >> 6) << 4))
    return load_half(p_b) * b_sc.to(tl.float32), load_half(p_b + 2) * b_mn.to(tl.float32)


@triton.jit
def _q4_k(b, i_v, o_l, s: tl.constexpr):
    """block_q4_K { half d, dmin; u8 scales[12]; u8 qs[128]; }"""
    b_d, b_m = _scales_k4(at_field(b, 0, 128, 16), i_v, s)
    return _nibbles(at_field(b, 16, 0, 128) + i_v * 16 + o_l, s), b_d, b_m


@triton.jit
def _q5_k(b, i_v, o_l, s: tl.constexpr):
    """block_q5_K { half d, dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]; }"""
    b_d, b_m = _scales_k4(at_field(b, 0, 160, 16), i_v, s)
    b_h = (load_byte(at_field(b, 16, 128, 32) + i_v % 2 * 16 + o_l) >> (i_v // 2 * 2 + s)) & 1
    return _nibbles(at_field(b, 48, 0, 128) + i_v * 16 + o_l, s) | (b_h << 4), b_d, b_m


@triton.jit
def _q6_k(b, i_v, o_l, s: tl.constexpr):
    """block_q6_K { u8 ql[128]; u8 qh[64]; i8 scales[16]; half d; }"""
    b_sc = tl.load(at_field(b, 192, 192, 16) + i_v // 2 * 8 + 2 * s + i_v % 2).to(tl.int8, bitcast=True)
    b_d = load_half(at_field(b, 208, 208, 2)) * b_sc.to(tl.float32)
    b_low = _nibbles(at_field(b, 0, 0, 128) + i_v // 2 * 64 + s % 2 * 32 + i_v % 2 * 16 + o_l, s // 2)
    b_high = (load_byte(at_field(b, 128, 128, 64) + i_v * 16 + o_l) >> (2 * s)) & 3
    return b_low | (b_high << 4), b_d, b_d * 32


@triton.jit
def _packed_dot(
    b_y,
    a,
    planar: tl.constexpr,
    units: tl.constexpr,
    dot_type: tl.constexpr,
    decode: tl.constexpr,
    n_bits: tl.constexpr,
    type_size: tl.constexpr,
    n_v: tl.constexpr,
    n_s: tl.constexpr,
):
    p_w, i_n, n_rows, p_x, n_cols = a
    n_units = n_cols // (16 * n_s)
    row_blocks = n_units // n_v
    # [1, 1, 16], [K]
    o_l = tl.arange(0, 16)[None, None, :]
    o_k = tl.arange(0, 16 * units)
    for i_0 in range(0, n_units, units):
        # [1, U, 1], [N, U, 1]; units past the end repeat the last one, against zeros of x
        i_u = tl.minimum(i_0 + tl.arange(0, units), n_units - 1)[None, :, None]
        i_b = i_n[:, None, None] * row_blocks + i_u // n_v
        b = (p_w, i_b, tl.cast(n_rows, tl.int64) * row_blocks) if planar else (p_w + i_b * type_size,)
        # [K]
        i_c = i_0 + o_k // 16
        o_x = (i_c * 32 if n_v == 1 else i_c // 2 * (32 * n_s) + i_c % 2 * 16) + o_k % 16
        for s in tl.static_range(n_s):
            # [K, M]
            p_b_x = p_x + (o_x + s * (16 if n_v == 1 else 32))[:, None]
            b_x = tl.load(p_b_x, mask=(i_c < n_units)[:, None], other=0)
            # [N, U, 16]: put below the exponent of 2^n, the bits of a code q are the float 2^n + q
            b_q, b_d, b_m = decode(b, i_u % n_v, o_l, s)
            b_f = ((b_q << (23 - n_bits)) | ((127 + n_bits) << 23)).to(tl.float32, bitcast=True) - 2**n_bits
            # [N, K]
            b_w = tl.reshape(b_d * b_f - b_m, [i_n.shape[0], 16 * units]).to(b_x.dtype)
            b_y = tl.dot(b_w.to(dot_type), b_x.to(dot_type), b_y, input_precision="ieee")
    return b_y


@triton.jit
def _float_dot(b_y, a, units: tl.constexpr, dot_type: tl.constexpr, dtype: tl.constexpr):
    p_w, i_n, _, p_x, n_cols = a
    p_w = p_w.to(tl.pointer_type(dtype)) + i_n[:, None] * n_cols
    for i_0 in range(0, n_cols, 16 * units):
        # [K], [K, M], [N, K]
        o_k = i_0 + tl.arange(0, 16 * units)
        b_x = tl.load(p_x + o_k[:, None], mask=(o_k < n_cols)[:, None], other=0)
        b_w = tl.load(p_w + o_k[None, :], mask=(o_k < n_cols)[None, :], other=0)
        b_y = tl.dot(b_w.to(b_x.dtype).to(dot_type), b_x.to(dot_type), b_y, input_precision="ieee")
    return b_y


@triton.jit
def _typed_dot(b_y, a, type_id: tl.constexpr, planar: tl.constexpr, units: tl.constexpr, dot_type: tl.constexpr):
    # Of blocks: bits of a code, bytes, units, and streams of a unit.
    if type_id == 0:
        return _float_dot(b_y, a, units, dot_type, tl.float32)
    elif type_id == 1:
        return _float_dot(b_y, a, units, dot_type, tl.float16)
    elif type_id == 30:
        return _float_dot(b_y, a, units, dot_type, tl.bfloat16)
    elif type_id == 2:
        return _packed_dot(b_y, a, planar, units, dot_type, _q4_0, 4, 18, 1, 2)
    elif type_id == 6:
        return _packed_dot(b_y, a, planar, units, dot_type, _q5_0, 5, 22, 1, 2)
    elif type_id == 7:
        return _packed_dot(b_y, a, planar, units, dot_type, _q5_1, 5, 24, 1, 2)
    elif type_id == 8:
        return _packed_dot(b_y, a, planar, units, dot_type, _q8_0, 8, 34, 1, 2)
    elif type_id == 10:
        return _packed_dot(b_y, a, planar, units, dot_type, _q2_k, 2, 84, 4, 4)
    elif type_id == 11:
        return _packed_dot(b_y, a, planar, units, dot_type, _q3_k, 3, 110, 4, 4)
    elif type_id == 12:
        return _packed_dot(b_y, a, planar, units, dot_type, _q4_k, 4, 144, 8, 2)
    elif type_id == 13:
        return _packed_dot(b_y, a, planar, units, dot_type, _q5_k, 5, 176, 8, 2)
    elif type_id == 14:
        return _packed_dot(b_y, a, planar, units, dot_type, _q6_k, 6, 210, 4, 4)
    elif type_id == 20:
        return _packed_dot(b_y, a, planar, units, dot_type, _iq4_nl, 8, 18, 1, 2)


@triton.jit
def _dot(
    experts,
    i_e,
    i_n,
    n_rows,
    p_x,
    n_cols,
    types: tl.constexpr,
    planar: tl.constexpr,
    units: tl.constexpr,
    dot_type: tl.constexpr,
):
    """Rows i_n [N] of expert i_e of experts = (p_data, p_offsets, p_types, p_bias) times p_x [1, M], plus bias"""
    p_data, p_offsets, p_types, p_bias = experts
    offset = tl.load(p_offsets + i_e)
    type_id = tl.load(p_types + i_e)
    b_y = tl.zeros([i_n.shape[0], p_x.shape[1]], tl.float32)
    for i in tl.static_range(len(types)):
        if len(types) == 1 or type_id == types[i]:
            p_w = p_data + tl.multiple_of(offset, alignment_of(types[i], planar))
            b_y = _typed_dot(b_y, (p_w, i_n.to(tl.int64), n_rows, p_x, n_cols), types[i], planar, units, dot_type)
    if p_bias is not None:
        b_y += tl.load(p_bias + i_e * n_rows + i_n)[:, None]
    return b_y


@triton.jit(do_not_specialize=["n_experts", "top_k"])
def _gate_up_kernel(
    p_x,
    p_order,
    p_starts,
    p_tile_expert,
    p_tile_start,
    p_gate,
    p_gate_offsets,
    p_gate_types,
    p_gate_bias,
    p_up,
    p_up_offsets,
    p_up_types,
    p_up_bias,
    p_hidden,
    n_experts,
    n_rows,
    n_cols,
    top_k,
    alpha,
    limit,
    activation: tl.constexpr,
    gate_types: tl.constexpr,
    gate_planar: tl.constexpr,
    up_types: tl.constexpr,
    up_planar: tl.constexpr,
    dot_type: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    units: tl.constexpr,
):
    i_e = tl.load(p_tile_expert + tl.program_id(0))
    if i_e == n_experts:
        return
    # [M], [N]; rows past an end repeat the last one, and only the store is masked.
    i_m = tl.load(p_tile_start + tl.program_id(0)) + tl.arange(0, block_m)
    i_end = tl.load(p_starts + i_e + 1)
    i_n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    i_row = tl.minimum(i_n, n_rows - 1)
    i_t = tl.load(p_order + tl.minimum(i_m, i_end - 1)) // top_k
    p_b_x = (p_x + i_t * n_cols)[None, :]
    # [N, M]
    gate = (p_gate, p_gate_offsets, p_gate_types, p_gate_bias)
    b_gate = _dot(gate, i_e, i_row, n_rows, p_b_x, n_cols, gate_types, gate_planar, units, dot_type)
    up = (p_up, p_up_offsets, p_up_types, p_up_bias)
    b_up = _dot(up, i_e, i_row, n_rows, p_b_x, n_cols, up_types, up_planar, units, dot_type)
    b_h = activate(b_gate, b_up, alpha, limit, activation)
    p_h = p_hidden + i_m.to(tl.int64)[None, :] * n_rows + i_n[:, None]
    tl.store(p_h, b_h.to(p_hidden.dtype.element_ty), mask=(i_n < n_rows)[:, None] & (i_m < i_end)[None, :])


@triton.jit(do_not_specialize=["n_experts"])
def _down_kernel(
    p_hidden,
    p_order,
    p_starts,
    p_tile_expert,
    p_tile_start,
    p_down,
    p_down_offsets,
    p_down_types,
    p_down_bias,
    p_gates,
    p_out,
    n_experts,
    n_rows,
    n_cols,
    types: tl.constexpr,
    planar: tl.constexpr,
    dot_type: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    units: tl.constexpr,
):
    i_e = tl.load(p_tile_expert + tl.program_id(0))
    if i_e == n_experts:
        return
    # [M], [N]
    i_m = tl.load(p_tile_start + tl.program_id(0)) + tl.arange(0, block_m)
    i_end = tl.load(p_starts + i_e + 1)
    i_n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    i_row = tl.minimum(i_n, n_rows - 1)
    i_last = tl.minimum(i_m, i_end - 1)
    p_h = (p_hidden + i_last.to(tl.int64) * n_cols)[None, :]
    # [N, M]
    down = (p_down, p_down_offsets, p_down_types, p_down_bias)
    b_y = _dot(down, i_e, i_row, n_rows, p_h, n_cols, types, planar, units, dot_type)
    # [M]
    i_s = tl.load(p_order + i_last)
    b_y *= tl.load(p_gates + i_s)[None, :]
    tl.store(p_out + i_s[None, :] * n_rows + i_n[:, None], b_y, mask=(i_n < n_rows)[:, None] & (i_m < i_end)[None, :])


# Whether these kernels run in Triton's interpreter, which alone takes CPU tensors.
INTERPRETED = not isinstance(_gate_up_kernel, triton.JITFunction)

_DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# Rows of weights, units of a dot product, warps, and stages of a program.
_SHAPES = [(64, 8, 4, 1)] if INTERPRETED else [(64, 4, 4, 3), (64, 4, 8, 3), (128, 4, 8, 3), (128, 2, 8, 3)]
_CONFIGS = [
    triton.Config({"block_n": rows, "units": units}, num_warps=warps, num_stages=stages)
    for rows, units, warps, stages in _SHAPES
]


def _tuned(kernel: triton.JITFunction, key: list[str]):
    return triton.autotune(_CONFIGS, ["n_rows", "n_cols", "block_m", *key])(kernel)


_gate_up = _tuned(_gate_up_kernel, ["gate_types", "gate_planar", "up_types", "up_planar"])
_down = _tuned(_down_kernel, ["types", "planar"])


class Groups(NamedTuple):
    """Which (token, choice) pairs each program takes; everything is on the device, of shapes known to the host."""

    # Pairs, numbered token * K + choice, sorted by expert: [T * K]
    order: torch.Tensor
    # Where each expert's pairs start in `order`, and the end: [E + 1]
    starts: torch.Tensor
    # The expert of each tile of at most block_m pairs, E where there is no such tile, and its first place in `order`.
    tile_expert: torch.Tensor
    tile_start: torch.Tensor


def group_tokens(chosen: torch.Tensor, n_experts: int, block_m: int) -> Groups:
    """Sort the pairs of chosen [T, K] by expert and cut each expert's share into tiles; pairs of no expert are left."""
    n_pairs = chosen.numel()
    sorted_experts, order = chosen.flatten().long().sort(stable=True)
    starts = torch.searchsorted(sorted_experts, torch.arange(n_experts + 1, device=chosen.device))
    tiles = (starts.diff() + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    # Each expert in use wastes at most block_m - 1 places.
    n_tiles = (n_pairs + min(n_pairs, n_experts) * (block_m - 1)) // block_m
    i_tile = torch.arange(n_tiles, device=chosen.device)
    expert = torch.searchsorted(tile_ends, i_tile, right=True)
    present = expert.clamp(max=n_experts - 1)
    tile_start = starts[present] + (i_tile - (tile_ends - tiles)[present]) * block_m
    return Groups(order, starts, expert, tile_start)


def launch(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
    activation: Activation,
) -> torch.Tensor:
    """As `moe_prefill`, of contiguous tensors; nothing is checked."""
    n_pairs, n_experts = chosen.numel(), gate.n_experts
    # A quarter more than the mean, so that most experts need one tile; products in float32 want registers.
    block_m = triton.next_power_of_2(max(16, n_pairs * 5 // (n_experts * 4)))
    block_m = min(block_m, 32 if x.dtype == torch.float32 else 128)
    groups = group_tokens(chosen, n_experts, block_m)
    # numpy, behind the interpreter, has no product in bfloat16.
    dot_type = tl.float32 if INTERPRETED else _DOT_TYPES[x.dtype]
    hidden = x.new_empty((n_pairs, gate.n_rows))
    out = x.new_empty((n_pairs, down.n_rows), dtype=torch.float32)

    def grid(n_rows: int):
        return lambda meta: (len(groups.tile_expert), triton.cdiv(n_rows, meta["block_n"]))

    with torch.cuda.device_of(x):
        _gate_up[grid(gate.n_rows)](
            x,
            *groups,
            *tensors_of(gate),
            *tensors_of(up),
            hidden,
            n_experts,
            gate.n_rows,
            gate.n_cols,
            chosen.shape[1],
            activation.alpha,
            activation.limit,
            activation=activation.name,
            gate_types=gate.types,
            gate_planar=gate.planar,
            up_types=up.types,
            up_planar=up.planar,
            dot_type=dot_type,
            block_m=block_m,
            enable_fp_fusion=True,
        )
        _down[grid(down.n_rows)](
            hidden,
            *groups,
            *tensors_of(down),
            gates,
            out,
            n_experts,
            down.n_rows,
            down.n_cols,
            types=down.types,
            planar=down.planar,
            dot_type=dot_type,
            block_m=block_m,
            enable_fp_fusion=True,
        )
    return out.view(*chosen.shape, -1).sum(1).to(x.dtype)
