"""Running one expert at a time, as llama.cpp does, and what encoding it changes in the output of its block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..arch.experts import EXPERT_RULES, UNMODELLED, Activation, Clamp, ExpertRule
from ..checkpoint import ExpertMatrix, Source
from ..encode import decode_rows, encode_rows
from ..errors import SourceError
from ..prefetch import prefetch
from ..qtypes import QType, stock_substitute
from .data import WHOLE
from .statistics import TokenSample

_ALPHA, _BOUND = 1.702, 7.0
# llama.cpp takes limits below this for none.
_LEAST_LIMIT = 1e-6


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One expert's float32 matrices [n_rows, n_cols] by projection, and the biases and scales of their products.

    `limit` is what the clamp of its rule, if any, bounds; 0 for no clamp.
    """

    rule: ExpertRule
    matrices: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    scales: Mapping[str, float]
    limit: float = 0.0

    def inputs(self, x: Tensor, gates: Tensor) -> Tensor:
        """What it reads of the block's inputs x [T, H] under gate weights [T]."""
        return x * gates[:, None] if self.rule.scales_input else x

    def intermediate(self, x: Tensor) -> Tensor:
        """What `down` reads, [T, I], for inputs x [T, H]."""
        return self.activate({proj: self.project(proj, x) for proj in self.matrices if proj != "down"})

    def output(self, a: Tensor) -> Tensor:
        """The expert's output [T, H] for its intermediate activations a [T, I]."""
        return self.project("down", a)

    def gated(self, x: Tensor, gates: Tensor) -> Tensor:
        """What it adds to the output of its block."""
        y = self.output(self.intermediate(self.inputs(x, gates)))
        return y if self.rule.scales_input else y * gates[:, None]

    def project(self, proj: str, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The product of x with one of its matrices, or with `weights` in place of that, scaled and biased."""
        y = functional.linear(x, self.matrices[proj] if weights is None else weights)
        if proj in self.scales:
            y = y * self.scales[proj]
        return y + self.biases[proj] if proj in self.biases else y

    def activate(self, products: Mapping[str, Tensor]) -> Tensor:
        """Intermediate activations from the products with `gate`, if it has one, and `up`."""
        up, gate = products["up"], products.get("gate")
        if gate is None:
            return _nonlinear(self.rule.activation, up)
        if self.rule.activation == Activation.CLAMPED_SWIGLU:
            gate, up = gate.clamp(max=_BOUND), up.clamp(-_BOUND, _BOUND)
            return gate * torch.sigmoid(_ALPHA * gate) * (up + 1)
        if self.limit:
            up = up.clamp(-self.limit, self.limit)
        if self.limit and self.rule.clamp == Clamp.GATE:
            gate = gate.clamp(max=self.limit)
        gate = _nonlinear(self.rule.activation, gate)
        if self.limit and self.rule.clamp == Clamp.ACTIVATED_GATE:
            gate = gate.clamp(max=self.limit)
        return gate * up


class LayerExperts:
    """The experts of one layer, read when asked for; SourceError for experts that we do not know how to run."""

    def __init__(self, source: Source, bid: int, device: str = "cpu") -> None:
        if reason := unmodelled(source):
            raise SourceError(
                f"{source.label}: the experts of {source.architecture} cannot be run: {reason}",
                "use --strategy mse, which needs no calibration",
            )
        self.source = source
        self.device = device
        self.rule = EXPERT_RULES.get(source.architecture, ExpertRule())
        stacks = [stack for stack in source.stacks if stack.bid == bid]
        self.n_experts = stacks[0].n_experts
        self.matrices: list[dict[str, ExpertMatrix]] = [{} for _ in range(self.n_experts)]
        """By expert and projection."""
        for stack in stacks:
            for matrix in stack.matrices:
                self.matrices[matrix.xid][matrix.proj] = matrix
        fused = any(stack.proj == "gate_up" for stack in stacks)
        self._biases, self._scales = {}, {}
        for proj in self.matrices[0]:
            for found, suffix, owner in (
                (self._biases, "bias", proj),
                (self._scales, "scale", "up" if fused and proj == "gate" else proj),
            ):
                name = f"blk.{bid}.ffn_{owner}_exps.{suffix}"
                if name in source.tensors:
                    found[proj] = source.read_rows(name).reshape(self.n_experts, -1)
        # llama.cpp clamps nothing where gate and up are one stack.
        self._limit = 0.0 if fused or self.rule.clamp is None else _limit(source, bid)

    def read(self, xid: int) -> ExpertWeights:
        read = {proj: self.source.read_matrix(matrix) for proj, matrix in self.matrices[xid].items()}
        return ExpertWeights(
            self.rule,
            {proj: self._tensor(rows) for proj, rows in read.items()},
            {proj: self._tensor(bias[xid]) for proj, bias in self._biases.items()},
            {proj: float(scale[xid, 0]) for proj, scale in self._scales.items()},
            self._limit,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def unmodelled(source: Source) -> str:
    """Why the source's experts cannot be run here; empty when they can."""
    if reason := UNMODELLED.get(source.architecture):
        return reason
    for bid in {stack.bid for stack in source.stacks}:
        projs = {proj for stack in source.stacks if stack.bid == bid for proj in stack.proj.split("_")}
        if not {"up", "down"} <= projs:
            return f"layer {bid} lacks ffn_up_exps or ffn_down_exps"
        if "gate" not in projs and source.architecture not in EXPERT_RULES:
            return "they have no gates, and which activation instead is not known"
    return ""


def block_errors(
    source: Source,
    bid: int,
    sample: TokenSample,
    qtypes: Mapping[str, tuple[QType, ...]],
    threads: int,
    advance: Callable[[int], None],
    device: str = "cpu",
) -> dict[tuple[int, int, str, QType], float]:
    """How much a block's output changes when one matrix of an expert, or (WHOLE) the expert, is encoded.

    By (layer, expert, projection or WHOLE, type): the squared change of the sum of the experts' gated outputs, itself
    summed over all tokens, as estimated from the sample. Experts without a sampled token have no entries. `qtypes` are
    the types to try by stack; of WHOLE, those for which every stack has tried what llama.cpp would write for them.
    `advance` is told the weights done with, once for every type, those of skipped experts as well.
    """
    layer = LayerExperts(source, bid, device)
    used = np.unique(sample.chosen)
    reads = prefetch(partial(layer.read, int(xid)) for xid in used)
    errors: dict[tuple[int, int, str, QType], float] = {}
    for xid, matrices in enumerate(layer.matrices):
        types = {proj: qtypes.get(matrix.stack, ()) for proj, matrix in matrices.items()}
        if xid not in used:
            advance(sum(m.n_rows * m.n_cols * len(types[proj]) for proj, m in matrices.items()))
            continue
        tokens, ranks = np.nonzero(sample.chosen == xid)
        x, gates = (
            torch.from_numpy(values).to(device=device, dtype=torch.float32)
            for values in (sample.inputs[tokens], sample.gates[tokens, ranks])
        )
        found = _expert_errors(next(reads), x, gates, types, threads, advance)
        errors |= {(bid, xid, *key): error / sample.share for key, error in found.items()}
    return errors


@torch.inference_mode()
def _expert_errors(
    expert: ExpertWeights,
    x: Tensor,
    gates: Tensor,
    types: Mapping[str, tuple[QType, ...]],
    threads: int,
    advance: Callable[[int], None],
) -> dict[tuple[str, QType], float]:
    """By projection or WHOLE and type, the squared changes of the expert's gated outputs summed over its tokens."""
    x = expert.inputs(x, gates)
    products = {proj: expert.project(proj, x) for proj in expert.matrices if proj != "down"}
    a = expert.activate(products)
    y = expert.output(a)
    weight = torch.ones_like(gates) if expert.rule.scales_input else gates**2

    def error(changed: Tensor) -> float:
        return float((changed - y).square().sum(dim=1).double() @ weight.double())

    def encoded(proj: str, qtype: QType) -> Tensor:
        rows = expert.matrices[proj].cpu().numpy()
        decoded = decode_rows(encode_rows(rows, qtype, threads), qtype, rows.shape[1], threads)
        advance(rows.size)
        return torch.from_numpy(decoded).to(x.device)

    errors: dict[tuple[str, QType], float] = {}
    changed: dict[str, dict[QType, Tensor]] = {}
    for proj in products:
        changed[proj] = {qtype: expert.project(proj, x, encoded(proj, qtype)) for qtype in types[proj]}
        for qtype, product in changed[proj].items():
            errors[proj, qtype] = error(expert.output(expert.activate({**products, proj: product})))
    whole = _whole_types(types, {proj: weights.shape[1] for proj, weights in expert.matrices.items()})
    for qtype in types["down"]:
        down = encoded("down", qtype)
        errors["down", qtype] = error(expert.project("down", a, down))
        for label, taken in whole.items():
            if taken["down"] == qtype:
                activations = expert.activate({proj: of[taken[proj]] for proj, of in changed.items()})
                errors[WHOLE, label] = error(expert.project("down", activations, down))
    return errors


def _whole_types(types: Mapping[str, tuple[QType, ...]], n_cols: Mapping[str, int]) -> dict[QType, dict[str, QType]]:
    """What each projection takes when the whole expert is given a type, for types where all of that is tried."""
    asked = {qtype for tried in types.values() for qtype in tried}
    taken = {qtype: {proj: stock_substitute(qtype, n_cols[proj]) for proj in types} for qtype in sorted(asked)}
    return {qtype: by_proj for qtype, by_proj in taken.items() if all(by_proj[proj] in types[proj] for proj in types)}


def _nonlinear(activation: Activation, x: Tensor) -> Tensor:
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)
        case Activation.SQUARED_RELU:
            return functional.relu(x).square()
        case Activation.CLAMPED_SWIGLU:
            raise ValueError("a clamped SwiGLU needs a gate")


def _limit(source: Source, bid: int) -> float:
    """The layer's limit in the metadata, 0 without one."""
    key = f"{source.architecture}.swiglu_clamp_exp"
    found = next((field.value for field in source.fields if field.key == key), 0.0)
    limit = found[bid] if isinstance(found, list) else found
    return limit if limit > _LEAST_LIMIT else 0.0
