"""What a sweep makes of a model: which files, and each of them when it is asked for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Self

from ..allocation import TOOL
from ..budget import make_problem, make_units, size_range
from ..calibration.imatrix import open_importance
from ..calibration.store import load_calibration
from ..checkpoint import Source
from ..encode import Encoder, library_version
from ..errors import AlphaQError, UsageError
from ..layout import alignment_of
from ..pipeline import AllocationSettings, allocate, convert
from ..recipe import GRANULARITIES
from ..reporter import Reporter, Silent
from ..signals import needs_of, read_calibration
from ..strategies import STRATEGIES
from ..tensor_types import choose_types
from .presets import check_presets, float_file, write_preset

_INPUTS = ("calibration", "imatrix", "initial_router")


@dataclass(frozen=True)
class SweepSettings:
    """What is made of a model.

    Each of `strategies` spends each of `bpws`, bits per expert weight, and with `sizes_of_presets` as many bytes as the
    file of each preset takes, once for each of `granularities`, some of GRANULARITIES. `presets` are some of PRESETS.
    `allocation` is what all have in common: its budget, its strategy and its granularity are not looked at, and presets
    heed its `overrides` and `imatrix` only.
    """

    strategies: tuple[str, ...] = ("alphaq",)
    granularities: tuple[str, ...] = ("stack",)
    bpws: tuple[float, ...] = ()
    presets: tuple[str, ...] = ()
    sizes_of_presets: bool = False
    allocation: AllocationSettings = field(default_factory=AllocationSettings)

    def check(self, source: Source) -> None:
        """UsageError for what makes no sense for `source`, AlphaQError for files that are not of it."""
        check_presets(self.presets)
        for name in self.strategies:
            if name not in STRATEGIES:
                raise UsageError(f"strategy {name!r}: unknown", f"one of {', '.join(STRATEGIES)}")
        for name in self.granularities:
            if name not in GRANULARITIES:
                raise UsageError(f"--granularity {name!r}: unknown", f"one of {', '.join(GRANULARITIES)}")
        if not self.granularities:
            raise UsageError("--granularity names none", f"some of {', '.join(GRANULARITIES)}")
        for bpw in self.bpws:
            if not 0 < bpw < math.inf:
                raise UsageError(
                    f"a budget of {bpw:g} bits per expert weight makes no sense", "for example 2.6,3,3.5,4"
                )
        if self.sizes_of_presets and not self.presets:
            raise UsageError("there are no presets to take sizes from", "name some, for example Q2_K,Q3_K_M,Q4_K_M")
        if not self.presets and not (self.bpws and self.strategies):
            raise UsageError(
                "nothing to compare", "give budgets, for example --bpw 3,3.5,4, or --presets Q3_K_M,Q4_K_M"
            )
        common = self.allocation
        is_spent = bool(self.bpws or self.sizes_of_presets)
        for name, granularity in product(self.strategies, self.granularities) if is_spent else ():
            settings = replace(common, granularity=granularity)
            try:
                read_calibration(source, settings, needs_of(STRATEGIES[name], settings), Silent())
            except UsageError as error:
                raise UsageError(f"strategy {name!r}: {error.message}", error.hint) from None
        choose_types(source, common.overrides)
        if common.imatrix is not None:
            open_importance(common.imatrix, source)
        if common.calibration is not None:
            load_calibration(common.calibration, source)

    def remarks(self, source: Source) -> list[str]:
        """What to know before the work: budgets that cannot be spent."""
        if not self.bpws:
            return []
        found: dict[str, None] = {}
        for granularity in self.granularities:
            common = replace(self.allocation, bpw=0.0, granularity=granularity)
            _, fixed = choose_types(source, common.overrides)
            units = make_units(source.stacks, fixed, common.types, granularity)
            most = size_range(make_problem(units, common, alignment_of(source)))[1]
            most_bpw = most * 8 / sum(unit.n_weights for unit in units)
            # A hair is what rounding makes of a budget that is just the most.
            above = [f"{bpw:g}" for bpw in dict.fromkeys(self.bpws) if bpw > most_bpw * (1 + 1e-9)]
            if above:
                budgets = ", ".join(above)
                found[f"a budget of {budgets} bits per expert weight: the types allow no more than {most_bpw:g}"] = None
        return list(found)


@dataclass(frozen=True)
class Row:
    """A file to make: llama.cpp's by a preset, or ours by an allocation, in which `size_of` may name a preset."""

    name: str
    origin: str
    preset: str = ""
    allocation: AllocationSettings | None = None
    size_of: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.name}.gguf"


