"""llama.cpp itself as an oracle: its converter from the source distribution, its quantiser from the library."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ROOT


def load_tool(name: str):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# The converter knows tokenizers by a hash of one vocabulary; ours are trained on the fly.
_CONVERT = """
import json, runpy, sys
directory, jobs = sys.argv[1], json.loads(sys.argv[2])
script = directory + "/convert_hf_to_gguf.py"
sys.path[:0] = [directory, directory + "/gguf-py"]
from conversion.base import TextModel
for pre, arguments in jobs:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


def convert_with_llama_cpp(source: Path, out: Path, outtype: str = "f32", pre: str = "qwen2") -> None:
    """Convert `source` with llama.cpp's own converter, its tokenizer taken for `pre`; skips when it is not at hand."""
    _run_converter([(pre, [str(source), "--outfile", str(out), "--outtype", outtype])])


def convert_all_with_llama_cpp(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Convert several (source, out) to f32 in one process, which saves the converter's start-up for all but one."""
    _run_converter([("qwen2", [str(source), "--outfile", str(out), "--outtype", "f32"]) for source, out in pairs])


def convert_vocabularies_with_llama_cpp(jobs: Sequence[tuple[Path, Path, str]]) -> None:
    """Convert the tokenizers of several (source, out, pre) in one go, metadata only."""
    _run_converter([(pre, [str(source), "--outfile", str(out), "--vocab-only"]) for source, out, pre in jobs])


def llama_cpp_sources() -> Path:
    """The sources that the installed llama-cpp-python was built from; skips the test when they are not at hand."""
    directory: Path = load_tool("fetch_llama_cpp").oracle_dir()
    if not directory.is_dir():
        pytest.skip("llama.cpp's sources are absent: run python tools/fetch_llama_cpp.py")
    return directory


def _run_converter(jobs: list[tuple[str, list[str]]]) -> None:
    command = [sys.executable, "-c", _CONVERT, str(llama_cpp_sources()), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def quantize_with_llama_cpp(
    source: Path,
    out: Path,
    types: dict[str, int],
    threads: int = 1,
    imatrix: Mapping[str, np.ndarray] | None = None,
) -> None:
    """`llama_model_quantize` with one anchored override per tensor in `types` (name -> ggml type id).

    `imatrix` maps tensor names to float32 [matrices, n_cols].
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    # Overrides are ignored unless the base ftype is a quantised one.
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.pure = True
    params.allow_requantize = False
    params.token_embedding_type = types["token_embd.weight"]
    params.output_tensor_type = types["output.weight"]
    overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for i, (name, qtype) in enumerate(types.items()):
        overrides[i].pattern = ("^" + name.replace(".", r"\.") + "$").encode()
        overrides[i].type = qtype
    params.tt_overrides = overrides
    if imatrix is not None:
        # The array ends at an entry without a name.
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, weights) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), weights.size
            entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


def start_tool(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of llama.cpp to its end, with more in its environment; skips when it was not built."""
    program = llama_cpp_sources() / "build/bin" / name
    if not program.is_file():
        pytest.skip(f"{name} is absent: run python tools/fetch_llama_cpp.py --build")
    command = [program, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
    )


def run_tool(name: str, *arguments: object, **environment: str) -> str:
    """What a program of llama.cpp prints that ends well; skips when it was not built."""
    done = start_tool(name, *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def run_perplexity(*arguments: object, **environment: str) -> str:
    """What llama-perplexity prints, with its figures."""
    # On a busy machine it often ends before its log's thread has written the last lines.
    for _ in range(40):
        printed = run_tool("llama-perplexity", *arguments, **environment)
        if re.search("Same top p:|Final estimate:", printed):
            return printed
    raise AssertionError("llama-perplexity printed no figures, 40 times")
