"""Meters: each measures one thing on expert matrices and keeps it in its own ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import spectral
from .calibration.imatrix import ImportanceMatrix
from .checkpoint import ExpertMatrix, Source
from .encode import Encoder, decode_rows, find_encoder
from .ledger import Ledger, Row
from .measurements import Alpha, AlphaSettings, Distortion, DistortionSettings, Key, key_of
from .qtypes import QType

SCHEMA = 1
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


class AlphaMeter:
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
        self.found: dict[Key, Alpha] = dict(self.ledger.parsed(parse_alpha))

    def needs(self, matrix: ExpertMatrix) -> bool:
        return key_of(matrix) not in self.found

    def measure(self, matrix: ExpertMatrix, rows: np.ndarray) -> None:
        row = measure_alpha(matrix, rows, self.settings, self.max_tiles, self.device, self.threads)
        key, alpha = parse_alpha(self.ledger.append(row))
        self.found[key] = alpha


class DistortionMeter:
    """Encoding errors of one source under one setting, for the types each stack may take.

    With `imatrix` they are the plain squared errors of the rounding that it weighs.
    """

    def __init__(
        self,
        source: Source,
        settings: DistortionSettings,
        qtypes: Mapping[str, tuple[QType, ...]],
        cache_dir: Path,
        threads: int,
        imatrix: ImportanceMatrix | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        self.seed = settings.seed
        self.sample = settings.sample_rows(source.stacks)
        self.qtypes = qtypes
        self.threads = threads
        self.encoder = encoder or find_encoder()
        # The matrices of a stack come one after another, and all of its importance is read at once.
        self.weights = None if imatrix is None else lru_cache(maxsize=1)(imatrix.weights)
        header = {
            "measured": "distortion",
            "schema": SCHEMA,
            "source": source.fingerprint,
            "encoder": self.encoder.version,
            "rows": self.sample,
            "seed": settings.seed,
        }
        if imatrix is not None:
            header["imatrix"] = imatrix.digest
        self.ledger = _open_ledger(cache_dir, "distortion", header, DISTORTION_COLUMNS)
        self.found: dict[tuple[Key, QType], Distortion] = dict(self.ledger.parsed(_parse_distortion))

    def _missing(self, matrix: ExpertMatrix) -> list[QType]:
        return [q for q in self.qtypes.get(matrix.stack, ()) if (key_of(matrix), q) not in self.found]

    def needs(self, matrix: ExpertMatrix) -> bool:
        return bool(self._missing(matrix))

    def measure(self, matrix: ExpertMatrix, rows: np.ndarray) -> None:
        weights = None if self.weights is None else self.weights(matrix.stack)
        importance = None if weights is None else weights[matrix.xid]
        for qtype in self._missing(matrix):
            seed = _seed(self.seed, matrix)
            result = measure_distortion(rows, qtype, self.sample, seed, self.threads, importance, self.encoder)
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


class VarianceMeter:
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


def measure_distortion(
    rows: np.ndarray,
    qtype: QType,
    sample: int | None,
    seed: int,
    threads: int,
    importance: np.ndarray | None = None,
    encoder: Encoder | None = None,
) -> Distortion:
    """Squared error of encoding `rows` float32 [n_rows, n_cols] as `qtype`, summed over all rows.

    `importance` float32 [n_cols] weighs the rounding, not the error; `encoder` is libggml's unless given. With
    `sample` below n_rows that many rows are drawn without replacement from `seed`, the sum is scaled up, and its
    standard error follows from the spread between rows.
    """
    n_rows = len(rows)
    if sample is not None:
        sample = max(sample, 2)  # one row says nothing of the spread
    if sample is not None and sample < n_rows:
        rows = np.ascontiguousarray(rows[np.sort(np.random.default_rng(seed).choice(n_rows, sample, replace=False))])
    blocks = (encoder or find_encoder()).encode(rows, qtype, threads, importance)
    decoded = decode_rows(blocks, qtype, rows.shape[1], threads)
    errors = np.square(rows - decoded, dtype=np.float64).sum(axis=1)
    m = len(errors)
    spread = errors.std(ddof=1) if 1 < m < n_rows else 0.0
    return Distortion(float(errors.mean() * n_rows), float(n_rows * spread / np.sqrt(m) * np.sqrt(1 - m / n_rows)))


def _open_ledger(cache_dir: Path, kind: str, header: dict[str, Any], columns: tuple[str, ...]) -> Ledger:
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:24]
    return Ledger(cache_dir / f"{kind}-{key}.csv", header, columns)


def _row_key(row: Row) -> Key:
    return (row["stack"], int(row["expert"]), row["proj"])


def parse_alpha(row: Row) -> tuple[Key, Alpha]:
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
