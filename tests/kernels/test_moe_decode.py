"""The experts of few tokens against float64 over gguf-py's decoders, for the Triton kernels and their torch twin."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from alphaq_kernels import FORMATS, Activation, BlockFormat, PackedExperts, moe_decode

QType = gguf.GGMLQuantizationType
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = [*(f.name for f in FORMATS), *FLOATS]
BY_NAME = {f.name: f for f in FORMATS}

# Where the halves lie in each block, from the structs of ggml-common.h.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q5_1": (0, 2)}

every_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture(autouse=True)
def triton_present(request: pytest.FixtureRequest) -> None:
    """Skip what needs triton where there is none."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "triton":
        pytest.importorskip("triton")


class Experts:
    """Experts of one projection, packed, with their weights and biases in float64."""

    def __init__(self, types: list[str], n_rows: int, n_cols: int, seed: int, *, bias: bool = False):
        rng = np.random.default_rng([n_rows, n_cols, seed])
        raw, decoded = zip(*(random_matrix(name, n_rows, n_cols, rng) for name in types), strict=True)
        self.weights = np.stack(decoded).astype(np.float64)
        self.bias = rng.standard_normal((len(types), n_rows)).astype(np.float32) if bias else None
        self.packed = PackedExperts.from_experts(
            [(torch.from_numpy(rows), name) for rows, name in zip(raw, types, strict=True)],
            None if self.bias is None else torch.from_numpy(self.bias),
        )

    def __call__(self, xid: int, x: np.ndarray) -> np.ndarray:
        return self.weights[xid] @ x + (0 if self.bias is None else self.bias[xid])


