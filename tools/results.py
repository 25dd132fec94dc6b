"""What the scripts beside this one share: what made a result, how it is recorded, and how they end."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alphaq_gguf.console import Console
from alphaq_gguf.errors import AlphaQError

_LIBRARIES = ("alphaq-gguf", "llama-cpp-python", "torch", "triton", "transformers")


def describe_run(script: str, words: Sequence[str], *libraries: str) -> dict[str, Any]:
    """What made a result: command, date, machine, versions. Names stand without directories of this machine."""
    return {
        "command": " ".join(["python", f"tools/{script}", *(Path(word).name for word in words)]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: _find_version(name) for name in libraries},
    }


def introduce(result: dict[str, Any]) -> str:
    """The first words of a report, from describe_run's."""
    versions = [f"{name} {result[name]}" for name in _LIBRARIES if result.get(name)]
    return ", ".join([f"`{result['command']}`", result["date"], result["machine"], *versions])


def write_result(output: Path, result: dict[str, Any], lines: Sequence[str]) -> None:
    """RESULT.json and RESULT.md, each replaced whole."""
    for suffix, text in ((".json", json.dumps(result, indent=2)), (".md", "\n".join(lines))):
        fresh = output.with_name(output.name + suffix + ".new")
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(output.with_name(output.name + suffix))


def run(main: Callable[[Sequence[str], Console], int | None]) -> None:
    """Call a script's `main` with the command line's words; problems the user can fix are told in one line.

    The exit code is what `main` returns.
    """
    console = Console()
    try:
        code = main(sys.argv[1:], console)
    except AlphaQError as error:
        console.error(error.message, error.hint)
        code = error.exit_code
    sys.exit(code)


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
