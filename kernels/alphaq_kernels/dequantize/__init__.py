"""Decode GGUF blocks to floats."""

from __future__ import annotations

import torch

from ..backends import choose_backend, require_triton
from ..formats import BlockFormat, find_format
from .naive import dequantize_naive

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize(
    blocks: torch.Tensor, qtype: int | str, dtype: torch.dtype = torch.float32, *, backend: str = "auto"
) -> torch.Tensor:
    """Decode rows of GGUF blocks: uint8 [n_rows, row_bytes] -> `dtype` [n_rows, n_cols], on the same device.

    `qtype` is a ggml type id (a `gguf.GGMLQuantizationType` is one) or a name such as "Q4_K"; `dtype` is float32,
    float16 or bfloat16; `backend` is "triton", "torch", or "auto", which takes Triton for CUDA tensors where triton
    is installed. CPU tensors reach Triton only in its interpreter (TRITON_INTERPRET=1 before the first launch).

    Every bit pattern of a block decodes to the same float32 bits as in `gguf.dequantize` (gguf-py, quants.py), the
    sign of zero included, except that NaN is only promised to be NaN: its sign and payload depend on the processor.
    float16 and bfloat16 are that float32 rounded to nearest even.

    Raises ValueError, before anything is launched, for an unknown type, dtype or backend, for blocks that are not a
    contiguous uint8 matrix of whole blocks, and where Triton is asked for but cannot run on the tensor's device.
    """
    fmt = find_format(qtype)
    _check(blocks, fmt, dtype)
    if choose_backend(backend, blocks.device) == "torch":
        return dequantize_naive(blocks, fmt, dtype)

    from .triton_kernels import INTERPRETED, launch

    require_triton(blocks.device, INTERPRETED)
    out = blocks.new_empty((blocks.shape[0], blocks.shape[1] // fmt.type_size * fmt.block_size), dtype=dtype)
    launch(blocks, fmt, out)
    return out


def _check(blocks: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> None:
    if not isinstance(blocks, torch.Tensor):
        raise ValueError(f"blocks must be a torch.Tensor, not {type(blocks).__name__}")
    if blocks.dtype != torch.uint8:
        raise ValueError(f"blocks must be torch.uint8, not {blocks.dtype}")
    if blocks.ndim != 2:
        raise ValueError(f"blocks must be [n_rows, row_bytes], not of shape {list(blocks.shape)}")
    if blocks.shape[1] % fmt.type_size:
        raise ValueError(f"rows of {blocks.shape[1]} bytes are not whole {fmt.name} blocks of {fmt.type_size} bytes")
    if not blocks.is_contiguous():
        raise ValueError(f"blocks must be contiguous, not of strides {list(blocks.stride())}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, not {dtype}")
