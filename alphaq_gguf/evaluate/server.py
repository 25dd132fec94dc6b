"""llama-cpp-python's OpenAI-compatible server for one file, with containers or without."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

from ..errors import AlphaQError
from ..guard import override
from ..plugin import read_container_file
from .llama import one_line_errors, weights_placed

# What clients get to take the rest of their answers.
_GRACE_S = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, at a free port for 0; AlphaQError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        # Names that cannot be looked up have codes of their own; Python adds the address to the system's words.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise AlphaQError(f"{host}:{port}: {reason}", "choose another --host or --port") from None


def serve(
    path: Path,
    listening: socket.socket,
    announce: Callable[[], None],
    *,
    n_ctx: int,
    threads: int,
    gpu_layers: int,
    repack: bool,
    log_level: str,
) -> None:
    """Answer requests until the process is interrupted; answers that are being written then end.

    `announce` is called when the file is loaded.
    AlphaQError when the server's packages are missing or the file does not load.
    """
    try:
        import uvicorn
        from llama_cpp.server import app as server
        from llama_cpp.server.settings import ModelSettings, ServerSettings
    except ImportError as error:
        raise AlphaQError(
            f"the server's packages are not installed: {error.name} is missing", "pip install 'alphaq-gguf[serve]'"
        ) from None

    asked = read_container_file(path)
    model = _settings(
        ModelSettings,
        model=str(path),
        model_alias=path.stem,
        n_ctx=n_ctx,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=gpu_layers,
        kv_overrides=None if asked is None else [override(asked.architecture)],
        flash_attn=True,
        # Those of all tokens would take memory for context times vocabulary.
        logits_all=False,
        use_mlock=False,
        verbose=False,
    )
    with one_line_errors(path), weights_placed(path, asked, repack=repack) as placed:
        app = server.create_app(server_settings=_settings(ServerSettings), model_settings=[model])
    proxy: Any = server._llama_proxy
    stopping = Event()
    proxy().generate = _until(stopping, proxy().generate)

    class Interruptible(uvicorn.Server):
        """Ends what is being written, which it would otherwise wait for."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            stopping.set()
            super().handle_exit(sig, frame)

    announce()
    config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=_GRACE_S)
    try:
        Interruptible(config).run(sockets=[listening])
    except KeyboardInterrupt:
        # How the server passes on what has stopped it.
        pass
    finally:
        # While the interpreter ends would be too late: what the model needs to be freed is gone by then.
        proxy.free()
        # Not before: the model has a bare pointer to it.
        del placed


def _until(stopping: Event, generate: Callable[..., Iterator[int]]) -> Callable[..., Iterator[int]]:
    """`Llama.generate`, whose tokens end when it is time to stop."""

    def generate_until(*args: Any, **kwargs: Any) -> Iterator[int]:
        for token in generate(*args, **kwargs):
            if stopping.is_set():
                return
            yield token

    return generate_until


def _settings(kind: Any, **values: Any) -> Any:
    """Settings as given, the others at their defaults, and none from environment variables that happen to be set."""
    defaults = {name: field.default for name, field in kind.model_fields.items()}
    return kind(**defaults | values)
