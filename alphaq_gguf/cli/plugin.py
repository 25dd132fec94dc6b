"""`alphaq-gguf plugin`: the ggml plug-in that llama.cpp needs for files with a type per expert."""

from __future__ import annotations

import os
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.gguf import GGUFSource
from ..console import Console
from ..plugin import build_plugin, cache_dir, check_types, load_plugin
from ..plugin.load import BACKEND_API_VERSION, PACKAGE, SUPPORTED
from ..qtypes import bpw

NAME = "plugin"

app = typer.Typer(
    name=NAME, help="The ggml plug-in that llama.cpp needs for files with a type per expert.", no_args_is_help=True
)


def build(
    force: Annotated[bool, typer.Option("--force", help="Compile it again.")] = False,
) -> None:
    """Compile the plug-in for the installed llama-cpp-python, with the C++ compiler that CXX names or that is found."""
    console = Console()
    console.result(f"Plug-in: {_build(console, again=force)}")


def path() -> None:
    """Print where the plug-in is, compiled if need be, for GGML_BACKEND_PATH of llama.cpp's own programs."""
    Console().text(f"{_build(Console())}\n")


def check(
    file: Annotated[Path | None, typer.Argument(help="GGUF file to check as well.", show_default=False)] = None,
) -> None:
    """Load the plug-in, which then tests itself; with FILE, see whether it can run with it, all containers checked."""
    console = Console()
    source = None if file is None else GGUFSource(file, allow_requantize=True)
    loaded = load_plugin(_build(console))
    console.result(f"Plug-in: {loaded.path}")
    console.result(f"Loaded and tested, for version {BACKEND_API_VERSION} of ggml's backend interface")
    console.result(f"{PACKAGE}: {version(PACKAGE)}, tested with {', '.join(SUPPORTED)}")
    if source is None:
        return
    if not source.containers:
        console.result(f"{file}: no containers, it runs in any llama.cpp")
        return
    types = {qtype for container in source.containers.values() for qtype in container.types}
    check_types(types, str(file))
    names = ", ".join(qtype.name for qtype in sorted(types, key=bpw))
    n = len(source.containers)
    whole = "1 container is whole, its" if n == 1 else f"{n} containers are whole, their"
    console.result(f"{file}: can run: {whole} types are {names}")


COMMANDS = {"build": build, "path": path, "check": check}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _build(console: Console, *, again: bool = False) -> Path:
    named = shlex.split(os.environ.get("CXX", ""))
    return build_plugin(cache_dir(), console, compiler=named or None, again=again)
