"""What a comparison found, as it is kept in JSON and shown in reports."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import AlphaQError
from ..evaluate.metrics import Divergence, Estimate
from ..evaluate.speed import Speed
from ..writer import write_atomically

FORMAT = "alphaq-comparison"
SCHEMA = 1


@dataclass(frozen=True)
class ReferenceInfo:
    """The full-precision model that files are held against.

    `engine` ran it ("pytorch", "llama.cpp", "llama.cpp, exact", or "file" for a base file made elsewhere); `perplexity`
    is its own on the text.
    """

    name: str
    fingerprint: str
    engine: str
    perplexity: Estimate


@dataclass(frozen=True)
class TextInfo:
    """The tokens that all files saw.

    `digest` is the sha256 of the windows as int64; of each window of `n_ctx` tokens the second half is scored,
    `n_scored` in all. `is_own` where the reference wrote the text.
    """

    names: tuple[str, ...]
    digest: str
    n_ctx: int
    n_windows: int
    n_scored: int
    is_own: bool = False


@dataclass(frozen=True)
class StackTypes:
    """The experts of one stack by type: {type name: experts}."""

    layer: int
    proj: str
    experts: dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """A file to judge: a GGUF, or a recipe with a type per expert, whose size is then the one it would have.

    `origin` says how it came about: "alphaq" and other strategies, "preset Q4_K_M", or "" when it is not known.
    `n_bytes` is the whole file. `budget_bpw` is what was asked for. `types` counts the whole model's weights by type.
    `stacking` is the recipe's result of that name.
    """

    name: str
    fingerprint: str
    n_bytes: int
    bpw: float
    expert_bpw: float
    granularity: str = "stack"
    origin: str = ""
    budget_bpw: float | None = None
    types: dict[str, int] | None = None
    stacks: tuple[StackTypes, ...] = ()
    stacking: dict[str, Any] | None = None


@dataclass(frozen=True)
class Evaluation:
    """One file in one engine: "llama.cpp", "pytorch", or "triton" for PyTorch with the Triton kernels.

    `routers` is the share of tokens by layer whose set of chosen experts equals the reference's. Memory in bytes:
    `peak_bytes` resident, `device_bytes` on the GPU.
    """

    file: str
    engine: str
    device: str
    perplexity: Estimate
    divergence: Divergence
    routers: dict[int, float]
    load_s: float
    speed: Speed | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CrossEngine:
    """How far `engine` is from `other` on the same file: mean KL(other || engine), and how often both agree."""

    file: str
    engine: str
    other: str
    kld: Estimate
    top1: Estimate


@dataclass(frozen=True)
class ProjectionAlphas:
    """PL_Alpha_Hill of every expert of one projection in one layer, None where there is none."""

    layer: int
    proj: str
    alphas: tuple[float | None, ...]


@dataclass(frozen=True)
class TaskScore:
    """A zero-shot task's score: `metric` in [0, 1] over `n` examples."""

    file: str
    engine: str
    task: str
    metric: str
    score: Estimate
    n: int


@dataclass(frozen=True)
class Comparison:
    """Everything. `command` is the line that makes it again; `versions` are of the packages that computed it.

    `failures` names files (and engines) that could not be judged, with the reason.
    """

    command: str
    date: str
    machine: str
    versions: dict[str, str]
    reference: ReferenceInfo
    text: TextInfo
    candidates: tuple[Candidate, ...]
    evaluations: tuple[Evaluation, ...]
    cross: tuple[CrossEngine, ...] = ()
    alphas: tuple[ProjectionAlphas, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    failures: dict[str, str] | None = None
    notes: tuple[str, ...] = ()

    def candidate(self, name: str) -> Candidate:
        """The candidate called `name`."""
        return next(candidate for candidate in self.candidates if candidate.name == name)


def save_comparison(path: Path, comparison: Comparison) -> None:
    """Write the comparison as JSON, atomically."""
    write_atomically(path, json.dumps(to_plain(comparison), indent=1) + "\n")


def to_plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON holds it."""
    return {"format": FORMAT, "schema": SCHEMA, **asdict(comparison)}


def load_comparison(path: Path) -> Comparison:
    """Read a comparison; AlphaQError for a file that is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["schema"] != SCHEMA:
            raise ValueError(f"{data['format']} of schema {data['schema']}, expected {FORMAT} of schema {SCHEMA}")
        return from_plain(Comparison, data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlphaQError(f"{path}: no comparison of files: {error}", "make it again: alphaq-gguf compare") from None


def from_plain(kind: Any, data: Any) -> Any:
    """A value of type `kind`, dataclasses and containers of them, from what JSON kept of it."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {field.name: from_plain(hints[field.name], data[field.name]) for field in fields(kind)}
        return kind(**known)  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, None) or data is None:
        inner: Sequence[Any] = [argument for argument in arguments if argument is not type(None)]
        return data if data is None or not inner else from_plain(inner[0], data)
    if origin is tuple:
        return tuple(from_plain(arguments[0], item) for item in data)
    if origin is dict:
        # JSON knows no keys but strings.
        return {arguments[0](key): from_plain(arguments[1], value) for key, value in data.items()}
    return data
