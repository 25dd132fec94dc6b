"""Find the scales and codes of GGUF blocks with Triton, each program for a few blocks; naive.py, the twin, explains.

All of a program's blocks stay in registers: [B, G, L] for groups of L weights, [B, G, 1] and [B, 1, 1] for what
groups and blocks have one of.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import IQ4_NL_VALUES
from .packing import Fields
from .plans import INDEPENDENT, LEAST_HALF, LEAST_MAXIMUM, MARGIN, MOST_HALF, ROUNDS, Plan

# What Triton's own annotations say of constants and reductions is not what they take and give.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

# Weights per program: 8 per thread of a single warp, which sums over whole blocks without a barrier.
_WEIGHTS = 256
_WARPS = 1

_INDEPENDENT = tl.constexpr(INDEPENDENT)
_LEAST_HALF = tl.constexpr(LEAST_HALF)
_LEAST_MAXIMUM = tl.constexpr(LEAST_MAXIMUM)
_MARGIN = tl.constexpr(MARGIN)
_MOST_HALF = tl.constexpr(MOST_HALF)
_ROUNDS = tl.constexpr(ROUNDS)
# The 16 values of IQ4_NL, one byte each, and what lies halfway between neighbours.
_IQ4_NL_LOW = tl.constexpr(int.from_bytes([v & 255 for v in IQ4_NL_VALUES[:8]], "little", signed=True))
_IQ4_NL_HIGH = tl.constexpr(int.from_bytes([v & 255 for v in IQ4_NL_VALUES[8:]], "little", signed=True))
_IQ4_NL_MIDDLES = tl.constexpr(tuple((a + b) / 2 for a, b in pairwise(IQ4_NL_VALUES)))


@triton.jit
def _sum(b_t):
    return tl.sum(b_t, 2, keep_dims=True)


@triton.jit
def _block_sum(b_t):
    return tl.sum(_sum(b_t), 1, keep_dims=True)


@triton.jit
def _ratio(b_a, b_b):
    return tl.where(b_b == 0, 0.0, b_a / tl.where(b_b == 0, 1.0, b_b))


@triton.jit
def _clamp_round(b_t, low: tl.constexpr, high: tl.constexpr):
    return tl.floor(tl.minimum(tl.maximum(b_t, low), high) + 0.5)


@triton.jit
def _round_half(b_d, b_unit):
    b_exact = tl.minimum(tl.maximum(b_d * b_unit, -_MOST_HALF), _MOST_HALF)
    b_half = b_exact.to(tl.float16).to(tl.float32)
    b_least = tl.where(b_exact > 0, _LEAST_HALF, -_LEAST_HALF)
    return tl.where((b_half == 0) & (b_exact != 0), b_least, b_half) / b_unit


@triton.jit
def _extreme(b_t, axis: tl.constexpr):
    b_low, b_high = tl.min(b_t, axis, keep_dims=True), tl.max(b_t, axis, keep_dims=True)
    return tl.where(b_high > -b_low, b_high, b_low)


@triton.jit
def _candidate(i, start: tl.constexpr, step: tl.constexpr):
    return tl.where(i == 0, 0.0, start + (i - 1) * step)


@triton.jit
def _solve(b_uu, b_uv, b_vv, b_uy, b_vy, signed: tl.constexpr):
    b_det = b_uu * b_vv - b_uv * b_uv
    b_b = _ratio(b_uv * b_uy - b_uu * b_vy, b_det)
    b_alone = b_det <= _INDEPENDENT * b_uu * b_vv
    if not signed:
        b_alone = b_alone | (b_b < 0)
    b_a = tl.where(b_alone, _ratio(b_uy, b_uu), _ratio(b_vv * b_uy - b_uv * b_vy, b_det))
    return b_a, tl.where(b_alone, 0.0, b_b)


@triton.jit
def _fit_scale(
    b_a,
    b_curvature,
    b_unit,
    first: tl.constexpr,
    last: tl.constexpr,
    end: tl.constexpr,
    stretch: tl.constexpr,
    stretch_step: tl.constexpr,
    n_stretches: tl.constexpr,
):
    b_extreme = _extreme(b_a, 1)
    b_d = _round_half(b_extreme / end, b_unit)
    b_best = _block_sum(b_curvature * _square(b_a - b_d * _clamp_round(_ratio(b_a, b_d), first, last)))
    for i in range(1, n_stretches):
        b_found = _round_half(b_extreme / (end * (1 + _candidate(i, stretch, stretch_step))), b_unit)
        b_levels = _clamp_round(_ratio(b_a, b_found), first, last)
        b_error = _block_sum(b_curvature * _square(b_a - b_found * b_levels))
        b_better = b_error < b_best
        b_best, b_d = tl.where(b_better, b_error, b_best), tl.where(b_better, b_found, b_d)
    return b_d


@triton.jit
def _square(b_t):
    return b_t * b_t


@triton.jit
def _codes(b_y, b_d, b_sc, b_dmin, b_mn, high: tl.constexpr):
    return _clamp_round((b_y + b_dmin * b_mn) * _ratio(1.0, b_d * b_sc), 0, high)


@triton.jit
def _fit_affine(
    b_y,
    b_w,
    b_mass,
    high: tl.constexpr,
    shift: tl.constexpr,
    shift_step: tl.constexpr,
    n_shifts: tl.constexpr,
    signed: tl.constexpr,
):
    b_low, b_top = tl.min(b_y, 2, keep_dims=True), tl.max(b_y, 2, keep_dims=True)
    if not signed:
        b_low = tl.minimum(b_low, 0.0)
    b_span, b_wy, b_margin = b_top - b_low, _sum(b_w * b_y), _MARGIN * _sum(b_w * b_y * b_y)
    b_best, b_a, b_b, b_curvature = _sum(b_w * _square(b_y - b_low)), b_span * 0, -b_low, b_mass
    # Each shift from the low end, then from the high end.
    for i in range(2 * n_shifts):
        b_inverse = _ratio(high + _candidate(i // 2, shift, shift_step), b_span)
        b_q = _clamp_round(tl.where(i % 2 == 0, b_y - b_low, b_top - b_y) * b_inverse, 0, high)
        b_q = tl.where(i % 2 == 0, b_q, high - b_q)
        b_wq = b_w * b_q
        b_u, b_uu = _sum(b_wq), _sum(b_wq * b_q)
        b_found_a, b_found_b = _solve(b_uu, b_u, b_mass, _sum(b_wq * b_y), b_wy, signed)
        b_error = _sum(b_w * _square(b_found_a * b_q - b_found_b - b_y))
        b_better = b_error + b_margin < b_best
        b_best = tl.where(b_better, b_error, b_best)
        b_a, b_b = tl.where(b_better, b_found_a, b_a), tl.where(b_better, b_found_b, b_b)
        b_curvature = tl.where(b_better, b_uu - b_u * b_u / b_mass, b_curvature)
    return b_a, b_b, b_curvature


@triton.jit
def _affine_kernel(
    p_x,
    p_w,
    p_q,
    p_d,
    p_sc,
    p_dmin,
    p_mn,
    n,
    n_blocks: tl.constexpr,
    n_groups: tl.constexpr,
    width: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    first: tl.constexpr,
    last: tl.constexpr,
    end: tl.constexpr,
    shift: tl.constexpr,
    shift_step: tl.constexpr,
    n_shifts: tl.constexpr,
    stretch: tl.constexpr,
    stretch_step: tl.constexpr,
    n_stretches: tl.constexpr,
    signed: tl.constexpr,
    weighed: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * n_blocks + tl.arange(0, n_blocks)[:, None, None]
    o_g = o_b * n_groups + tl.arange(0, n_groups)[None, :, None]
    o_w = o_g * width + tl.arange(0, width)[None, None, :]
    m_b = o_b < n
    # [B, G, L]
    b_y = tl.load(p_x + o_w, m_b, 0.0)
    b_w = tl.load(p_w + o_w, m_b, 1.0) if weighed else tl.full(b_y.shape, 1.0, tl.float32)
    # [B, 1, 1]
    b_unit = tl.maximum(tl.max(tl.max(tl.abs(b_y), 2, keep_dims=True), 1, keep_dims=True), _LEAST_MAXIMUM)
    b_y = b_y / b_unit
    # [B, G, 1]
    b_mass = _sum(b_w)
    b_a, b_b, b_curvature = _fit_affine(b_y, b_w, b_mass, high, shift, shift_step, n_shifts, signed)
    # [B, 1, 1]
    b_d = _fit_scale(b_a, b_curvature, b_unit, first, last, end, stretch, stretch_step, n_stretches)
    b_dmin = _fit_scale(b_b, b_mass, b_unit, first, last, end, stretch, stretch_step, n_stretches)
    # [B, G, 1]
    b_sc, b_mn = _clamp_round(_ratio(b_a, b_d), first, last), _clamp_round(_ratio(b_b, b_dmin), first, last)
    b_q = _codes(b_y, b_d, b_sc, b_dmin, b_mn, high)
    b_best = _block_sum(b_w * _square(b_d * b_sc * b_q - b_dmin * b_mn - b_y))
    b_best_d, b_best_sc, b_best_dmin, b_best_mn = b_d, b_sc, b_dmin, b_mn
    for _ in range(_ROUNDS):
        b_q = _codes(b_y, b_d, b_sc, b_dmin, b_mn, high)
        b_wq = b_w * b_q
        b_sc = _clamp_round(_ratio(_sum(b_wq * (b_y + b_dmin * b_mn)), b_d * _sum(b_wq * b_q)), first, last)
        b_q = _codes(b_y, b_d, b_sc, b_dmin, b_mn, high)
        b_mn = _clamp_round(_ratio(_sum(b_w * (b_d * b_sc * b_q - b_y)), b_dmin * b_mass), first, last)
        b_u = b_sc * _codes(b_y, b_d, b_sc, b_dmin, b_mn, high)
        b_wu = b_w * b_u
        b_uu, b_uv, b_vv = _block_sum(b_wu * b_u), _block_sum(b_wu * b_mn), _block_sum(b_w * b_mn * b_mn)
        b_d, b_dmin = _solve(b_uu, b_uv, b_vv, _block_sum(b_wu * b_y), _block_sum(b_w * b_mn * b_y), signed)
        b_d, b_dmin = _round_half(b_d, b_unit), _round_half(b_dmin, b_unit)
        b_q = _codes(b_y, b_d, b_sc, b_dmin, b_mn, high)
        b_error = _block_sum(b_w * _square(b_d * b_sc * b_q - b_dmin * b_mn - b_y))
        b_better = b_error < b_best
        b_best = tl.where(b_better, b_error, b_best)
        b_best_d, b_best_dmin = tl.where(b_better, b_d, b_best_d), tl.where(b_better, b_dmin, b_best_dmin)
        b_best_sc, b_best_mn = tl.where(b_better, b_sc, b_best_sc), tl.where(b_better, b_mn, b_best_mn)
    b_q = _codes(b_y, b_best_d, b_best_sc, b_best_dmin, b_best_mn, high)
    tl.store(p_q + o_w, b_q.to(tl.uint8), m_b)
    tl.store(p_d + o_b, (b_best_d * b_unit).to(tl.float16), m_b)
    tl.store(p_sc + o_g, b_best_sc.to(tl.int8), m_b)
    tl.store(p_dmin + o_b, (b_best_dmin * b_unit).to(tl.float16), m_b)
    tl.store(p_mn + o_g, b_best_mn.to(tl.int8), m_b)


@triton.jit
def _nearest(b_t, low: tl.constexpr, high: tl.constexpr, listed: tl.constexpr):
    """The number of the nearest code, and its value."""
    if listed:
        b_q = tl.zeros_like(b_t).to(tl.int32)
        for i in tl.static_range(15):
            b_q += (b_t > _IQ4_NL_MIDDLES[i]).to(tl.int32)
        b_v = tl.where(b_q < 8, _IQ4_NL_LOW, _IQ4_NL_HIGH) >> (b_q % 8 * 8).to(tl.int64)
        return b_q, b_v.to(tl.int8).to(tl.float32)
    else:
        b_v = _clamp_round(b_t, low, high)
        return (b_v - low).to(tl.int32), b_v


@triton.jit
def _symmetric_kernel(
    p_x,
    p_w,
    p_q,
    p_d,
    p_sc,
    n,
    n_blocks: tl.constexpr,
    n_groups: tl.constexpr,
    width: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    first: tl.constexpr,
    last: tl.constexpr,
    end: tl.constexpr,
    shift: tl.constexpr,
    shift_step: tl.constexpr,
    n_shifts: tl.constexpr,
    stretch: tl.constexpr,
    stretch_step: tl.constexpr,
    n_stretches: tl.constexpr,
    listed: tl.constexpr,
    weighed: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * n_blocks + tl.arange(0, n_blocks)[:, None, None]
    o_g = o_b * n_groups + tl.arange(0, n_groups)[None, :, None]
    o_w = o_g * width + tl.arange(0, width)[None, None, :]
    m_b = o_b < n
    # [B, G, L]
    b_y = tl.load(p_x + o_w, m_b, 0.0)
    b_w = tl.load(p_w + o_w, m_b, 1.0) if weighed else tl.full(b_y.shape, 1.0, tl.float32)
    # [B, 1, 1]
    b_unit = tl.maximum(tl.max(tl.max(tl.abs(b_y), 2, keep_dims=True), 1, keep_dims=True), _LEAST_MAXIMUM)
    b_y = b_y / b_unit
    # [B, G, 1]
    b_extreme, b_energy = _extreme(b_y, 2), _sum(b_w * b_y * b_y)
    b_best, b_a, b_curvature = b_energy, b_extreme * 0, b_extreme * 0
    for i in range(2 * n_shifts):
        b_inverse = _ratio(low + _candidate(i // 2, shift, shift_step), b_extreme)
        _, b_v = _nearest(b_y * tl.where(i % 2 == 0, b_inverse, -b_inverse), low, high, listed)
        b_wv = b_w * b_v
        b_vv = _sum(b_wv * b_v)
        b_found = _ratio(_sum(b_wv * b_y), b_vv)
        b_error = _sum(b_w * _square(b_found * b_v - b_y))
        b_better = b_error + _MARGIN * b_energy < b_best
        b_best, b_a = tl.where(b_better, b_error, b_best), tl.where(b_better, b_found, b_a)
        b_curvature = tl.where(b_better, b_vv, b_curvature)
    # [B, 1, 1]
    b_d = _fit_scale(b_a, b_curvature, b_unit, first, last, end, stretch, stretch_step, n_stretches)
    # [B, G, 1]
    b_sc = _clamp_round(_ratio(b_a, b_d), first, last)
    _, b_v = _nearest(b_y * _ratio(1.0, b_d * b_sc), low, high, listed)
    b_zeros, b_best = _block_sum(b_w * b_y * b_y), _block_sum(b_w * _square(b_d * b_sc * b_v - b_y))
    b_best_d, b_best_sc = tl.where(b_zeros < b_best, 0.0, b_d), b_sc
    b_best = tl.minimum(b_best, b_zeros)
    for _ in range(_ROUNDS):
        _, b_v = _nearest(b_y * _ratio(1.0, b_d * b_sc), low, high, listed)
        b_wv = b_w * b_v
        b_sc = _clamp_round(_ratio(_sum(b_wv * b_y), b_d * _sum(b_wv * b_v)), first, last)
        _, b_v = _nearest(b_y * _ratio(1.0, b_d * b_sc), low, high, listed)
        b_u = b_sc * b_v
        b_d = _round_half(_ratio(_block_sum(b_w * b_u * b_y), _block_sum(b_w * b_u * b_u)), b_unit)
        _, b_v = _nearest(b_y * _ratio(1.0, b_d * b_sc), low, high, listed)
        b_error = _block_sum(b_w * _square(b_d * b_sc * b_v - b_y))
        b_better = b_error < b_best
        b_best, b_best_d = tl.where(b_better, b_error, b_best), tl.where(b_better, b_d, b_best_d)
        b_best_sc = tl.where(b_better, b_sc, b_best_sc)
    b_q, _ = _nearest(b_y * _ratio(1.0, b_best_d * b_best_sc), low, high, listed)
    tl.store(p_q + o_w, b_q.to(tl.uint8), m_b)
    tl.store(p_d + o_b, (b_best_d * b_unit).to(tl.float16), m_b)
    tl.store(p_sc + o_g, b_best_sc.to(tl.int8), m_b)


INTERPRETED = not isinstance(_affine_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was first imported."""


