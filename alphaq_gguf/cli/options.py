"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from ..errors import UsageError
from ..measure import AlphaSettings, DistortionSettings
from ..pipeline import AllocationSettings
from ..qtypes import QType, parse_qtype
from ..spectral import ESTIMATORS
from ..strategies import STRATEGIES
from ..tensor_types import parse_overrides

_BUDGET, _ALPHAS, _OUTPUT, _MACHINE = "Budget and allocation", "Alphas", "Output", "Machine"


def _choices(name: str, values: list[str]) -> Any:
    return Enum(name, {value: value for value in values}, type=str)


StrategyName = _choices("StrategyName", list(STRATEGIES))
EstimatorName = _choices("EstimatorName", list(ESTIMATORS))
SpectrumName = _choices("SpectrumName", ["farms", "full"])
ReferenceName = _choices("ReferenceName", ["all", "projection", "stack"])
DistortionName = _choices("DistortionName", ["measured", "analytic"])

Source = Annotated[
    Path, typer.Argument(help="Hugging Face checkpoint directory, or an F32/F16/BF16 GGUF file.", show_default=False)
]
Bpw = Annotated[
    float | None,
    typer.Option(help="Bits per expert weight, scales included.", rich_help_panel=_BUDGET, show_default=False),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Size of the whole file, such as 8GiB, 7.5GB or 900MiB.", rich_help_panel=_BUDGET, show_default=False
    ),
]
Strategy = Annotated[
    StrategyName,
    typer.Option(
        help="How bits are spent: " + "; ".join(f"{s.name}: {s.summary}" for s in STRATEGIES.values()) + ".",
        rich_help_panel=_BUDGET,
    ),
]
Gamma = Annotated[
    float | None,
    typer.Option(
        help="Strength of alpha (0 ignores it). (default: 1 / std(ln alpha))",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
Reference = Annotated[ReferenceName, typer.Option(help="What the median alpha is taken over.", rich_help_panel=_BUDGET)]
Types = Annotated[
    str | None,
    typer.Option(
        help="Types allowed for expert stacks, comma-separated. (default: Q2_K to Q6_K and Q8_0 for rows of a "
        "multiple of 256, Q4_0, Q5_0, Q5_1 and Q8_0 for others)",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        help="REGEX=TYPE: the type of every tensor whose name the regular expression finds; repeatable.",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
Distortion = Annotated[
    DistortionName,
    typer.Option(
        help="Error of each type: measured on the real encoding, or the paper's variance x 2^(-2 bits).",
        rich_help_panel=_BUDGET,
    ),
]
DistortionRows = Annotated[
    str,
    typer.Option(
        help="Rows encoded per expert to measure the error: all, a number, or auto (all up to 200 M expert "
        "weights, else 64).",
        rich_help_panel=_BUDGET,
    ),
]
Spectrum = Annotated[
    SpectrumName,
    typer.Option(help="Eigenvalues of 128 x 128 tiles (FARMS) or of the whole matrix.", rich_help_panel=_ALPHAS),
]
Estimator = Annotated[EstimatorName, typer.Option(help="Rule for the length of the tail.", rich_help_panel=_ALPHAS)]
Tiles = Annotated[
    str,
    typer.Option(
        help="Tiles per matrix: all, a number (seeded sample), or auto (all up to an estimated 30 core-minutes, "
        "else 256).",
        rich_help_panel=_ALPHAS,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every sample.", rich_help_panel=_ALPHAS)]
AlphasFile = Annotated[
    Path | None,
    typer.Option(
        "--alphas", help="Alphas file to use instead of measuring.", rich_help_panel=_ALPHAS, show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=_OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)]
Device = Annotated[
    str, typer.Option(help="Where spectra are computed: cpu, cuda, cuda:1, ...", rich_help_panel=_MACHINE)
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads. (default: all cores)", min=1, rich_help_panel=_MACHINE, show_default=False),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where measurements are kept. (default: the user's cache directory)",
        rich_help_panel=_MACHINE,
        show_default=False,
    ),
]
PreTokenizer = Annotated[
    str | None,
    typer.Option(
        help="llama.cpp's pre-tokenizer id, where the tokenizer's regex is unknown.",
        rich_help_panel=_MACHINE,
        show_default=False,
    ),
]
AllowRequantize = Annotated[
    bool,
    typer.Option(
        "--allow-requantize", help="Accept a GGUF whose experts are already quantised.", rich_help_panel=_MACHINE
    ),
]

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`8GiB`, `8G` (binary), `7.5GB` (decimal), `123456` -> bytes; UsageError otherwise."""
    match = _SIZE.match(text)
    if not match:
        raise UsageError(f"--size {text!r} is not a size", "for example --size 8GiB")
    number, letter, binary = float(match[1]), (match[2] or "").upper(), match[3]
    decimal = letter and not binary and text.strip().upper().endswith("B")
    return int(number * (1000 if decimal else 1024) ** " KMGT".index(letter or " "))


def count_or(text: str, words: tuple[str, ...], option: str) -> str:
    """Check that `text` is one of `words` or a positive number; UsageError otherwise."""
    if text in words or (text.isdecimal() and int(text) > 0):
        return text
    raise UsageError(f"{option} {text!r}: expected a positive number or {' or '.join(words)}")


def threads_or_all(threads: int | None) -> int:
    return threads or os.cpu_count() or 1


def cache_or_default(cache_dir: Path | None) -> Path:
    return cache_dir or Path(platformdirs.user_cache_dir("alphaq-gguf"))


def check_device(device: str) -> str:
    """UsageError when torch has no such device here, or one without float64, which spectra need."""
    import torch

    try:
        torch.empty(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: not available: {reason}", "use --device cpu") from None
    return device


def alpha_settings(spectrum: Any, estimator: Any, tiles: str, seed: int) -> AlphaSettings:
    return AlphaSettings(spectrum.value, estimator.value, count_or(tiles, ("auto", "all"), "--tiles"), seed)


def parse_types(text: str | None) -> tuple[QType, ...] | None:
    """`Q2_K,Q4_K` -> types; UsageError for an unknown one."""
    if text is None:
        return None
    try:
        return tuple(parse_qtype(name) for name in text.split(",") if name.strip())
    except ValueError as error:
        raise UsageError(f"--types {text!r}: {error}") from None


def allocation_settings(
    *,
    bpw: float | None,
    size: str | None,
    strategy: Any,
    gamma: float | None,
    reference: Any,
    types: str | None,
    tensor_type: list[str] | None,
    distortion: Any,
    distortion_rows: str,
    alphas: AlphaSettings,
) -> AllocationSettings:
    """All texts parsed; UsageError for the first that makes no sense."""
    if gamma is not None and not 0 <= gamma <= 1000:
        raise UsageError(f"--gamma {gamma:g}: expected a number from 0 to 1000")
    return AllocationSettings(
        bpw=bpw,
        size_bytes=None if size is None else parse_size(size),
        strategy=strategy.value,
        gamma=gamma,
        alpha_reference=reference.value,
        types=parse_types(types),
        overrides=tuple(parse_overrides(tensor_type or [])),
        alphas=alphas,
        distortion=DistortionSettings(
            distortion.value, count_or(distortion_rows, ("auto", "all"), "--distortion-rows"), alphas.seed
        ),
    )