def random_matrix(name: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes as rows of blocks, and what gguf-py decodes them to, of standard deviation around n_cols^-1/2."""
    if name in FLOATS:
        weights = torch.from_numpy(rng.standard_normal((n_rows, n_cols)) / np.sqrt(n_cols)).to(FLOATS[name])
        return weights.view(torch.uint8).numpy(), weights.double().numpy()
    fmt: BlockFormat = BY_NAME[name]
    blocks = rng.integers(0, 256, (n_rows * n_cols // fmt.block_size, fmt.type_size), dtype=np.uint8)
    spread = np.std(gguf.dequantize(with_halves(blocks, fmt, np.ones(len(blocks)), rng), QType[name]))
    scales = rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks)) / spread / np.sqrt(n_cols)
    rows = with_halves(blocks, fmt, scales, rng).reshape(n_rows, -1)
    return rows, gguf.dequantize(rows, QType[name])


def with_halves(blocks: np.ndarray, fmt: BlockFormat, scales: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blocks = blocks.copy()
    for at in HALVES.get(fmt.name, (0,)):
        halves = (scales * rng.uniform(0.8, 1.2)).astype("<f2")
        blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
    return blocks


def activate(activation: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if activation.name == "swiglu_oai":
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
        return gate / (1 + np.exp(-activation.alpha * gate)) * (up + 1)
    act = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
    }
    return act[activation.name](gate) * up


class Layer:
    """The experts of one layer, tokens for them, and the outcome in float64."""

    def __init__(
        self,
        types: tuple[list[str], list[str], list[str]],
        hidden: int,
        inner: int,
        n_tokens: int,
        n_chosen: int,
        *,
        dtype: torch.dtype = torch.float32,
        activation: Activation = Activation(),  # noqa: B008
        bias: bool = False,
    ):
        self.gate = Experts(types[0], inner, hidden, 0, bias=bias)
        self.up = Experts(types[1], inner, hidden, 1, bias=bias)
        self.down = Experts(types[2], hidden, inner, 2, bias=bias)
        self.activation = activation
        rng = np.random.default_rng([hidden, inner, n_tokens, n_chosen])
        self.x = torch.from_numpy(rng.standard_normal((n_tokens, hidden))).to(dtype)
        self.chosen = torch.from_numpy(rng.integers(0, len(types[0]), (n_tokens, n_chosen)))
        self.gates = torch.from_numpy(rng.uniform(0.1, 1, (n_tokens, n_chosen)).astype(np.float32))

    def oracle(self) -> torch.Tensor:
        out = np.zeros(self.x.shape)
        for t, x in enumerate(self.x.double().numpy()):
            for xid, weight in zip(self.chosen[t].tolist(), self.gates[t].tolist(), strict=True):
                out[t] += weight * self.down(xid, activate(self.activation, self.gate(xid, x), self.up(xid, x)))
        return torch.from_numpy(out)

    def arguments(self, device: torch.device, *, planar: bool = False) -> tuple:
        packed = (experts.packed.to(device) for experts in (self.gate, self.up, self.down))
        packed = (p.to_planar() if planar else p for p in packed)
        return self.x.to(device), self.chosen.to(device), self.gates.to(device), *packed, self.activation

    def check(self, got: torch.Tensor) -> None:
        """Within a few float32 roundings of the largest output; float16 and bfloat16 are that, rounded once more."""
        assert got.dtype == self.x.dtype
        want = self.oracle()
        largest = float(want.abs().max())
        rounding = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[got.dtype]
        torch.testing.assert_close(got.cpu().double(), want, rtol=rounding, atol=5e-6 * largest)


# The twin decodes planar experts as test_packed.py tests.
every_layout = pytest.mark.parametrize(
    ("backend", "planar"),
    [("torch", False), ("triton", False), ("triton", True)],
    ids=["torch", "triton", "triton-planar"],
)


@every_layout
@pytest.mark.parametrize("name", TYPES)
def test_one_type(name: str, backend: str, planar: bool, device: torch.device):
    blocks_of_32 = BY_NAME[name].block_size == 32 if name in BY_NAME else True
    hidden, inner = (352, 96) if blocks_of_32 else (256, 256)
    layer = Layer(([name] * 3, [name] * 3, [name] * 3), hidden, inner, 1, 2)
    layer.check(moe_decode(*layer.arguments(device, planar=planar), backend=backend))


@every_layout
def test_all_types_in_one_launch(backend: str, planar: bool, device: torch.device):
    layer = Layer((TYPES, TYPES[3:] + TYPES[:3], TYPES[::-1]), 256, 256, 7, 2)
    layer.chosen = torch.arange(14).view(7, 2) % len(TYPES)
    layer.check(moe_decode(*layer.arguments(device, planar=planar), backend=backend))


@every_backend
@pytest.mark.parametrize(
    ("n_tokens", "n_chosen", "n_experts"), [(1, 1, 1), (1, 8, 9), (1, 2, 8), (3, 3, 2), (7, 1, 5), (16, 1, 6)]
)
def test_any_numbers_of_tokens_and_experts(
    n_tokens: int, n_chosen: int, n_experts: int, backend: str, device: torch.device
):
    types = (["Q8_0"] * n_experts, ["Q4_0"] * n_experts, ["Q5_1"] * n_experts)
    layer = Layer(types, 64, 32, n_tokens, n_chosen)
    layer.check(moe_decode(*layer.arguments(device), backend=backend))


@every_backend
@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (1408, 32), (64, 352), (37, 19), (5, 1)])
def test_ragged_sizes(hidden: int, inner: int, backend: str, device: torch.device):
    name = "IQ4_NL" if hidden % 32 == 0 else "F32"
    layer = Layer(([name], [name], [name]), hidden, inner, 1, 2)
    layer.check(moe_decode(*layer.arguments(device), backend=backend))


@pytest.mark.parametrize(
    "activation",
    [
        Activation("silu"),
        Activation("gelu"),
        Activation("relu"),
        Activation("swiglu_oai"),
        Activation("swiglu_oai", alpha=1.3, limit=0.5),
    ],
    ids=lambda a: f"{a.name}-{a.limit}",
)
@every_backend
def test_activations_and_biases(activation: Activation, backend: str, device: torch.device):
    types = (["Q4_0", "F16"], ["Q8_0", "Q8_0"], ["Q5_0", "Q4_0"])
    layer = Layer(types, 64, 96, 2, 2, activation=activation, bias=True)
    layer.check(moe_decode(*layer.arguments(device), backend=backend))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half_precision(dtype: torch.dtype, backend: str, device: torch.device):
    layer = Layer((["Q4_0"] * 4, ["Q8_0"] * 4, ["Q5_0"] * 4), 96, 64, 3, 2, dtype=dtype)
    layer.check(moe_decode(*layer.arguments(device), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q4_K"])
def test_half_precision_before_rounding(name: str, dtype: torch.dtype, device: torch.device):
    """Where x has 16 bits the kernels read codes in pairs, at the cost of some bits of float32 and no more."""
    pytest.importorskip("triton")
    from alphaq_kernels.moe_decode.triton_kernels import launch

    layer = Layer(([name], [name], [name]), 256, 256, 1, 2, dtype=dtype)
    out = torch.full((1, 256), float("nan"), device=device)
    launch(*layer.arguments(device), torch.empty(1, 2, 256, device=device), out)
    want = layer.oracle()
    torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=3e-5 * float(want.abs().max()))


@pytest.mark.parametrize("shape", [(8, 1, 32), (1, 1, 64), (2, 2, 32)], ids=lambda s: "x".join(map(str, s)))
def test_shapes_of_programs(shape: tuple[int, int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Those that the interpreter would not take, too."""
    triton = pytest.importorskip("triton")
    from alphaq_kernels.moe_decode import triton_kernels

    n_r, n_g, n_u = shape
    config = triton.Config({"n_r": n_r, "n_g": n_g, "n_u": n_u}, num_warps=n_g * n_u // 32)
    for kernel in (triton_kernels._gate_up, triton_kernels._down):
        monkeypatch.setattr(kernel, "configs", [config])
    layer = Layer((["Q4_0", "Q8_0"], ["Q5_1", "Q5_1"], ["Q8_0", "BF16"]), 96, 32, 1, 2, bias=True)
    layer.chosen = torch.tensor([[1, 0]])
    layer.check(moe_decode(*layer.arguments(device), backend="triton"))


@every_backend
def test_fused_gate_and_up(backend: str, device: torch.device):
    """Two views of one stack, which start at different bytes of it."""
    fused = Experts(["Q8_0"] * 3, 64, 96, 5, bias=True)
    layer = Layer((["Q8_0"] * 3, ["Q8_0"] * 3, ["Q4_0"] * 3), 96, 32, 2, 2)
    assert fused.bias is not None
    for half, experts in enumerate((layer.gate, layer.up)):
        rows = slice(32 * half, 32 * half + 32)
        experts.weights, experts.bias = fused.weights[:, rows], np.ascontiguousarray(fused.bias[:, rows])
        experts.packed = replace(
            fused.packed,
            offsets=fused.packed.offsets + half * 32 * 3 * 34,
            n_rows=32,
            bias=torch.from_numpy(experts.bias),
        )
    layer.check(moe_decode(*layer.arguments(device), backend=backend))


@every_backend
def test_ids_may_be_int32_and_tokens_none(backend: str, device: torch.device):
    layer = Layer((["Q4_0"] * 4, ["Q8_0"] * 4, ["Q5_0"] * 4), 64, 32, 2, 2)
    x, chosen, gates, *rest = layer.arguments(device)
    layer.check(moe_decode(x, chosen.int(), gates, *rest, backend=backend))
    assert moe_decode(x[:0], chosen[:0], gates[:0], *rest, backend=backend).shape == (0, 64)


@pytest.mark.parametrize(("hidden", "inner"), [(96, 32), (37, 19)])
def test_kernels_write_every_number_and_nothing_else(hidden: int, inner: int, device: torch.device):
    pytest.importorskip("triton")
    from alphaq_kernels.moe_decode.triton_kernels import launch

    name = "Q8_0" if hidden % 32 == 0 else "F16"
    layer = Layer(([name] * 3, [name] * 3, [name] * 3), hidden, inner, 3, 2)
    margin = 4096
    sizes = 3 * 2 * inner, 3 * hidden
    buffers = [torch.full((size + 2 * margin,), float("nan"), device=device) for size in sizes]
    h, out = (b[margin:-margin].view(*shape) for b, shape in zip(buffers, ((3, 2, inner), (3, hidden)), strict=True))
    launch(*layer.arguments(device), h, out)
    layer.check(out)
    assert not h.isnan().any()
    for buffer in buffers:
        assert buffer[:margin].isnan().all()
        assert buffer[-margin:].isnan().all()


def test_a_call_repeats_to_the_bit_in_a_cuda_graph(device: torch.device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    pytest.importorskip("triton")
    layer = Layer((TYPES, TYPES, TYPES), 256, 256, 4, 6, dtype=torch.bfloat16)
    arguments = layer.arguments(device)
    want = moe_decode(*arguments, backend="triton")
    layer.check(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = moe_decode(*arguments, backend="triton")
    for _ in range(3):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, want)


def test_auto_takes_triton_on_a_gpu_and_torch_else(device: torch.device):
    pytest.importorskip("triton")
    layer = Layer((["Q4_0"] * 2, ["Q4_0"] * 2, ["Q4_0"] * 2), 64, 32, 1, 1)
    backend = "triton" if device.type == "cuda" else "torch"
    assert torch.equal(moe_decode(*layer.arguments(device)), moe_decode(*layer.arguments(device), backend=backend))


def experts(n_experts: int = 3, n_rows: int = 32, n_cols: int = 64) -> PackedExperts:
    return PackedExperts.from_stack(torch.zeros(n_experts * n_rows, n_cols // 32 * 34, dtype=torch.uint8), 8, n_experts)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x must be one of torch.float32, .*, not torch.float64"),
        ({"x": torch.zeros(64)}, r"x must be a contiguous matrix, not of shape \[64\]"),
        ({"x": torch.zeros(64, 2).T}, r"x must be a contiguous matrix, not of shape \[2, 64\], strides \(1, 2\)"),
        ({"x": torch.zeros(2, 32)}, r"gate must be \[3, 32, 32\], not \[3, 32, 64\]"),
        ({"chosen": torch.zeros(2, 2)}, "chosen must be one of torch.int32, torch.int64, not torch.float32"),
        ({"chosen": torch.zeros(2, 3, dtype=torch.int64)}, r"both be \[2, K\], not \[2, 3\] and \[2, 2\]"),
        ({"chosen": torch.tensor([[0, 3], [1, 2]])}, "ids from 0 to 2, not 0 to 3"),
        ({"chosen": torch.tensor([[0, -1], [1, 2]])}, "ids from 0 to 2, not -1 to 2"),
        ({"gates": torch.zeros(2, 2, dtype=torch.float16)}, "gates must be one of torch.float32, not torch.float16"),
        ({"gates": torch.zeros(2, 2, device="meta")}, "gates must be on cpu, as x is, not on meta"),
        ({"up": experts(n_rows=64)}, r"up must be \[3, 32, 64\], not \[3, 64, 64\]"),
        ({"up": experts(n_experts=4)}, r"up must be \[3, 32, 64\], not \[4, 32, 64\]"),
        ({"down": experts()}, r"down must be \[3, 64, 32\], not \[3, 32, 64\]"),
        ({"backend": "cuda"}, "not 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(replaced: dict, message: str):
    correct = {
        "x": torch.zeros(2, 64),
        "chosen": torch.zeros(2, 2, dtype=torch.int64),
        "gates": torch.zeros(2, 2),
        "gate": experts(),
        "up": experts(),
        "down": experts(n_rows=64, n_cols=32),
        "activation": Activation(),
    }
    assert moe_decode(**correct).shape == (2, 64)
    with pytest.raises(ValueError, match=message):
        moe_decode(**{**correct, **replaced})


_FRESH = """
import torch, triton
from alphaq_kernels import Activation, PackedExperts, moe_decode
from importlib import import_module
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

x, chosen, gates = torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
experts = PackedExperts.from_stack(torch.zeros(32, 34, dtype=torch.uint8), 8, 1)
try:
    moe_decode(x, chosen, gates, experts, experts, experts, Activation(), backend="triton")
except ValueError as error:
    print(error)

kernels = import_module("alphaq_kernels.moe_decode.triton_kernels")
types = (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 14, 20, 30)
tables = ("*u8", "*i64", "*i32", "*fp32")
shape = {"n_rows": 1, "n_cols": 1, "one": 1}
for kernel, constants in (
    (kernels._gate_up_kernel, {"activation": "gelu", "gate_types": types, "up_types": (12,), "gate_planar": True,
                               "up_planar": False}),
    (kernels._down_kernel, {"types": types, "planar": False}),
):
    constants |= {"exact": False, "n_r": 1, "n_g": 1, "n_u": 64}
    names = kernel.arg_names
    kinds = {"offsets": "*i64", "types": "*i32", "bias": "*fp32", "chosen": "*i32", "x": "*bf16", "out": "*bf16"}
    floats = {"p_h", "p_weights"}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in floats else kinds.get(name.rpartition("_")[2], "*u8")
        else:
            signature[name] = "fp32" if name in ("alpha", "limit") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.startswith("p_") or n == "n_cols"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2, "enable_fp_fusion": True})
    print("compiled", "ld.global.v4" in done.asm["ptx"], len(done.asm["cubin"]) > 0)
"""


def test_kernels_compile_without_a_gpu():
    """What the interpreter accepts may still not compile: both kernels, all types, for a Hopper GPU."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _FRESH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, *compiled = done.stdout.splitlines()
    assert "cannot run on device 'cpu'" in refusal
    assert compiled == ["compiled True True"] * 2
