"""Quantised files in PyTorch and in llama.cpp: how far apart, and that llama.cpp's rounding of activations is why.

llama.cpp rounds what it multiplies with quantised weights to 8 bits. Followed in PyTorch, what is left are roundings
that fall to the other side because float32 sums come in another order, and what those entail.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, LAYOUTS, build_moe

from alphaq_gguf.encode import encode_rows
from alphaq_gguf.evaluate.activation_rounding import multiply
from alphaq_gguf.evaluate.blocks import FileBlocks
from alphaq_gguf.evaluate.engines import LlamaEngine
from alphaq_gguf.evaluate.llama import log_softmax
from alphaq_gguf.evaluate.torch_model import TorchModel
from alphaq_gguf.qtypes import FLOAT_TYPES, QType

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL"]
OTHERS_FLOAT = r"^(?!.*_exps).*\.weight$=F32"
# All types in one file, and different ones where transformers fuses tensors that GGUF has apart.
MIXED = [
    r"ffn_gate_exps=Q3_K",
    r"ffn_up_exps=Q4_K",
    r"ffn_down_exps=Q6_K",
    r"blk\.1\.ffn_gate_exps=Q2_K",
    r"blk\.1\.ffn_down_exps=Q5_K",
    r"attn_(q|k|qkv|q_a|k_b)\.weight=Q5_0",
    r"attn_(gate|output|v_b)\.weight=Q5_1",
    r"(attn_v|attn_q_b|ffn_up_shexp)\.weight=IQ4_NL",
    r"^(output|token_embd)\.weight=Q4_0",
]
# Every family, and some whose output is tied to the embedding.
VARIANTS = [*FAMILIES, "Ernie4_5_Moe without shared experts", "Llama4 tied, with Scout's rope scaling"]


class Run(NamedTuple):
    """What an engine makes of some windows: logits of all tokens, and the experts that each layer chose for them."""

    logits: np.ndarray
    experts: np.ndarray

    @classmethod
    def join(cls, windows: Sequence[tuple[np.ndarray, Mapping[int, Any]]]) -> Run:
        layers = [[np.sort(chosen[bid]) for bid in sorted(chosen)] for _, chosen in windows]
        return cls(np.concatenate([logits for logits, _ in windows]), np.concatenate(layers, axis=1))


def run_llama_cpp(path: Path, windows: Sequence[Sequence[int]]) -> Run:
    with LlamaEngine(path, n_ctx=len(windows[0]), threads=1, exact=True) as engine:
        return Run.join([engine.run(window) for window in windows])


def run_pytorch(path: Path, windows: Sequence[Sequence[int]], *, round_activations: bool) -> Run:
    model = TorchModel(FileBlocks(path), round_activations=round_activations)
    found = []
    for window in windows:
        with model.watching_experts() as chosen:
            found.append((model.logits(window), chosen))
    return Run.join(found)


def divergence(found: Run, expected: Run) -> np.ndarray:
    """KLD of each token."""
    p, q = (log_softmax(run.logits.astype(np.float64)) for run in (expected, found))
    return (np.exp(p) * (p - q)).sum(axis=1)


class CpuTraits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h."""

    _fields_ = [
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                *(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
                *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


def cpu_traits(qtype: int) -> CpuTraits:
    from llama_cpp.llama_cpp import _lib

    get = _lib.ggml_get_type_traits_cpu
    get.restype, get.argtypes = ctypes.POINTER(CpuTraits), [ctypes.c_int]
    # Fills the tables of float16.
    _lib.ggml_cpu_init()
    return get(qtype).contents


@pytest.mark.parametrize("name", ["F16", "BF16", *TYPES])
def test_products_are_those_of_ggml(name: str) -> None:
    qtype, n_cols = QType[name], 512
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((n, n_cols), dtype=np.float32) for n in (16, 8))
    x[3, :256] = 0
    if qtype in FLOAT_TYPES:
        dtype = torch.float16 if qtype == QType.F16 else torch.bfloat16
        halves = torch.from_numpy(weight).to(dtype)
        blocks, decoded = halves.view(torch.uint8).numpy(), halves.float()
    else:
        blocks = np.ascontiguousarray(encode_rows(weight, qtype))
        decoded = torch.from_numpy(gguf.dequantize(blocks, qtype))
    traits = cpu_traits(qtype)
    expected = np.empty((len(x), len(weight)), dtype=np.float32)
    for i, row in enumerate(x):
        rounded = np.zeros(4 * n_cols, np.uint8)
        cpu_traits(traits.vec_dot_type).from_float(row.ctypes.data, rounded.ctypes.data, n_cols)
        for j, packed in enumerate(blocks):
            out = expected[i, j:].ctypes.data
            traits.vec_dot(n_cols, out, 0, packed.ctypes.data, 0, rounded.ctypes.data, 0, 1)
    plain = x @ decoded.numpy().T
    found = multiply(torch.from_numpy(x), decoded, qtype).numpy()
    assert np.abs(found - expected).max() < 1e-5 * plain.std()
    assert np.abs(plain - expected).max() > 1e-4 * plain.std()


@pytest.mark.parametrize("layout", VARIANTS)
def test_every_family_gives_what_llama_cpp_gives(layout: str, tmp_path: Path, cli) -> None:
    source, path = build_moe(tmp_path / "model", **LAYOUTS[layout]), tmp_path / "mixed.gguf"
    types = [part for override in MIXED for part in ("--tensor-type", override)]
    code, _, err = cli("convert", source, "-o", path, "--bpw", 32, *types)
    assert code == 0, err
    windows = [[int(t) for t in np.random.default_rng(seed).integers(3, 390, 128)] for seed in range(3)]
    expected = run_llama_cpp(path, windows)
    assert np.ptp(expected.logits) > 1, "logits too small for the comparison to mean anything"
    plain, rounding = (run_pytorch(path, windows, round_activations=value) for value in (False, True))

    # Random routers rank experts by little; where another expert is chosen, the logits are others.
    moved = [(run.experts != expected.experts).any(axis=(0, 2)) for run in (plain, rounding)]
    apart, left = (divergence(run, expected)[~away].mean() for run, away in zip((plain, rounding), moved, strict=True))
    assert moved[1].mean() <= min(0.05, moved[0].mean())
    # Random weights tell tokens apart by more than trained ones do: logits are 13 wide, and Granite's 2, at 1e-5.
    assert apart < 1e-2
    assert left < min(1e-3, apart / 2)


@pytest.mark.parametrize("qtype", TYPES)
def test_every_type_gives_what_llama_cpp_gives(qtype: str, trained: Path, heldout: str, tmp_path: Path, cli) -> None:
    files = {"experts": ["--tensor-type", OTHERS_FLOAT], "default": []}
    found: dict[tuple[str, bool], float] = {}
    for name, others in files.items():
        path = tmp_path / f"{name}.gguf"
        code, _, err = cli("convert", trained, "-o", path, "--bpw", 32, "--tensor-type", f"_exps={qtype}", *others)
        assert code == 0, err
        with TorchModel(FileBlocks(path)) as model:
            windows = model.vocabulary.windows(heldout, 256)[:4]
        expected = run_llama_cpp(path, windows)
        for rounding in (False, True):
            run = run_pytorch(path, windows, round_activations=rounding)
            found[name, rounding] = float(divergence(run, expected).mean())
    # With only experts quantised, nothing else rounds.
    assert 0 < found["experts", False] < 1e-3
    assert found["experts", True] < 1e-5
    # Q8_0 and Q6_K of all else adds about as much again.
    assert found["default", False] < 3e-3
    assert found["default", True] < min(1e-3, found["default", False] / 2)
