"""Experts run one by one: transformers' blocks, brute force over their weights, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import build_moe
from gguf import GGUFWriter
from gguf.quants import dequantize
from small_sources import expert_tensors, gaussian, stack_name

from alphaq_gguf.calibration.data import WHOLE
from alphaq_gguf.calibration.experts import LayerExperts, block_errors, unmodelled
from alphaq_gguf.calibration.statistics import TokenSample
from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.encode import encode_rows
from alphaq_gguf.errors import SourceError
from alphaq_gguf.qtypes import QType
from alphaq_gguf.routing import read_routers, route

TRANSPOSED = ("GptOss", "Llama4")
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("Qwen2Moe", "Mixtral", "GptOss", "Llama4", "GraniteMoe", "Olmoe", "DeepseekV3")},
    "Llama4": {"num_experts_per_tok": 2},
    # Wide enough for both clamps to matter.
    "GptOss": {"initializer_range": 0.5},
}


@dataclass(frozen=True)
class Model:
    """A layer of a tiny model, as our source and as transformers' module in float64, and inputs of its experts."""

    family: str
    source: Source
    bid: int
    block: Any
    inputs: np.ndarray

    def routed(self) -> np.ndarray:
        """What transformers adds up from the experts chosen, shared ones left out."""
        seen: list[torch.Tensor] = []
        hook = self.block.experts.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            self.block(torch.from_numpy(self.inputs).double()[None])
        hook.remove()
        # Some experts' outputs come one after the other.
        return seen[0].reshape(-1, *self.inputs.shape).sum(dim=0).numpy()

    def place(self, xid: int, proj: str) -> torch.Tensor:
        """A view of one expert's matrix among transformers' parameters, [n_rows, n_cols]."""
        experts = self.block.experts
        weights = (experts.down_proj if proj == "down" else experts.gate_up_proj).data[xid]
        weights = weights.T if self.family in TRANSPOSED else weights
        if proj == "down":
            return weights
        if self.family == "GptOss":
            return weights[int(proj == "up") :: 2]
        return weights.chunk(2)[int(proj == "up")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    from transformers import AutoModelForCausalLM

    built: dict[str, Model] = {}

    def build(family: str) -> Model:
        if family not in built:
            directory = build_moe(tmp_path_factory.mktemp(family) / "model", family, **VARIANTS[family], draft=False)
            source = open_source(directory)
            bid = source.stacks[-1].bid
            loaded = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float64, experts_implementation="eager"
            ).eval()
            layer = loaded.model.layers[bid]
            (block,) = (module for module in layer.children() if hasattr(module, "experts"))
            rng = np.random.default_rng(7)
            norm = read_routers(source)[bid].norm
            inputs = (rng.standard_normal((48, len(norm))) * norm).astype(np.float32) / 2
            built[family] = Model(family, source, bid, block, inputs)
        return built[family]

    return build


@pytest.mark.parametrize("family", VARIANTS)
def test_gated_outputs_add_up_to_what_transformers_routes(family, model):
    one = model(family)
    routing = route(read_routers(one.source)[one.bid], one.inputs)
    layer = LayerExperts(one.source, one.bid)
    found = np.zeros(one.inputs.shape)
    for xid in range(layer.n_experts):
        expert = layer.read(xid)
        tokens, ranks = np.nonzero(routing.chosen == xid)
        x, gates = torch.from_numpy(one.inputs[tokens]), torch.from_numpy(routing.gates[tokens, ranks]).float()
        found[tokens] += expert.gated(x, gates).numpy()
    expected = one.routed()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def qtypes_of(source: Source, bid: int) -> dict[str, tuple[QType, ...]]:
    """Few types, and not the same ones for every stack."""
    types = {"gate": (QType.Q2_K, QType.Q8_0), "up": (QType.Q2_K, QType.Q8_0), "down": (QType.Q8_0, QType.Q2_K)}
    return {
        stack.name: (*types[stack.proj], *((QType.Q3_K,) if stack.proj == "up" else ()))
        for stack in source.stacks
        if stack.bid == bid
    }


