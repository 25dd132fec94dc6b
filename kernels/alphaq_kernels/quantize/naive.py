"""Find the scales and codes of GGUF blocks in plain torch, on any device: the twin that kernels are checked against.

Sums are taken in an order that depends on nothing but the width, so a block gets the same bytes in any company.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import Fields
from .plans import INDEPENDENT, LEAST_HALF, LEAST_MAXIMUM, MARGIN, MOST_HALF, ROUNDS, Plan


def search_naive(x: Tensor, w: Tensor | None, plan: Plan) -> Fields:
    """Scales and codes of blocks x float32 [n, block_size]; w, of this shape too, in (0, 1], weighs squared errors."""
    x = x.reshape(-1, plan.n_groups, plan.width)
    w = torch.ones_like(x) if w is None else w.reshape(x.shape)
    # Squares of weights in units of the block's largest stay inside float32.
    unit = x.abs().amax((1, 2), keepdim=True).clamp_min(LEAST_MAXIMUM)
    search = _search_affine if plan.affine else _search_symmetric
    return search(x / unit, w, unit, plan)


def _search_affine(y: Tensor, w: Tensor, unit: Tensor, plan: Plan) -> Fields:
    """y = d * sc * q - dmin * mn: a first choice, then sc, mn and (d, dmin) in turn, each the best for the others."""

    def codes() -> Tensor:
        return _clamp_round((y + dmin * mn) * _ratio(1, d * sc), plan.low, plan.high)

    def error() -> Tensor:
        return _block_sum(w * (d * sc * q - dmin * mn - y) ** 2)

    a, b, curvature = _fit_affine(y, w, plan)
    mass = _sum(w)
    d, dmin = _fit_scale(a, curvature, unit, plan), _fit_scale(b, mass, unit, plan)
    sc, mn = _levels(_ratio(a, d), plan), _levels(_ratio(b, dmin), plan)
    q = codes()
    best = (error(), d, sc, dmin, mn)
    for _ in range(ROUNDS):
        sc = _levels(_ratio(_sum(w * q * (y + dmin * mn)), d * _sum(w * q * q)), plan)
        q = codes()
        mn = _levels(_ratio(_sum(w * (d * sc * q - y)), dmin * mass), plan)
        q = codes()
        u, v = sc * q, mn.expand_as(q)
        squares = _block_sum(w * u * u), _block_sum(w * u * v), _block_sum(w * v * v)
        d, dmin = _solve(*squares, _block_sum(w * u * y), _block_sum(w * v * y), plan)
        d, dmin = _round_half(d, unit), _round_half(dmin, unit)
        q = codes()
        best = _better((error(), d, sc, dmin, mn), best)
    _, d, sc, dmin, mn = best
    return _fields(codes(), d * unit, sc, dmin * unit, mn)


def _search_symmetric(y: Tensor, w: Tensor, unit: Tensor, plan: Plan) -> Fields:
    """y = d * sc * v: a first choice, then sc and d in turn, each the best for the other."""

    def values() -> Tensor:
        return _values(y * _ratio(1, d * sc), plan)

    a, curvature = _fit_symmetric(y, w, plan)
    d = _fit_scale(a, curvature, unit, plan)
    sc = _levels(_ratio(a, d), plan)
    v = values()
    best = (_block_sum(w * (d * sc * v - y) ** 2), d, sc)
    # Not all types have a code for zero.
    best = _better((_block_sum(w * y * y), torch.zeros_like(d), sc), best)
    for _ in range(ROUNDS):
        sc = _levels(_ratio(_sum(w * v * y), d * _sum(w * v * v)), plan)
        u = sc * values()
        d = _round_half(_ratio(_block_sum(w * u * y), _block_sum(w * u * u)), unit)
        v = values()
        best = _better((_block_sum(w * (d * sc * v - y) ** 2), d, sc), best)
    _, d, sc = best
    t = y * _ratio(1, d * sc)
    q = _nearest(t, plan.values) if plan.values else _clamp_round(t, plan.low, plan.high) - plan.low
    return _fields(q, d * unit, sc)


def _fit_affine(y: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """a and b of each group with the least error of y = a * q - b, and what the error grows by with a squared.

    Candidates are codes spread evenly over the group's range or more or less than that, from either end.
    """
    low, high = y.amin(2, keepdim=True), y.amax(2, keepdim=True)
    if not plan.signed:
        low = low.clamp_max(0)
    span, mass, wy = high - low, _sum(w), _sum(w * y)
    best = (_sum(w * (y - low) ** 2), torch.zeros_like(span), -low, mass)
    margin = MARGIN * _sum(w * y * y)
    for shift in plan.shifts:
        inverse = _ratio(plan.high + shift, span)
        up = _clamp_round((y - low) * inverse, plan.low, plan.high)
        down = plan.high - _clamp_round((high - y) * inverse, plan.low, plan.high)
        for q in (up, down):
            wq, wqq = _sum(w * q), _sum(w * q * q)
            a, b = _solve(wqq, wq, mass, _sum(w * q * y), wy, plan)
            best = _better((_sum(w * (a * q - b - y) ** 2), a, b, wqq - wq * wq / mass), best, margin)
    return best[1:]


def _fit_symmetric(y: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """a of each group with the least error of y = a * v, and what the error grows by with a squared.

    Candidates let the weight that is largest take the lowest value, or more or less than that, of either sign.
    """
    extreme = _extreme(y, 2)
    energy, zero = _sum(w * y * y), torch.zeros_like(extreme)
    best = (energy, zero, zero)
    for shift in plan.shifts:
        inverse = _ratio(plan.low + shift, extreme)
        for signed in (inverse, -inverse):
            v = _values(y * signed, plan)
            wvv = _sum(w * v * v)
            a = _ratio(_sum(w * v * y), wvv)
            best = _better((_sum(w * (a * v - y) ** 2), a, wvv), best, MARGIN * energy)
    return best[1:]


def _fit_scale(a: Tensor, curvature: Tensor, unit: Tensor, plan: Plan) -> Tensor:
    """d of each block, a half, with the least error of a = d * level over its groups: [n, groups, 1] -> [n, 1, 1]."""
    extreme = _extreme(a, 1)
    best = (torch.full_like(extreme, torch.inf), extreme)
    for stretch in plan.stretches:
        d = _round_half(extreme / (plan.end * (1 + stretch)), unit)
        best = _better((_block_sum(curvature * (a - d * _levels(_ratio(a, d), plan)) ** 2), d), best)
    return best[1]


def _solve(uu: Tensor, uv: Tensor, vv: Tensor, uy: Tensor, vy: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """a and b with the least squared error of y = a * u - b * v, from sums of products; b is 0 where it may not be."""
    det = uu * vv - uv * uv
    a, b = _ratio(vv * uy - uv * vy, det), _ratio(uv * uy - uu * vy, det)
    alone = det <= INDEPENDENT * uu * vv
    if not plan.signed:
        alone |= b < 0
    return torch.where(alone, _ratio(uy, uu), a), torch.where(alone, 0.0, b)


def _better(found: tuple[Tensor, ...], best: tuple[Tensor, ...], margin: Tensor | float = 0.0) -> tuple[Tensor, ...]:
    """`found` where its first tensor is less than that of `best` by more than `margin`, element by element."""
    smaller = found[0] + margin < best[0]
    return tuple(torch.where(smaller, *pair) for pair in zip(found, best, strict=True))


def _levels(t: Tensor, plan: Plan) -> Tensor:
    return _clamp_round(t, plan.first, plan.last)


def _values(t: Tensor, plan: Plan) -> Tensor:
    """The value of a code nearest to t."""
    if plan.values is None:
        return _clamp_round(t, plan.low, plan.high)
    return torch.tensor(plan.values, dtype=t.dtype, device=t.device)[_nearest(t, plan.values)]


def _nearest(t: Tensor, values: tuple[int, ...]) -> Tensor:
    """The index of the value nearest to t."""
    known = torch.tensor(values, dtype=t.dtype, device=t.device)
    return torch.bucketize(t, (known[1:] + known[:-1]) / 2)


def _clamp_round(t: Tensor, low: int, high: int) -> Tensor:
    return (t.clamp(low, high) + 0.5).floor_()


def _extreme(t: Tensor, dim: int) -> Tensor:
    """What is largest in magnitude, with its sign."""
    low, high = t.amin(dim, keepdim=True), t.amax(dim, keepdim=True)
    return torch.where(high > -low, high, low)


def _ratio(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _round_half(d: Tensor, unit: Tensor) -> Tensor:
    """d * unit as the nearest half that is finite, and not 0 where d is not, in units of `unit`."""
    exact = (d * unit).clamp(-MOST_HALF, MOST_HALF)
    half = exact.half().float()
    return torch.where((half == 0) & (exact != 0), LEAST_HALF * exact.sign(), half) / unit


def _sum(t: Tensor) -> Tensor:
    """Sums over the last dimension, whose length is a power of two."""
    while t.shape[-1] > 1:
        half = t.shape[-1] // 2
        t = t[..., :half] + t[..., half:]
    return t


def _block_sum(t: Tensor) -> Tensor:
    return _sum(_sum(t).transpose(1, 2))


def _fields(q: Tensor, d: Tensor, sc: Tensor, dmin: Tensor | None = None, mn: Tensor | None = None) -> Fields:
    return Fields(
        q.flatten(1).to(torch.uint8),
        d.flatten(1).half(),
        sc.flatten(1).to(torch.int8),
        None if dmin is None else dmin.flatten(1).half(),
        None if mn is None else mn.flatten(1).to(torch.int8),
    )
