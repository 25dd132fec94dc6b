"""What llama.cpp says of its errors, which it writes to a log and does not return."""

from __future__ import annotations

import ctypes
from collections import deque
from functools import cache
from typing import Any

_LOG_LEVEL_ERROR = 4

_CALLBACKS: list[Any] = []


@cache
def collect_errors() -> deque[str]:
    """Listen to llama.cpp's log for the rest of the process; the deque holds its latest error lines."""
    import llama_cpp

    errors: deque[str] = deque(maxlen=20)

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _user: ctypes.c_void_p) -> None:
        if level == _LOG_LEVEL_ERROR and text.strip():
            errors.append(text.decode("utf-8", "replace").strip())

    # llama.cpp keeps the bare pointer: the callback must not be collected.
    _CALLBACKS.append(collect)
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    return errors
