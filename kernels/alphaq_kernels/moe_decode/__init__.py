"""The experts of few tokens: each token through the experts chosen for it, summed by its gates."""

from __future__ import annotations

import torch

from ..backends import choose_backend, require_triton
from ..packed import Activation, PackedExperts
from .naive import moe_decode_naive

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def moe_decode(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
    activation: Activation,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum over k of gates[t, k] * down_e(activation(gate_e(x[t]), up_e(x[t]))), e = chosen[t, k]: -> [T, H].

    x is float32, float16 or bfloat16 [T, H], T from 1 to 16 (more works, slowly), chosen int32 or int64 [T, K], gates
    float32 [T, K]; `gate` and `up` are [I, H], `down` is [H, I], and each expert has its own block type. The sum is
    accumulated in float32 and comes in x's dtype. `backend` is that of `alphaq_kernels.dequantize`.

    In Triton nothing is read back to the host and a call repeats to the bit, so it can be captured in a CUDA graph
    once a call of the same shapes and types has compiled and tuned the kernels. Ids of `chosen` outside of the
    experts are therefore refused on the CPU alone; on a GPU they read out of bounds.

    Raises ValueError, before anything is launched, for a wrong dtype, shape, device, layout or backend.
    """
    check_arguments(x, chosen, gates, gate, up, down)
    if choose_backend(backend, x.device) == "torch":
        return moe_decode_naive(x, chosen, gates, gate, up, down, activation)

    from .triton_kernels import INTERPRETED, launch

    require_triton(x.device, INTERPRETED)
    check_words(gate, up, down)
    out = torch.empty_like(x)
    if len(x):
        h = torch.empty((*chosen.shape, gate.n_rows), dtype=torch.float32, device=x.device)
        launch(x, chosen, gates, gate, up, down, activation, h, out)
    return out


def check_arguments(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
) -> None:
    for name, tensor, dtypes in (
        ("x", x, _DTYPES),
        ("chosen", chosen, (torch.int32, torch.int64)),
        ("gates", gates, (torch.float32,)),
    ):
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}, not {tensor.dtype}")
        if tensor.ndim != 2 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous matrix, not of shape {list(tensor.shape)}, strides {tensor.stride()}"
            )
    if chosen.shape != gates.shape or len(chosen) != len(x) or not chosen.shape[1]:
        raise ValueError(
            f"chosen and gates must both be [{len(x)}, K], not {list(chosen.shape)} and {list(gates.shape)}"
        )
    shape = (gate.n_experts, gate.n_rows, x.shape[1])
    for name, experts, expected in (
        ("gate", gate, shape),
        ("up", up, shape),
        ("down", down, (shape[0], *shape[:0:-1])),
    ):
        found = (experts.n_experts, experts.n_rows, experts.n_cols)
        if found != expected:
            raise ValueError(f"{name} must be {list(expected)}, not {list(found)}")
    for name, tensor in (
        ("chosen", chosen),
        ("gates", gates),
        ("gate", gate.data),
        ("up", up.data),
        ("down", down.data),
    ):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as x is, not on {tensor.device}")
    if chosen.device.type == "cpu" and chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < shape[0]:
        raise ValueError(f"chosen must be ids from 0 to {shape[0] - 1}, not {int(chosen.min())} to {int(chosen.max())}")


def check_words(gate: PackedExperts, up: PackedExperts, down: PackedExperts) -> None:
    """ValueError unless kernels can load words of 16 bytes from the start of each projection's data."""
    for name, experts in (("gate", gate), ("up", up), ("down", down)):
        if experts.data.data_ptr() % 16:
            raise ValueError(f"data of {name} must start at a multiple of 16 bytes for backend 'triton'")
