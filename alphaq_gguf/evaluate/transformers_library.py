"""The transformers library as the PyTorch paths use it: quiet, without remote code, modules without weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import AlphaQError


@contextmanager
def open_transformers(label: str, other_way: str) -> Iterator[Any]:
    """The library, without its progress bars and warnings; AlphaQError when it is missing or fails.

    `label` is what messages call the model, `other_way` what to do where this transformers cannot run it.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise AlphaQError(
            f"{label}: running a model in PyTorch needs transformers, which is not installed",
            f"pip install 'alphaq-gguf[torch-path]', or {other_way}",
        ) from None
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if has_bars:
        logging.disable_progress_bar()
    try:
        yield transformers
    except AlphaQError:
        raise
    except Exception as error:
        # Whatever it raises, the cause is a file or a version that the user can exchange.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AlphaQError(
            f"{label}: transformers {transformers.__version__} cannot load it: {reason}",
            f"install a newer transformers, or {other_way}",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def cache_name(model: Any) -> str:
    """What a model's forward calls its cache, and so does its output: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile have parameters without data; their buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
