"""Type sizes and fallbacks against the bytes libggml writes and the choices llama.cpp's own quantiser makes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape
from hypothesis import given
from hypothesis import strategies as st

from alphaq_gguf.encode import encode_rows
from alphaq_gguf.qtypes import (
    EXPERT_TYPES,
    FLOAT_TYPES,
    K_TYPES,
    LEGACY_TYPES,
    NOMINAL_BITS,
    QType,
    bpw,
    candidates,
    file_type,
    fits,
    parse_qtype,
    row_bytes,
    stock_substitute,
)

WRITTEN = (*EXPERT_TYPES, *FLOAT_TYPES)


@pytest.mark.parametrize("qtype", WRITTEN, ids=lambda q: q.name)
def test_sizes_are_those_of_the_encoded_bytes(qtype):
    encoded = encode_rows(np.ones((3, 512), np.float32), qtype)
    assert row_bytes(qtype, 512) == encoded.shape[1]
    assert bpw(qtype) == encoded.nbytes * 8 / (3 * 512)


def test_bits_per_weight_are_the_published_ones():
    expected = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
    expected |= {"Q4_0": 4.5, "Q5_0": 5.5, "Q5_1": 6.0, "IQ4_NL": 4.5, "F16": 16, "BF16": 16, "F32": 32}
    assert {q.name: bpw(q) for q in WRITTEN} == expected


@given(st.sampled_from(WRITTEN), st.integers(1, 5000))
def test_a_row_has_bytes_exactly_when_it_fits(qtype, n_cols):
    if fits(qtype, n_cols):
        assert row_bytes(qtype, n_cols) == quant_shape_to_byte_shape((n_cols,), qtype)[0]
    else:
        with pytest.raises(ValueError, match=qtype.name):
            row_bytes(qtype, n_cols)


def test_candidates_follow_the_row_length():
    assert candidates(2048) == K_TYPES
    assert candidates(1408) == LEGACY_TYPES
    assert candidates(100) == (QType.F16,)


@given(st.integers(1, 5000), st.none() | st.lists(st.sampled_from(WRITTEN), max_size=8))
def test_candidates_fit_and_are_sorted_without_repetition(n_cols, allowed):
    found = candidates(n_cols, allowed)
    assert all(fits(q, n_cols) for q in found)
    assert len(set(found)) == len(found)
    assert [bpw(q) for q in found] == sorted(bpw(q) for q in found)
    if allowed is None:
        assert found
    else:
        assert set(found) == {q for q in allowed if n_cols % {True: 256, False: 32}[q.name.endswith("_K")] == 0} | {
            q for q in allowed if q in FLOAT_TYPES
        }


def test_every_offered_type_has_nominal_bits_below_its_stored_bits():
    for qtype in WRITTEN:
        assert NOMINAL_BITS[qtype] <= bpw(qtype) < NOMINAL_BITS[qtype] + 1.5


def quantize(source: Path, out: Path, name: str) -> dict[str, QType]:
    """Types that llama.cpp's quantiser gives the tensors of `source` when all are asked to be `name`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.pure = True
    params.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return {t.name: t.tensor_type for t in GGUFReader(out).tensors}


@pytest.mark.parametrize(
    ("qtype", "ftype"),
    [
        (QType.Q2_K, "Q2_K"),
        (QType.Q3_K, "Q3_K_M"),
        (QType.Q4_K, "Q4_K_M"),
        (QType.Q5_K, "Q5_K_M"),
        (QType.Q6_K, "Q6_K"),
        (QType.Q8_0, "Q8_0"),
        (QType.Q4_0, "Q4_0"),
        (QType.Q5_0, "Q5_0"),
        (QType.Q5_1, "Q5_1"),
        (QType.IQ4_NL, "IQ4_NL"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_substitutes_are_the_ones_llama_cpp_makes(tmp_path, qtype, ftype):
    widths = {"blk.0.ffn_gate.weight": 256, "blk.0.ffn_down.weight": 96, "blk.0.ffn_up.weight": 40}
    writer = GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(96)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    for name, n_cols in widths.items():
        writer.add_tensor(name, np.ones((8, n_cols), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    chosen = quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", ftype)
    assert {name: stock_substitute(qtype, n_cols) for name, n_cols in widths.items()} == {
        name: chosen[name] for name in widths
    }


@pytest.mark.parametrize("qtype", WRITTEN, ids=lambda q: q.name)
def test_type_names_are_parsed_in_any_case(qtype):
    for name in (qtype.name, qtype.name.lower(), f" {qtype.name} "):
        assert parse_qtype(name) == qtype


@pytest.mark.parametrize("name", ["", "Q4", "Q4_K_M", "iq2_xxs", "Q4-K"])
def test_an_unknown_type_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown type.*Q2_K.*F32"):
        parse_qtype(name)


def test_the_file_label_is_that_of_the_type_with_most_bytes():
    assert file_type({QType.Q8_0: 10, QType.Q3_K: 11, QType.F32: 9}) == LlamaFileType.MOSTLY_Q3_K_M
    assert file_type({QType.Q4_K: 5}) == LlamaFileType.MOSTLY_Q4_K_M
    assert file_type({QType.F32: 7, QType.F16: 7}) == file_type({QType.F16: 7, QType.F32: 7})


@pytest.mark.parametrize("qtype", WRITTEN, ids=lambda q: q.name)
def test_every_written_type_has_a_file_label_of_its_name(qtype):
    label = file_type({qtype: 1}).name
    assert label.removeprefix("MOSTLY_").removeprefix("ALL_").startswith(qtype.name)


@pytest.mark.parametrize("qtype", [QType.Q4_1, QType.IQ2_XXS, QType.I32], ids=lambda q: q.name)
def test_a_type_only_carried_over_from_the_source_still_gets_a_label(qtype):
    # A source may hold tensors of types we never choose; they are copied, and may be most of the file.
    assert isinstance(file_type({qtype: 100, QType.Q4_K: 1}), LlamaFileType)
