"""Packed experts against gguf-py's decoders and the structs of ggml, and activations against their formulas."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from alphaq_kernels import FORMATS, Activation, BlockFormat, PackedExperts

QType = gguf.GGMLQuantizationType
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)

# The structs of ggml-common.h, longest field first, with what `to_planar` keeps together as one field.
PLANES = {
    "Q4_0": [("qs", 2, 16), ("d", 0, 2)],
    "Q5_0": [("qs", 6, 16), ("qh", 2, 4), ("d", 0, 2)],
    "Q5_1": [("qs", 8, 16), ("qh", 4, 4), ("dm", 0, 4)],
    "Q8_0": [("qs", 2, 32), ("d", 0, 2)],
    "Q2_K": [("qs", 16, 64), ("scales", 0, 16), ("dm", 80, 4)],
    "Q3_K": [("qs", 32, 64), ("hmask", 0, 32), ("scales", 96, 12), ("d", 108, 2)],
    "Q4_K": [("qs", 16, 128), ("dm and scales", 0, 16)],
    "Q5_K": [("qs", 48, 128), ("qh", 16, 32), ("dm and scales", 0, 16)],
    "Q6_K": [("ql", 0, 128), ("qh", 128, 64), ("scales", 192, 16), ("d", 208, 2)],
    "IQ4_NL": [("qs", 2, 16), ("d", 0, 2)],
}


def random_rows(fmt: BlockFormat, n_rows: int, n_cols: int, seed: int = 0) -> torch.Tensor:
    """Blocks of random bytes with scales below 1, so that nothing but equal numbers compares equal."""
    rng = np.random.default_rng([fmt.type_id, n_rows, seed])
    blocks = rng.integers(0, 256, (n_rows * n_cols // fmt.block_size, fmt.type_size), dtype=np.uint8)
    for name, start, size in PLANES[fmt.name]:
        if name.startswith("d"):
            blocks[:, start + 1 : start + min(size, 4) : 2] &= 0xBB
    return torch.from_numpy(blocks.reshape(n_rows, -1))


def decode(rows: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(rows.numpy(), QType(fmt.type_id)))


def mixed() -> tuple[list[tuple[torch.Tensor, int | str]], list[torch.Tensor]]:
    """An expert [3, 512] of every type, packed and decoded."""
    experts: list[tuple[torch.Tensor, int | str]] = [(random_rows(fmt, 3, 512), fmt.name) for fmt in FORMATS]
    decoded = [decode(rows, fmt) for (rows, _), fmt in zip(experts, FORMATS, strict=True)]
    for name, dtype in FLOATS.items():
        weights = torch.randn(3, 512, generator=torch.Generator().manual_seed(7)).to(dtype)
        experts.append((weights.view(torch.uint8), QType[name]))
        decoded.append(weights.float())
    return experts, decoded


@pytest.mark.parametrize("shape", ["rows", "stack"])
@every_format
def test_a_stack_is_read_where_it_lies(fmt: BlockFormat, shape: str):
    rows = random_rows(fmt, 12, 512)
    experts = PackedExperts.from_stack(rows if shape == "rows" else rows.view(4, 3, -1), fmt.type_id, 4)
    assert (experts.n_experts, experts.n_rows, experts.n_cols) == (4, 3, 512)
    assert experts.data.data_ptr() == rows.data_ptr()
    assert experts.n_bytes == rows.numel()
    assert experts.types == (fmt.type_id,)
    for xid in range(4):
        assert torch.equal(experts.dequantize(xid), decode(rows[3 * xid : 3 * xid + 3], fmt))


def test_experts_of_all_types():
    raw, want = mixed()
    experts = PackedExperts.from_experts(raw)
    assert experts.types == tuple(sorted(experts.type_ids.tolist()))
    assert experts.n_bytes == sum(rows.numel() for rows, _ in raw)
    assert not (experts.offsets % 16).any()
    for xid, weights in enumerate(want):
        assert torch.equal(experts.dequantize(xid), weights)
        assert torch.equal(experts.dequantize(xid, torch.bfloat16), weights.bfloat16())


def test_planar_experts_decode_alike():
    raw, want = mixed()
    experts = PackedExperts.from_experts(raw)
    planar = experts.to_planar()
    assert planar.planar
    assert planar.n_bytes == experts.n_bytes
    assert planar.to_planar() is planar
    for xid, weights in enumerate(want):
        assert torch.equal(planar.dequantize(xid), weights)


@every_format
def test_planar_layout(fmt: BlockFormat):
    rows = random_rows(fmt, 3, 512)
    planar = PackedExperts.from_experts([(rows, fmt.name)]).to_planar()
    blocks = rows.view(-1, fmt.type_size)
    want = torch.cat([blocks[:, start : start + size].flatten() for _, start, size in PLANES[fmt.name]])
    assert torch.equal(planar.data[: planar.n_bytes], want)


def test_halves_of_a_fused_stack():
    fmt = next(f for f in FORMATS if f.name == "Q6_K")
    rows = random_rows(fmt, 12, 256)
    fused = PackedExperts.from_stack(rows, fmt.type_id, 2)
    offsets = fused.offsets + 3 * fmt.type_size
    gate, up = (PackedExperts(fused.data, at, fused.type_ids, 3, 256) for at in (fused.offsets, offsets))
    assert torch.equal(gate.dequantize(1), decode(rows[6:9], fmt))
    assert torch.equal(up.dequantize(1), decode(rows[9:12], fmt))
    assert torch.equal(up.to_planar().dequantize(1), decode(rows[9:12], fmt))


def test_to_another_device(device: torch.device):
    raw, want = mixed()
    experts = PackedExperts.from_experts(raw, torch.randn(len(raw), 3)).to(device)
    assert experts.bias is not None
    for tensor in (experts.data, experts.offsets, experts.type_ids, experts.bias, experts.dequantize(0)):
        assert tensor.device.type == device.type
    assert torch.equal(experts.dequantize(1).cpu(), want[1])


def packed(**fields) -> PackedExperts:
    """Two experts [3, 64] of Q8_0, with some fields replaced."""
    correct = {
        "data": torch.zeros(2 * 3 * 2 * 34, dtype=torch.uint8),
        "offsets": torch.tensor([0, 204]),
        "type_ids": torch.tensor([8, 8], dtype=torch.int32),
        "n_rows": 3,
        "n_cols": 64,
    }
    return PackedExperts(**{**correct, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": torch.zeros(408)}, "data must be torch.uint8 of 1 dimensions, not torch.float32"),
        ({"data": torch.zeros(408, 1, dtype=torch.uint8)}, r"not torch.uint8 \[408, 1\]"),
        ({"data": torch.zeros(816, dtype=torch.uint8)[::2]}, "data must be contiguous"),
        ({"offsets": torch.tensor([0, 204], dtype=torch.int32)}, "offsets must be torch.int64"),
        ({"offsets": torch.tensor([0])}, "1 offsets and 2 type_ids"),
        ({"offsets": torch.tensor([0, 206])}, "expert 1: 3 rows of 68 bytes from byte 206 on are not within the 408"),
        ({"offsets": torch.tensor([-2, 204])}, "expert 0: 3 rows of 68 bytes from byte -2"),
        ({"offsets": torch.tensor([0, 203])}, "expert 1: byte 203 is no multiple of 2, as Q8_0 needs"),
        ({"offsets": torch.tensor([0, 200]), "planar": True}, "byte 200 is no multiple of 16, as planar Q8_0 needs"),
        ({"type_ids": torch.tensor([8, 9], dtype=torch.int32)}, "unknown expert type 9: expected one of Q4_0, .*, F32"),
        ({"type_ids": torch.tensor([8, 12], dtype=torch.int32)}, "expert 1: 64 columns are not whole Q4_K blocks"),
        ({"n_rows": 0}, r"must have rows and columns, not \[0, 64\]"),
        ({"bias": torch.zeros(2, 3, dtype=torch.float16)}, "bias must be torch.float32"),
        ({"bias": torch.zeros(2, 4)}, r"bias must be \[2, 3\], not \[2, 4\]"),
        ({"bias": torch.zeros(2, 3, device="meta")}, "bias must be on cpu, as data is, not on meta"),
    ],
)
def test_wrong_fields_are_refused(fields: dict, message: str):
    packed()
    with pytest.raises(ValueError, match=message):
        packed(**fields)


@pytest.mark.parametrize(
    ("rows", "n_experts", "message"),
    [
        (torch.zeros(5, 68, dtype=torch.uint8), 2, r"shape \[5, 68\] do not hold the rows of 2 experts"),
        (torch.zeros(68, dtype=torch.uint8), 1, r"shape \[68\]"),
        (torch.zeros(4, 70, dtype=torch.uint8), 2, "rows of 70 bytes are not whole Q8_0 blocks of 34 bytes"),
        (torch.zeros(4, 136, dtype=torch.uint8)[:, :68], 2, "blocks must be contiguous"),
    ],
)
def test_wrong_stacks_are_refused(rows: torch.Tensor, n_experts: int, message: str):
    with pytest.raises(ValueError, match=message):
        PackedExperts.from_stack(rows, "Q8_0", n_experts)


def test_wrong_lists_are_refused():
    rows = torch.zeros(4, 68, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least one expert"):
        PackedExperts.from_experts([])
    with pytest.raises(ValueError, match=r"one shape, not \[\(3, 64\), \(4, 64\)\]"):
        PackedExperts.from_experts([(rows, "Q8_0"), (rows[:3], "Q8_0")])
    with pytest.raises(ValueError, match=r"must be torch.uint8 \[n_rows, row_bytes\] on cpu, not torch.int8"):
        PackedExperts.from_experts([(rows, "Q8_0"), (rows.view(torch.int8), "Q8_0")])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (Activation(), lambda g, u: g * sigmoid(g) * u),
        (Activation("gelu"), lambda g, u: g / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u),
        (Activation("relu"), lambda g, u: max(g, 0) * u),
        (Activation("swiglu_oai"), lambda g, u: g * sigmoid(1.702 * g) * (u + 1)),
        (
            Activation("swiglu_oai", alpha=1.5, limit=2),
            lambda g, u: min(g, 2) * sigmoid(1.5 * min(g, 2)) * (max(min(u, 2), -2) + 1),
        ),
    ],
    ids=lambda a: f"{a.name}-{a.limit}" if isinstance(a, Activation) else "",
)
def test_activations(activation: Activation, formula):
    values = [-4.0, -2.5, -1.0, 0.0, 0.5, 1.7, 3.0]
    gate, up = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).unbind(1)
    want = [formula(g, u) for g in values for u in values]
    torch.testing.assert_close(activation(gate, up), torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'swish': expected silu, gelu, relu or swiglu_oai"):
        Activation("swish")
