"""ggml's public API through ctypes: products of experts on a device, as llama.cpp would ask for them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

F32, I32 = 0, 26
_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
SUCCESS = 0


class _Params(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


_SIGNATURES = {
    "ggml_init": (ctypes.c_void_p, [_Params]),
    "ggml_free": (None, [ctypes.c_void_p]),
    "ggml_new_tensor_3d": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 3]),
    "ggml_mul_mat_id": (ctypes.c_void_p, [ctypes.c_void_p] * 4),
    "ggml_new_graph": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_build_forward_expand": (None, [ctypes.c_void_p] * 2),
    "ggml_set_name": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_backend_dev_by_name": (ctypes.c_void_p, [ctypes.c_char_p]),
    "ggml_backend_dev_init": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_backend_dev_buffer_type": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [ctypes.c_void_p] * 2),
    "ggml_backend_dev_backend_reg": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_reg_get_proc_address": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_backend_dev_buffer_from_host_ptr": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
    ),
    "ggml_backend_buft_alloc_buffer": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
    "ggml_backend_buffer_get_base": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [ctypes.c_void_p, ctypes.c_int]),
    "ggml_backend_buffer_free": (None, [ctypes.c_void_p]),
    "ggml_backend_tensor_alloc": (ctypes.c_int, [ctypes.c_void_p] * 3),
    "ggml_backend_tensor_set": (None, [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2),
    "ggml_backend_graph_compute": (ctypes.c_int, [ctypes.c_void_p] * 2),
    "ggml_backend_free": (None, [ctypes.c_void_p]),
}


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's library as llama_cpp has loaded it, through which ggml's functions are found."""
    import llama_cpp.llama_cpp

    found = llama_cpp.llama_cpp._lib
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


@dataclass
class Product:
    """What a MUL_MAT_ID gives: status, results float32 [tokens, used, rows], and whether the device took it."""

    status: int
    values: np.ndarray
    supported: bool


@dataclass
class Experts:
    """A stack of experts in a buffer of a device; `data` uint8 is mapped, or copied to "DEVICE copied"."""

    device: str
    qtype: int
    shape: tuple[int, int, int]
    data: np.ndarray
    usage: int = _WEIGHTS

    def __post_init__(self) -> None:
        lib = library()
        name, _, way = self.device.partition(" ")
        self._device = lib.ggml_backend_dev_by_name(name.encode())
        assert self._device, f"no device {self.device}"
        self._ctx = lib.ggml_init(_Params(1 << 20, None, True))
        self.tensor = lib.ggml_new_tensor_3d(self._ctx, self.qtype, *reversed(self.shape))
        lib.ggml_set_name(self.tensor, b"blk.0.ffn_up_exps.weight")
        mapped = way != "copied"
        size = len(self.data)
        if mapped:
            pointer = self.data.ctypes.data
            self.buffer = lib.ggml_backend_dev_buffer_from_host_ptr(self._device, pointer, size, size)
            lib.ggml_backend_tensor_alloc(self.buffer, self.tensor, pointer)
        else:
            self.buffer = lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_dev_buffer_type(self._device), size)
            lib.ggml_backend_tensor_alloc(self.buffer, self.tensor, lib.ggml_backend_buffer_get_base(self.buffer))
        lib.ggml_backend_buffer_set_usage(self.buffer, self.usage)
        if not mapped:
            lib.ggml_backend_tensor_set(self.tensor, self.data.ctypes.data, 0, size)
        self.backend = lib.ggml_backend_dev_init(self._device, None)

    def set_threads(self, n_threads: int) -> None:
        """Compute on so many threads from now on."""
        lib = library()
        address = lib.ggml_backend_reg_get_proc_address(
            lib.ggml_backend_dev_backend_reg(self._device), b"ggml_backend_set_n_threads"
        )
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(self.backend, n_threads)

    def __enter__(self) -> Experts:
        return self

    def __exit__(self, *_: object) -> None:
        lib = library()
        lib.ggml_backend_free(self.backend)
        lib.ggml_backend_buffer_free(self.buffer)
        lib.ggml_free(self._ctx)

    def multiply(self, *operands: tuple[np.ndarray, np.ndarray]) -> list[Product]:
        """Products, computed in one graph, with pairs of x float32 [tokens, slots, cols] and ids int32 [tokens, used].

        Slots are 1 or `used`. Both may be views with any strides but along the last axis of x.
        """
        lib = library()
        ctx = lib.ggml_init(_Params(1 << 22, None, True))
        graph = lib.ggml_new_graph(ctx)
        products, keep = [], []
        for x, ids in operands:
            b, chosen = _wrap(ctx, F32, x, keep), _wrap(ctx, I32, ids[None], keep)
            node = lib.ggml_mul_mat_id(ctx, self.tensor, b, chosen)
            values = np.full((*ids.shape, self.shape[1]), np.nan, np.float32)
            _Tensor.from_address(node).data = values.ctypes.data
            lib.ggml_build_forward_expand(graph, node)
            products.append(Product(SUCCESS, values, lib.ggml_backend_dev_supports_op(self._device, node)))
        status = lib.ggml_backend_graph_compute(self.backend, graph)
        lib.ggml_free(ctx)
        for product in products:
            product.status = status
        return products

    def multiply_twice(self, x: np.ndarray, ids: np.ndarray) -> Product:
        """The product of a product with the same experts, whose rows are as long as their columns, in one graph."""
        lib = library()
        ctx = lib.ggml_init(_Params(1 << 20, None, True))
        graph = lib.ggml_new_graph(ctx)
        keep: list[np.ndarray] = []
        operand, chosen = _wrap(ctx, F32, x, keep), _wrap(ctx, I32, ids[None], keep)
        for _ in range(2):
            operand = lib.ggml_mul_mat_id(ctx, self.tensor, operand, chosen)
            values = np.full((*ids.shape, self.shape[1]), np.nan, np.float32)
            _Tensor.from_address(operand).data = values.ctypes.data
            keep.append(values)
        lib.ggml_build_forward_expand(graph, operand)
        supported = lib.ggml_backend_dev_supports_op(self._device, operand)
        status = lib.ggml_backend_graph_compute(self.backend, graph)
        lib.ggml_free(ctx)
        return Product(status, keep[-1], supported)


def _wrap(ctx: int, number: int, array: np.ndarray, keep: list) -> int:
    """A tensor of these values where they are, strides and all."""
    tensor = library().ggml_new_tensor_3d(ctx, number, *reversed(array.shape))
    fields = _Tensor.from_address(tensor)
    fields.data = array.ctypes.data
    for i, stride in enumerate(reversed(array.strides)):
        fields.nb[i] = stride
    fields.nb[3] = fields.nb[2] * fields.ne[2]
    keep.append(array)
    return tensor
