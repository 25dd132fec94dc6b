"""Encoding and decoding by libggml against the `gguf` package's numpy implementation and published errors.

The package can encode Q8_0, Q4_0, Q5_0, Q5_1 and the float types, and its bytes are the same. K-quants and
IQ4_NL it can only decode; their bytes are checked by decoding and by their error.
"""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sources import gaussian

from alphaq_gguf.encode import decode_rows, encode_rows, row_spans
from alphaq_gguf.encode.libggml import _library
from alphaq_gguf.qtypes import EXPERT_TYPES, FLOAT_TYPES, QType, block_size, bpw, row_bytes

SAME_BYTES = (QType.Q8_0, QType.Q4_0, QType.Q5_0, QType.Q5_1, *FLOAT_TYPES)

# Relative mean squared error on Gaussian weights, measured with libggml.
GAUSSIAN_ERROR = {
    QType.Q2_K: 8.8e-2,
    QType.Q3_K: 2.3e-2,
    QType.Q4_K: 5.1e-3,
    QType.Q5_K: 1.3e-3,
    QType.Q6_K: 3.2e-4,
    QType.Q8_0: 2.9e-5,
    QType.Q4_0: 7.4e-3,
    QType.IQ4_NL: 5.8e-3,
}

ROWS = {
    "gaussian": gaussian(32, 512),
    "tiny": gaussian(32, 512, scale=1e-7),
    "subnormal": gaussian(8, 512, scale=1e-39),
    "huge": gaussian(8, 512, scale=1e4),
    "zero": np.zeros((2, 512), np.float32),
    "constant": np.full((2, 512), -0.37, np.float32),
    "ties": np.random.default_rng(1).integers(-8, 9, (32, 512)).astype(np.float32),
    # + 0 turns -0 into 0: the package keeps the sign of a zero scale, libggml does not.
    "sparse": gaussian(32, 512) * (gaussian(32, 512, seed=2) > 2) + np.float32(0),
}


@pytest.mark.parametrize("qtype", SAME_BYTES, ids=lambda q: q.name)
@pytest.mark.parametrize("kind", ROWS)
def test_bytes_equal_those_of_the_gguf_package(kind, qtype):
    rows = ROWS[kind]
    with np.errstate(all="ignore"):
        expected = gguf.quantize(rows, qtype).view(np.uint8).reshape(len(rows), -1)
    encoded = encode_rows(rows, qtype)
    assert encoded.dtype == np.uint8
    assert encoded.shape == (len(rows), row_bytes(qtype, rows.shape[1]))
    np.testing.assert_array_equal(encoded, expected)


@pytest.mark.parametrize("qtype", (*EXPERT_TYPES, *FLOAT_TYPES), ids=lambda q: q.name)
@pytest.mark.parametrize("kind", ROWS)
def test_decoded_rows_equal_those_of_the_gguf_package(kind, qtype):
    encoded = encode_rows(ROWS[kind], qtype)
    decoded = decode_rows(encoded, qtype, 512)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, gguf.dequantize(encoded, qtype).reshape(decoded.shape))


