"""Float rows to GGUF blocks and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .libggml import decode_rows, encode_rows, library_version, row_spans

__all__ = ["ENCODERS", "Encoder", "decode_rows", "encode_rows", "find_encoder", "library_version", "row_spans"]

ENCODERS = ("libggml", "torch")


@dataclass(frozen=True)
class Encoder:
    """Something that makes blocks of rows: `encode` takes and gives what `encode_rows` does.

    `version` is what the bytes depend on besides the weights.
    """

    name: str
    version: str
    encode: Callable[..., np.ndarray]


def find_encoder(name: str = "libggml", device: str = "cpu") -> Encoder:
    """The encoder of this name, one of ENCODERS; "torch" computes on `device`. ValueError for any other name."""
    if name == "libggml":
        return Encoder(name, library_version(), encode_rows)
    if name == "torch":
        from . import torch_encoder

        encode = partial(torch_encoder.encode_rows, device=device)
        return Encoder(name, torch_encoder.encoder_version(), encode)
    raise ValueError(f"unknown encoder {name!r}: expected one of {', '.join(ENCODERS)}")
