"""What products multiply, rounded as llama.cpp's CPU backend rounds it: the difference that the same bytes leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from alphaq_kernels import PackedExperts
from torch import nn
from torch.nn import functional

from ..arch import TensorPlan
from ..qtypes import QType, block_size
from .packed_experts import PackedLayer

_HALVES = {QType.F16: torch.float16, QType.BF16: torch.bfloat16}
_LATENT = "alphaq_latent"
"""What transformers calls the attention that multiplies latents, in its table of implementations."""


def multiply(x: torch.Tensor, weight: torch.Tensor, qtype: QType) -> torch.Tensor:
    """x [..., n_cols] times weight [n_rows, n_cols], which `qtype` decodes to, both float32: [..., n_rows].

    Rows of x take the weights' `vec_dot_type` of ggml-cpu.c: float16 and bfloat16 for weights of these, block_q8_K for
    blocks of 256 weights, block_q8_1 for Q5_1, block_q8_0 for other blocks of 32.
    """
    if qtype == QType.F32:
        return functional.linear(x, weight)
    if qtype in _HALVES:
        return functional.linear(x.to(_HALVES[qtype]).float(), weight)
    blocks = x.unflatten(-1, (-1, block_size(qtype)))
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    if block_size(qtype) == 256:
        scale = -127 / peak
        step = 1 / scale
    else:
        scale = 127 / peak.abs()
        step = (peak.abs() / 127).half().float()
    # A block of zeros has no scale.
    codes = (blocks * scale).round().clamp(max=127).nan_to_num(0)
    # In float64, so that fewer of the roundings that follow fall to the other side.
    product = functional.linear((codes * step).flatten(-2).double(), weight.double()).float()
    if qtype == QType.Q5_1:
        # A block's sum, which its minimum multiplies, is rounded apart. Weights that are encoded as 0 are the minimum.
        sums = codes.sum(-1)
        excess = (peak.abs().squeeze(-1) / 127 * sums).half().float() - step.squeeze(-1) * sums
        product += functional.linear(excess, weight.unflatten(-1, (-1, block_size(qtype))).amin(-1))
    return product


class RoundingLayer(PackedLayer):
    """The experts of a layer in plain PyTorch, each product's rows rounded for the type of that expert's weights."""

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, device=x.device)
        for xid in chosen.unique().tolist():
            i_t, i_k = (chosen == xid).nonzero(as_tuple=True)
            x_e = x[i_t].float()
            hidden = self.activation(_project(x_e, self.gate, xid), _project(x_e, self.up, xid))
            out.index_add_(0, i_t, _project(hidden, self.down, xid) * gates[i_t, i_k, None].float())
        return out.to(x.dtype)


def round_products(model: nn.Module, plans: Iterable[TensorPlan], types: Mapping[str, Sequence[QType]]) -> None:
    """Have a loaded `model` round what it multiplies with weights that are not float32 in the file.

    Routers that were made other than float32 by name are left out.
    """
    owner: Any
    for owner in list(model.modules()):
        packed = getattr(owner, "packed", None)
        if isinstance(packed, PackedLayer):
            owner.packed = RoundingLayer(packed.gate, packed.up, packed.down, packed.activation)
    rows: dict[str, list[tuple[QType, torch.Tensor]]] = {}
    for plan in plans:
        qtype, path = types[plan.name][0], plan.parts[0].tensor.rpartition(".")[0]
        if plan.name.endswith("attn_k_b.weight"):
            _round_latent(model, path.rpartition(".")[0], qtype, types[plan.name.replace("_k_b", "_v_b")][0])
        elif plan.name == "token_embd.weight" and "output.weight" not in types:
            rows["lm_head"] = [(qtype, torch.arange(plan.shape[0]))]
        linear = model.get_submodule(path)
        if type(linear) is nn.Linear and len(plan.shape) == 2:
            (part,) = plan.parts
            ids = torch.arange(linear.out_features)[slice(*part.rows or (None,))]
            if part.transform is not None:
                ids = part.transform(ids[:, None].expand_as(linear.weight))[:, 0]
            rows.setdefault(path, []).append((qtype, ids))
    for path, parts in rows.items():
        owner = model.get_submodule(path)
        owner.forward = partial(_run_linear, owner, parts)


def _run_linear(linear: nn.Linear, parts: list[tuple[QType, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """A linear layer whose output features `ids` come of weights that are `qtype` in the file."""
    out = x.new_empty((*x.shape[:-1], linear.out_features))
    for qtype, ids in parts:
        out[..., ids] = multiply(x.float(), linear.weight[ids].float(), qtype).to(x)
    return out if linear.bias is None else out + linear.bias


def _project(x: torch.Tensor, experts: PackedExperts, xid: int) -> torch.Tensor:
    product = multiply(x, experts.dequantize(xid, backend="torch"), QType(experts.table[xid][1].type_id))
    return product if experts.bias is None else product + experts.bias[xid]


def _round_latent(model: Any, path: str, key_type: QType, value_type: QType) -> None:
    """Have the latent attention at `path` compute as llama.cpp does, which makes no keys and values of the latents.

    The weights of keys multiply the queries instead, and those of values what was attended to.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = model.get_submodule(path)
    attention.key_type, attention.value_type = key_type, value_type
    attention.kv_b_proj.register_forward_pre_hook(lambda _, given: setattr(attention, "latents", given[0]))
    ALL_ATTENTION_FUNCTIONS.register(_LATENT, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_LATENT, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = _LATENT


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **others: Any
) -> tuple[torch.Tensor, None]:
    """Attention of queries [batch, heads, tokens, width]: [batch, tokens, heads, v_head_dim]; `value` is not used."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    n_keys, heads = module.qk_nope_head_dim, query.shape[1]
    up = module.kv_b_proj.weight.unflatten(0, (heads, -1)).float()
    keys, values = up[:, :n_keys].transpose(1, 2), up[:, n_keys:]
    latents = module.latents.view(len(query), 1, -1, up.shape[-1]).expand(-1, heads, -1, -1)
    query = torch.cat((_multiply_heads(query[..., :n_keys], keys, module.key_type), query[..., n_keys:]), -1)
    key = torch.cat((latents, key[..., n_keys:]), -1)
    attended, _ = sdpa_attention_forward(module, query, key, latents, mask, **others)
    return _multiply_heads(attended.transpose(1, 2), values, module.value_type).transpose(1, 2), None


def _multiply_heads(x: torch.Tensor, weights: torch.Tensor, qtype: QType) -> torch.Tensor:
    """x [batch, heads, tokens, n_cols] times weights [heads, n_rows, n_cols]."""
    products = [multiply(x[:, i].float(), weight, qtype) for i, weight in enumerate(weights)]
    return torch.stack(products, 1).to(x)
