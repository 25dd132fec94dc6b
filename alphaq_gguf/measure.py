"""Measure a source: alpha and variance of every expert matrix, and the error of every type on it.

One matrix is in memory at a time. Results go to ledgers named after the source's fingerprint and the
settings, so a second run, or one after an interruption, measures only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import spectral
from .checkpoint import ExpertMatrix, ExpertStack, Source
from .encode import decode_rows, encode_rows, library_version
from .errors import AlphaQError
from .ledger import Ledger, Row, read_ledger
from .prefetch import prefetch
from .qtypes import QType
from .reporter import Reporter, Silent

SCHEMA = 1
# Nominal cost of one 128 x 128 tile, and the estimate up to which all tiles are used.
TILE_CORE_S = 1e-3
ALL_TILES_CORE_S = 60 * 60.0
_WORTH_A_LINE_S = 20.0
# Expert weights up to which every row is encoded for the distortion; above, rows are sampled.
ALL_ROWS_WEIGHTS = 200_000_000
SAMPLED_ROWS = 64

ALPHA_COLUMNS = (
    "stack",
    "layer",
    "expert",
    "proj",
    "n_rows",
    "n_cols",
    "alpha",
    "variance",
    "k",
    "n",
    "spectrum",
    "problem",
)
DISTORTION_COLUMNS = ("stack", "expert", "proj", "qtype", "squared_error", "standard_error", "rows")
VARIANCE_COLUMNS = ("stack", "expert", "proj", "row_variance")

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


def note_tiles(settings: AlphaSettings, stacks: list[ExpertStack], threads: int, reporter: Reporter) -> None:
    """Say what all tiles would cost, and whether they are all used, where that is worth a line."""
    seconds = tile_seconds(stacks) / threads
    if settings.spectrum == "farms" and seconds > _WORTH_A_LINE_S:
        kept = settings.max_tiles(stacks)
        chosen = "using all" if kept is None else f"using {kept} seeded tiles a matrix (--tiles all for all)"
        reporter.note(f"Spectra of all tiles take about {seconds / 60:.1f} min on {threads} threads: {chosen}")


def measure(
    source: Source,
    *,
    alphas: AlphaSettings | None,
    distortion: DistortionSettings | None,
    qtypes: Mapping[str, tuple[QType, ...]],
    cache_dir: Path,
    row_variances: bool = False,
    given_alphas: Path | None = None,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Measurements:
    """Measure every expert matrix of `source` that the ledgers in `cache_dir` do not hold yet.

    `qtypes` maps stack names to the types whose error is wanted; `given_alphas` is an alphas file to
    use instead of measuring (AlphaQError when it belongs to another source). WeightError names a
    matrix with NaN or infinite weights.
    """
    reporter = reporter or Silent()
    meters: list[_AlphaMeter | _DistortionMeter | _VarianceMeter] = []
    found_alphas, alpha_header, alpha_meter = {}, {}, None
    if given_alphas is not None:
        alpha_header, found_alphas = load_alphas(given_alphas, source)
    elif alphas is not None:
        alpha_meter = _AlphaMeter(source, alphas, cache_dir, device, threads)
        alpha_header, found_alphas = alpha_meter.ledger.header, alpha_meter.found
        meters.append(alpha_meter)
    found_distortions, distortion_header = {}, {}
    if distortion is not None and distortion.kind == "measured":
        distortion_meter = _DistortionMeter(source, distortion, qtypes, cache_dir, threads)
        distortion_header, found_distortions = distortion_meter.ledger.header, distortion_meter.found
        meters.append(distortion_meter)
    found_variances = {}
    if row_variances:
        variance_meter = _VarianceMeter(source, cache_dir)
        found_variances = variance_meter.found
        meters.append(variance_meter)

    matrices = [m for stack in source.stacks for m in stack.matrices]
    todo = [m for m in matrices if any(meter.needs(m) for meter in meters)]
    try:
        if todo:
            if alpha_meter and any(map(alpha_meter.needs, todo)):
                note_tiles(alpha_meter.settings, source.stacks, threads, reporter)
            total = sum(m.n_rows * m.n_cols for m in todo)
            with _one_torch_thread(), reporter.task("Measuring experts", total, "weights") as advance:
                reads = prefetch(partial(source.read_matrix, matrix) for matrix in todo)
                for matrix, rows in zip(todo, reads, strict=True):
                    for meter in meters:
                        if meter.needs(matrix):
                            meter.measure(matrix, rows)
                    advance(matrix.n_rows * matrix.n_cols)
    except BaseException:
        for meter in meters:
            meter.ledger.close(complete=False)
        raise
    for meter in meters:
        meter.ledger.close(complete=True)
    return Measurements(found_alphas, found_distortions, alpha_header, distortion_header, found_variances)


class _AlphaMeter:
    """Alphas of one source under one setting, in memory and in their ledger."""

    def __init__(self, source: Source, settings: AlphaSettings, cache_dir: Path, device: str, threads: int) -> None:
        self.settings = settings
        self.device = device
        self.threads = threads
        self.max_tiles = settings.max_tiles(source.stacks)
        header = {
            "measured": "alphas",
            "schema": SCHEMA,
            "source": source.fingerprint,
            "spectrum": settings.spectrum,
            "estimator": settings.estimator,
            "max_tiles": self.max_tiles,
            "seed": settings.seed,
        }
        self.ledger = _open_ledger(cache_dir, "alphas", header, ALPHA_COLUMNS)
        self.found: dict[Key, Alpha] = dict(self.ledger.parsed(_parse_alpha))

    def needs(self, matrix: ExpertMatrix) -> bool:
        return key_of(matrix) not in self.found

    def measure(self, matrix: ExpertMatrix, rows: np.ndarray) -> None:
        row = measure_alpha(matrix, rows, self.settings, self.max_tiles, self.device, self.threads)
        key, alpha = _parse_alpha(self.ledger.append(row))
        self.found[key] = alpha


class _DistortionMeter:
    """Encoding errors of one source under one setting, for the types each stack may take."""

    def __init__(
        self,
        source: Source,
        settings: DistortionSettings,
        qtypes: Mapping[str, tuple[QType, ...]],
        cache_dir: Path,
        threads: int,
    ) -> None:
        self.seed = settings.seed
        self.sample = settings.sample_rows(source.stacks)
        self.qtypes = qtypes
        self.threads = threads
        header = {
            "measured": "distortion",
            "schema": SCHEMA,
            "source": source.fingerprint,
            "encoder": library_version(),
            "rows": self.sample,
            "seed": settings.seed,
        }
        self.ledger = _open_ledger(cache_dir, "distortion", header, DISTORTION_COLUMNS)
        self.found: dict[tuple[Key, QType], Distortion] = dict(self.ledger.parsed(_parse_distortion))

    def _missing(self, matrix: ExpertMatrix) -> list[QType]:
        return [q for q in self.qtypes.get(matrix.stack, ()) if (key_of(matrix), q) not in self.found]

    def needs(self, matrix: ExpertMatrix) -> bool:
        return bool(self._missing(matrix))

    def measure(self, matrix: ExpertMatrix, rows: np.ndarray) -> None:
        for qtype in self._missing(matrix):
            result = measure_distortion(rows, qtype, self.sample, _seed(self.seed, matrix), self.threads)
            row = {
                "stack": matrix.stack,
                "expert": matrix.xid,
                "proj": matrix.proj,
                "qtype": qtype.name,
                "squared_error": result.squared_error,
                "standard_error": result.standard_error,
                "rows": min(self.sample or matrix.n_rows, matrix.n_rows),
            }
            self.ledger.append(row)
            self.found[key_of(matrix), qtype] = result


class _VarianceMeter:
    """Largest row variances of each expert's first matrix: gate, or up in layers without gates."""

    def __init__(self, source: Source, cache_dir: Path) -> None:
        self.gated = {stack.bid for stack in source.stacks if stack.proj in ("gate", "gate_up")}
        header = {"measured": "row variances", "schema": SCHEMA, "source": source.fingerprint}
        self.ledger = _open_ledger(cache_dir, "row-variances", header, VARIANCE_COLUMNS)
        self.found: dict[Key, float] = dict(self.ledger.parsed(lambda row: (_row_key(row), float(row["row_variance"]))))

    def needs(self, matrix: ExpertMatrix) -> bool:
        first = "gate" if matrix.bid in self.gated else "up"
        return matrix.proj == first and key_of(matrix) not in self.found

    def measure(self, matrix: ExpertMatrix, rows: np.ndarray) -> None:
        value = float(rows.var(axis=1, dtype=np.float64).max())
        place = {"stack": matrix.stack, "expert": matrix.xid, "proj": matrix.proj}
        self.ledger.append({**place, "row_variance": value})
        self.found[key_of(matrix)] = value


