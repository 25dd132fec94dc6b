"""What can be measured on a source: how it is asked for, what comes of it, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import spectral
from .checkpoint import ExpertMatrix, ExpertStack
from .qtypes import QType

# Nominal cost of one 128 x 128 tile, and the estimate up to which all tiles are used.
TILE_CORE_S = 1e-3
ALL_TILES_CORE_S = 60 * 60.0
# Expert weights up to which every row is encoded for the distortion; above, rows are sampled.
ALL_ROWS_WEIGHTS = 200_000_000
SAMPLED_ROWS = 64

Key = tuple[str, int, str]
"""(stack name, expert, projection)."""


@dataclass(frozen=True)
class AlphaSettings:
    """How alphas are measured. `tiles`: "auto", "all" or a number (seeded sample above it)."""

    spectrum: str = "farms"
    estimator: str = "hill"
    tiles: str = "auto"
    seed: int = 0

    def max_tiles(self, stacks: list[ExpertStack]) -> int | None:
        """The number of tiles a matrix may use, None for all: "auto" takes all up to 60 core-minutes."""
        if self.tiles == "all" or (self.tiles == "auto" and tile_seconds(stacks) <= ALL_TILES_CORE_S):
            return None
        return spectral.SAMPLED_TILES if self.tiles == "auto" else int(self.tiles)


@dataclass(frozen=True)
class DistortionSettings:
    """How the error of a type is found: "measured" on `rows` ("auto", "all", a number) or "analytic"."""

    kind: str = "measured"
    rows: str = "auto"
    seed: int = 0

    def sample_rows(self, stacks: list[ExpertStack]) -> int | None:
        """Rows per matrix, None for all: "auto" takes all up to 200 M expert weights, else 64."""
        if self.rows == "all" or (self.rows == "auto" and sum(s.n_weights for s in stacks) <= ALL_ROWS_WEIGHTS):
            return None
        return SAMPLED_ROWS if self.rows == "auto" else int(self.rows)


@dataclass(frozen=True)
class Alpha:
    """A matrix' exponent (None with `problem` set), population variance, tail length and spectrum kind."""

    alpha: float | None
    variance: float
    k: int
    n: int
    spectrum: str
    problem: str


@dataclass(frozen=True)
class Distortion:
    """Sum over all weights of a matrix of (w - decode(encode(w)))^2; `standard_error` is 0 unless sampled."""

    squared_error: float
    standard_error: float


@dataclass(frozen=True)
class Measurements:
    """What was measured on a source. `alpha_header` and `distortion_header` record how.

    `row_variances` are the largest population variances of a row, of each expert's first matrix.
    """

    alphas: dict[Key, Alpha]
    distortions: dict[tuple[Key, QType], Distortion]
    alpha_header: dict[str, Any]
    distortion_header: dict[str, Any]
    row_variances: dict[Key, float]


def key_of(matrix: ExpertMatrix) -> Key:
    return (matrix.stack, matrix.xid, matrix.proj)


def tile_seconds(stacks: list[ExpertStack]) -> float:
    """Estimated core-seconds to decompose every tile of every expert matrix."""
    tiles = sum(spectral.count_tiles(m.n_rows, m.n_cols) for s in stacks for m in s.matrices)
    return tiles * TILE_CORE_S
