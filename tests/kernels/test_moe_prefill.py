"""Experts of many tokens against float64 sums over gguf-py's decoded weights, for the kernels and their twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from alphaq_kernels import FORMATS, Activation, PackedExperts, find_format, moe_decode
from alphaq_kernels.moe_prefill import moe_prefill
from alphaq_kernels.packed import FLOAT_FORMATS, find_expert_format

# Where the halves lie in each block, from the structs of ggml-common.h, and a size that makes weights of about 0.1.
HALVES = {
    "Q4_0": ((0,), 2e-2),
    "Q5_0": ((0,), 1e-2),
    "Q5_1": ((0, 2), 5e-3),
    "Q8_0": ((0,), 1e-3),
    "Q2_K": ((80, 82), 5e-3),
    "Q3_K": ((108,), 2e-3),
    "Q4_K": ((0, 2), 3e-4),
    "Q5_K": ((0, 2), 2e-4),
    "Q6_K": ((208,), 1e-4),
    "IQ4_NL": ((0,), 1e-3),
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = [f.name for f in (*FORMATS, *FLOAT_FORMATS)]
SMALL_BLOCKS = [name for name in TYPES if find_expert_format(name).block_size <= 32]

# Relative error allowed: weights and hidden vectors are rounded to the dtype (the interpreter truncates bfloat16).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}

every_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture(autouse=True)
def triton_present(request: pytest.FixtureRequest) -> None:
    """Skip what needs triton where there is none."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "triton":
        pytest.importorskip("triton")


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Every tensor made by `empty` starts as NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_rows(name: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n_rows, row_bytes]: random bytes but for scales that keep weights near 0.1."""
    if name in FLOATS:
        rows = torch.from_numpy(rng.standard_normal((n_rows, n_cols)) / 10).to(FLOATS[name])
        return rows.view(torch.uint8).numpy()
    fmt = find_format(name)
    raw = rng.integers(0, 256, (n_rows * n_cols // fmt.block_size, fmt.type_size), dtype=np.uint8)
    places, size = HALVES[name]
    for at in places:
        raw[:, at : at + 2] = (rng.uniform(-size, size, (len(raw), 1))).astype("<f2").view(np.uint8)
    return raw.reshape(n_rows, -1)


class Layer:
    """Random experts with the types of three lists, and what they should give."""

    def __init__(
        self,
        types: tuple[list[str], list[str], list[str]],
        hidden: int,
        inner: int,
        device: torch.device,
        *,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng([seed, hidden, inner])
        self.weights, self.biases, self.packed = [], [], []
        for names, (n_rows, n_cols) in zip(types, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            raw = [random_rows(name, n_rows, n_cols, rng) for name in names]
            self.weights.append(
                [
                    gguf.dequantize(rows, gguf.GGMLQuantizationType[name]).astype(np.float64).reshape(n_rows, n_cols)
                    for rows, name in zip(raw, names, strict=True)
                ]
            )
            b = rng.standard_normal((len(names), n_rows)).astype(np.float32) if bias else None
            self.biases.append(np.zeros((len(names), n_rows)) if b is None else b)
            self.packed.append(
                PackedExperts.from_experts(
                    [(torch.from_numpy(rows).to(device), name) for rows, name in zip(raw, names, strict=True)],
                    None if b is None else torch.from_numpy(b).to(device),
                )
            )

    def expected(
        self, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor, activation: Activation
    ) -> np.ndarray:
        """The sum over each token's experts, one by one, in float64."""
        out = np.zeros(x.shape)
        tokens = x.double().cpu().numpy()
        for i_t, (xids, shares) in enumerate(zip(chosen.tolist(), gates.tolist(), strict=True)):
            for xid, share in zip(xids, shares, strict=True):
                gate, up = (self.weights[p][xid] @ tokens[i_t] + self.biases[p][xid] for p in (0, 1))
                hidden = activate(gate, up, activation)
                out[i_t] += share * (self.weights[2][xid] @ hidden + self.biases[2][xid])
        return out


def activate(gate: np.ndarray, up: np.ndarray, activation: Activation) -> np.ndarray:
    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    match activation.name:
        case "silu":
            return gate * sigmoid(gate) * up
        case "gelu":
            return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
        case "relu":
            return np.maximum(gate, 0) * up
        case _:
            gate = np.minimum(gate, activation.limit)
            up = np.clip(up, -activation.limit, activation.limit)
            return gate * sigmoid(activation.alpha * gate) * (up + 1)


