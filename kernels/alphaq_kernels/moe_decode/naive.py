"""The experts of few tokens in plain torch, on any device: the twin that the kernels are checked against."""

from __future__ import annotations

import torch

from ..packed import Activation, PackedExperts


def moe_decode_naive(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
    activation: Activation,
) -> torch.Tensor:
    """One expert at a time, decoded to float32: [T, H] -> [T, H] in x's dtype."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for xid in chosen.unique().tolist():
        i_t, i_k = (chosen == xid).nonzero(as_tuple=True)
        x_e = x[i_t].float()
        y = _project(activation(_project(x_e, gate, xid), _project(x_e, up, xid)), down, xid)
        out.index_add_(0, i_t, y * gates[i_t, i_k, None])
    return out.to(x.dtype)


def _project(x: torch.Tensor, experts: PackedExperts, xid: int) -> torch.Tensor:
    bias = None if experts.bias is None else experts.bias[xid]
    return torch.nn.functional.linear(x, experts.dequantize(xid, backend="torch"), bias)
