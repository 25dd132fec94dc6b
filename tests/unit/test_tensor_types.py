"""Types of tensors that hold no experts, and overrides by regular expression."""

from __future__ import annotations

import numpy as np
import pytest
from small_sources import expert_tensors, gaussian, stack_name, write_source

from alphaq_gguf.checkpoint import Source
from alphaq_gguf.errors import UsageError
from alphaq_gguf.gguf_file import TensorInfo
from alphaq_gguf.qtypes import QType
from alphaq_gguf.tensor_types import choose_types, default_type, parse_overrides

Q6, Q8, F32, F16, BF16 = QType.Q6_K, QType.Q8_0, QType.F32, QType.F16, QType.BF16


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("token_embd.weight", (400, 256), Q6),
        ("token_embd.weight", (400, 96), Q8),
        ("token_embd.weight", (400, 100), F16),
        ("output.weight", (400, 256), Q8),
        ("blk.0.attn_q.weight", (64, 256), Q8),
        ("blk.11.attn_output.weight", (64, 256), Q8),
        ("blk.0.attn_kv_a_mqa.weight", (64, 96), Q8),
        ("blk.0.attn_v.weight", (64, 80), F16),
        ("blk.0.ffn_up_shexp.weight", (64, 256), Q8),
        ("blk.0.ffn_down.weight", (64, 1408), Q8),
        ("blk.0.ffn_gate_inp.weight", (60, 2048), F32),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 2048), F32),
        ("blk.0.attn_q_norm.weight", (4, 128), F32),
        ("output_norm.weight", (256,), F32),
        ("blk.0.attn_q.bias", (256,), F32),
        ("blk.0.ffn_down_exps.bias", (8, 256), F32),
        ("rope_freqs", (64,), F32),
        ("blk.0.something_new.weight", (64, 256), BF16),
        ("xblk.0.attn_q.weight", (64, 256), BF16),
    ],
)
def test_float_tensors_get_the_documented_type(name, shape, expected):
    assert default_type(TensorInfo(name, shape, BF16), tied=False) == expected


def test_an_embedding_that_is_also_the_output_gets_more_bits():
    assert default_type(TensorInfo("token_embd.weight", (400, 256), BF16), tied=True) == Q8


@pytest.mark.parametrize("qtype", [QType.Q4_1, QType.I32, QType.Q5_K], ids=lambda q: q.name)
def test_tensors_that_are_not_float_keep_their_type(qtype):
    for name in ("blk.0.attn_q.weight", "blk.0.unknown", "blk.0.attn_norm.weight"):
        assert default_type(TensorInfo(name, (64, 256), qtype), tied=False) == qtype


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    tensors = {
        **expert_tensors(),
        "token_embd.weight": gaussian(40, 256),
        "blk.0.attn_q.weight": gaussian(64, 256),
        "blk.0.attn_q.bias": gaussian(64),
        "blk.0.attn_k.weight": gaussian(64, 96),
        "blk.0.attn_norm.weight": np.ones(256, np.float32),
    }
    return write_source(tmp_path_factory.mktemp("types") / "m.gguf", tensors)


DEFAULTS = {
    "blk.0.ffn_gate_inp.weight": F32,
    "token_embd.weight": Q8,  # no output.weight: tied
    "blk.0.attn_q.weight": Q8,
    "blk.0.attn_q.bias": F32,
    "blk.0.attn_k.weight": Q8,
    "blk.0.attn_norm.weight": F32,
}


def test_without_overrides_every_other_tensor_has_its_default(source):
    assert choose_types(source, []) == (DEFAULTS, {})


def test_a_quantised_type_passes_over_norms_biases_and_routers(source):
    types, fixed = choose_types(source, parse_overrides(["attn_=q5_0"]))
    assert types == {**DEFAULTS, "blk.0.attn_q.weight": QType.Q5_0, "blk.0.attn_k.weight": QType.Q5_0}
    assert fixed == {}


def test_expert_stacks_are_fixed_apart_from_the_other_types(source):
    types, fixed = choose_types(source, parse_overrides([r"ffn_(up|down)_exps=Q3_K"]))
    assert types == DEFAULTS
    assert fixed == {stack_name("up"): QType.Q3_K, stack_name("down"): QType.Q3_K}


def test_later_overrides_win(source):
    types, fixed = choose_types(source, parse_overrides(["attn_q=F16", "attn_q=BF16", "_exps=Q2_K", "up_exps=Q6_K"]))
    assert types["blk.0.attn_q.weight"] == BF16
    assert types["blk.0.attn_q.bias"] == BF16
    assert fixed == {stack_name("gate"): QType.Q2_K, stack_name("down"): QType.Q2_K, stack_name("up"): Q6}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("attn_x=Q8_0", "matches no tensor"),
        ("norm=Q8_0", "stay float"),
        ("ffn_gate_inp=Q8_0", "stay float"),
        ("attn_k=Q4_K", r"blk\.0\.attn_k\.weight has rows of 96"),
        (".=Q4_K", "rows of 96"),
    ],
)
def test_an_override_that_cannot_work_is_a_usage_error(source, text, cause):
    with pytest.raises(UsageError, match=cause):
        choose_types(source, parse_overrides([text]))


def test_overrides_split_at_the_last_equals_sign():
    assert parse_overrides(["a=b=q4_k", "x.*=F32"]) == [("a=b", QType.Q4_K), ("x.*", F32)]


@pytest.mark.parametrize("text", ["attn", "=Q8_0", "attn=", "attn=Q9", "attn(=Q8_0", ""])
def test_a_malformed_override_is_a_usage_error_that_quotes_it(text):
    with pytest.raises(UsageError) as refused:
        parse_overrides([text])
    assert repr(text) in refused.value.message
