"""What a model family must say, and the helpers that families share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, RopeScalingType

from ..errors import SourceError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
Transform = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Part:
    """Rows that one checkpoint tensor contributes: optionally one expert of a fused tensor, a row range of it.

    `transform` rearranges or computes instead of passing rows through: it is given the whole tensor
    (the whole expert's, if `expert` is set), so it suits what fits in memory. `inverse` undoes one that computes;
    one that only rearranges can do without.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transform: Transform | None = None
    inverse: Transform | None = None


@dataclass(frozen=True)
class TensorPlan:
    """A GGUF tensor to write: its name, its shape in torch order, and the parts its rows come from, in order.

    All parts give the same number of rows. `computed` says that a transform makes new values, which
    it is given and gives as float32; otherwise the stored type is kept. What is computed without an inverse is
    a constant, which config.json alone tells.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    computed: bool = False


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

    def with_defaults(self, values: Mapping[str, Any]) -> Config:
        """This configuration with `values` for the fields it lacks."""
        return Config({**values, **self}, self.where)

    @property
    def head_dim(self) -> int:
        """Width of an attention head: its own field, or the hidden size shared out evenly."""
        return self.get("head_dim") or self.need("hidden_size") // self.need("num_attention_heads")

    @property
    def n_experts(self) -> int:
        """Routed experts per layer, under any of transformers' names."""
        return self.need("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint; SourceError when the file holds anything else, FileNotFoundError without it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not valid JSON: {error}", "download it again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(data).__name__}", "download it again")
    return data


@dataclass(frozen=True)
class TokenizerRules:
    """What a model family knows of its tokenizers beyond their files; most need nothing.

    `special`: tokens, by kind (bos, eos, eot, eom, unk, sep, pad), that count where no file names one and the
    vocabulary has them. `preferred`: names to choose where several of llama.cpp's pre-tokenizers split alike.
    `space_prefix`: tokenizer_config.json's `add_prefix_space` is written down, whatever the tokenizer.
    """

    special: Mapping[str, str] = field(default_factory=dict)
    preferred: tuple[str, ...] = ()
    space_prefix: bool = False


class Family(ABC):
    """One model family: which GGUF tensors and metadata its checkpoints become."""

    model_type: str
    """`model_type` in config.json."""
    aliases: tuple[str, ...] = ()
    """Other `model_type`s of the same family."""
    gguf_arch: str
    """llama.cpp's architecture name."""
    tokenizer = TokenizerRules()

    def ignores(self, config: Config, tensor: str) -> bool:
        """Whether a checkpoint tensor has no place in the GGUF, such as draft layers or a vision tower."""
        return tensor.endswith("rotary_emb.inv_freq")

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raise SourceError for a configuration llama.cpp's implementation of the family cannot run."""

    def remarks(self, config: Config) -> list[str]:
        """Where llama.cpp computes a little otherwise than the model, whoever makes the file."""
        return []

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

    def add(
        self,
        gguf_name: str,
        tensor: str,
        *,
        shape: tuple[int, ...],
        transform: Transform | None = None,
        stored: tuple[int, ...] | None = None,
    ) -> None:
        """A tensor of `shape`, from one that is stored as `stored` (default: the same), rearranged by `transform`."""
        self.expect(tensor, stored or shape)
        parts = (Part(tensor, transform=transform),)
        if transform is None and len(shape) == 3:
            parts = tuple(Part(tensor, expert=i) for i in range(shape[0]))
        self.plans.append(TensorPlan(gguf_name, shape, parts))

    def add_computed(
        self, gguf_name: str, tensor: str, *, shape: tuple[int, ...], transform: Transform, inverse: Transform
    ) -> None:
        """A tensor of `shape` whose values `transform` computes of another's, from which `inverse` gets them back."""
        self.expect(tensor, shape)
        part = Part(tensor, transform=transform, inverse=inverse)
        self.plans.append(TensorPlan(gguf_name, shape, (part,), computed=True))

    def add_rows(self, gguf_name: str, tensor: str, *, rows: tuple[int, int], stored: tuple[int, int]) -> None:
        """Rows [start, stop) of a matrix that is stored as `stored`."""
        self.expect(tensor, stored)
        shape = (rows[1] - rows[0], stored[1])
        self.plans.append(TensorPlan(gguf_name, shape, (Part(tensor, rows=rows),)))

    def add_optional(self, gguf_name: str, tensor: str, *, shape: tuple[int, ...]) -> None:
        """Like `add`, when the checkpoint has the tensor at all."""
        if tensor in self.shapes:
            self.add(gguf_name, tensor, shape=shape)

    def add_ends(self, config: Config, *, tied_output: bool = True) -> None:
        """Token embedding, final norm and output; a tied output is left out.

        Without `tied_output` llama.cpp's architecture knows none, and a tied embedding is written twice.
        """
        n_embd, n_vocab = config.need("hidden_size"), config.need("vocab_size")
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        is_tied = bool(config.get("tie_word_embeddings", False))
        self.add("token_embd.weight", embedding, shape=(n_vocab, n_embd))
        self.add("output_norm.weight", "model.norm.weight", shape=(n_embd,))
        if not tied_output:
            is_tied = is_tied or head not in self.shapes
            self.add("output.weight", embedding if is_tied else head, shape=(n_vocab, n_embd))
        elif not is_tied:
            self.add("output.weight", head, shape=(n_vocab, n_embd))

    def add_attention(
        self,
        bid: int,
        config: Config,
        *,
        interleaved_rope: bool = False,
        wide_norms: bool = False,
    ) -> None:
        """A layer's q, k, v and output projections, with the biases and norms the checkpoint has.

        `interleaved_rope` is for architectures whose rotary embedding llama.cpp applies to neighbouring
        pairs, where transformers pairs the two halves of a head. `wide_norms` says that q and k are
        normalised over all their heads at once, not head by head.
        """
        n_embd, heads = config.need("hidden_size"), config.need("num_attention_heads")
        head_dim = config.head_dim
        n_q, n_kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
        hf, out = f"model.layers.{bid}.self_attn", f"blk.{bid}"
        for proj, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            transform = interleave_halves(head_dim) if interleaved_rope and proj != "v" else None
            weight, bias = f"{hf}.{proj}_proj.weight", f"{hf}.{proj}_proj.bias"
            self.add(f"{out}.attn_{proj}.weight", weight, shape=(n_out, n_embd), transform=transform)
            if bias in self.shapes:
                self.add(f"{out}.attn_{proj}.bias", bias, shape=(n_out,), transform=transform)
        for proj, n_out in (("q", n_q), ("k", n_kv)):
            width = n_out if wide_norms else head_dim
            self.add_optional(f"{out}.attn_{proj}_norm.weight", f"{hf}.{proj}_norm.weight", shape=(width,))
        self.add(f"{out}.attn_output.weight", f"{hf}.o_proj.weight", shape=(n_embd, n_q))
        self.add_optional(f"{out}.attn_output.bias", f"{hf}.o_proj.bias", shape=(n_embd,))

    def add_experts(
        self,
        bid: int,
        prefix: str,
        n_experts: int,
        n_ff: int,
        n_embd: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        """The gate, up and down stacks of a layer under `prefix`.

        Two checkpoint layouts: `PREFIX.N.NAME.weight` one by one, NAME from `names`; fused
        `PREFIX.gate_up_proj` [E, 2 n_ff, n_embd], gate first, with `PREFIX.down_proj` [E, n_embd, n_ff].
        """
        fused_gate_up, fused_down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        shapes = {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
        for (proj, shape), hf_name in zip(shapes.items(), names, strict=True):
            fused = fused_down if proj == "down" else fused_gate_up
            if fused in self.shapes:
                height = shape[0] if proj == "down" else 2 * n_ff
                self.expect(fused, (n_experts, height, shape[1]))
                first = n_ff if proj == "up" else 0
                parts = [Part(fused, expert=xid, rows=(first, first + shape[0])) for xid in range(n_experts)]
            else:
                parts = [Part(f"{prefix}.{xid}.{hf_name}.weight") for xid in range(n_experts)]
                for part in parts:
                    self.expect(part.tensor, shape)
            self.add_stack(bid, proj, (n_experts, *shape), parts)

    def add_mlp(self, bid: int, prefix: str, n_ff: int, n_embd: int, suffix: str = "") -> None:
        """A gated feed-forward block under `prefix`: a dense layer's or, with suffix `_shexp`, the shared experts'."""
        for proj, shape in (("gate", (n_ff, n_embd)), ("up", (n_ff, n_embd)), ("down", (n_embd, n_ff))):
            self.add(f"blk.{bid}.ffn_{proj}{suffix}.weight", f"{prefix}.{proj}_proj.weight", shape=shape)

    def add_constant(self, gguf_name: str, values: torch.Tensor, tensor: str) -> None:
        """A vector that config.json tells; it is read off `tensor`, any small one, only to have a source."""
        part = Part(tensor, transform=lambda _: values)
        self.plans.append(TensorPlan(gguf_name, tuple(values.shape), (part,), computed=True))

    def add_stack(self, bid: int, proj: str, shape: tuple[int, int, int], parts: Sequence[Part]) -> None:
        """An expert stack [E, n_rows, n_cols] with one part per expert; call `expect` for what the parts read."""
        self.plans.append(TensorPlan(f"blk.{bid}.ffn_{proj}_exps.weight", shape, tuple(parts)))

    def expect(self, tensor: str, shape: tuple[int, ...]) -> None:
        """SourceError unless the checkpoint has `tensor`, of `shape`."""
        found = self.shapes.get(tensor)
        if found is None:
            raise SourceError(
                f"{self.where}: tensor {tensor} is missing", "the checkpoint is incomplete: download it again"
            )
        if found != shape:
            raise SourceError(
                f"{self.where}: tensor {tensor} has shape {list(found)}, config.json calls for {list(shape)}"
            )


def interleave_halves(head_dim: int) -> Transform:
    """Rows of each head from halves (0, 1, .. d/2, d/2+1 ..) to pairs (0, d/2, 1, d/2+1, ..)."""

    def transform(weight: torch.Tensor) -> torch.Tensor:
        heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
        return heads.transpose(1, 2).reshape(weight.shape)

    return transform


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
