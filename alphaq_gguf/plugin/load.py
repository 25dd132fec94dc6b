"""Load the ggml plug-in into this process's llama.cpp, and place tensors in its buffers."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import AlphaQError
from ..evaluate.llama_log import collect_errors
from ..guard import DEVICE, REPACKING_DEVICE
from ..qtypes import QType
from ..reporter import Reporter

PACKAGE = "llama-cpp-python"
BACKEND_API_VERSION = 2
"""Of the interface that ggml_backend_interface.h declares."""
SUPPORTED = ("0.3.36",)
"""Versions of llama-cpp-python that the plug-in is tested with."""

# One function of each of ggml's libraries; which of them are libraries of their own differs from build to build.
_LIBRARIES_WITH = ("ggml_backend_load", "ggml_init", "ggml_get_type_traits_cpu")
# How the plug-in begins what it says.
_VOICE = "alphaq: "


class BufferTypeOverride(ctypes.Structure):
    """`struct llama_model_tensor_buft_override` of llama.h, which llama-cpp-python does not define.

    `llama_model_params.tensor_buft_overrides` points to an array of these that ends with an empty one.
    """

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


@dataclass(frozen=True)
class Plugin:
    """The plug-in in this process: ggml's handles of its registration and of its two buffer types."""

    path: Path
    registration: int
    mapped: int
    repacking: int

    def place(self, pattern: str, *, repack: bool) -> ctypes.Array[BufferTypeOverride]:
        """What `tensor_buft_overrides` is to point to while a model loads: tensors that match are in its buffers.

        With `repack` these are the buffers with experts rearranged for the processor.
        """
        chosen = self.repacking if repack else self.mapped
        return (BufferTypeOverride * 2)(BufferTypeOverride(pattern.encode(), chosen), BufferTypeOverride(None, None))


_LOADED: dict[Path, Plugin] = {}


def load_plugin(path: Path) -> Plugin:
    """The plug-in at `path` in this process, loaded once; it tests itself as it loads.

    AlphaQError with its reason, or ggml's, when it does not load.
    """
    path = path.resolve()
    if path not in _LOADED:
        _LOADED[path] = _load(path)
    return _LOADED[path]


def unload_plugin() -> None:
    """Take the plug-in out of this process again, in which no model that uses it may be open."""
    for plugin in _LOADED.values():
        _library().ggml_backend_unload(plugin.registration)
    _LOADED.clear()


def does_not_run(reason: str) -> AlphaQError:
    """The error for a plug-in that the installed llama.cpp cannot use, naming those that can."""
    return AlphaQError(
        f"the ggml plug-in does not run in {PACKAGE} {version(PACKAGE)}: {reason}",
        f"it is made for version {BACKEND_API_VERSION} of ggml's backend interface and tested with {PACKAGE} "
        f"{', '.join(SUPPORTED)}: pip install {PACKAGE}=={SUPPORTED[-1]}",
    )


def try_plugin(path: Path, reporter: Reporter) -> None:
    """See whether the plug-in at `path` loads: in a process of its own, which a wrong interface may crash."""
    load_plugin(path)


def check_types(types: set[QType], where: str) -> None:
    """AlphaQError for a type that the installed llama.cpp does not know, or cannot multiply with on the CPU."""
    library = _library()
    traits_of = getattr(library, "ggml_get_type_traits_cpu", None)
    if traits_of is not None:
        traits_of.restype, traits_of.argtypes = ctypes.POINTER(_CpuTypeTraits), [ctypes.c_int]
    for qtype in sorted(types):
        known = library.ggml_type_name(qtype) not in (None, b"NONE")
        if not known or (traits_of is not None and not traits_of(qtype).contents.vec_dot):
            raise AlphaQError(
                f"{where}: has experts of type {qtype.name}, with which {PACKAGE} {version(PACKAGE)} cannot compute "
                "on the CPU",
                f"update {PACKAGE}, or convert the model without it: --types",
            )


class _CpuTypeTraits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h, as far as it is needed."""

    _fields_ = [("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p)]


def _load(path: Path) -> Plugin:
    library = _library()
    _promote(library)
    errors = collect_errors()
    errors.clear()
    with _hearing_plugin() as said:
        registration = library.ggml_backend_load(os.fsencode(path))
    if not registration:
        raise does_not_run([*said, *errors, "it gives no reason"][0])
    mapped, repacking = (_buffer_type(library, name) for name in (DEVICE, REPACKING_DEVICE))
    return Plugin(path, registration, mapped, repacking)


def _buffer_type(library: Any, device: str) -> int:
    return library.ggml_backend_dev_buffer_type(library.ggml_backend_dev_by_name(device.encode()))


def _library() -> Any:
    """libllama as llama_cpp has loaded it, through which ggml's functions are found whichever library has them."""
    import llama_cpp.llama_cpp

    # Private, but opening the files again could load second copies of ggml: its wheel holds each under three names.
    library: Any = llama_cpp.llama_cpp._lib
    pointer = ctypes.c_void_p
    library.ggml_backend_load.restype, library.ggml_backend_load.argtypes = pointer, [ctypes.c_char_p]
    library.ggml_backend_unload.restype, library.ggml_backend_unload.argtypes = None, [pointer]
    library.ggml_backend_dev_by_name.restype = pointer
    library.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    library.ggml_backend_dev_buffer_type.restype = pointer
    library.ggml_backend_dev_buffer_type.argtypes = [pointer]
    library.ggml_type_name.restype, library.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return library


class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of dlfcn.h."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _promote(library: Any) -> None:
    """Make ggml's functions visible to the plug-in, which is linked against none of its libraries.

    So one plug-in serves any program of the same backend interface. Python loads libraries for itself alone.
    """
    process = ctypes.CDLL(None)
    for name in _LIBRARIES_WITH:
        function, info = getattr(library, name, None), _SymbolInfo()
        if function is None:
            continue
        if process.dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)) and info.file:
            ctypes.CDLL(os.fsdecode(info.file), mode=os.RTLD_NOW | os.RTLD_NOLOAD | os.RTLD_GLOBAL)


@contextmanager
def _hearing_plugin() -> Iterator[list[str]]:
    """The lines that the plug-in writes to stderr in the block, known after it; other output is passed on."""
    said: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            written = file.read()
    for line in written.splitlines(keepends=True):
        text = line.decode("utf-8", "replace")
        if text.startswith(_VOICE):
            said.append(text.removeprefix(_VOICE).strip())
        else:
            os.write(2, line)
