"""Operations on GGUF blocks: Triton kernels, each with a twin in plain torch.

Importing this package needs neither triton nor a GPU: triton is loaded when a kernel is first launched.
"""

from .dequantize import dequantize
from .formats import FORMATS, BlockFormat, find_format

__all__ = ["FORMATS", "BlockFormat", "dequantize", "find_format"]
