"""KV caches of public models against sums written out by hand, and the rules the large ones do not show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from gguf import GGUFValueType

from alphaq_gguf.errors import SourceError, UsageError
from alphaq_gguf.gguf_file import Field, TensorInfo, make_field
from alphaq_gguf.memory import ContextSettings, MemoryNeed, memory_need
from alphaq_gguf.qtypes import QType

DEFAULT = ContextSettings(8192)


def make_fields(arch: str, values: dict[str, Any]) -> list[Field]:
    kinds = {int: GGUFValueType.UINT32, list: GGUFValueType.ARRAY}
    name = make_field("general.architecture", GGUFValueType.STRING, arch)
    return [name, *(make_field(f"{arch}.{key}", kinds[type(value)], value) for key, value in values.items())]


def make_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    shapes = {"token_embd.weight": (1000, 64), **shapes}
    return {name: TensorInfo(name, shape, QType.F16) for name, shape in shapes.items()}


def need_of(
    arch: str, values: dict[str, Any], context: ContextSettings = DEFAULT, *, recurrent: Iterable[int] = ()
) -> MemoryNeed:
    """A model of little more than its metadata: `recurrent` layers have a state space tensor each."""
    tensors = make_tensors({f"blk.{il}.ssm_out.weight": (64, 64) for il in recurrent})
    return memory_need(make_fields(arch, {"embedding_length": 64, **values}), tensors, context)


def attention(n_layers: int, heads: int, heads_kv: int | list[int], key: int, value: int) -> dict[str, Any]:
    counts = {"block_count": n_layers, "attention.head_count": heads, "attention.head_count_kv": heads_kv}
    return {**counts, "attention.key_length": key, "attention.value_length": value}


def layers(n: int, heads_kv: int | list[int] = 2, **more: Any) -> dict[str, Any]:
    """Small layers, with attention keys by their last word."""
    return {**attention(n, 4, heads_kv, 64, 64), **{f"attention.{key}": value for key, value in more.items()}}


# What one of the small layers caches of a token, and of 8192.
CELL = 2 * (64 + 64) * 2
FULL = 8192 * CELL


def test_qwen3_30b_a3b():
    need = need_of("qwen3moe", attention(48, 32, 4, 128, 128))
    assert need.kv_cache == 8192 * 48 * 4 * (128 + 128) * 2 == 805_306_368


def test_mixtral_8x7b_whose_head_length_follows_from_its_width():
    values = {"block_count": 32, "attention.head_count": 32, "attention.head_count_kv": 8, "embedding_length": 4096}
    assert need_of("llama", values).kv_cache == 8192 * 32 * 8 * (128 + 128) * 2 == 1_073_741_824


def test_deepseek_v2_lite_caches_one_latent_per_layer_and_no_values():
    expanded = {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
    need = need_of("deepseek2", {**attention(27, 16, 1, 512 + 64, 512), **expanded})
    assert need.kv_cache == 8192 * 27 * (512 + 64) * 2 == 254_803_968


GPT_OSS = {**attention(24, 64, 8, 64, 64), "attention.sliding_window": 128}


def test_gpt_oss_20b_keeps_window_and_micro_batch_in_every_other_layer():
    # 128 + 512 tokens, rounded up to 768.
    assert need_of("gpt-oss", GPT_OSS).kv_cache == 12 * (8192 + 768) * 8 * (64 + 64) * 2 == 220_200_960


def test_qwen3_next_80b_has_three_states_for_each_cache():
    ssm = {"ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.inner_size": 4096}
    linear = [il for il in range(48) if il % 4 != 3]
    need = need_of("qwen3next", {**attention(48, 16, 2, 256, 256), **ssm}, recurrent=linear)
    states = 36 * ((4 - 1) * (4096 + 2 * 16 * 128) + 128 * 4096) * 4
    assert need.kv_cache == 8192 * 12 * 2 * (256 + 256) * 2 + states == 201_326_592 + 79_036_416


@pytest.mark.parametrize(("n_ctx", "cells"), [(1, 256), (256, 256), (8000, 8192), (8193, 8448)])
def test_contexts_are_rounded_up_to_256_cells(n_ctx, cells):
    assert need_of("qwen3moe", layers(1), ContextSettings(n_ctx)).kv_cache == cells * CELL


def test_quantised_caches():
    context = replace(DEFAULT, type_k=QType.Q8_0, type_v=QType.Q4_0)
    assert need_of("qwen3moe", layers(1), context).kv_cache == 8192 * (2 * 64 // 32) * (34 + 18)


def test_a_cache_type_that_does_not_fit_is_refused():
    context = replace(DEFAULT, type_k=QType.Q8_0)
    with pytest.raises(UsageError, match="Q8_0 KV cache needs rows of a multiple of 32, this model's have 40"):
        need_of("qwen3moe", layers(1, key_length=20), context)


def test_prediction_layers_have_no_cache_except_in_unknown_hybrids():
    values = {**layers(3), "nextn_predict_layers": 1}
    assert need_of("glm4moe", values).kv_cache == 2 * FULL
    assert need_of("qwen3next", values, recurrent=[0]).kv_cache == 1 * FULL
    assert need_of("bailingmoe3", values, recurrent=[0]).kv_cache == 2 * FULL


def test_sequences_share_cells_but_not_windows_and_states():
    context = replace(DEFAULT, n_seq_max=4)
    assert need_of("qwen3moe", layers(1), context).kv_cache == FULL
    assert need_of("gpt-oss", GPT_OSS, context).kv_cache == 12 * (8192 + 4 * 128 + 512) * 8 * (64 + 64) * 2
    ssm = {"ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16}
    assert need_of("jamba", {**layers(1), **ssm}, context, recurrent=[0]).kv_cache == 4 * (3 * 64 + 16 * 64) * 4


WINDOW = {"sliding_window": 1000}
# 1000 + 512 tokens are 1536 cells.
SHORT = 1536 * CELL


@pytest.mark.parametrize(
    ("arch", "more", "expected"),
    [
        ("afmoe", WINDOW, 3 * SHORT + FULL),
        ("gpt-oss", WINDOW, 2 * SHORT + 2 * FULL),
        ("gpt-oss", {**WINDOW, "sliding_window_pattern": 4}, 3 * SHORT + FULL),
        ("gpt-oss", {**WINDOW, "sliding_window_pattern": [1, 0, 0, 0]}, SHORT + 3 * FULL),
        ("gpt-oss", {"sliding_window": 0}, 4 * FULL),
        ("mimo2", WINDOW, 4 * FULL),
        ("mimo2", {**WINDOW, "sliding_window_pattern": [0, 1, 1, 1]}, 3 * SHORT + FULL),
        ("phimoe", WINDOW, 4 * FULL),
        ("of-the-future", WINDOW, 4 * FULL),
        # A window of 4096 whatever the file says, but only if it says something.
        ("smallthinker", WINDOW, 3 * 4608 * CELL + FULL),
        ("smallthinker", {}, 4 * FULL),
    ],
)
def test_which_layers_are_windowed(arch, more, expected):
    need = need_of(arch, layers(4, **more))
    assert need.kv_cache == expected
    assert bool(need.notes) == (more.get("sliding_window", 0) > 0 and expected == 4 * FULL)


def test_windows_start_before_or_after_the_full_layer():
    # Of 5 layers the first and fifth, or the fourth, see everything.
    assert need_of("laguna", layers(5, **WINDOW)).kv_cache == 3 * SHORT + 2 * FULL
    assert need_of("afmoe", layers(5, **WINDOW)).kv_cache == 4 * SHORT + FULL


def test_llama_4_has_its_window_even_without_metadata():
    context = ContextSettings(32768)
    assert need_of("llama4", layers(4), context).kv_cache == (3 * (8192 + 512) + 32768) * CELL
    assert need_of("llama4", layers(4, sliding_window=0), context).kv_cache == 4 * 32768 * CELL


def test_a_full_window_cache_can_be_asked_for():
    assert need_of("gpt-oss", GPT_OSS, replace(DEFAULT, swa_full=True)).kv_cache == 24 * 8192 * 8 * (64 + 64) * 2


def test_windowed_layers_may_have_heads_of_their_own_and_last_layers_no_cache():
    own = {"key_length_swa": 32, "value_length_swa": 16, "shared_kv_layers": 1}
    need = need_of("gemma4", layers(4, **WINDOW, **own, sliding_window_pattern=[1, 0, 1, 0]))
    assert need.kv_cache == 2 * 1536 * 2 * (32 + 16) * 2 + FULL


@pytest.mark.parametrize(("arch", "flash_attention"), [("mimo2", False), ("grok", True)])
def test_without_flash_attention_values_are_padded_and_scores_kept(arch, flash_attention):
    uneven = layers(2, heads_kv=[1, 2])
    plain = need_of("mimo2", uneven)
    assert plain.kv_cache == 8192 * (1 + 2) * (64 + 64) * 2
    padded = need_of(arch, uneven, replace(DEFAULT, flash_attention=flash_attention))
    assert padded.kv_cache == 8192 * ((1 + 2) * 64 + (2 + 2) * 64) * 2
    assert padded.compute - plain.compute >= 512 * 8192 * 4 * 4


def test_indexers_cache_a_key_more():
    sparse = {"indexer.key_length": 128}
    mla = layers(2, key_length_mla=96, value_length_mla=64, **sparse)
    latents, key = 2 * 8192 * 2 * 64 * 2, 8192 * 128 * 2
    assert need_of("deepseek32", mla).kv_cache == latents + 2 * key
    assert need_of("glm-dsa", {**mla, "attention.indexer.types": [1, 0]}).kv_cache == latents + key
    # A pooled one has key, gate and pooled key.
    assert need_of("glm5-next", {**mla, "attention.indexer.kpool": 4}).kv_cache == latents + 2 * 3 * key
    # Without MLA its cache has values of ordinary length, which nothing uses.
    assert need_of("minimax-m3", layers(2, **sparse)).kv_cache == 2 * (FULL + key + 8192 * 64 * 2)


def test_other_states():
    convolution = {**layers(2, heads_kv=[0, 2]), "shortconv.l_cache": 3}
    assert need_of("lfm2moe", convolution, recurrent=[0]).kv_cache == 64 * 2 * 4 + FULL
    delta = {**layers(2, heads_kv=[0, 2]), "ssm.conv_kernel": 4, "kda.head_dim": 128}
    assert need_of("kimi-linear", delta, recurrent=[0]).kv_cache == 4 * (3 * 3 * 128 + 128 * 128) * 4 + FULL


def test_the_parts_and_their_sum():
    tensors = make_tensors({"blk.0.attn_q.weight": (256, 64), "output.weight": (9000, 64)})
    need = memory_need(make_fields("qwen3moe", {"embedding_length": 64, **layers(1)}), tensors, DEFAULT)
    assert need.tensors == 2 * 64 * (1000 + 256 + 9000)
    assert need.compute >= (512 + 1) * 9000 * 4
    assert need.beside_weights == need.kv_cache + need.compute + need.fixed
    assert need.total == need.tensors + need.beside_weights


def test_metadata_llama_cpp_would_miss_too():
    with pytest.raises(SourceError, match=r"no qwen3moe\.block_count"):
        memory_need(make_fields("qwen3moe", {}), make_tensors({}), DEFAULT)