def decoded(rows: np.ndarray, qtype: QType) -> torch.Tensor:
    return torch.from_numpy(dequantize(encode_rows(np.ascontiguousarray(rows), qtype), qtype)).double()


@pytest.mark.parametrize("family", VARIANTS)
def test_block_errors_are_what_replaced_weights_change(family, model):
    one = model(family)
    routing = route(read_routers(one.source)[one.bid], one.inputs)
    sample = TokenSample(one.inputs, routing.chosen, routing.gates.astype(np.float32), 1.0)
    qtypes = qtypes_of(one.source, one.bid)
    told: list[int] = []
    found = block_errors(one.source, one.bid, sample, qtypes, 1, told.append)

    layer = LayerExperts(one.source, one.bid)
    used = [int(xid) for xid in np.unique(routing.chosen)]
    tried = {(proj, q) for proj, m in layer.matrices[0].items() for q in qtypes[m.stack]}
    tried |= {(WHOLE, QType.Q2_K), (WHOLE, QType.Q8_0)}
    assert found.keys() == {(one.bid, xid, *key) for xid in used for key in tried}
    assert sum(told) == sum(s.n_weights * len(qtypes[s.name]) for s in one.source.stacks if s.bid == one.bid)

    before = one.routed()
    for (_, xid, proj, qtype), error in found.items():
        if xid not in used[:2]:
            continue
        projs = ("gate", "up", "down") if proj == WHOLE else (proj,)
        kept = {p: one.place(xid, p).clone() for p in projs}
        for p, weights in kept.items():
            one.place(xid, p).copy_(decoded(weights.float().numpy(), qtype))
        expected = np.square(one.routed() - before).sum()
        for p, weights in kept.items():
            one.place(xid, p).copy_(weights)
        assert error == pytest.approx(expected, rel=1e-4), (xid, proj, qtype)
        assert error > 0


def test_a_sample_stands_for_all_tokens(model):
    one = model("Mixtral")
    chosen, gates = np.tile([[2, 0]], (6, 1)), np.full((6, 2), 0.5, np.float32)
    qtypes = {stack_name("down", one.bid): (QType.Q4_K,)}
    whole = block_errors(
        one.source, one.bid, TokenSample(one.inputs[:6], chosen, gates, 1.0), qtypes, 1, lambda n: None
    )
    sampled = TokenSample(one.inputs[:6], chosen, gates, 0.125)
    found = block_errors(one.source, one.bid, sampled, qtypes, 1, lambda n: None)
    assert found.keys() == {(one.bid, xid, "down", QType.Q4_K) for xid in (0, 2)}
    assert found == {key: pytest.approx(8 * error) for key, error in whole.items()}


# Small experts in GGUF files, some as no family of ours has them.

N_EMBD, N_FF = 64, 32


def layer_of(
    path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "newmoe", limits: list[float] | None = None
) -> Source:
    """A source with one layer's `tensors`."""
    writer = GGUFWriter(path, architecture)
    if limits is not None:
        writer.add_array(f"{architecture}.swiglu_clamp_exp", limits)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_source(path)


def separate() -> dict[str, np.ndarray]:
    return {name: tensor / 4 for name, tensor in expert_tensors(3, N_FF, N_EMBD).items() if "_exps" in name}


def fused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    gate_up = np.concatenate([tensors[stack_name("gate")], tensors[stack_name("up")]], axis=1)
    return {stack_name("gate_up"): gate_up, stack_name("down"): tensors[stack_name("down")]}


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def squared_relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) ** 2


def clamped_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = np.minimum(gate, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)


