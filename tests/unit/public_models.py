"""What a public checkpoint holds, from its config.json alone: transformers builds the model without memory for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from alphaq_gguf.arch import Config, Family

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")


def held_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors as transformers holds them."""
    import torch
    import transformers

    model_class = getattr(transformers, values["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(dict(values)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def public_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the layout of most public checkpoints: experts one by one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, held in held_shapes(values).items():
        fused = _FUSED.match(name)
        if fused is None:
            shapes[name] = held
            continue
        n_experts, n_rows, n_cols = held
        projections = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
        for projection in projections:
            shape = (n_rows // len(projections), n_cols)
            shapes |= {f"{fused[1]}.{xid}.{projection}.weight": shape for xid in range(n_experts)}
    return shapes


def metadata(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the family writes under its architecture's name, without that name."""
    writer = GGUFWriter(None, family.gguf_arch)
    family.add_metadata(Config(values, "config.json"), writer)
    pairs = {key: value.value for data in writer.kv_data for key, value in data.items()}
    prefix = f"{family.gguf_arch}."
    return {key.removeprefix(prefix): value for key, value in pairs.items() if key.startswith(prefix)}
