"""Compile the ggml plug-in against the headers of the installed llama-cpp-python, once for each of its versions."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.resources import as_file, files
from pathlib import Path

from ..alone import alone
from ..errors import AlphaQError
from ..evaluate.isolated import ProcessDiedError, run_isolated
from ..reporter import Reporter
from .load import BACKEND_API_VERSION, PACKAGE, does_not_run, try_plugin

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
# What the plug-in leaves undefined is in the process that loads it; elsewhere than on macOS linkers take that as it is.
_PLATFORM_FLAGS = {"darwin": ("-undefined", "dynamic_lookup")}
_HEADERS = ("ggml.h", "ggml-backend.h", "ggml-cpu.h")
_LIBRARY = "libggml-alphaq.so"
_LOG = "compiler.log"
_FROM_SOURCE = f"reinstall it: pip install --force-reinstall --no-binary {PACKAGE} {PACKAGE}"


def build_plugin(
    cache_dir: Path, reporter: Reporter, *, compiler: Sequence[str] | None = None, again: bool = False
) -> Path:
    """The plug-in for the installed llama-cpp-python: the one in `cache_dir`, else compiled there; `again` compiles it.

    `compiler` is a command with its options; without it the first C++ compiler that is found. AlphaQError where there
    is no compiler or llama-cpp-python's headers are missing, for the compiler's first error, and for what then does not
    load or fails its own test.
    """
    if sys.platform == "win32":
        raise AlphaQError(
            "experts of several types in one stack do not run in llama.cpp on Windows yet",
            "use WSL, --engine torch, or files converted with --granularity stack",
        )
    include = find_headers()
    with as_file(files("ggml_plugin")) as sources:
        flags = (*_FLAGS, *_PLATFORM_FLAGS.get(sys.platform, ()))
        directory = cache_dir / f"{version(PACKAGE)}-api{BACKEND_API_VERSION}-{_fingerprint(sources, include, flags)}"
        library = directory / _LIBRARY
        if library.is_file() and not again:
            return library
        try:
            with alone(directory, reporter):
                # Another process may have been at it.
                if again or not library.is_file():
                    _compile(compiler or _find_compiler(), flags, sources, include, library, reporter)
        except OSError as error:
            raise AlphaQError(
                f"{directory}: cannot keep the compiled plug-in: {error.strerror}", "free or allow that directory"
            ) from None
    return library


def find_headers() -> Path:
    """The directory with ggml's public headers, of the installed llama-cpp-python; AlphaQError where there is none."""
    try:
        installed = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise AlphaQError(f"{PACKAGE} is not installed", f"pip install {PACKAGE}") from None
    places = [Path(str(file.locate())) for file in installed if file.name == _HEADERS[0]]
    for directory in (place.parent for place in places):
        if all((directory / name).is_file() for name in _HEADERS):
            return directory
    raise AlphaQError(
        f"{PACKAGE} {version(PACKAGE)} was installed without ggml's headers, which the plug-in needs", _FROM_SOURCE
    )


@cache
def _fingerprint(sources: Path, include: Path, flags: Sequence[str]) -> str:
    """What a compiled plug-in depends on, but for the compiler."""
    digest = hashlib.sha256(shlex.join(flags).encode())
    for path in (*sorted(_of_plugin(sources)), *sorted(include.glob("ggml*.h"))):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _of_plugin(sources: Path) -> list[Path]:
    return [path for path in sources.iterdir() if path.suffix in (".cpp", ".h")]


def _find_compiler() -> list[str]:
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    install = "xcode-select --install" if sys.platform == "darwin" else "sudo apt install g++ (or dnf install gcc-c++)"
    raise AlphaQError(
        "no C++ compiler was found, which the plug-in for experts of several types needs once",
        f"{install}; or name yours: CXX=COMPILER alphaq-gguf plugin build",
    )


def _compile(
    compiler: Sequence[str], flags: Sequence[str], sources: Path, include: Path, library: Path, reporter: Reporter
) -> None:
    """Compile into `library`, which appears when it is whole and loads."""
    reporter.note(f"Compiling the ggml plug-in for {PACKAGE} {version(PACKAGE)}, once: under a minute")
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        built = Path(directory) / library.name
        code = sorted(str(path) for path in _of_plugin(sources) if path.suffix == ".cpp")
        command = [*compiler, *flags, f"-I{include}", "-o", str(built), *code]
        try:
            found = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise AlphaQError(
                f"{compiler[0]}: cannot be run: {error.strerror}", "name a C++17 compiler in CXX, or unset it"
            ) from None
        if found.returncode:
            log = library.with_name(_LOG)
            log.write_text(f"{shlex.join(command)}\n{found.stderr}{found.stdout}", encoding="utf-8")
            lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line), lines[0] if lines else "it gave no reason")
            raise AlphaQError(
                f"the ggml plug-in does not compile with {compiler[0]} against {PACKAGE} {version(PACKAGE)}: {first}",
                f"try another compiler with CXX, or report it with {log}",
            )
        try:
            run_isolated(try_plugin, built, label="the ggml plug-in", reporter=reporter)
        except ProcessDiedError as error:
            raise does_not_run(error.reason) from None
        built.replace(library)
