"""What llama.cpp knows about an architecture's experts and no GGUF metadata says.

Mixture-of-experts architectures of llama.cpp as of llama-cpp-python 0.3.36, from what each one's graph hands to
`build_moe_ffn` and what that does with it. An architecture that is missing here has gated experts with SiLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Activation(Enum):
    """What an expert does to its gate's product before it multiplies the other one, or to its only one."""

    SILU = auto()
    GELU = auto()
    """In its tanh form."""
    RELU = auto()
    SQUARED_RELU = auto()
    CLAMPED_SWIGLU = auto()
    """g sigmoid(1.702 g) (u + 1), with g at most 7 and u within 7 of 0."""


class Clamp(Enum):
    """What the limit in the metadata key `swiglu_clamp_exp` bounds, beside the other product."""

    GATE = auto()
    ACTIVATED_GATE = auto()


@dataclass(frozen=True)
class ExpertRule:
    """`scales_input`: the gate weight multiplies an expert's input, not its output."""

    activation: Activation = Activation.SILU
    clamp: Clamp | None = None
    scales_input: bool = False


# nomic-bert-moe and nemotron_h_moe have experts without gates.
EXPERT_RULES = {
    "bailingmoe3": ExpertRule(clamp=Clamp.ACTIVATED_GATE),
    "deepseek4": ExpertRule(clamp=Clamp.GATE),
    "gemma4": ExpertRule(Activation.GELU),
    "glm5-next": ExpertRule(clamp=Clamp.GATE),
    "gpt-oss": ExpertRule(Activation.CLAMPED_SWIGLU),
    "grok": ExpertRule(Activation.GELU),
    "hy_v4": ExpertRule(clamp=Clamp.GATE),
    "llama4": ExpertRule(scales_input=True),
    "maple": ExpertRule(clamp=Clamp.GATE),
    "minimax-m3": ExpertRule(Activation.CLAMPED_SWIGLU),
    "nemotron_h_moe": ExpertRule(Activation.SQUARED_RELU),
    "nomic-bert-moe": ExpertRule(Activation.GELU),
    "smallthinker": ExpertRule(Activation.RELU),
    "step35": ExpertRule(clamp=Clamp.ACTIVATED_GATE),
}

UNMODELLED = {"kimi-k3": "their activation is bounded by hyperbolic tangents whose widths are hyper-parameters"}
"""Architectures whose experts compute what no rule here says."""
