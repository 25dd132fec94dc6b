"""The experts of many tokens in plain torch, on any device: the twin that the kernels are checked against."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..packed import Activation, PackedExperts


def moe_prefill_naive(
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
    activation: Activation,
) -> torch.Tensor:
    """Each expert once, decoded to float32, on all tokens that chose it: [T, H] -> [T, H] in x's dtype."""
    pairs = x.new_empty((chosen.numel(), down.n_rows), dtype=torch.float32)
    experts, order = chosen.flatten().sort(stable=True)
    present, counts = experts.unique_consecutive(return_counts=True)
    for xid, rows in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        x_e = x[rows // chosen.shape[1]].float()
        hidden = activation(_project(x_e, gate, xid), _project(x_e, up, xid))
        pairs[rows] = _project(hidden, down, xid) * gates.flatten()[rows, None]
    return pairs.view(*chosen.shape, down.n_rows).sum(1).to(x.dtype)


def _project(x: torch.Tensor, experts: PackedExperts, xid: int) -> torch.Tensor:
    bias = None if experts.bias is None else experts.bias[xid]
    return functional.linear(x, experts.dequantize(xid, backend="torch"), bias)
