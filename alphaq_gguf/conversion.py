"""From a source and a recipe to a GGUF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .calibration.imatrix import ImportanceMatrix
from .checkpoint import Source
from .container import Container
from .encode import Encoder, find_encoder, row_spans
from .errors import AlphaQError
from .gguf_file import TensorInfo
from .layout import plan_file
from .prefetch import prefetch
from .qtypes import FLOAT_TYPES, QType
from .recipe import Recipe, check_recipe
from .reporter import Reporter
from .writer import check_output, write_gguf

# Weights read and encoded at once: 16 MiB of float32, enough for every core to have a share.
_CHUNK_WEIGHTS = 1 << 22
# Zeros written at once.
_FILL_BYTES = 1 << 22


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. `resumed_bytes` were already there from an interrupted run.

    `expert_bpw` are stored bits per expert weight, `containers` the stacks whose experts have types of their own.
    """

    path: Path
    size: int
    recipe: Recipe
    resumed_bytes: int
    expert_bpw: float
    containers: tuple[str, ...] = ()


def convert(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    imatrix: ImportanceMatrix | None = None,
    encoder: Encoder | None = None,
    force: bool = False,
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Conversion:
    """Write the GGUF that `recipe` makes of `source` to `out`, in one pass and atomically.

    `imatrix` weighs the rounding of every tensor that it knows, as llama-quantize does; `encoder` is libggml's unless
    given. OutputError when `out` cannot be written, AlphaQError when the recipe is for another source, importance
    matrix or encoder, WeightError on NaN or infinite weights. An interrupted run continues when called again.
    """
    encoder = encoder or find_encoder()
    check_recipe(recipe, source, "recipe")
    check_imatrix(recipe, imatrix, "recipe")
    check_encoder(recipe, encoder, "recipe")
    check_output(out, force=force, inputs=source.files)
    plan = plan_file(source, recipe, imatrix)

    def produce(info: TensorInfo) -> Iterator[np.ndarray]:
        stored, container = source.tensors[info.name], plan.containers.get(info.name)
        weights = None if imatrix is None else imatrix.weights(info.name)
        height = max(1, info.n_rows // (1 if weights is None else len(weights)))
        pieces = _cut(info, container, height)
        # Floats always pass through float32, exactly, because that is where NaN is looked for.
        copied = stored.qtype if stored.qtype not in FLOAT_TYPES else None
        chunks = prefetch(
            partial(source.read_bytes if qtype == copied else source.read_rows, info.name, start, stop)
            for start, stop, qtype in pieces
        )

        def encoded() -> Iterator[np.ndarray]:
            for (start, stop, qtype), rows in zip(pieces, chunks, strict=True):
                importance = None if weights is None else weights[start // height : -(-stop // height)]
                yield rows if qtype == copied else encoder.encode(rows, qtype, threads, importance)

        return encoded() if container is None else _frame(container, info.n_bytes, pieces, encoded())

    resumed = write_gguf(out, plan.header, plan.tensors, plan.size, produce, reporter)
    return Conversion(out, plan.size, recipe, resumed, plan.expert_bpw, tuple(plan.containers))


def _cut(info: TensorInfo, container: Container | None, height: int) -> list[tuple[int, int, QType]]:
    """What to read and encode at once, in the file's order: (first row, end, type).

    Each holds whole matrices of `height` rows or lies in one, so that the importance of its rows is that of whole
    vectors, and lies in one expert of a container.
    """
    step = max(1, _CHUNK_WEIGHTS // max(info.n_cols, 1))
    block = step // height * height or height
    if container is None:
        return [(start, stop, info.qtype) for start, stop in row_spans(info.n_rows, step, block)]
    n_rows = container.shape[1]
    return [
        (xid * n_rows + start, xid * n_rows + stop, container.types[xid])
        for xid in container.order
        for start, stop in row_spans(n_rows, step, block)
    ]


def _frame(
    container: Container, n_bytes: int, pieces: Sequence[tuple[int, int, QType]], blocks: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """The container's header, its `pieces` encoded as `blocks` in their places, and zeros up to `n_bytes`."""
    head = container.header()
    yield np.frombuffer(head, np.uint8)
    at = len(head)
    for (start, _, _), data in zip(pieces, blocks, strict=True):
        xid, row = divmod(start, container.shape[1])
        if row == 0:
            yield np.zeros(container.offsets[xid] - at, np.uint8)
            at = container.offsets[xid]
        yield data
        at += data.nbytes
    while at < n_bytes:
        fill = np.zeros(min(n_bytes - at, _FILL_BYTES), np.uint8)
        yield fill
        at += fill.nbytes


def check_imatrix(recipe: Recipe, imatrix: ImportanceMatrix | None, where: str) -> None:
    """AlphaQError unless `imatrix` is the one that the recipe was made with, or neither is there."""
    named = recipe.settings.get("imatrix") or {}
    file, digest = named.get("file"), named.get("digest")
    if digest == (None if imatrix is None else imatrix.digest):
        return
    if imatrix is None:
        raise AlphaQError(f"{where}: allocated with the importance matrix {file}, none is given", f"--imatrix {file}")
    if digest is None:
        raise AlphaQError(
            f"{where}: allocated without an importance matrix, {imatrix.label} is given",
            "allocate again with --imatrix, or leave it out",
        )
    raise AlphaQError(
        f"{where}: allocated with the importance matrix {file}, {digest[:12]}: "
        f"{imatrix.label} is {imatrix.digest[:12]}",
        "give that one, or allocate again with this --imatrix",
    )


def check_encoder(recipe: Recipe, encoder: Encoder, where: str) -> None:
    """AlphaQError unless `encoder` is the one whose errors the recipe was made with."""
    # Recipes that do not say so are older than the second encoder.
    named = recipe.settings.get("encoder", "libggml")
    if named != encoder.name:
        raise AlphaQError(
            f"{where}: allocated for the encoder {named}, not {encoder.name}",
            f"--encoder {named}, or allocate again with --encoder {encoder.name}",
        )
