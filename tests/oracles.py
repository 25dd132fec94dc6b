"""llama.cpp itself as an oracle: its converter from the source distribution, its quantiser from the library."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

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
import sys
directory, script = sys.argv[1], sys.argv[2]
sys.path[:0] = [directory, directory + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = [script, *sys.argv[3:]]
import runpy
runpy.run_path(script, run_name="__main__")
"""


def convert_with_llama_cpp(source: Path, out: Path, outtype: str = "f32") -> None:
    """Convert `source` with llama.cpp's own converter; skips the test when its sources are not at hand."""
    directory = load_tool("fetch_llama_cpp").oracle_dir()
    if not directory.is_dir():
        pytest.skip("llama.cpp's converter is absent: run python tools/fetch_llama_cpp.py")
    script = directory / "convert_hf_to_gguf.py"
    command = [sys.executable, "-c", _CONVERT, str(directory), str(script)]
    done = subprocess.run(
        [*command, str(source), "--outfile", str(out), "--outtype", outtype], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def quantize_with_llama_cpp(source: Path, out: Path, types: dict[str, int], threads: int = 1) -> None:
    """`llama_model_quantize` with one anchored override per tensor in `types` (name -> ggml type id)."""
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
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
