"""Encode and decode rows with the ggml library that llama-cpp-python ships, on all cores.

The same functions that llama.cpp's own quantiser calls, so the bytes are the same too.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version

import numpy as np

from ..errors import AlphaQError
from ..qtypes import QType, row_bytes

_PACKAGE = "llama-cpp-python"
# Rows handed to a thread at once: enough work per call, few enough that all cores stay busy.
_CHUNK_WEIGHTS = 1 << 18
# The encoders sum importance times powers of weights in float32; from about 1e30 on that overflows to NaN or zeros.
_MOST_IMPORTANCE = 1e20


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    """libggml-base from the installed wheel, without importing llama_cpp (which loads every backend)."""
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")
    try:
        path = distribution(_PACKAGE).locate_file(f"llama_cpp/lib/{name}")
        lib = ctypes.CDLL(str(path))
    except PackageNotFoundError:
        raise AlphaQError(f"{_PACKAGE} is not installed", f"pip install {_PACKAGE}") from None
    except OSError as error:
        raise AlphaQError(f"cannot load libggml: {error}", f"reinstall {_PACKAGE}") from None
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return lib


def library_version() -> str:
    """What the bytes depend on besides the weights, for cache keys: package and version."""
    return f"{_PACKAGE} {version(_PACKAGE)}"


def row_spans(n_rows: int, step: int, block: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of at most `step` rows that cover `n_rows` in order; none reaches over a multiple of `block`."""
    block = block or max(n_rows, 1)
    ends = [(first, min(first + block, n_rows)) for first in range(0, n_rows, block)]
    return [(start, min(start + step, end)) for first, end in ends for start in range(first, end, step)]


def in_chunks(n_rows: int, n_cols: int, threads: int, work, block: int | None = None) -> None:
    """Call `work(start, stop)` over all rows, on `threads` threads (ctypes releases the GIL)."""
    spans = row_spans(n_rows, max(1, _CHUNK_WEIGHTS // max(n_cols, 1)), block)
    if threads <= 1 or len(spans) == 1:
        for span in spans:
            work(*span)
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, *span) for span in spans]:
            future.result()


def encode_rows(rows: np.ndarray, qtype: QType, threads: int = 1, importance: np.ndarray | None = None) -> np.ndarray:
    """Encode float32 `rows` [n_rows, n_cols] as `qtype`: uint8 [n_rows, row_bytes].

    `importance` float32 [n_cols], at least 0, weighs the errors of each column; types with nothing to choose (floats,
    Q8_0) ignore it. [matrices, n_cols] is for rows that are so many matrices of equal height, one after another.
    Byte-equal to llama.cpp's quantiser without or with an importance matrix (`ggml_quantize_chunk`).
    ValueError when the array is not C-contiguous 2-D float32, the row is no whole number of blocks or the
    importance is not of these shapes and values.
    """
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.flags.c_contiguous:
        raise ValueError(f"expected C-contiguous float32 [rows, cols], found {rows.dtype} {rows.shape}")
    n_rows, n_cols = rows.shape
    vectors = None if importance is None else importance_vectors(importance, n_rows, n_cols)
    height = n_rows if vectors is None else n_rows // len(vectors)
    out = np.empty((n_rows, row_bytes(qtype, n_cols)), dtype=np.uint8)
    if qtype == QType.F32:
        out[:] = rows.view(np.uint8)
        return out
    lib = _library()

    def work(start: int, stop: int) -> None:
        vector = None if vectors is None else vectors[start // height].ctypes.data
        written = lib.ggml_quantize_chunk(
            int(qtype), rows.ctypes.data, out.ctypes.data, start * n_cols, stop - start, n_cols, vector
        )
        if written != (stop - start) * out.shape[1]:
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes for {qtype.name}")

    in_chunks(n_rows, n_cols, threads, work, height)
    return out


def importance_vectors(importance: np.ndarray, n_rows: int, n_cols: int) -> np.ndarray:
    """`importance` as C-contiguous float32 [matrices, n_cols]; ValueError when it does not suit the rows."""
    if importance.dtype != np.float32 or importance.ndim not in (1, 2) or importance.shape[-1] != n_cols:
        raise ValueError(f"expected importance float32 [{n_cols}], found {importance.dtype} {importance.shape}")
    vectors = np.ascontiguousarray(np.atleast_2d(importance))
    if not len(vectors) or n_rows % len(vectors):
        raise ValueError(f"{n_rows} rows are no {len(vectors)} matrices of equal height")
    # Not a number is not in any range either.
    if not ((vectors >= 0) & (vectors <= _MOST_IMPORTANCE)).all():
        raise ValueError(f"expected importance between 0 and {_MOST_IMPORTANCE:g}")
    return vectors


def decode_rows(blocks: np.ndarray, qtype: QType, n_cols: int, threads: int = 1) -> np.ndarray:
    """Decode uint8 `blocks` [n_rows, row_bytes] of `qtype` to float32 [n_rows, n_cols]."""
    expected = row_bytes(qtype, n_cols)
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != expected:
        raise ValueError(f"expected uint8 [rows, {expected}] for {qtype.name}, found {blocks.dtype} {blocks.shape}")
    blocks = np.ascontiguousarray(blocks)
    if qtype == QType.F32:
        return blocks.view(np.float32)
    to_float = _library().ggml_get_type_traits(int(qtype)).contents.to_float
    if not to_float:
        raise ValueError(f"libggml cannot decode {qtype.name}")
    out = np.empty((blocks.shape[0], n_cols), dtype=np.float32)

    def work(start: int, stop: int) -> None:
        to_float(blocks[start:].ctypes.data, out[start:].ctypes.data, (stop - start) * n_cols)

    in_chunks(blocks.shape[0], n_cols, threads, work)
    return out
