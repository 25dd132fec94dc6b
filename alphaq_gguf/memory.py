"""How much memory llama.cpp needs to run a file at a given context length.

Facts of llama.cpp as of llama-cpp-python 0.3.36, checked against what it reports for real hyper-parameters:
the KV cache is exact, the compute buffer an upper estimate. Attention of a kind this module does not know is
counted as full attention, so that the sum errs upwards.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .arch.attention import HYBRIDS_WITHOUT_NEXTN_CACHE, WINDOW_RULES, WITHOUT_FLASH_ATTENTION, WindowRule
from .errors import SourceError, UsageError
from .gguf_file import Field, TensorInfo, align
from .qtypes import QType, block_size, fits, row_bytes

# What no log line shows: 120 MiB for a tokenizer of 152,000 tokens, work buffers, or a CUDA context with its pools.
FIXED_BYTES = 512 << 20

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)$")
_RECURRENT = ("ssm_", "shortconv.")
_F32 = 4


@dataclass(frozen=True)
class ContextSettings:
    """How llama.cpp is run; the defaults are llama-cli's.

    llama-server runs 4 sequences over one cache (`n_seq_max=4`); libllama and llama-cpp-python start from
    `swa_full=True`. `n_outputs` limits the tokens of a batch that get logits: None reserves them for a whole
    micro-batch, as libllama does by default; llama-server limits them to its sequences.
    """

    n_ctx: int
    n_ubatch: int = 512
    type_k: QType = QType.F16
    type_v: QType = QType.F16
    flash_attention: bool = True
    swa_full: bool = False
    n_seq_max: int = 1
    n_outputs: int | None = None

    @property
    def cells(self) -> int:
        """Context lengths are rounded up to a multiple of 256."""
        return align(self.n_ctx, 256)

    @property
    def n_tokens(self) -> int:
        """Tokens computed at once."""
        return min(self.n_ubatch, self.n_ctx)

    def window_cells(self, window: int) -> int:
        """A sliding-window layer keeps each sequence's window and the micro-batch, unless `swa_full`."""
        if self.swa_full:
            return self.cells
        return align(min(self.cells, window * self.n_seq_max + self.n_tokens), 256)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes by part; `notes` say where the estimate is knowingly high."""

    tensors: int
    kv_cache: int
    compute: int
    fixed: int = FIXED_BYTES
    notes: tuple[str, ...] = ()

    @property
    def beside_weights(self) -> int:
        """What running takes on top of the weights."""
        return self.kv_cache + self.compute + self.fixed

    @property
    def total(self) -> int:
        return self.tensors + self.beside_weights


def memory_need(fields: Iterable[Field], tensors: Mapping[str, TensorInfo], context: ContextSettings) -> MemoryNeed:
    """What a file with this metadata and these tensors needs, weights in the types that `tensors` names.

    UsageError when rows of the cache do not divide into blocks of its type, SourceError when the metadata lacks
    what llama.cpp needs as well.
    """
    model = _Model(fields, tensors)
    weights = sum(info.n_bytes for info in tensors.values())
    return MemoryNeed(weights, _kv_cache(model, context), _compute(model, context), notes=model.notes)


class _Model:
    """The hyper-parameters that decide about memory, and the tensors of each block."""

    def __init__(self, fields: Iterable[Field], tensors: Mapping[str, TensorInfo]) -> None:
        self._fields = {field.key: field for field in fields}
        self.arch: str = self._fields["general.architecture"].value
        self.tensors = tensors
        self.blocks: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
        for name, info in tensors.items():
            if match := _BLOCK.match(name):
                self.blocks[int(match[1])][match[2]] = info
        self.n_blocks: int = self.get("block_count")
        self.n_layers: int = self.n_blocks - self.get("nextn_predict_layers", 0)
        self.n_embd: int = self.get("embedding_length")
        self.heads: list[int] = self.per_layer("attention.head_count")
        self.heads_kv: list[int] = self.per_layer("attention.head_count_kv", self.heads)

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own metadata; without a default the key is required."""
        field = self._fields.get(f"{self.arch}.{key}")
        if field is None and default is None:
            raise SourceError(f"the metadata has no {self.arch}.{key}", "convert the checkpoint to GGUF again")
        return default if field is None else field.value

    def per_layer(self, key: str, default: Any = None) -> list[Any]:
        """A value that may be one for all layers or one for each."""
        value = self.get(key, default)
        return value if isinstance(value, list) else [value] * self.n_blocks

    def head_length(self, which: str, il: int) -> int:
        """Length of a `key` or `value` head; windowed layers may have their own."""
        full = self.get(f"attention.{which}_length", self.n_embd // max(self.heads[0], 1))
        return self.get(f"attention.{which}_length_swa", full) if self.windowed[il] else full

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention: the cached latent serves as key and value."""
        return self.get("attention.key_length_mla", 0) > 0 and self.get("attention.value_length_mla", 0) > 0

    @cached_property
    def recurrent(self) -> list[int]:
        """Layers with a state of fixed size: state space models, linear attention, short convolutions."""
        return [il for il in range(self.n_layers) if any(name.startswith(_RECURRENT) for name in self.blocks[il])]

    @cached_property
    def cached(self) -> list[int]:
        """Layers with a KV cache of their own.

        Prediction layers (MTP) have none in a normal context. Tensor names tell recurrent layers, some of which attend
        as well; those whose metadata sets no key-value heads do not.
        """
        keep_nextn = bool(self.recurrent) and self.arch not in HYBRIDS_WITHOUT_NEXTN_CACHE
        last = self.n_blocks if keep_nextn else self.n_layers
        own = [
            il
            for il in range(min(last, self.n_blocks - self.get("attention.shared_kv_layers", 0)))
            if il not in self.recurrent or any(name.startswith("attn_k") for name in self.blocks[il])
        ]
        return [il for il in own if self.heads_kv[il] > 0]

    @cached_property
    def window(self) -> int:
        """Length of the sliding window that llama.cpp applies, 0 for none."""
        rule = WINDOW_RULES.get(self.arch)
        declared = self.get("attention.sliding_window", int(rule is not None and rule.by_default))
        return 0 if rule is None or declared == 0 else rule.size or declared

    @cached_property
    def windowed(self) -> list[bool]:
        """Whether each layer sees the sliding window only."""
        rule = WINDOW_RULES.get(self.arch, WindowRule())
        pattern: list[bool | int] | int = self.get("attention.sliding_window_pattern", rule.period)
        if not self.window or not pattern:
            return [False] * self.n_blocks
        if isinstance(pattern, list):
            return [bool(flag) for flag in pattern] + [False] * (self.n_blocks - len(pattern))
        dense = 0 if rule.dense_first else pattern - 1
        return [il < self.n_layers and il % pattern != dense for il in range(self.n_blocks)]

    @property
    def notes(self) -> tuple[str, ...]:
        window = self.get("attention.sliding_window", 0)
        if window and not any(self.windowed):
            return (f"{self.arch}: the sliding window of {window} saves nothing, every layer is counted in full",)
        return ()


def _kv_cache(model: _Model, context: ContextSettings) -> int:
    """llama.cpp allocates all cells when it loads: a row of keys and one of values for each layer and cell."""
    widths_v = {il: 0 if model.is_mla else model.head_length("value", il) * model.heads_kv[il] for il in model.cached}
    if not context.flash_attention or model.arch in WITHOUT_FLASH_ATTENTION:
        # Transposed values need rows of one length in all layers.
        widths_v = dict.fromkeys(widths_v, max(widths_v.values(), default=0))
    total = 0
    for il in model.cached:
        width_k = model.head_length("key", il) * model.heads_kv[il]
        cells = context.window_cells(model.window) if model.windowed[il] else context.cells
        total += cells * (_cache_row(context.type_k, width_k) + _cache_row(context.type_v, widths_v[il]))
    return total + _indexer_cache(model, context) + len(model.recurrent) * _state_bytes(model) * context.n_seq_max


def _indexer_cache(model: _Model, context: ContextSettings) -> int:
    """Sparse attention: one more key head in layers with an indexer, and an unused value unless MLA.

    A pooled indexer caches key, gate and pooled key.
    """
    width = model.get("attention.indexer.key_length", 0) * (3 if model.get("attention.indexer.kpool", 0) else 1)
    if not width:
        return 0
    full = model.per_layer("attention.indexer.types", 1)
    value = 0 if model.is_mla else model.head_length("value", 0)
    row = _cache_row(context.type_k, width) + _cache_row(context.type_v, value)
    return context.cells * row * sum(il < model.n_layers and bool(full[il]) for il in model.cached)


def _cache_row(qtype: QType, width: int) -> int:
    if not fits(qtype, width):
        raise UsageError(
            f"a {qtype.name} KV cache needs rows of a multiple of {block_size(qtype)}, this model's have {width}",
            "choose F16",
        )
    return row_bytes(qtype, width)


def _state_bytes(model: _Model) -> int:
    """Convolution and recurrent state of one layer and sequence, in float32."""
    taps = max(model.get("ssm.conv_kernel", 0) - 1, 0)
    if model.get("shortconv.l_cache", 0):
        state = model.n_embd * (model.get("shortconv.l_cache") - 1)
    elif length := model.get("kda.head_dim", 0):
        state = model.heads[0] * (3 * taps * length + length**2)
    else:
        inner, length = model.get("ssm.inner_size", 0), model.get("ssm.state_size", 0)
        state = taps * (inner + 2 * model.get("ssm.group_count", 0) * length) + length * inner
    return state * _F32


def _compute(model: _Model, context: ContextSettings) -> int:
    """The graph's buffer and the output buffer, from above.

    ggml reuses the memory of finished nodes, so the largest moment counts: inside a layer, or the logits after the
    last. They may not fit where that layer's FFN was, since the hidden state they are made from lies in its midst.
    """
    flash = context.flash_attention and model.arch not in WITHOUT_FLASH_ATTENTION
    mask_row = context.cells + (context.window_cells(model.window) if any(model.windowed) else 0)
    attended = mask_row * (2 if flash else 4)
    if not flash:
        attended += context.cells * max(model.heads) * _F32
    if model.get("attention.indexer.key_length", 0):
        # Its own mask, scores, and the mask of what it selected.
        attended += context.cells * 8
    layers = range(model.n_layers)
    ffn = max(_ffn_width(model, il) for il in layers)
    widest = max(ffn, *(_attention_width(model, il, flash) for il in layers))
    # Residual, normed and result of attention and FFN, the router, and gaps.
    hidden = 7 * model.n_embd * model.get("hyper_connection.count", 1)
    n_vocab = model.tensors.get("output.weight", model.tensors["token_embd.weight"]).n_rows
    outputs = context.n_tokens if context.n_outputs is None else min(context.n_outputs, context.n_tokens)
    inside = context.n_tokens * (attended + (hidden + widest) * _F32)
    last = (context.n_tokens * (hidden + ffn) + outputs * n_vocab) * _F32
    # Without flash attention the latent is transposed to serve as value.
    transposed = 0 if flash or not model.is_mla else context.cells * model.head_length("key", 0) * 2
    return max(inside, last) + transposed + n_vocab * context.n_seq_max * _F32


def _attention_width(model: _Model, il: int, flash: bool) -> int:
    """Float32 values of a token in attention: every projection, the query and the result as long as cached keys.

    Convolutions hold their input, output and two copies.
    """
    width = (2 if flash else 3) * model.heads[il] * model.head_length("key", il) if il in model.cached else 0
    for name, info in model.blocks[il].items():
        if name.endswith(".weight") and not name.startswith("ffn_"):
            if "conv" in name:
                width += 4 * math.prod(info.shape[:-1])
            elif len(info.shape) == 2:
                width += info.n_rows
    return width


def _ffn_width(model: _Model, il: int) -> int:
    """Float32 values of a token in the FFN: gate, up, their product; also `down` where it exceeds the first two."""
    used = model.per_layer("expert_used_count", 0)[il]
    widths = [0]
    for name, info in model.blocks[il].items():
        if match := re.match(r"ffn_down(_exps|_chexps|_shexp)?\.weight$", name):
            inner, outer = info.n_cols, info.shape[-2]
            width = 3 * inner + (outer if 2 * inner < outer else 0)
            widths.append(width * (used if match[1] in ("_exps", "_chexps") else 1))
    return max(widths)
