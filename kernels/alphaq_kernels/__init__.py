"""Operations on GGUF blocks: Triton kernels, each with a twin in plain torch.

Importing this package needs neither triton nor a GPU: triton is loaded when a kernel is first launched.
"""

from .backends import why_no_triton
from .dequantize import dequantize
from .formats import FORMATS, BlockFormat, find_format
from .moe_decode import moe_decode
from .moe_prefill import moe_prefill
from .packed import Activation, PackedExperts
from .quantize import quantize

__all__ = [
    "FORMATS",
    "Activation",
    "BlockFormat",
    "PackedExperts",
    "dequantize",
    "find_format",
    "moe_decode",
    "moe_prefill",
    "quantize",
    "why_no_triton",
]
