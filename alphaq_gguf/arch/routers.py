"""What llama.cpp knows about an architecture's routers and no GGUF metadata says.

Mixture-of-experts architectures of llama.cpp as of llama-cpp-python 0.3.36, from what each one's graph hands to
`build_moe_ffn`. An architecture that is missing here is taken at its metadata's word: see the defaults of RouterRule.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Gating(IntEnum):
    """How logits become gate weights; the values are those of the metadata key `expert_gating_func`."""

    SOFTMAX = 1
    SIGMOID = 2
    SOFTMAX_OF_CHOSEN = 3
    SQRT_SOFTPLUS = 4


@dataclass(frozen=True)
class RouterRule:
    """`gating` and `normalise` overrule the metadata; `default_gating` stands in where the metadata says nothing.

    Gate weights are divided by their sum with `normalise`; None leaves it to the metadata, which by default does not.
    `norms` are the tensors that may scale the router's input: the first one that a layer has does.
    """

    gating: Gating | None = None
    default_gating: Gating = Gating.SOFTMAX
    normalise: bool | None = None
    norms: tuple[str, ...] = ("ffn_norm", "post_attention_norm")


_PLAIN = RouterRule(Gating.SOFTMAX, normalise=False)
_NORMALISED = RouterRule(Gating.SOFTMAX, normalise=True)
_SIGMOID_BY_DEFAULT = RouterRule(default_gating=Gating.SIGMOID)
_ALWAYS_NORMALISED = RouterRule(normalise=True)

# Two of these apply a layer norm instead of an RMS norm; for random vectors of their width the two are the same.
ROUTER_RULES = {
    "afmoe": _SIGMOID_BY_DEFAULT,
    "arctic": RouterRule(Gating.SOFTMAX, normalise=True, norms=("ffn_norm_exps",)),
    "bailingmoe": RouterRule(Gating.SOFTMAX),
    "cohere2moe": RouterRule(default_gating=Gating.SIGMOID, norms=("attn_norm",)),
    "dbrx": RouterRule(Gating.SOFTMAX, normalise=True, norms=("attn_output_norm",)),
    "deepseek": _PLAIN,
    "ernie4_5-moe": _NORMALISED,
    "glm-dsa": _SIGMOID_BY_DEFAULT,
    "glm4moe": _SIGMOID_BY_DEFAULT,
    "glm5-next": _SIGMOID_BY_DEFAULT,
    "gpt-oss": RouterRule(Gating.SOFTMAX_OF_CHOSEN, normalise=False),
    "granite_swa": _NORMALISED,
    "granitehybrid": _NORMALISED,
    "granitemoe": _NORMALISED,
    "grok": _NORMALISED,
    "grovemoe": _NORMALISED,
    "hunyuan-moe": _NORMALISED,
    "hy_v3": _SIGMOID_BY_DEFAULT,
    "jamba": _PLAIN,
    "kimi-linear": _ALWAYS_NORMALISED,
    "laguna": _SIGMOID_BY_DEFAULT,
    "lfm2moe": _ALWAYS_NORMALISED,
    "llada-moe": _PLAIN,
    "llama": _NORMALISED,
    "llama4": RouterRule(Gating.SIGMOID, normalise=False),
    "maple": _NORMALISED,
    "mellum": _NORMALISED,
    "mimo2": RouterRule(Gating.SIGMOID, normalise=True),
    "minimax-01": _NORMALISED,
    "minimax-m2": _ALWAYS_NORMALISED,
    "mistral3": _NORMALISED,
    "nemotron_h_moe": RouterRule(Gating.SIGMOID, norms=("post_attention_norm", "attn_norm")),
    "olmoe": _PLAIN,
    "phimoe": _NORMALISED,
    "qwen2moe": _PLAIN,
    "qwen35moe": _NORMALISED,
    "qwen3moe": _NORMALISED,
    "qwen3next": _NORMALISED,
    "qwen3vlmoe": _NORMALISED,
    "qwen4exp": _NORMALISED,
    "rnd1": _NORMALISED,
    "step35": _SIGMOID_BY_DEFAULT,
}

UNSIMULATED = {
    "deepseek4": "its first layers choose experts by the token, not by a router",
    "gemma4": "its routers read another vector than its experts, with scales of their own",
    "smallthinker": "its routers read the residual stream, which no norm scales",
}
"""Architectures whose routing random vectors cannot stand in for."""
