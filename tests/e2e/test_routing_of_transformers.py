"""Routers read from checkpoints route as transformers' own router modules do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FAMILIES, LAYOUTS, build_moe

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.routing import read_routers, route

VARIANTS = {
    **{family: {"family": family} for family in FAMILIES},
    **{name: LAYOUTS[name] for name in ("DeepseekV2 lite", "Llama4 as Maverick")},
    "Glm4Moe in groups": {
        "family": "Glm4Moe",
        "num_experts": 8,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": False,
    },
}
N = 2048


def router_modules(model: Any) -> dict[int, Any]:
    """transformers' routers by layer: modules `gate` or `router` that hold a row per expert."""
    return {
        int(name.split(".")[2]): module
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router")) and "Router" in type(module).__name__
    }


def dense_gates(n_experts: int, output: tuple[Any, ...]) -> np.ndarray:
    """What a router module returned, as gate weights [n, E], 0 where an expert is not chosen."""
    import torch

    if len(output) == 2:  # scores of all experts, logits
        return output[0].numpy()
    _, weights, chosen = output
    return torch.zeros(len(weights), n_experts).scatter(1, chosen, weights).numpy()


@pytest.mark.parametrize("layout", VARIANTS)
def test_experts_and_gate_weights_are_those_of_transformers(layout: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = build_moe(tmp_path / "model", **VARIANTS[layout])
    source = open_source(directory)
    routers = read_routers(source)
    assert routers.keys() == {stack.bid for stack in source.stacks}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    modules = router_modules(model)
    # What is read beyond the model's layers is the draft layer, which transformers leaves out.
    assert modules.keys() == {bid for bid in routers if bid < model.config.num_hidden_layers}

    seen: dict[int, np.ndarray] = {}
    for bid, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, bid=bid: seen.update({bid: inputs[0].detach().numpy()}))
    with torch.no_grad():
        model(torch.arange(3, 67)[None])
    inputs = {bid: x.reshape(-1, x.shape[-1]) for bid, x in seen.items()}

    for bid, module in modules.items():
        router = routers[bid]
        # Without the norm's weights, what reaches the router is a vector of unit RMS but for epsilon.
        rms = np.sqrt(((inputs[bid] / router.norm) ** 2).mean(axis=1))
        assert rms == pytest.approx(np.ones(len(rms)), abs=1e-3)
        vectors = np.random.default_rng(bid).standard_normal((N, len(router.norm))).astype(np.float32) * router.norm
        # Short enough for these models' loud routers to stay clear of the sums that llama.cpp does not divide by.
        vectors /= 4
        with torch.no_grad():
            expected = dense_gates(len(router.weights), module(torch.from_numpy(vectors)))
        chosen, gates, _ = route(router, vectors)
        found = np.zeros(expected.shape)
        np.put_along_axis(found, chosen, gates, axis=1)
        assert ((found > 0).sum(axis=0) == (expected > 0).sum(axis=0)).all()
        assert np.abs(found - expected).max() < 1e-5
