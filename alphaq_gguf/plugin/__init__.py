"""The ggml plug-in with which llama.cpp computes with experts of several types in one stack: built, loaded, used."""

from __future__ import annotations

from pathlib import Path

import platformdirs

from ..reporter import Reporter, Silent
from .build import build_plugin
from .file import ContainerFile, read_container_file
from .load import Plugin, check_types, load_plugin, unload_plugin

__all__ = [
    "ContainerFile",
    "Plugin",
    "build_plugin",
    "cache_dir",
    "check_types",
    "load_plugin",
    "prepare",
    "read_container_file",
    "unload_plugin",
]


def cache_dir() -> Path:
    """Where the compiled plug-in is kept, for all processes of this user."""
    return Path(platformdirs.user_cache_dir("alphaq-gguf")) / "plugin"


def prepare(path: Path, reporter: Reporter | None = None) -> None:
    """Compile the plug-in now if the file at `path` needs it, so that those who load the file later find it.

    AlphaQError for a file whose containers are damaged, and when the plug-in cannot be built.
    """
    if read_container_file(path) is not None:
        build_plugin(cache_dir(), reporter or Silent())
