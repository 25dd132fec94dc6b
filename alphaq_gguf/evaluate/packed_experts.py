"""The experts of a layer run from GGUF blocks, each expert's of its own type, inside transformers' model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from alphaq_kernels import FORMATS, Activation, PackedExperts, moe_decode, moe_prefill
from torch import nn

from ..arch.experts import Activation as ExpertActivation
from ..arch.experts import ExpertRule
from ..qtypes import FLOAT_TYPES, QType

READABLE_TYPES = (*(QType(f.type_id) for f in FORMATS), *FLOAT_TYPES)
"""Types that experts can be packed in."""

IMPLEMENTATION = "alphaq_packed"
"""What transformers calls these experts, in its table of implementations and in a model's config."""

# Up to so many tokens a kernel reads each chosen expert's blocks once for each token; for more they are grouped.
_DECODE_TOKENS = 16
# Bounds the memory for what experts give to each token.
_MOST_TOKENS = 2048

_ACTIVATIONS = {
    ExpertActivation.SILU: Activation("silu"),
    ExpertActivation.CLAMPED_SWIGLU: Activation("swiglu_oai", alpha=1.702, limit=7.0),
}


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """What all experts of a layer compute, their matrices kept as blocks on the device."""

    gate: PackedExperts
    up: PackedExperts
    down: PackedExperts
    activation: Activation

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Outputs of the experts `chosen` [tokens, top_k] for x [tokens, width], summed up with weights `gates`."""
        run = moe_decode if len(x) <= _DECODE_TOKENS else moe_prefill
        weights = self.gate, self.up, self.down, self.activation
        parts = zip(x.split(_MOST_TOKENS), chosen.split(_MOST_TOKENS), gates.float().split(_MOST_TOKENS), strict=True)
        return torch.cat([run(x_p, chosen_p, gates_p, *weights) for x_p, chosen_p, gates_p in parts])


class DenselyCalled(nn.Module):
    """Stands in for experts that are given every token for every expert, scaled by its gate weight.

    The rows of experts that a token does not use are zero, and so are their results.
    """

    def __init__(self, layer: PackedLayer, top_k: int) -> None:
        super().__init__()
        self.packed = layer
        self.top_k = top_k

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows [experts * tokens, width], all of expert 0 first -> results of the same shape."""
        x = hidden_states.unflatten(0, (self.packed.gate.n_experts, -1))
        # [top_k, tokens]; where a scaled row is all zero by chance, any expert makes zero of it.
        chosen = (x != 0).any(-1).int().topk(self.top_k, dim=0).indices
        tokens = torch.arange(x.shape[1], device=x.device).expand_as(chosen)
        rows = x[chosen, tokens].flatten(0, 1)
        y = self.packed(rows, chosen.reshape(-1, 1), rows.new_ones((len(rows), 1)))
        out = torch.zeros_like(x)
        out[chosen, tokens] = y.unflatten(0, chosen.shape)
        return out.flatten(0, 1)


def attach(model: nn.Module, path: str, layer: PackedLayer, rule: ExpertRule, top_k: int) -> None:
    """Have the experts module at `path` of a transformers model run `layer`, and lose its own parameters."""
    if rule.scales_input:
        model.set_submodule(path, DenselyCalled(layer, top_k))
        return
    experts: Any = model.get_submodule(path)
    for name, _ in list(experts.named_parameters(recurse=False)):
        delattr(experts, name)
    experts.packed = layer


def register() -> None:
    """Add these experts to transformers' table of implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def forward(
        experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return experts.packed(hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def activation_of(rule: ExpertRule) -> Activation:
    """What the kernels call an architecture's activation."""
    return _ACTIVATIONS[rule.activation]


def pack(
    matrices: Iterable[tuple[torch.Tensor, QType]], bias: torch.Tensor | None, device: torch.device
) -> PackedExperts:
    """One projection's matrices, uint8 [n_rows, row_bytes] of each expert, and float32 biases, on `device`."""
    packed = PackedExperts.from_experts([(rows, int(qtype)) for rows, qtype in matrices], bias).to(device)
    # As many bytes, in an order that the kernels load faster.
    return packed.to_planar() if device.type == "cuda" else packed
