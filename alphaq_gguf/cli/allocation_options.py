"""Options of the commands that allocate: how alphas are measured, what is to be spent, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..budget import DEFAULT_CONTEXT, ROUTING_MASSES, SCOPES
from ..errors import UsageError
from ..measurements import AlphaSettings, DistortionSettings
from ..pipeline import AllocationSettings
from ..recipe import GRANULARITIES
from ..spectral import ESTIMATORS
from ..strategies import STRATEGIES
from ..tensor_types import parse_overrides
from .options import CONTEXT_HELP, parse_types

_BUDGET, _ALPHAS = "Budget and allocation", "Alphas"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*$", re.IGNORECASE)

ALL_STRATEGIES = "all"
StrategyName: Any = StrEnum("StrategyName", [(name, name) for name in (*STRATEGIES, ALL_STRATEGIES)])
EstimatorName: Any = StrEnum("EstimatorName", [(name, name) for name in ESTIMATORS])


GranularityName: Any = StrEnum("GranularityName", [(name.replace("-", "_"), name) for name in GRANULARITIES])
RoutingMassName: Any = StrEnum("RoutingMassName", [(name, name) for name in ROUTING_MASSES])
ScopeName: Any = StrEnum("ScopeName", [(name, name) for name in SCOPES])


class SpectrumName(StrEnum):
    farms = "farms"
    full = "full"


class ReferenceName(StrEnum):
    all = "all"
    projection = "projection"
    stack = "stack"


class DistortionName(StrEnum):
    measured = "measured"
    analytic = "analytic"


@dataclass(frozen=True)
class AlphaOptions:
    """How alphas are measured."""

    spectrum: Annotated[
        SpectrumName,
        typer.Option(help="Eigenvalues of 128 x 128 tiles (FARMS) or of the whole matrix.", rich_help_panel=_ALPHAS),
    ] = SpectrumName.farms
    estimator: Annotated[
        EstimatorName,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(help="Rule for the length of the tail.", rich_help_panel=_ALPHAS),
    ] = EstimatorName.hill
    tiles: Annotated[
        str,
        typer.Option(
            help="Tiles per matrix: all, a number (seeded sample), or auto (all up to an estimated 60 core-minutes, "
            "else 256).",
            rich_help_panel=_ALPHAS,
        ),
    ] = "auto"
    seed: Annotated[int, typer.Option(help="Seed of every sample.", rich_help_panel=_ALPHAS)] = 0

    def settings(self) -> AlphaSettings:
        tiles = _count_or(self.tiles, ("auto", "all"), "--tiles")
        return AlphaSettings(self.spectrum.value, self.estimator.value, tiles, self.seed)


@dataclass(frozen=True)
class BudgetOptions:
    """What to spend, and how."""

    bpw: Annotated[
        float | None,
        typer.Option(help="Bits per expert weight, scales included.", rich_help_panel=_BUDGET, show_default=False),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the whole file, such as 8GiB, 7.5GB or 900MiB.", rich_help_panel=_BUDGET, show_default=False
        ),
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(
            help="Memory that the file, its KV cache at --ctx and llama.cpp's buffers must fit into, such as 12GiB.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    ctx: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"With --fit: {CONTEXT_HELP} (default: 8192)", rich_help_panel=_BUDGET, show_default=False
        ),
    ] = None
    strategy: Annotated[
        StrategyName,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(
            help="How bits are spent; `alphaq-gguf strategies` says what each does, and `all` lets `allocate` compare "
            "them.",
            rich_help_panel=_BUDGET,
        ),
    ] = StrategyName.alphaq
    routing_mass: Annotated[
        RoutingMassName | None,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(
            help="Multiply errors by how much random vectors use the expert: the share routed to it, or its mean "
            "squared gate weight; true-: by how much the text of --calibration does. (default: count with sim-routing, "
            "none with others)",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="How text uses the experts, for moqa, pmq, self and --routing-mass true-count and true-gate2: a file "
            "of `alphaq-gguf calibrate`. (default: that of --imatrix)",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Importance matrix that weighs rounding, expert by expert: imatrix.gguf, a legacy .dat, or a file of "
            "`alphaq-gguf calibrate`.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    pmq_exponents: Annotated[
        tuple[float, float, float],
        typer.Option(
            help="With pmq: the powers of an expert's frequency, of its gate weight and of its error.",
            rich_help_panel=_BUDGET,
        ),
    ] = (1.0, 1.0, 2.0)
    initial_router: Annotated[
        Path | None,
        typer.Option(
            help="With router-norm: safetensors file with the routers before training, as blk.N.ffn_gate_inp.weight.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    granularity: Annotated[
        GranularityName,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(
            help="What gets a type of its own: a stack, as in any GGUF, each expert of it, or each expert with all its "
            "projections.",
            rich_help_panel=_BUDGET,
        ),
    ] = GranularityName.stack
    containers: Annotated[
        bool,
        typer.Option(
            help="With a type per expert, spend the budget on what a GGUF stores, unused bytes of containers included, "
            "or on the experts' own bytes alone.",
            rich_help_panel=_BUDGET,
        ),
    ] = True
    scope: Annotated[
        ScopeName,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(help="What the budget is shared out over evenly before it is spent.", rich_help_panel=_BUDGET),
    ] = ScopeName["global"]
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Strength of alpha; 0 ignores it. (default: 1 / std(ln alpha))",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    alpha_reference: Annotated[
        ReferenceName, typer.Option(help="What the median alpha is taken over.", rich_help_panel=_BUDGET)
    ] = ReferenceName.all
    alphas: Annotated[
        Path | None,
        typer.Option(help="Alphas file to use instead of measuring.", rich_help_panel=_BUDGET, show_default=False),
    ] = None
    types: Annotated[
        str | None,
        typer.Option(
            help="Types allowed for expert stacks, comma-separated. (default: Q2_K to Q6_K and Q8_0 for rows of a "
            "multiple of 256, Q4_0, Q5_0, Q5_1 and Q8_0 for others)",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            help="REGEX=TYPE: the type of every tensor whose name the regular expression finds; repeatable.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None
    distortion: Annotated[
        DistortionName,
        typer.Option(
            help="Error of each type: measured on the real encoding, or the paper's variance x 2^(-2 bits).",
            rich_help_panel=_BUDGET,
        ),
    ] = DistortionName.measured
    distortion_rows: Annotated[
        str,
        typer.Option(
            help="Rows encoded per expert to measure the error: all, a number, or auto (all up to 200 M expert "
            "weights, else 64).",
            rich_help_panel=_BUDGET,
        ),
    ] = "auto"

    @property
    def label(self) -> str:
        """The budget as it appears in file names."""
        return f"{self.bpw:g}bpw" if self.bpw is not None else self.size or self.fit or ""

    @property
    def given(self) -> bool:
        """Whether the user said anything about what is to be allocated."""
        options = (self.bpw, self.size, self.fit, self.types, self.tensor_type, self.alphas, self.calibration)
        return any(options) or self.gamma is not None

    def settings(self, alphas: AlphaSettings) -> AllocationSettings:
        """All texts parsed; UsageError for the first that makes no sense."""
        if self.gamma is not None and not 0 <= self.gamma <= 1000:
            raise UsageError(f"--gamma {self.gamma:g}: expected a number from 0 to 1000")
        if not all(0 <= power <= 10 for power in self.pmq_exponents):
            raise UsageError(f"--pmq-exponents {self.pmq_exponents}: expected three numbers from 0 to 10")
        if self.ctx is not None and self.fit is None:
            raise UsageError("--ctx belongs to --fit", "for example --fit 12GiB --ctx 8192")
        rows = _count_or(self.distortion_rows, ("auto", "all"), "--distortion-rows")
        return AllocationSettings(
            bpw=self.bpw,
            size_bytes=None if self.size is None else _parse_size(self.size, "--size"),
            fit_bytes=None if self.fit is None else _parse_size(self.fit, "--fit"),
            n_ctx=self.ctx or DEFAULT_CONTEXT,
            strategy=self.strategy.value,
            routing_mass=None if self.routing_mass is None else self.routing_mass.value,
            initial_router=self.initial_router,
            calibration=self.calibration,
            imatrix=self.imatrix,
            exponents=self.pmq_exponents,
            granularity=self.granularity.value,
            containers=self.containers,
            scope=self.scope.value,
            gamma=self.gamma,
            alpha_reference=self.alpha_reference.value,
            types=parse_types(self.types),
            overrides=tuple(parse_overrides(self.tensor_type or [])),
            alphas=alphas,
            distortion=DistortionSettings(self.distortion.value, rows, alphas.seed),
        )


def _parse_size(text: str, option: str) -> int:
    """`8GiB`, `8G` (binary), `7.5GB` (decimal), `123456` -> bytes; UsageError otherwise."""
    match = _SIZE.match(text)
    if not match:
        raise UsageError(f"{option} {text!r} is not a size", f"for example {option} 8GiB")
    number, letter, binary = float(match[1]), (match[2] or "").upper(), match[3]
    decimal = letter and not binary and text.strip().upper().endswith("B")
    return int(number * (1000 if decimal else 1024) ** " KMGT".index(letter or " "))


def _count_or(text: str, words: tuple[str, ...], option: str) -> str:
    """Check that `text` is one of `words` or a positive number; UsageError otherwise."""
    if text in words or (text.isdecimal() and int(text) > 0):
        return text
    raise UsageError(f"{option} {text!r}: expected a positive number or {' or '.join(words)}")
