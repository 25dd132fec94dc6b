"""Measure a source: alpha and variance of every expert matrix, and the error of every type on it.

One matrix is in memory at a time. Results go to ledgers named after the source's fingerprint and the
settings, so a second run, or one after an interruption, measures only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .calibration.imatrix import ImportanceMatrix
from .checkpoint import ExpertStack, Source
from .encode import Encoder
from .errors import AlphaQError
from .ledger import read_ledger
from .measurements import Alpha, AlphaSettings, DistortionSettings, Key, Measurements, key_of, tile_seconds
from .meters import SCHEMA, AlphaMeter, DistortionMeter, VarianceMeter, parse_alpha
from .prefetch import prefetch
from .qtypes import QType
from .reporter import Reporter, Silent

_WORTH_A_LINE_S = 20.0


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
    imatrix: ImportanceMatrix | None = None,
    encoder: Encoder | None = None,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Measurements:
    """Measure every expert matrix of `source` that the ledgers in `cache_dir` do not hold yet.

    `qtypes` maps stack names to the types whose error is wanted; `given_alphas` is an alphas file to
    use instead of measuring (AlphaQError when it belongs to another source); `imatrix` weighs the rounding
    whose errors are measured, and `encoder`, libggml's unless given, does it. WeightError names a matrix with NaN or
    infinite weights.
    """
    reporter = reporter or Silent()
    meters: list[AlphaMeter | DistortionMeter | VarianceMeter] = []
    found_alphas, alpha_header, alpha_meter = {}, {}, None
    if given_alphas is not None:
        alpha_header, found_alphas = load_alphas(given_alphas, source)
    elif alphas is not None:
        alpha_meter = AlphaMeter(source, alphas, cache_dir, device, threads)
        alpha_header, found_alphas = alpha_meter.ledger.header, alpha_meter.found
        meters.append(alpha_meter)
    found_distortions, distortion_header = {}, {}
    if distortion is not None and distortion.kind == "measured":
        distortion_meter = DistortionMeter(source, distortion, qtypes, cache_dir, threads, imatrix, encoder)
        distortion_header, found_distortions = distortion_meter.ledger.header, distortion_meter.found
        meters.append(distortion_meter)
    found_variances = {}
    if row_variances:
        variance_meter = VarianceMeter(source, cache_dir)
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
        found = dict(parse_alpha(row) for row in rows)
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


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads out of the way while we run one call a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
