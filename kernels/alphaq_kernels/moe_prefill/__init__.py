"""The experts of many tokens: grouped by expert, so that each expert is decoded once for all of its tokens."""

from __future__ import annotations

import torch

from ..backends import choose_backend, require_triton
from ..moe_decode import check_arguments, check_words
from ..packed import Activation, PackedExperts
from .naive import moe_prefill_naive


def moe_prefill(
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

    Arguments, result and errors are those of `moe_decode`; this is the faster of the two where several tokens choose
    the same expert. It takes 4 T K H bytes, and T K I values of x's dtype, of memory beside its arguments.

    In Triton tokens are grouped by expert on the device: nothing is read back to the host and a call repeats to the
    bit, so it can be captured in a CUDA graph once a call of the same shapes and types has compiled and tuned the
    kernels. They round weights and hidden vectors to x's dtype, for the tensor cores, and add in float32. Ids of
    `chosen` outside of the experts are refused on the CPU alone; on a GPU what they contribute is undefined.
    """
    check_arguments(x, chosen, gates, gate, up, down)
    if choose_backend(backend, x.device) == "torch":
        return moe_prefill_naive(x, chosen, gates, gate, up, down, activation)

    from .triton_kernels import INTERPRETED, launch

    require_triton(x.device, INTERPRETED)
    check_words(gate, up, down)
    return launch(x, chosen, gates, gate, up, down, activation) if len(x) else torch.empty_like(x)