@pytest.mark.parametrize(
    ("architecture", "activate"),
    [
        ("newmoe", lambda gate, up: silu(gate) * up),
        ("grok", lambda gate, up: gelu(gate) * up),
        ("smallthinker", lambda gate, up: np.maximum(gate, 0) * up),
        ("minimax-m3", clamped_swiglu),
        ("maple", lambda gate, up: silu(np.minimum(gate, 1.5)) * np.clip(up, -1.5, 1.5)),
        ("step35", lambda gate, up: np.minimum(silu(gate), 1.5) * np.clip(up, -1.5, 1.5)),
    ],
)
def test_gated_activations_by_hand(tmp_path, architecture, activate):
    tensors = separate()
    source = layer_of(tmp_path / "m.gguf", tensors, architecture, [1.5, 99.0])
    x = gaussian(9, N_EMBD, scale=3)
    gate, up, down = (tensors[stack_name(proj)][1].astype(np.float64) for proj in ("gate", "up", "down"))
    a = activate(x @ gate.T, x @ up.T)
    expert = LayerExperts(source, 0).read(1)
    assert expert.intermediate(torch.from_numpy(x)).numpy() == pytest.approx(a, rel=1e-4, abs=1e-4)
    y = expert.gated(torch.from_numpy(x), torch.linspace(0, 1, 9)).numpy()
    assert y == pytest.approx(np.linspace(0, 1, 9)[:, None] * (a @ down.T), rel=1e-4, abs=2e-4)


@pytest.mark.parametrize(("architecture", "activate"), [("nemotron_h_moe", squared_relu), ("nomic-bert-moe", gelu)])
def test_experts_without_gates(tmp_path, architecture, activate):
    tensors = {name: tensor for name, tensor in separate().items() if "gate" not in name}
    source = layer_of(tmp_path / "m.gguf", tensors, architecture)
    x = gaussian(9, N_EMBD)
    up, down = (tensors[stack_name(proj)][2].astype(np.float64) for proj in ("up", "down"))
    a = activate(x @ up.T)
    expert = LayerExperts(source, 0).read(2)
    assert expert.intermediate(torch.from_numpy(x)).numpy() == pytest.approx(a, rel=1e-4, abs=1e-4)

    sample = TokenSample(x, np.full((9, 1), 2), np.ones((9, 1), np.float32), 1.0)
    qtypes = dict.fromkeys(tensors, (QType.Q8_0,))
    found = block_errors(source, 0, sample, qtypes, 1, lambda n: None)
    coarse_up, coarse_down = (decoded(rows.astype(np.float32), QType.Q8_0).numpy() for rows in (up, down))
    changed = {
        "up": activate(x @ coarse_up.T) @ down.T,
        "down": a @ coarse_down.T,
        WHOLE: activate(x @ coarse_up.T) @ coarse_down.T,
    }
    assert found == {
        (0, 2, proj, QType.Q8_0): pytest.approx(np.square(y - a @ down.T).sum(), rel=1e-3)
        for proj, y in changed.items()
    }


def test_a_fused_stack_holds_gate_before_up(tmp_path):
    apart = layer_of(tmp_path / "apart.gguf", separate())
    joined = layer_of(tmp_path / "joined.gguf", fused(separate()))
    x = gaussian(20, N_EMBD)
    sample = TokenSample(x, np.tile([0, 2], (20, 1)), gaussian(20, 2, seed=1), 0.5)
    types = (QType.Q4_0, QType.Q8_0)
    errors = [
        block_errors(source, 0, sample, {s.name: types for s in source.stacks}, 1, lambda n: None)
        for source in (apart, joined)
    ]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 2 * 4 * 2
    # llama.cpp heeds no limit there.
    limited = layer_of(tmp_path / "limited.gguf", fused(separate()), "maple", [1e-3])
    x = torch.from_numpy(x)
    assert (LayerExperts(limited, 0).read(0).intermediate(x) == LayerExperts(apart, 0).read(0).intermediate(x)).all()