@pytest.mark.parametrize("qtype", EXPERT_TYPES, ids=lambda q: q.name)
def test_any_bytes_decode_as_the_gguf_package_decodes_them(qtype):
    blocks = np.random.default_rng(qtype.value).integers(0, 256, (16, row_bytes(qtype, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, qtype)
    np.testing.assert_array_equal(decode_rows(blocks, qtype, 512), expected)


@given(
    qtype=st.sampled_from([*EXPERT_TYPES, QType.F16, QType.BF16]),
    n_rows=st.integers(1, 5),
    n_blocks=st.integers(1, 3),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_a_row_is_encoded_the_same_alone_and_among_others(qtype, n_rows, n_blocks, seed):
    rows = gaussian(n_rows, n_blocks * max(block_size(qtype), 32), seed=seed)
    together = encode_rows(rows, qtype)
    for i in range(n_rows):
        np.testing.assert_array_equal(encode_rows(rows[i : i + 1].copy(), qtype)[0], together[i])


@pytest.mark.parametrize("qtype", (*EXPERT_TYPES, *FLOAT_TYPES), ids=lambda q: q.name)
def test_threads_do_not_change_bytes_or_values(qtype):
    # More than one chunk of 2^18 weights, the last one short.
    rows = gaussian(150, 4096)
    encoded = encode_rows(rows, qtype, threads=2)
    np.testing.assert_array_equal(encoded, encode_rows(rows, qtype, threads=1))
    np.testing.assert_array_equal(decode_rows(encoded, qtype, 4096, threads=2), decode_rows(encoded, qtype, 4096))


def mean_squares(*shape: int, seed: int = 0) -> np.ndarray:
    """Importance as unequal as that of real layers: most of it on few columns."""
    return np.random.default_rng(seed).gamma(0.3, size=shape).astype(np.float32)


def quantize_chunk(rows: np.ndarray, qtype: QType, importance: np.ndarray) -> np.ndarray:
    """ggml's own answer for one matrix in one call."""
    out = np.zeros((len(rows), row_bytes(qtype, rows.shape[1])), np.uint8)
    pointers = (rows.ctypes.data, out.ctypes.data)
    written = _library().ggml_quantize_chunk(int(qtype), *pointers, 0, *rows.shape, importance.ctypes.data)
    assert written == out.nbytes
    return out


@pytest.mark.parametrize("qtype", (*EXPERT_TYPES, QType.F16, QType.BF16), ids=lambda q: q.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_importance_gives_the_bytes_ggml_gives_each_matrix_alone(qtype, threads):
    # Matrices of 70 rows, in chunks of 64.
    rows, importance = gaussian(140, 4096), mean_squares(2, 4096)
    expected = [quantize_chunk(part, qtype, vector) for part, vector in zip(np.split(rows, 2), importance, strict=True)]
    np.testing.assert_array_equal(encode_rows(rows, qtype, threads, importance), np.concatenate(expected))
    np.testing.assert_array_equal(encode_rows(rows[:70], qtype, threads, importance[0]), expected[0])


@pytest.mark.parametrize("qtype", (*EXPERT_TYPES, *FLOAT_TYPES), ids=lambda q: q.name)
def test_importance_moves_error_to_columns_of_little_importance(qtype):
    rows = gaussian(64, 512, seed=3)
    ratios = []
    for seed in range(8):
        importance = mean_squares(512, seed=seed)
        plain, weighed = (
            importance @ np.square(rows - decode_rows(encode_rows(rows, qtype, 1, given), qtype, 512)).sum(axis=0)
            for given in (None, importance)
        )
        ratios.append(weighed / plain if plain else 1.0)
    if qtype in (QType.Q8_0, *FLOAT_TYPES):
        assert ratios == [1.0] * 8
    else:
        assert np.mean(ratios) < 0.85


@pytest.mark.parametrize(
    ("importance", "cause"),
    [
        pytest.param(np.ones(512), "float64", id="float64"),
        pytest.param(np.ones(256, np.float32), r"\[512\], found float32 \(256,\)", id="other-columns"),
        pytest.param(np.ones((1, 1, 512), np.float32), r"\(1, 1, 512\)", id="three-dimensional"),
        pytest.param(np.ones((3, 512), np.float32), "4 rows .* 3 matrices", id="rows-left-over"),
        pytest.param(np.ones((0, 512), np.float32), "4 rows .* 0 matrices", id="no-matrices"),
        pytest.param(np.full(512, np.nan, np.float32), "between 0", id="nan"),
        pytest.param(np.full(512, np.inf, np.float32), "between 0", id="infinite"),
        pytest.param(np.full(512, -1e-3, np.float32), "between 0", id="negative"),
        # ggml makes Q4_K blocks of NaN with this, and Q3_K blocks of zeros.
        pytest.param(np.full(512, 1e38, np.float32), r"between 0 and 1e\+20", id="overflowing"),
    ],
)
def test_importance_of_another_kind_is_a_value_error(importance, cause):
    with pytest.raises(ValueError, match=cause):
        encode_rows(gaussian(4, 512), QType.Q4_K, importance=importance)


@pytest.mark.parametrize("qtype", EXPERT_TYPES, ids=lambda q: q.name)
def test_the_largest_importance_allowed_overflows_nowhere(qtype):
    rows = gaussian(8, 512, scale=100)
    importance = np.where(np.arange(512) % 2, np.float32(1e20), np.float32(1e-20)).astype(np.float32)
    decoded = decode_rows(encode_rows(rows, qtype, importance=importance), qtype, 512)
    assert np.square(rows - decoded).sum(axis=0)[1::2].sum() < 0.2 * np.square(rows)[:, 1::2].sum()


@given(n_rows=st.integers(0, 60), step=st.integers(1, 20), block=st.none() | st.integers(1, 70))
def test_spans_cover_all_rows_in_order_and_stay_inside_blocks(n_rows, step, block):
    spans = row_spans(n_rows, step, block)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(n_rows))
    assert all(1 <= stop - start <= step for start, stop in spans)
    if block:
        assert all(start // block == (stop - 1) // block for start, stop in spans)
    else:
        assert len(spans) == -(-n_rows // step)


@pytest.mark.parametrize("qtype", GAUSSIAN_ERROR, ids=lambda q: q.name)
def test_the_error_on_gaussian_weights_is_the_published_one(qtype):
    rows = gaussian(64, 1024, seed=7).astype(np.float64)
    decoded = decode_rows(encode_rows(rows.astype(np.float32), qtype), qtype, 1024)
    assert np.square(rows - decoded).sum() / np.square(rows).sum() == pytest.approx(GAUSSIAN_ERROR[qtype], rel=0.1)


def test_more_bits_mean_less_error():
    rows = gaussian(32, 512)
    ranked = sorted({QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0, QType.F16}, key=bpw)
    errors = [np.square(rows - decode_rows(encode_rows(rows, q), q, 512), dtype=np.float64).mean() for q in ranked]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("qtype", (*EXPERT_TYPES, *FLOAT_TYPES), ids=lambda q: q.name)
def test_no_rows_encode_to_no_bytes(qtype):
    encoded = encode_rows(np.empty((0, 256), np.float32), qtype, threads=2, importance=np.ones((3, 256), np.float32))
    assert encoded.shape == (0, row_bytes(qtype, 256))
    assert decode_rows(encoded, qtype, 256, threads=2).shape == (0, 256)


def test_encoding_leaves_its_input_alone():
    rows = gaussian(4, 256)
    before = rows.copy()
    for qtype in (*EXPERT_TYPES, *FLOAT_TYPES):
        encode_rows(rows, qtype)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.zeros((2, 256)), id="float64"),
        pytest.param(np.zeros((2, 256), np.float16), id="float16"),
        pytest.param(np.zeros((2, 256), ">f4"), id="big-endian"),
        pytest.param(np.zeros((2, 256), np.int32), id="integers"),
        pytest.param(np.zeros(256, np.float32), id="one-dimensional"),
        pytest.param(np.zeros((1, 2, 256), np.float32), id="three-dimensional"),
        pytest.param(np.zeros((256, 256), np.float32).T, id="transposed"),
        pytest.param(np.zeros((2, 512), np.float32)[:, ::2], id="strided"),
    ],
)
def test_arrays_of_another_kind_are_a_value_error(rows):
    with pytest.raises(ValueError, match="float32"):
        encode_rows(rows, QType.Q8_0)


@pytest.mark.parametrize(("qtype", "n_cols"), [(QType.Q4_K, 128), (QType.Q8_0, 33), (QType.Q3_K, 1408)])
def test_rows_of_broken_blocks_are_a_value_error(qtype, n_cols):
    with pytest.raises(ValueError, match=f"{qtype.name} needs rows"):
        encode_rows(np.zeros((1, n_cols), np.float32), qtype)
    with pytest.raises(ValueError, match=f"{qtype.name} needs rows"):
        decode_rows(np.zeros((1, 1000), np.uint8), qtype, n_cols)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(np.zeros((2, 35), np.uint8), id="row-too-long"),
        pytest.param(np.zeros((2, 33), np.uint8), id="row-too-short"),
        pytest.param(np.zeros(34, np.uint8), id="one-dimensional"),
        pytest.param(np.zeros((2, 34), np.int8), id="signed"),
    ],
)
def test_blocks_of_another_shape_are_a_value_error(blocks):
    with pytest.raises(ValueError, match=r"uint8 \[rows, 34\]"):
        decode_rows(blocks, QType.Q8_0, 32)


def test_decoding_takes_strided_blocks():
    encoded = encode_rows(gaussian(6, 64), QType.Q5_1)
    np.testing.assert_array_equal(decode_rows(encoded[::2], QType.Q5_1, 64), decode_rows(encoded, QType.Q5_1, 64)[::2])


@pytest.mark.parametrize("qtype", [QType.I8, QType.I32, QType.F64], ids=lambda q: q.name)
def test_a_type_libggml_cannot_decode_is_an_exception_and_no_crash(qtype):
    # In a process of its own: calling libggml without a decoder ends the process.
    code = (
        "import numpy as np\n"
        "from alphaq_gguf.encode import decode_rows\n"
        "from alphaq_gguf.qtypes import QType, row_bytes\n"
        f"qtype = QType.{qtype.name}\n"
        "try:\n"
        "    decode_rows(np.zeros((1, row_bytes(qtype, 32)), np.uint8), qtype, 32)\n"
        "except ValueError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n")
