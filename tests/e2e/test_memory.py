"""Converting takes memory for a chunk of rows, not for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from checkpoints import build_moe
from safetensors.torch import load_file, save_file

MIB = 1 << 20
# Runs the command line and reports the process' own peak.
MEASURE = """
import resource, sys
from alphaq_gguf.cli import main
code = main(sys.argv[1:])
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
sys.exit(code)
"""


def peak_bytes(source: Path, out: Path, cache: Path) -> int:
    options = ["--bpw", "8.5", "--types", "Q3_K,Q8_0", "--distortion-rows", "16", "--threads", "2", "-q"]
    command = [sys.executable, "-c", MEASURE, "convert", source, "-o", out, "--cache-dir", cache, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_peak_memory_stays_far_below_the_models_size(tiny: Path, tmp_path: Path) -> None:
    n_experts, width = 100, 2048
    model = build_moe(tmp_path / "model", num_experts=2, num_hidden_layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts": n_experts, "moe_intermediate_size": width}))
    tensors = {n: t for n, t in load_file(model / "model.safetensors").items() if "experts." not in n}
    tensors["model.layers.0.mlp.gate.weight"] = torch.randn(n_experts, 256)
    for expert in range(n_experts):
        for proj, shape in (("gate", (width, 256)), ("up", (width, 256)), ("down", (256, width))):
            name = f"model.layers.0.mlp.experts.{expert}.{proj}_proj.weight"
            tensors[name] = torch.randn(shape)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    size = (model / "model.safetensors").stat().st_size
    assert size > 600 * MIB
    del tensors
    idle = peak_bytes(tiny, tmp_path / "tiny.gguf", tmp_path / "cache")
    busy = peak_bytes(model, tmp_path / "big.gguf", tmp_path / "cache")
    assert busy - idle < 220 * MIB
    assert (tmp_path / "big.gguf").stat().st_size > 150 * MIB
