"""See the tensors that llama.cpp computes while it runs a model, through its evaluation callback."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from ..errors import AlphaQError

_DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 26: np.dtype(np.int32)}
"""Of the ggml types whose values are numbers one by one."""

# llama.cpp's scheduler names its copies of weights DEVICE#NAME#NUMBER.
_COPY = re.compile(r"[^#]*#(.*)#\d+$")


class _Fields(ctypes.Structure):
    """The first fields of `struct ggml_tensor` of ggml.h, which has no functions that return them."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 3),
    ]


class Tensor:
    """A node of llama.cpp's graph, or one of its sources; valid only inside the callback that was given it."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._fields = _Fields.from_address(address)

    @cached_property
    def name(self) -> str:
        return _library().ggml_get_name(self._address).decode("utf-8", "replace")

    @property
    def op(self) -> str:
        """The operation that computes it, such as MUL_MAT_ID; NONE for weights."""
        return _op_name(self._fields.op)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What the operation reads, at most three."""
        return tuple(Tensor(address) for address in self._fields.src if address)

    def array(self) -> np.ndarray:
        """A copy of its values, four dimensions in torch order, from whatever memory they are in.

        Those of a node's sources are there when the node has just been computed, those of their sources may not be.
        ValueError for a quantised tensor.
        """
        dtype = _DTYPES.get(self._fields.type)
        if dtype is None:
            raise ValueError(f"{self.name}: cannot read values of ggml type {self._fields.type}")
        # A view's bytes may have gaps, which its strides step over.
        data = np.empty(_library().ggml_nbytes(self._address), dtype=np.uint8)
        _library().ggml_backend_tensor_get(self._address, data.ctypes.data, 0, data.size)
        return np.ndarray(self._fields.ne[::-1], dtype, data, strides=self._fields.nb[::-1])


def weights_name(product: Tensor) -> str:
    """The weights that a MUL_MAT_ID multiplies with, by their name in the file."""
    name = product.sources[0].name
    match = _COPY.match(name)
    return match[1] if match else name


class Watch:
    """Hands computed tensors to `take`: those that `wants` accepts, in the order of the graph.

    Hand it to `LlamaModel`. llama.cpp asks `wants` about every node before it computes it, when its values are not
    there yet, and runs everything between two wanted nodes in one go. What either raises ends the watching of that
    sequence, and surfaces from `LlamaModel.run` and the methods that call it.
    """

    def __init__(self, wants: Callable[[Tensor], bool], take: Callable[[Tensor], None]) -> None:
        import llama_cpp.llama_cpp as library

        _check_layout()
        self._wants = wants
        self._take = take
        self._error: BaseException | None = None
        self.callback = library.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _user: int | None) -> bool:
        if self._error is not None:
            return False
        try:
            if ask:
                return self._wants(Tensor(address))
            self._take(Tensor(address))
            return True
        except BaseException as error:
            # ctypes would print it and go on.
            self._error = error
            return False

    def reraise(self) -> None:
        """Raise what a callback raised since the last time."""
        error, self._error = self._error, None
        if error is not None:
            raise error


@cache
def _library() -> ctypes.CDLL:
    """ggml's functions, found through the libllama that is loaded: that very build's."""
    from llama_cpp.llama_cpp import _lib

    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_get_name": (ctypes.c_char_p, [ctypes.c_void_p]),
        "ggml_op_name": (ctypes.c_char_p, [ctypes.c_int]),
        "ggml_nbytes": (ctypes.c_size_t, [ctypes.c_void_p]),
        "ggml_backend_tensor_get": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(_lib, name)
        function.restype, function.argtypes = result, arguments
    return _lib


@cache
def _op_name(op: int) -> str:
    return _library().ggml_op_name(op).decode()


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@cache
def _check_layout() -> None:
    """AlphaQError when the fields of tensors that ggml makes are not where we read them."""
    lib = _library()
    lib.ggml_init.restype, lib.ggml_init.argtypes = ctypes.c_void_p, [_InitParams]
    lib.ggml_free.restype, lib.ggml_free.argtypes = None, [ctypes.c_void_p]
    make, multiply = lib.ggml_new_tensor_3d, lib.ggml_mul_mat_id
    make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 3]
    multiply.restype, multiply.argtypes = ctypes.c_void_p, [ctypes.c_void_p] * 4
    context = lib.ggml_init(_InitParams(1 << 16, None, True))
    try:
        sources = [
            make(context, 1, 64, 5, 3),  # weights of three experts, f16
            make(context, 0, 64, 2, 7),  # inputs of seven tokens at two experts each, f32
            make(context, 26, 2, 7, 1),  # those experts' ids, i32
        ]
        product = _Fields.from_address(multiply(context, *sources))
        stack, _, ids = (_Fields.from_address(address) for address in sources)
        found = [
            *(product.type, [*product.ne], [*product.nb], [*product.src]),
            *(stack.type, [*stack.ne], [*stack.nb], [*stack.src]),
            *(ids.type, stack.op, product.op > 0),
        ]
        expected = [
            *(0, [5, 2, 7, 1], [4, 20, 40, 280], sources),
            *(1, [64, 5, 3, 1], [2, 128, 640, 1920], [None] * 3),
            *(26, 0, True),
        ]
        same = found == expected and _op_name(product.op) == "MUL_MAT_ID"
    finally:
        lib.ggml_free(context)
    if not same:
        raise AlphaQError(
            f"llama-cpp-python {version('llama-cpp-python')}: its tensors cannot be watched: their layout is another",
            "install a version that this one of alphaq-gguf knows, such as llama-cpp-python 0.3.36",
        )