def route(n_tokens: int, top_k: int, n_experts: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random (chosen, gates); no token chooses an expert twice."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :top_k].contiguous()
    return chosen.to(device), torch.rand(n_tokens, top_k, generator=generator).to(device)


def vectors(n_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(n_tokens, hidden, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def check(
    layer: Layer,
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    backend: str,
    activation: Activation = Activation(),  # noqa: B008 (frozen)
) -> None:
    with nan_filled_memory() if backend == "triton" else torch.no_grad():
        got = moe_prefill(x, chosen, gates, *layer.packed, activation, backend=backend)
    assert (got.dtype, got.shape, got.device) == (x.dtype, x.shape, x.device)
    want = layer.expected(x, chosen, gates, activation)
    error = np.linalg.norm(got.double().cpu().numpy() - want) / np.linalg.norm(want)
    assert error < TOLERANCE[x.dtype], f"relative error {error:.2g}"


@pytest.mark.parametrize("name", TYPES)
@every_backend
def test_every_type(name: str, backend: str, device: torch.device):
    layer = Layer(([name] * 2, [name] * 2, [name] * 2), 256, 256, device)
    check(layer, vectors(5, 256, torch.float32, device), *route(5, 1, 2, device), backend)


@pytest.mark.parametrize(
    ("dtype", "planar"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, True)],
    ids=["f32", "f32-planar", "f16", "bf16-planar"],
)
@every_backend
def test_all_types_in_one_launch(dtype: torch.dtype, planar: bool, backend: str, device: torch.device):
    n = len(TYPES)
    down = [SMALL_BLOCKS[xid % len(SMALL_BLOCKS)] for xid in range(n)]
    # 288 rows and columns: no multiple of a tile, nor of 256.
    layer = Layer((TYPES, TYPES[5:] + TYPES[:5], down), 256, 288, device, bias=True)
    if planar:
        layer.packed = [experts.to_planar() for experts in layer.packed]
    check(layer, vectors(9, 256, dtype, device), *route(9, 3, n, device), backend)


@pytest.mark.parametrize(("hidden", "inner"), [(50, 33), (7, 100)])
@every_backend
def test_float_experts_of_any_width(hidden: int, inner: int, backend: str, device: torch.device):
    layer = Layer((["F32", "F16", "BF16"], ["BF16", "F32", "F16"], ["F16", "BF16", "F32"]), hidden, inner, device)
    check(layer, vectors(6, hidden, torch.float32, device), *route(6, 2, 3, device), backend)


@pytest.mark.parametrize(
    "activation",
    [
        Activation("gelu"),
        Activation("relu"),
        Activation("swiglu_oai"),
        Activation("swiglu_oai", alpha=1.3, limit=0.8),
        Activation("silu", limit=0.1),
    ],
    ids=lambda a: f"{a.name}-{a.limit}",
)
@every_backend
def test_activations(activation: Activation, backend: str, device: torch.device):
    layer = Layer((["Q8_0"] * 2, ["Q4_0"] * 2, ["Q5_1"] * 2), 64, 96, device, bias=True)
    check(layer, vectors(4, 64, torch.float32, device), *route(4, 2, 2, device), backend, activation)


@pytest.mark.parametrize("chosen", [[[1]] * 70, [[3, 1]] * 33 + [[0, 3]], [[2, 0]]])
@every_backend
def test_uneven_shares(chosen: list[list[int]], backend: str, device: torch.device):
    """Several tiles for one expert, none for others."""
    layer = Layer((["Q4_0", "F16", "Q8_0", "IQ4_NL"],) * 3, 64, 32, device)
    x = vectors(len(chosen), 64, torch.float32, device)
    gates = route(len(chosen), len(chosen[0]), 4, device)[1]
    check(layer, x, torch.tensor(chosen, dtype=torch.int32, device=device), gates, backend)


@every_backend
def test_a_fused_stack_is_two_views_of_one_buffer(backend: str, device: torch.device):
    apart = Layer((["Q5_0"] * 3, ["Q5_0"] * 3, ["F16"] * 3), 64, 40, device)
    gate, up, down = apart.packed
    row_bytes = 64 // 32 * 22
    fused = torch.cat([p.data[: 3 * 40 * row_bytes].view(3, -1) for p in (gate, up)], dim=1).flatten()
    starts = torch.arange(3, device=device) * (2 * 40 * row_bytes)
    apart.packed = [
        replace(gate, data=fused, offsets=starts),
        replace(up, data=fused, offsets=starts + 40 * row_bytes),
        down,
    ]
    check(apart, vectors(5, 64, torch.float32, device), *route(5, 2, 3, device), backend)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "f16", "bf16"])
