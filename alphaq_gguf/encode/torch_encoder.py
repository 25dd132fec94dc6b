"""Encode rows with the kernels of `alphaq_kernels`, on a GPU or, as their oracle, the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from alphaq_kernels.quantize import VERSION, quantize

from ..qtypes import FLOAT_TYPES, QType, row_bytes
from .libggml import encode_rows as encode_with_libggml
from .libggml import importance_vectors, in_chunks


def encoder_version() -> str:
    """What the bytes depend on besides the weights, for cache keys."""
    return f"alphaq-kernels quantize {VERSION}"


def encode_rows(
    rows: np.ndarray,
    qtype: QType,
    threads: int = 1,
    importance: np.ndarray | None = None,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """As libggml's `encode_rows`, with less squared error, computed on `device`, or on `threads` threads of the CPU.

    Floats are left to libggml. ValueError where libggml's raises one.
    """
    if qtype in FLOAT_TYPES:
        return encode_with_libggml(rows, qtype, threads, importance)
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.flags.c_contiguous:
        raise ValueError(f"expected C-contiguous float32 [rows, cols], found {rows.dtype} {rows.shape}")
    n_rows, n_cols = rows.shape
    out = torch.empty((n_rows, row_bytes(qtype, n_cols)), dtype=torch.uint8)
    x, w = _tensor(rows), None if importance is None else _tensor(importance_vectors(importance, n_rows, n_cols))
    if torch.device(device).type != "cpu":
        return quantize(x.to(device), int(qtype), None if w is None else w.to(device)).cpu().numpy()

    height = n_rows if w is None else n_rows // len(w)

    def work(start: int, stop: int) -> None:
        out[start:stop] = quantize(x[start:stop], int(qtype), None if w is None else w[start // height])

    with _one_torch_thread():
        in_chunks(n_rows, n_cols, threads, work, height)
    return out.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    # torch shares memory with arrays that may be written, and with no others.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One chunk a thread scales better than one operation on all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
