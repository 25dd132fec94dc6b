"""The commands that run a file, to be printed."""

from __future__ import annotations

import shlex
from pathlib import Path

_WITH_PLUGIN = 'GGML_BACKEND_PATH="$(alphaq-gguf plugin path)"'
NO_OLLAMA = "Ollama and other programs that load no plug-ins cannot run it: its experts have types of their own"


def ordinary_commands(file: Path) -> list[str]:
    """How to run an ordinary GGUF with this tool and with llama.cpp."""
    name = shlex.quote(str(file))
    return [f'alphaq-gguf run {name} "Hello"', f'llama-cli -m {name} -p "Hello"', f"llama-server -m {name}"]


def container_commands(file: Path, options: str) -> list[str]:
    """How to run a GGUF with containers, with this tool and with llama.cpp, whose `options` are the file's own."""
    name = shlex.quote(str(file))
    return [
        f'alphaq-gguf run {name} "Hello"',
        f"alphaq-gguf serve {name}",
        f'{_WITH_PLUGIN} llama-cli -m {name} {options} -p "Hello"',
        f"{_WITH_PLUGIN} llama-server -m {name} {options}",
    ]
