"""Float rows to GGUF blocks and back."""

from .libggml import decode_rows, encode_rows, library_version, row_spans

__all__ = ["decode_rows", "encode_rows", "library_version", "row_spans"]