def measure_alpha(
    matrix: ExpertMatrix, rows: np.ndarray, settings: AlphaSettings, max_tiles: int | None, device: str, threads: int
) -> dict[str, Any]:
    """One row of the alphas ledger for `rows` float32 [n_rows, n_cols].

    A side under 128 has no tile: the full spectrum is used and the row says so. Matrices without an
    exponent (zero, constant, rank-deficient, tiny) get an empty alpha and a named problem.
    """
    variance = float(rows.var(dtype=np.float64))
    has_tiles = spectral.count_tiles(*rows.shape) > 0
    kind = "farms" if settings.spectrum == "farms" and has_tiles else "full"
    if not rows.any():
        fit = spectral.Fit(None, 0, 0, 0.0, "all-zero matrix")
    elif (rows == rows.flat[0]).all():
        fit = spectral.Fit(None, 0, 0, 0.0, "constant matrix")
    else:
        weight = torch.from_numpy(rows).to(device)
        if kind == "farms":
            esd = spectral.farms_spectrum(weight, max_tiles, _seed(settings.seed, matrix), threads)
        else:
            esd = spectral.full_spectrum(weight)
        fit = spectral.fit_alpha(esd, settings.estimator)
    return alpha_row(matrix, Alpha(fit.alpha, variance, fit.k, fit.n, kind, fit.problem))