def test_scales_and_biases_come_after_the_product(tmp_path):
    tensors = separate()
    sizes = {"gate": N_FF, "up": N_FF, "down": N_EMBD}
    biases = {f"blk.0.ffn_{proj}_exps.bias": gaussian(3, n, seed=n) for proj, n in sizes.items()}
    scales = {f"blk.0.ffn_{proj}_exps.scale": gaussian(3, seed=i) for i, proj in enumerate(sizes)}
    x = gaussian(5, N_EMBD).astype(np.float64)

    def product(proj: str, inputs: np.ndarray, scaled_as: str) -> np.ndarray:
        scaled = inputs @ tensors[stack_name(proj)][1].T * scales[f"blk.0.ffn_{scaled_as}_exps.scale"][1]
        return scaled + biases[f"blk.0.ffn_{proj}_exps.bias"][1]

    def expected(gate_scale: str) -> np.ndarray:
        return product("down", silu(product("gate", x, gate_scale)) * product("up", x, "up"), "down")

    def found(name: str, stacks: Mapping[str, np.ndarray]) -> np.ndarray:
        expert = LayerExperts(layer_of(tmp_path / name, {**stacks, **biases, **scales}), 0).read(1)
        return expert.output(expert.intermediate(torch.from_numpy(x).float())).numpy()

    assert found("apart.gguf", tensors) == pytest.approx(expected("gate"), abs=1e-4)
    # llama.cpp scales a fused product by what is called the scale of `up`.
    assert found("fused.gguf", fused(tensors)) == pytest.approx(expected("up"), abs=1e-4)


def test_whole_experts_take_what_llama_cpp_writes_for_rows_that_do_not_fit(tmp_path):
    # Rows of 256 in gate and up take K-quants, rows of 32 in down do not.
    shapes = {"gate": (32, 256), "up": (32, 256), "down": (256, 32)}
    tensors = {stack_name(proj): gaussian(2, *shape, seed=i) for i, (proj, shape) in enumerate(shapes.items())}
    source = layer_of(tmp_path / "m.gguf", tensors)
    wide = (QType.Q2_K, QType.Q4_K, QType.Q6_K)
    qtypes = {
        stack_name("gate"): wide,
        stack_name("up"): wide,
        stack_name("down"): (QType.Q4_0, QType.Q8_0, QType.IQ4_NL),
    }
    x, ones = gaussian(6, 256), np.ones((6, 1), np.float32)
    found = block_errors(source, 0, TokenSample(x, np.ones((6, 1), int), ones, 1.0), qtypes, 1, lambda n: None)
    # Q4_K would make it Q5_0, which nobody tried.
    assert {qtype for _, _, proj, qtype in found if proj == WHOLE} == {QType.Q2_K, QType.Q6_K}

    def output(taken: Mapping[str, QType]) -> np.ndarray:
        gate, up, down = (decoded(tensors[stack_name(proj)][1], taken.get(proj, QType.F32)).numpy() for proj in shapes)
        return silu(x @ gate.T) * (x @ up.T) @ down.T

    for label, substitute in ((QType.Q2_K, QType.Q4_0), (QType.Q6_K, QType.Q8_0)):
        change = output({"gate": label, "up": label, "down": substitute}) - output({})
        assert found[0, 1, WHOLE, label] == pytest.approx(np.square(change).sum(), rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "dropped", "reason"),
    [
        ("kimi-k3", (), "hyperbolic tangents"),
        ("newmoe", ("gate",), "no gates"),
        ("newmoe", ("down",), "layer 0 lacks ffn_up_exps or ffn_down_exps"),
    ],
)
def test_experts_that_cannot_be_run(tmp_path, architecture, dropped, reason):
    tensors = {name: t for name, t in separate().items() if not any(f"_{proj}_" in name for proj in dropped)}
    source = layer_of(tmp_path / "m.gguf", tensors, architecture)
    assert reason in unmodelled(source)
    with pytest.raises(SourceError, match=reason):
        LayerExperts(source, 0)


@pytest.mark.parametrize("family", VARIANTS)
def test_experts_that_can_be_run(family, model):
    assert unmodelled(model(family).source) == ""
