"""Fetch the llama.cpp sources that match the installed llama-cpp-python, as an oracle for tests and benchmarks.

The source distribution of llama-cpp-python carries llama.cpp's own converter and tools. It is unpacked
once into the user's cache directory; nothing of it becomes part of this project.

    python tools/fetch_llama_cpp.py [--build]    # prints the directory

`--build` also compiles llama-perplexity, llama-quantize, llama-imatrix, llama-bench and llama-cli (about 6 minutes).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import platformdirs

TOOLS = ("llama-perplexity", "llama-quantize", "llama-imatrix", "llama-bench", "llama-cli")


def oracle_dir() -> Path:
    """Where the llama.cpp sources of the installed llama-cpp-python lie, or would."""
    name = f"llama.cpp-of-llama-cpp-python-{version('llama-cpp-python')}"
    return Path(platformdirs.user_cache_dir("alphaq-gguf")) / "oracles" / name


def fetch(target: Path) -> None:
    """Download the source distribution with pip and unpack its vendor/llama.cpp to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wanted = f"llama-cpp-python=={version('llama-cpp-python')}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch]
        subprocess.run([*command, wanted], check=True, stdout=sys.stderr)
        (archive,) = Path(scratch).glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).glob("llama_cpp_python-*/vendor/llama.cpp")
        unpacked.replace(target)


def build(target: Path) -> None:
    """Compile the command-line tools into `target`/build."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DGGML_NATIVE=ON"]
    subprocess.run(["cmake", "-S", target, "-B", target / "build", *options], check=True, stdout=sys.stderr)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(
        ["cmake", "--build", target / "build", "-j", jobs, "--target", *TOOLS], check=True, stdout=sys.stderr
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="also compile the command-line tools")
    arguments = parser.parse_args()
    target = oracle_dir()
    if not target.is_dir():
        fetch(target)
    if arguments.build and not all((target / "build" / "bin" / name).exists() for name in TOOLS):
        build(target)
    print(target)


if __name__ == "__main__":
    main()