def plan_rows(settings: SweepSettings) -> list[Row]:
    """All files, presets first, since others may have to be of their size.

    Names of files with one type per stack do not say so.
    """
    presets = dict.fromkeys(settings.presets)
    ways = list(product(dict.fromkeys(settings.strategies), dict.fromkeys(settings.granularities)))
    rows = [Row(f"preset-{preset}", f"preset {preset}", preset) for preset in presets]
    for bpw, (name, granularity) in product(dict.fromkeys(settings.bpws), ways):
        allocation = replace(
            settings.allocation, strategy=name, granularity=granularity, bpw=bpw, size_bytes=None, fit_bytes=None
        )
        rows.append(Row(f"{_way_name(name, granularity)}-{bpw:.10g}bpw", name, allocation=allocation))
    for preset, (name, granularity) in product(presets if settings.sizes_of_presets else (), ways):
        # The size is not known yet.
        allocation = replace(
            settings.allocation, strategy=name, granularity=granularity, bpw=None, size_bytes=0, fit_bytes=None
        )
        label = f"{_way_name(name, granularity)}-as-{preset}"
        rows.append(Row(label, name, allocation=allocation, size_of=f"preset-{preset}"))
    return rows


def _way_name(strategy: str, granularity: str) -> str:
    return strategy if granularity == "stack" else f"{strategy}-{granularity}"


class Maker:
    """Makes files of `source`, with what they have in common.

    What presets are made from lies in the directory `work_dir`; leaving it removes that, but for an interruption.
    """

    def __init__(
        self,
        source: Source,
        common: AllocationSettings,
        encoder: Encoder,
        device: str,
        threads: int,
        cache_dir: Path,
        work_dir: Path,
        reporter: Reporter,
    ) -> None:
        self.source = source
        self._cache_dir = cache_dir
        self._work_dir = work_dir
        self._common = common
        self._encoder = encoder
        self._device = device
        self._threads = threads
        self._reporter = reporter
        self._inputs = {name: _digest_file(getattr(common, name)) for name in _INPUTS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            for path in self._work_dir.glob("floats-*"):
                path.unlink()

    def identity(self, row: Row) -> Any:
        """All that the bytes of a file depend on, as plain values."""
        if row.allocation is None:
            chosen = [row.preset, self._common.overrides, self._inputs["imatrix"]]
        else:
            chosen = [asdict(row.allocation) | self._inputs, self._encoder.name, self._encoder.version]
        return [TOOL, library_version(), self.source.fingerprint, chosen]

    def make(self, row: Row, out: Path) -> None:
        """Write the file; AlphaQError when it cannot be made."""
        if row.allocation is None:
            write_preset(
                self._floats,
                row.preset,
                out,
                threads=self._threads,
                overrides=self._common.overrides,
                imatrix=self._common.imatrix,
                reporter=self._reporter,
            )
            return
        recipe = allocate(
            self.source,
            row.allocation,
            cache_dir=self._cache_dir,
            encoder=self._encoder,
            device=self._device,
            threads=self._threads,
            reporter=self._reporter,
        )
        imatrix = None if row.allocation.imatrix is None else open_importance(row.allocation.imatrix, self.source)
        convert(
            self.source,
            recipe,
            out,
            imatrix=imatrix,
            encoder=self._encoder,
            threads=self._threads,
            reporter=self._reporter,
        )

    @cached_property
    def _floats(self) -> Path:
        """What presets are made from, written once and gone when the sweep ends."""
        return float_file(self.source, self._work_dir, self._reporter)


def _digest_file(path: Path | None) -> str | None:
    """A sha256 of a file that allocations read; AlphaQError when it cannot be read."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AlphaQError(f"{path}: cannot be read: {error.strerror}") from None