def test_prefill_and_decode_agree(dtype: torch.dtype, device: torch.device):
    pytest.importorskip("triton")
    layer = Layer((["Q4_0", "Q8_0"], ["Q5_0", "F16"], ["Q5_1", "IQ4_NL"]), 64, 32, device, bias=True)
    arguments = (vectors(2, 64, dtype, device), *route(2, 2, 2, device), *layer.packed, Activation())
    prefill, decode = (op(*arguments, backend="triton").double() for op in (moe_prefill, moe_decode))
    assert ((prefill - decode).norm() / decode.norm()).item() < max(TOLERANCE[dtype], 1e-5)


def test_every_call_gives_the_same_bits(device: torch.device):
    pytest.importorskip("triton")
    layer = Layer((["Q4_0"] * 4, ["Q8_0"] * 4, ["Q5_0"] * 4), 64, 32, device)
    arguments = (vectors(20, 64, torch.float32, device), *route(20, 3, 4, device), *layer.packed, Activation())
    assert torch.equal(moe_prefill(*arguments, backend="triton"), moe_prefill(*arguments, backend="triton"))


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts"), [(1, 1, 1), (3, 2, 5), (50, 4, 8), (200, 1, 3)])
def test_tiles_hold_every_pair_once(n_tokens: int, top_k: int, n_experts: int, block_m: int, device: torch.device):
    pytest.importorskip("triton")
    from alphaq_kernels.moe_prefill.triton_kernels import group_tokens

    for seed in range(5):
        chosen = route(n_tokens, top_k, n_experts, device, seed)[0]
        if seed == 4:
            chosen.fill_(n_experts - 1)
        groups = group_tokens(chosen, n_experts, block_m)
        pairs = chosen.flatten().tolist()
        seen = []
        for expert, first in zip(groups.tile_expert.tolist(), groups.tile_start.tolist(), strict=True):
            if expert < n_experts:
                tile = groups.order[first : min(first + block_m, int(groups.starts[expert + 1]))].tolist()
                assert tile
                assert {pairs[i] for i in tile} == {expert}
                seen += tile
        assert sorted(seen) == list(range(len(pairs)))


@every_backend
def test_no_tokens(backend: str, device: torch.device):
    layer = Layer((["Q8_0"] * 2,) * 3, 32, 64, device)
    x, (chosen, gates) = vectors(0, 32, torch.float16, device), route(0, 2, 2, device)
    got = moe_prefill(x, chosen, gates, *layer.packed, Activation(), backend=backend)
    assert (got.shape, got.dtype) == ((0, 32), torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 64)}, r"gate must be \[2, 64, 64\], not \[2, 64, 32\]"),
        ({"x": torch.zeros(3, 32, dtype=torch.float64)}, "x must be one of .*, not torch.float64"),
        ({"chosen": torch.zeros(3, 2, dtype=torch.uint8)}, "chosen must be one of .*, not torch.uint8"),
        ({"gates": torch.zeros(2, 2)}, r"must both be \[3, K\], not \[3, 2\] and \[2, 2\]"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, not 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str):
    layer = Layer((["Q8_0"] * 2,) * 3, 32, 64, torch.device("cpu"))
    arguments = dict(zip(("gate", "up", "down"), layer.packed, strict=True))
    arguments |= {"x": torch.zeros(3, 32), "chosen": torch.zeros(3, 2, dtype=torch.int64), "gates": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=message):
        moe_prefill(**{**arguments, "activation": Activation(), **change})


def test_experts_past_2_to_the_31_bytes(device: torch.device):
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs a GPU with 8 GiB of free memory")
    layer = Layer((["Q8_0"] * 2, ["Q4_0"] * 2, ["Q5_1"] * 2), 64, 96, device)
    gap = 1 << 32
    data = torch.zeros(gap + layer.packed[0].data.numel(), dtype=torch.uint8, device=device)
    data[gap:] = layer.packed[0].data
    layer.packed[0] = replace(layer.packed[0], data=data, offsets=layer.packed[0].offsets + gap)
    check(layer, vectors(40, 64, torch.float16, device), *route(40, 2, 2, device), "triton")


def test_a_cuda_graph_can_hold_it(device: torch.device):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    layer = Layer((["Q4_0"] * 4, ["Q8_0"] * 4, ["Q5_0"] * 4), 64, 32, device)
    x, (chosen, gates) = vectors(20, 64, torch.float16, device), route(20, 2, 4, device)
    moe_prefill(x, chosen, gates, *layer.packed, Activation())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_prefill(x, chosen, gates, *layer.packed, Activation())
    chosen.copy_(route(20, 2, 4, device, seed=7)[0])
    graph.replay()
    assert torch.equal(out, moe_prefill(x, chosen, gates, *layer.packed, Activation()))
