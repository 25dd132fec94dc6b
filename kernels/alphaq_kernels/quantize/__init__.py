"""Encode floats as GGUF blocks."""

from __future__ import annotations

import torch

from ..backends import choose_backend, require_triton
from ..formats import BlockFormat, find_format
from .naive import search_naive
from .packing import pack
from .plans import PLANS

VERSION = 1
"""Changes whenever the blocks of some rows do."""
# Weights encoded at once: the twin holds about a dozen float32 tensors of this size, the kernel none.
_CHUNK_WEIGHTS = {"torch": 1 << 22, "triton": 1 << 25}
# No weight counts for less than this part of the most important one in its block, so that no sum over some is zero.
_LEAST_IMPORTANCE = 1e-6


def quantize(
    rows: torch.Tensor,
    qtype: int | str,
    importance: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    chunk_weights: int | None = None,
) -> torch.Tensor:
    """Encode finite rows as GGUF blocks: float32 [n_rows, n_cols] -> uint8 [n_rows, row_bytes], on the same device.

    Scales are searched for the least squared error, weighed by `importance`, float32 [n_cols], at least 0, or
    [matrices, n_cols] for rows that are so many matrices of equal height, one after another. The bytes are not those
    of libggml, whose searches favour large weights; the error is less. Zeros stay zeros; what no half scales is
    clamped. A block's bytes depend on its weights and the backend alone; backends, or one on different devices, may
    decide near ties otherwise.

    `qtype` and `backend` are as in `dequantize`; `chunk_weights` weights are encoded at once, 4 or 32 million unless
    given, which bounds the memory taken.

    Raises ValueError, before anything is launched, for an unknown type or backend, for rows that are no contiguous
    float32 matrix of whole blocks, for importance of another shape, type, device or sign, and where Triton is asked
    for but cannot run on the rows' device.
    """
    fmt = find_format(qtype)
    _check(rows, fmt, importance)
    backend = choose_backend(backend, rows.device)
    search = search_naive if backend == "torch" else _triton_search(rows)
    n_rows, n_cols = rows.shape
    x, per_row = rows.reshape(-1, fmt.block_size), n_cols // fmt.block_size
    known, per_matrix = None, 1
    if importance is not None:
        known = _relative(importance.reshape(-1, fmt.block_size))
        per_matrix = max(1, n_rows // (1 if importance.ndim == 1 else len(importance)) * per_row)
    out = torch.empty((len(x), fmt.type_size), dtype=torch.uint8, device=rows.device)
    step = max(1, (chunk_weights or _CHUNK_WEIGHTS[backend]) // fmt.block_size)
    for start in range(0, len(x), step):
        chunk, w = x[start : start + step], None
        if known is not None:
            i = torch.arange(start, start + len(chunk), device=rows.device)
            w = known[i // per_matrix * per_row + i % per_row]
        out[start : start + step] = pack(search(chunk, w, PLANS[fmt.name]), fmt)
    return out.view(n_rows, per_row * fmt.type_size)


def _relative(importance: torch.Tensor) -> torch.Tensor:
    """Importance [blocks, block_size] relative to the largest of each block; the same for all where that is 0."""
    most = importance.amax(1, keepdim=True)
    return torch.where(most > 0, importance / most, 1.0).clamp_min(_LEAST_IMPORTANCE)


def _triton_search(rows: torch.Tensor):
    from .triton_kernels import INTERPRETED, search

    require_triton(rows.device, INTERPRETED)
    return search


def _check(rows: torch.Tensor, fmt: BlockFormat, importance: torch.Tensor | None) -> None:
    if not isinstance(rows, torch.Tensor):
        raise ValueError(f"rows must be a torch.Tensor, not {type(rows).__name__}")
    if rows.dtype != torch.float32 or rows.ndim != 2:
        raise ValueError(f"rows must be torch.float32 [n_rows, n_cols], not {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] % fmt.block_size:
        raise ValueError(f"rows of {rows.shape[1]} weights are not whole {fmt.name} blocks of {fmt.block_size}")
    if not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous, not of strides {list(rows.stride())}")
    if importance is None:
        return
    if not isinstance(importance, torch.Tensor):
        raise ValueError(f"importance must be a torch.Tensor, not {type(importance).__name__}")
    shape, n_cols = list(importance.shape), rows.shape[1]
    if importance.dtype != torch.float32 or len(shape) not in (1, 2) or shape[-1] != n_cols:
        raise ValueError(f"importance must be torch.float32 [{n_cols}], not {importance.dtype} {shape}")
    if importance.device != rows.device:
        raise ValueError(f"importance must be on {rows.device} like the rows, not on {importance.device}")
    n_matrices = shape[0] if len(shape) == 2 else 1
    if not n_matrices or len(rows) % n_matrices:
        raise ValueError(f"{len(rows)} rows are no {n_matrices} matrices of equal height")
    # NaN is not in any range either.
    if not ((importance >= 0) & (importance < torch.inf)).all():
        raise ValueError("importance must be at least 0 and finite")
