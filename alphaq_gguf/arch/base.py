"""What a model family must say, and the helpers that families share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from ..errors import SourceError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """Rows that one checkpoint tensor contributes: optionally one expert of a fused tensor, a row range of it."""

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class TensorPlan:
    """A GGUF tensor to write: its name, its shape in torch order, and the parts its rows come from, in order."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class Config(dict[str, Any]):
    """A checkpoint's config.json; `need` raises a SourceError that names a missing field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def need(self, *keys: str) -> Any:
        """The first of `keys` that has a value; several are spellings of the same field."""
        for key in keys:
            if self.get(key) is not None:
                return self[key]
        raise SourceError(f"{self.where}: no field {keys[0]!r}, which this model family needs")

    @property
    def n_experts(self) -> int:
        """Routed experts per layer, under either of transformers' names."""
        return self.need("num_experts", "num_local_experts")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint; SourceError when the file holds anything else, FileNotFoundError without it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not valid JSON: {error}", "download it again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(data).__name__}", "download it again")
    return data


class Family(ABC):
    """One model family: which GGUF tensors and metadata its checkpoints become."""

    model_type: str
    """`model_type` in config.json."""
    gguf_arch: str
    """llama.cpp's architecture name."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Suffixes of checkpoint tensors that have no place in a GGUF."""

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raise SourceError for a configuration llama.cpp's implementation of the family cannot run."""

    @abstractmethod
    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        """All GGUF tensors, in writing order. `shapes` are the checkpoint's tensors."""

    @abstractmethod
    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        """Add the architecture's hyper-parameters to `writer`."""


class Planner:
    """Collects TensorPlans, checking every part against the checkpoint's shapes."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        self.shapes = shapes
        self.where = where
        self.plans: list[TensorPlan] = []

    def add(self, gguf_name: str, tensor: str, *, shape: tuple[int, ...]) -> None:
        """A tensor that is written as it stands."""
        self._expect(tensor, shape)
        self.plans.append(TensorPlan(gguf_name, shape, (Part(tensor),)))

    def add_optional(self, gguf_name: str, tensor: str, *, shape: tuple[int, ...]) -> None:
        """Like `add`, when the checkpoint has the tensor at all."""
        if tensor in self.shapes:
            self.add(gguf_name, tensor, shape=shape)

    def add_attention(self, bid: int, n_embd: int, n_q: int, n_kv: int, head_dim: int) -> None:
        """A layer's q, k, v and output projections, with the biases and per-head norms the checkpoint has."""
        hf, out = f"model.layers.{bid}.self_attn", f"blk.{bid}"
        for proj, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            self.add(f"{out}.attn_{proj}.weight", f"{hf}.{proj}_proj.weight", shape=(n_out, n_embd))
            self.add_optional(f"{out}.attn_{proj}.bias", f"{hf}.{proj}_proj.bias", shape=(n_out,))
        for proj in ("q", "k"):
            self.add_optional(f"{out}.attn_{proj}_norm.weight", f"{hf}.{proj}_norm.weight", shape=(head_dim,))
        self.add(f"{out}.attn_output.weight", f"{hf}.o_proj.weight", shape=(n_embd, n_q))

    def add_experts(self, bid: int, prefix: str, n_experts: int, n_ff: int, n_embd: int) -> None:
        """The gate, up and down stacks of a layer under `prefix`.

        Three checkpoint layouts: `PREFIX.N.gate_proj.weight` one by one; fused
        `PREFIX.gate_up_proj` [E, 2 n_ff, n_embd], gate first; `PREFIX.down_proj` [E, n_embd, n_ff].
        """
        shapes = {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
        fused_gate_up, fused_down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        for proj, shape in shapes.items():
            fused = fused_down if proj == "down" else fused_gate_up
            if fused in self.shapes:
                height = shape[0] if proj == "down" else 2 * n_ff
                self._expect(fused, (n_experts, height, shape[1]))
                first = n_ff if proj == "up" else 0
                rows = (first, first + shape[0])
                parts = tuple(Part(fused, expert=xid, rows=rows) for xid in range(n_experts))
            else:
                names = [f"{prefix}.{xid}.{proj}_proj.weight" for xid in range(n_experts)]
                for name in names:
                    self._expect(name, shape)
                parts = tuple(Part(name) for name in names)
            self.plans.append(TensorPlan(f"blk.{bid}.ffn_{proj}_exps.weight", (n_experts, *shape), parts))

    def _expect(self, tensor: str, shape: tuple[int, ...]) -> None:
        found = self.shapes.get(tensor)
        if found is None:
            raise SourceError(
                f"{self.where}: tensor {tensor} is missing", "the checkpoint is incomplete: download it again"
            )
        if found != shape:
            raise SourceError(
                f"{self.where}: tensor {tensor} has shape {list(found)}, config.json calls for {list(shape)}"
            )


def refuse_variants(config: Config, family: str, refused: Mapping[str, bool]) -> None:
    """SourceError for the first field whose value llama.cpp's implementation of `family` cannot honour."""
    for key, is_refused in refused.items():
        if is_refused:
            raise SourceError(f"{config.where}: {key} = {config.get(key)!r}: llama.cpp's {family} has no such variant")


def add_common_metadata(config: Config, writer: GGUFWriter) -> None:
    """Hyper-parameters that nearly all decoder families share, under llama.cpp's keys."""
    writer.add_block_count(config.need("num_hidden_layers"))
    writer.add_context_length(config.need("max_position_embeddings"))
    writer.add_embedding_length(config.need("hidden_size"))
    writer.add_feed_forward_length(config.need("intermediate_size"))
    writer.add_head_count(config.need("num_attention_heads"))
    writer.add_head_count_kv(config.get("num_key_value_heads") or config.need("num_attention_heads"))
    writer.add_layer_norm_rms_eps(config.need("rms_norm_eps"))
    writer.add_expert_count(config.n_experts)
    writer.add_expert_used_count(config.need("num_experts_per_tok"))
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    add_rope_metadata(config, writer)


def add_rope_metadata(config: Config, writer: GGUFWriter) -> None:
    """Rotary embedding base and scaling, from either spelling of transformers' configuration."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings", config.need("max_position_embeddings"))
        )
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    elif kind != "default":
        raise SourceError(f"{config.where}: rope scaling {kind!r} is not supported", "supported: default, linear, yarn")
    if theta is not None:
        writer.add_rope_freq_base(theta)