def alpha_row(matrix: ExpertMatrix, alpha: Alpha) -> dict[str, Any]:
    """A row of an alphas file: ALPHA_COLUMNS and their values."""
    place = (matrix.stack, matrix.bid, matrix.xid, matrix.proj, matrix.n_rows, matrix.n_cols)
    return dict(zip(ALPHA_COLUMNS, (*place, *astuple(alpha)), strict=True))


def measure_distortion(rows: np.ndarray, qtype: QType, sample: int | None, seed: int, threads: int) -> Distortion:
    """Squared error of encoding `rows` float32 [n_rows, n_cols] as `qtype`, summed over all rows.

    With `sample` below n_rows that many rows are drawn without replacement from `seed`, the sum is
    scaled up, and its standard error follows from the spread between rows.
    """
    n_rows = len(rows)
    if sample is not None:
        sample = max(sample, 2)  # one row says nothing of the spread
    if sample is not None and sample < n_rows:
        rows = np.ascontiguousarray(rows[np.sort(np.random.default_rng(seed).choice(n_rows, sample, replace=False))])
    decoded = decode_rows(encode_rows(rows, qtype, threads), qtype, rows.shape[1], threads)
    errors = np.square(rows - decoded, dtype=np.float64).sum(axis=1)
    m = len(errors)
    spread = errors.std(ddof=1) if 1 < m < n_rows else 0.0
    return Distortion(float(errors.mean() * n_rows), float(n_rows * spread / np.sqrt(m) * np.sqrt(1 - m / n_rows)))


def load_alphas(path: Path, source: Source) -> tuple[dict[str, Any], dict[Key, Alpha]]:
    """Read an alphas file for `source`; AlphaQError when it is of another model or lacks a matrix."""
    header, rows = read_ledger(path)
    if header.get("measured") != "alphas" or header.get("schema") != SCHEMA:
        raise AlphaQError(
            f"{path}: not an alphas file of schema {SCHEMA}: {header.get('measured')} {header.get('schema')}",
            "write one with `alphaq-gguf alphas`",
        )
    if header.get("source") != source.fingerprint:
        raise AlphaQError(f"{path}: measured on another model than {source.label}", "measure this one")
    try:
        found = dict(_parse_alpha(row) for row in rows)
    except (KeyError, ValueError) as error:
        raise AlphaQError(f"{path}: damaged row: {error!r}", "measure again") from None
    lacking = [m for s in source.stacks for m in s.matrices if key_of(m) not in found]
    if lacking:
        raise AlphaQError(f"{path}: no alpha for {lacking[0].label}", "measure again")
    return header, found


def alphas_header_text(header: dict[str, Any]) -> str:
    """The settings of an alphas file in a few words."""
    tiles = "all tiles" if header["max_tiles"] is None else f"{header['max_tiles']} tiles a matrix"
    return f"{header['estimator']} estimator, {header['spectrum']} spectrum, {tiles}, seed {header['seed']}"


def _open_ledger(cache_dir: Path, kind: str, header: dict[str, Any], columns: tuple[str, ...]) -> Ledger:
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:24]
    return Ledger(cache_dir / f"{kind}-{key}.csv", header, columns)


def _row_key(row: Row) -> Key:
    return (row["stack"], int(row["expert"]), row["proj"])


def _parse_alpha(row: Row) -> tuple[Key, Alpha]:
    return _row_key(row), Alpha(
        float(row["alpha"]) if row["alpha"] else None,
        float(row["variance"]),
        int(row["k"]),
        int(row["n"]),
        row["spectrum"],
        row["problem"],
    )


def _parse_distortion(row: Row) -> tuple[tuple[Key, QType], Distortion]:
    errors = Distortion(float(row["squared_error"]), float(row["standard_error"]))
    return (_row_key(row), QType[row["qtype"]]), errors


def _seed(seed: int, matrix: ExpertMatrix) -> int:
    """A seed of its own for each matrix, independent of the order in which they are measured."""
    digest = hashlib.sha256(f"{seed} {matrix.stack} {matrix.xid} {matrix.proj}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads out of the way while we run one call a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
