"""The ggml plug-in: products of experts of different types, and containers that are damaged."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from ggml import SUCCESS, Experts
from gguf.quants import dequantize

from alphaq_gguf.container import PAYLOAD_TYPES, choose_container, container_bytes, header_bytes, lay_out
from alphaq_gguf.encode import encode_rows
from alphaq_gguf.plugin import build_plugin, cache_dir, load_plugin
from alphaq_gguf.qtypes import QType, row_bytes
from alphaq_gguf.reporter import Silent

Q = QType
DEVICES = ("ALPHAQ", "ALPHAQ_REPACK", "ALPHAQ copied", "ALPHAQ_REPACK copied")
N_COLS = 512
# Rounding of operands to 8 bits in each block: relative to the norms of row and operand.
TOLERANCE = 0.01


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_plugin(build_plugin(cache_dir(), Silent()))


def weights_of(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def make_container(weights: np.ndarray, types: Sequence[QType]) -> tuple[int, np.ndarray]:
    """(type of the tensor, its bytes), aligned as a mapped file is."""
    container = lay_out(weights.shape, types)
    qtype = choose_container(container)
    data = aligned(container_bytes(qtype, weights.shape))
    header = container.header()
    data[: len(header)] = np.frombuffer(header, np.uint8)
    for xid, (kind, offset) in enumerate(zip(types, container.offsets, strict=True)):
        blocks = encode_rows(weights[xid], kind).reshape(-1)
        data[offset : offset + len(blocks)] = blocks
    return int(qtype), data


def aligned(size: int) -> np.ndarray:
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


def stock_products(weights: np.ndarray, types: Sequence[QType], x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What the CPU backend gives for each pair on an ordinary stack of the type of its expert: [tokens, used, rows]."""
    out = np.full((*ids.shape, weights.shape[1]), np.nan, np.float32)
    for qtype in set(types):
        blocks = aligned(weights.size // N_COLS * row_bytes(qtype, weights.shape[2]))
        blocks[:] = encode_rows(weights.reshape(-1, weights.shape[2]), qtype).reshape(-1)
        with Experts("CPU", int(qtype), weights.shape, blocks) as stack:
            found = stack.multiply((x, ids))[0].values
        chosen = np.isin(ids, [xid for xid, kind in enumerate(types) if kind == qtype])
        out[chosen] = found[chosen]
    return out


def exact_products(weights: np.ndarray, types: Sequence[QType], x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """In float64, of the dequantised weights and of operands as they are: [tokens, used, rows]."""
    decoded = [
        dequantize(encode_rows(w, kind), kind).astype(np.float64) for w, kind in zip(weights, types, strict=True)
    ]
    wide = np.broadcast_to(x, (*ids.shape, x.shape[-1]))
    return np.array([[decoded[xid] @ wide[t, s] for s, xid in enumerate(row)] for t, row in enumerate(ids)])


def scale_of(weights: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(weights, axis=-1).mean() * np.linalg.norm(x, axis=-1).mean())


MIXES = {
    "two K-quants": [Q.Q2_K, Q.Q4_K] * 4,
    "one that is alone": [Q.Q3_K] * 7 + [Q.Q6_K],
    "all with blocks of 256": [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q2_K, Q.Q3_K, Q.Q4_K],
    "all with blocks of 32": [Q.Q4_0, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.IQ4_NL, Q.Q4_0, Q.Q8_0, Q.Q5_1],
    "floats": [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.F32, Q.F16, Q.BF16, Q.Q2_K],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n_tokens", [1, 2, 9, 64])
@pytest.mark.parametrize("broadcast", [True, False])
def test_each_pair_is_multiplied_with_its_expert(device: str, mix: str, n_tokens: int, broadcast: bool) -> None:
    types = MIXES[mix]
    weights = weights_of((len(types), 48, N_COLS))
    rng = np.random.default_rng(n_tokens)
    ids = np.array([rng.permutation(len(types))[:3] for _ in range(n_tokens)], np.int32)
    x = rng.standard_normal((n_tokens, 1 if broadcast else 3, N_COLS), dtype=np.float32)
    qtype, data = make_container(weights, types)
    with Experts(device, qtype, weights.shape, data) as stack:
        stack.set_threads(2)
        found = stack.multiply((x, ids))[0]
    assert found.supported
    assert found.status == SUCCESS
    error = np.abs(found.values - exact_products(weights, types, x, ids)).max() / scale_of(weights, x)
    assert error < TOLERANCE
    if "REPACK" not in device:
        # Tiles of many rows are summed up in another order than single rows.
        stock = stock_products(weights, types, x, ids)
        assert np.abs(found.values - stock).max() / scale_of(weights, x) < 1e-6


@pytest.mark.parametrize("qtype", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q6_K, Q.Q8_0, Q.Q4_0, Q.F16])
@pytest.mark.parametrize("n_tokens", [1, 5, 64])
def test_a_single_type_gives_the_bits_of_an_ordinary_stack(qtype: QType, n_tokens: int) -> None:
    types = [qtype] * 6
    weights = weights_of((6, 40, N_COLS))
    rng = np.random.default_rng(n_tokens)
    ids = np.array([rng.permutation(6)[:2] for _ in range(n_tokens)], np.int32)
    x = rng.standard_normal((n_tokens, 1, N_COLS), dtype=np.float32)
    kind, data = make_container(weights, types)
    with Experts("ALPHAQ", kind, weights.shape, data) as stack:
        found = stack.multiply((x, ids))[0].values
    assert np.array_equal(found, stock_products(weights, types, x, ids))


@pytest.mark.parametrize("n_tokens", [3, 40])
def test_views_are_read_where_they_are(n_tokens: int) -> None:
    types = MIXES["two K-quants"]
    weights = weights_of((8, 32, N_COLS))
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((n_tokens, 4, 2 * N_COLS), dtype=np.float32)
    x = wide[:, 1:3, N_COLS // 2 : N_COLS // 2 + N_COLS]
    ids = np.array([rng.permutation(8) for _ in range(n_tokens)], np.int32)[:, 2:4]
    assert not x.flags.c_contiguous
    assert not ids.flags.c_contiguous
    kind, data = make_container(weights, types)
    with Experts("ALPHAQ", kind, weights.shape, data) as stack:
        found = stack.multiply((x, ids))[0].values
    assert np.abs(found - exact_products(weights, types, x, ids)).max() / scale_of(weights, x) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
def test_several_products_in_one_graph(device: str) -> None:
    types = MIXES["all with blocks of 256"]
    weights = weights_of((8, 64, N_COLS))
    rng = np.random.default_rng(0)
    operands = []
    for n_tokens in (1, 33, 4, 70):
        ids = np.array([rng.permutation(8)[:2] for _ in range(n_tokens)], np.int32)
        operands.append((rng.standard_normal((n_tokens, 1, N_COLS), dtype=np.float32), ids))
    operands.append(operands[1])
    kind, data = make_container(weights, types)
    with Experts(device, kind, weights.shape, data) as stack:
        for n_threads in (1, 2, 1, 3):
            stack.set_threads(n_threads)
            for (x, ids), found in zip(operands, stack.multiply(*operands), strict=True):
                exact = exact_products(weights, types, x, ids)
                assert np.abs(found.values - exact).max() / scale_of(weights, x) < TOLERANCE


@pytest.mark.parametrize("n_tokens", [1, 3, 64])
def test_a_product_of_a_product_waits_for_it(n_tokens: int) -> None:
    types = MIXES["two K-quants"]
    weights = weights_of((8, 256, 256))
    rng = np.random.default_rng(n_tokens)
    ids = np.array([rng.permutation(8)[:2] for _ in range(n_tokens)], np.int32)
    x = rng.standard_normal((n_tokens, 1, 256), dtype=np.float32)
    kind, data = make_container(weights, types)
    with Experts("ALPHAQ", kind, weights.shape, data) as stack:
        found = stack.multiply_twice(x, ids)
        assert found.status == SUCCESS
        (first,) = stack.multiply((x, ids))
        (expected,) = stack.multiply((first.values, ids))
    assert np.isfinite(expected.values).all()
    assert np.array_equal(found.values, expected.values)


def test_a_container_with_room_to_spare_is_as_good() -> None:
    types = [Q.Q2_K, Q.Q8_0]
    weights = weights_of((2, 16, N_COLS))
    _, data = make_container(weights, types)
    roomy = aligned(container_bytes(Q.F32, weights.shape))
    roomy[: len(data)] = data
    roomy[len(data) :] = 0xFF
    x, ids = np.ones((1, 1, N_COLS), np.float32), np.array([[1, 0]], np.int32)
    with Experts("ALPHAQ", int(Q.F32), weights.shape, roomy) as stack:
        found = stack.multiply((x, ids))[0].values
    assert np.abs(found - exact_products(weights, types, x, ids)).max() / scale_of(weights, x) < TOLERANCE


def test_only_what_was_sent_here_is_taken() -> None:
    # llama.cpp asks every device, with an empty buffer, of every tensor of every model.
    weights = weights_of((4, 16, N_COLS))
    kind, data = make_container(weights, [Q.Q2_K, Q.Q4_K, Q.Q2_K, Q.Q4_K])
    x, ids = np.ones((1, 1, N_COLS), np.float32), np.array([[1, 0]], np.int32)
    with Experts("ALPHAQ", kind, weights.shape, data, usage=0) as stack:
        assert not stack.multiply((x, ids))[0].supported


@pytest.mark.parametrize("expert", [-1, 4, 2**30, -(2**31)])
@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_do_not_exist_are_refused(device: str, expert: int, capfd: pytest.CaptureFixture[str]) -> None:
    weights = weights_of((4, 16, N_COLS))
    kind, data = make_container(weights, [Q.Q2_K, Q.Q4_K, Q.Q2_K, Q.Q4_K])
    x, ids = np.ones((1, 1, N_COLS), np.float32), np.array([[1, expert]], np.int32)
    with Experts(device, kind, weights.shape, data) as stack:
        assert stack.multiply((x, ids))[0].status != SUCCESS
    assert f"alphaq: blk.0.ffn_up_exps.weight: expert {expert} is asked for of 4" in capfd.readouterr().err


def refused(data: np.ndarray, shape: tuple[int, int, int], kind: int, device: str = "ALPHAQ") -> bool:
    x, ids = np.ones((1, 1, shape[2]), np.float32), np.arange(shape[0], dtype=np.int32)[None]
    with Experts(device, kind, shape, data) as stack:
        found = stack.multiply((x, ids))[0]
    return found.status != SUCCESS and bool(np.isnan(found.values).all())


SMALL = (4, 8, 256)
SMALL_TYPES = [Q.Q2_K, Q.Q4_K, Q.Q2_K, Q.Q8_0]


@pytest.mark.parametrize("device", DEVICES)
def test_every_flipped_byte_of_the_table_is_noticed(device: str) -> None:
    kind, sound = make_container(weights_of(SMALL), SMALL_TYPES)
    assert not refused(sound, SMALL, kind, device)
    for i in range(header_bytes(4)):
        for flip in (0x01, 0x80, 0xFF):
            data = aligned(len(sound))
            data[:] = sound
            data[i] ^= flip
            assert refused(data, SMALL, kind, device), f"byte {i}"


def with_fields(sound: np.ndarray, changes: dict[int, tuple[str, int]]) -> np.ndarray:
    """A container with fields (position -> struct code, value) changed and a checksum that fits again."""
    data = aligned(len(sound))
    data[:] = sound
    for place, (code, value) in changes.items():
        size = struct.calcsize(code)
        data[place : place + size] = np.frombuffer(struct.pack(code, value), np.uint8)
    n_experts = struct.unpack_from("<I", data, 12)[0]
    head = bytearray(data[: min(header_bytes(n_experts), len(data))])
    head[32:36] = bytes(4)
    data[32:36] = np.frombuffer(struct.pack("<I", zlib.crc32(head)), np.uint8)
    return data


ENTRY = 40
FLAWS = {
    "newer version": ({8: ("<I", 2)}, "its version is 2, this plug-in reads 1"),
    "more experts": ({12: ("<I", 5)}, "another shape"),
    "no experts": ({12: ("<I", 0)}, "another shape"),
    "very many experts": ({12: ("<I", 2**32 - 1)}, "another shape"),
    "other rows": ({16: ("<I", 9)}, "another shape"),
    "other columns": ({20: ("<I", 512)}, "another shape"),
    "an end elsewhere": ({24: ("<Q", 64)}, "do not end where it says"),
    "an unknown type": ({ENTRY: ("<I", 4)}, "expert 0 has type 4, which experts cannot have"),
    "a type past all": ({ENTRY: ("<I", 2**32 - 1)}, "which experts cannot have"),
    "an expert in the table": ({ENTRY + 8: ("<Q", 32)}, "expert 0 lies outside"),
    "an expert past the end": ({ENTRY + 8: ("<Q", 2**20)}, "expert 0 lies outside"),
    "an offset that wraps around": ({ENTRY + 8: ("<Q", 2**64 - 32)}, "expert 0 lies outside"),
    "an unaligned group": ({ENTRY + 3 * 16 + 8: ("<Q", 1000)}, "expert 3 is not aligned"),
    "a gap": ({ENTRY + 2 * 16 + 8: ("<Q", 4096)}, "expert 2"),
    "experts of one type in one place": ({ENTRY + 2 * 16 + 8: ("<Q", 1280)}, "expert 2 does not follow"),
    "groups that overlap": ({ENTRY + 1 * 16 + 8: ("<Q", 2304)}, "experts overlap"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_with_a_sound_checksum_are_told(flaw: str, capfd: pytest.CaptureFixture[str]) -> None:
    kind, sound = make_container(weights_of(SMALL), SMALL_TYPES)
    changes, message = FLAWS[flaw]
    assert refused(with_fields(sound, changes), SMALL, kind)
    err = capfd.readouterr().err
    assert "alphaq: blk.0.ffn_up_exps.weight is no container that can be used:" in err
    assert message in err


def test_an_ordinary_stack_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    weights = weights_of(SMALL)
    data = aligned(container_bytes(Q.Q4_K, SMALL))
    data[:] = encode_rows(weights.reshape(-1, 256), Q.Q4_K).reshape(-1)
    assert refused(data, SMALL, int(Q.Q4_K))
    assert "keep ordinary tensors out of this buffer type" in capfd.readouterr().err


def test_python_and_the_plugin_know_the_same_types() -> None:
    shape = (2, 8, 256)
    weights = weights_of(shape)
    for qtype in PAYLOAD_TYPES:
        other = Q.Q8_0 if qtype != Q.Q8_0 else Q.Q4_0
        kind, data = make_container(weights, [qtype, other])
        assert not refused(data, shape, kind), qtype.name