def search(x: Tensor, w: Tensor | None, plan: Plan) -> Fields:
    """As `search_naive`, on the tensors' device."""
    n, block_size = x.shape

    def empty(n_cols: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty((n, n_cols), dtype=dtype)

    fields = Fields(
        empty(block_size, torch.uint8),
        empty(1, torch.float16),
        empty(plan.n_groups, torch.int8),
        empty(1, torch.float16) if plan.affine else None,
        empty(plan.n_groups, torch.int8) if plan.affine else None,
    )
    n_blocks = _WEIGHTS // block_size
    grid = (triton.cdiv(n, n_blocks),)
    sizes = (n_blocks, plan.n_groups, plan.width, plan.low, plan.high, plan.first, plan.last, plan.end)
    steps = (*_spacing(plan.shifts), *_spacing(plan.stretches))
    kernel, out, last = _symmetric_kernel, (fields.q, fields.d, fields.sc), plan.values is not None
    if plan.affine:
        kernel, out, last = _affine_kernel, (*out, fields.dmin, fields.mn), plan.signed
    with torch.cuda.device_of(x):
        # A fused multiply-add is two steps for the price of one, and what it changes is less than a tie.
        kernel[grid](x, w, *out, n, *sizes, *steps, last, w is not None, num_warps=_WARPS, enable_fp_fusion=True)
    return fields


def _spacing(candidates: tuple[float, ...]) -> tuple[float, float, int]:
    """Where the candidates after the first, 0, start, the step between them, and how many there are in all."""
    if len(candidates) == 1:
        return 0.0, 0.0, 1
    _, start, second, *_ = candidates
    return start, second - start, len(candidates)
