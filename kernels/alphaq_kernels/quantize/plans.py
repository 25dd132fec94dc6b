"""What each block type lets an encoder choose, and where it looks for the best choice."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import IQ4_NL_VALUES

MOST_HALF = 65504.0
LEAST_HALF = 2.0**-24
# Blocks without a weight above this are zeros in any type, since the scale of a block is a half.
LEAST_MAXIMUM = 2.0**-60
# How often scales and codes are chosen anew after the first choice.
ROUNDS = 2
# The part of a group's sum of squares by which a candidate must be better than those before it: less than what rounding
# a scale to a half costs, and more than sums in float32 are off.
MARGIN = 1e-9
# The part of its diagonal that the determinant of two sums of squares keeps if they are not of the same direction.
INDEPENDENT = 1e-5


def _around_zero(start: float, stop: float, n: int) -> tuple[float, ...]:
    """0 and `n` steps from `start` to `stop`; 0 comes first, so that it wins where others are no better."""
    return (0.0, *(start + (stop - start) * i / (n - 1) for i in range(n)))


@dataclass(frozen=True)
class Plan:
    """A block is `n_groups` groups of `width` weights.

    Symmetric types are x = d * sc * v, affine ones x = d * sc * v - dmin * mn, with v from `low` to `high`, or from
    `values`, and sc and mn from `first` to `last`, which are both 1 in types without scales of groups. The largest
    scale of a block is to be `end`. Only a `signed` dmin may be negative.

    A search tries to let the codes of a group reach `shifts` steps further than its weights, and the scales of
    a block a `stretches` part further than those of its groups.
    """

    n_groups: int
    width: int
    low: int
    high: int
    shifts: tuple[float, ...]
    first: int = 1
    last: int = 1
    end: int = 1
    stretches: tuple[float, ...] = (0.0,)
    affine: bool = False
    signed: bool = False
    values: tuple[int, ...] | None = None


_STRETCHES = _around_zero(-0.3, 0.15, 16)

PLANS = {
    "Q4_0": Plan(1, 32, -8, 7, _around_zero(-1, 1, 12)),
    "Q5_0": Plan(1, 32, -16, 15, _around_zero(-1, 1, 12)),
    "Q5_1": Plan(1, 32, 0, 31, _around_zero(-0.9, 2, 13), affine=True, signed=True),
    "Q8_0": Plan(1, 32, -127, 127, _around_zero(-1, 1, 8)),
    "Q2_K": Plan(16, 16, 0, 3, _around_zero(-0.8, 1.5, 13), 0, 15, 15, _STRETCHES, affine=True),
    "Q3_K": Plan(16, 16, -4, 3, _around_zero(-1.2, 1.4, 14), -32, 31, -32, _STRETCHES),
    "Q4_K": Plan(8, 32, 0, 15, _around_zero(-0.9, 2, 13), 0, 63, 63, _STRETCHES, affine=True),
    "Q5_K": Plan(8, 32, 0, 31, _around_zero(-0.9, 2, 13), 0, 63, 63, _STRETCHES, affine=True),
    "Q6_K": Plan(16, 16, -32, 31, _around_zero(-1, 1, 12), -128, 127, -128, _STRETCHES),
    "IQ4_NL": Plan(1, 32, -127, 113, _around_zero(-20, 30, 15), values=IQ4_NL_VALUES),
}
