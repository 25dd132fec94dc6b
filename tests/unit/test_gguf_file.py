"""Our GGUF headers against the `gguf` package in both directions, and against damage of every kind."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_sources import gaussian, write_gguf

from alphaq_gguf.errors import SourceError
from alphaq_gguf.gguf_file import Field, TensorInfo, build_header, make_field, read_header
from alphaq_gguf.qtypes import QType

V = GGUFValueType

SCALARS = [
    ("t.u8", V.UINT8, 255),
    ("t.i8", V.INT8, -128),
    ("t.u16", V.UINT16, 65535),
    ("t.i16", V.INT16, -32768),
    ("t.u32", V.UINT32, 2**32 - 1),
    ("t.i32", V.INT32, -(2**31)),
    ("t.u64", V.UINT64, 2**64 - 1),
    ("t.i64", V.INT64, -(2**63)),
    ("t.f32", V.FLOAT32, 0.15625),
    ("t.f64", V.FLOAT64, 0.1),
    ("t.bool", V.BOOL, True),
    ("t.string", V.STRING, "naïve 東京 \U0001f600"),
    ("t.empty", V.STRING, ""),
]
ARRAYS = [
    ("a.u8", V.UINT8, [0, 255]),
    ("a.i16", V.INT16, [-1, 2, 3]),
    ("a.u32", V.UINT32, [2**32 - 1]),
    ("a.i32", V.INT32, [-5, 5]),
    ("a.u64", V.UINT64, [2**64 - 1, 0]),
    ("a.f32", V.FLOAT32, [0.5, -2.25]),
    ("a.f64", V.FLOAT64, [0.1, 0.2]),
    ("a.bool", V.BOOL, [True, False, True]),
    ("a.string", V.STRING, ["", "ä", "<|im_end|>"]),
]


def write_file(path: Path, fields, tensors, alignment: int = GGUF_DEFAULT_ALIGNMENT) -> Path:
    """A complete file from our own header and zero data."""
    header, _, size = build_header(fields, tensors, alignment)
    path.write_bytes(header + bytes(size - len(header)))
    return path


def test_the_gguf_package_reads_every_value_type_we_write(tmp_path):
    fields = [make_field("general.architecture", V.STRING, "test")]
    fields += [make_field(*entry) for entry in SCALARS]
    fields += [make_field(key, V.ARRAY, values, item) for key, item, values in ARRAYS]
    reader = GGUFReader(write_file(tmp_path / "all.gguf", fields, []))
    for key, vtype, value in SCALARS:
        found = reader.get_field(key)
        assert found is not None
        assert found.types == [vtype]
        assert found.contents() == value
    for key, item, values in ARRAYS:
        found = reader.get_field(key)
        assert found is not None
        assert found.types[:2] == [V.ARRAY, item]
        assert list(found.contents()) == values


def test_our_parser_reads_every_value_type_the_gguf_package_writes(tmp_path):
    writer = GGUFWriter(tmp_path / "theirs.gguf", "test")
    for key, vtype, value in SCALARS:
        if key != "t.empty":  # the writer refuses empty strings
            writer.add_key_value(key, value, vtype)
    for key, item, values in ARRAYS:
        writer.add_key_value(key, values, V.ARRAY, item)
    writer.add_tensor("x", np.zeros((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "theirs.gguf")
    for key, vtype, value in SCALARS:
        if key != "t.empty":
            assert header.fields[key].vtype == vtype
            assert header.get(key) == value
    for key, _, values in ARRAYS:
        assert header.get(key) == values
    assert header.get("general.architecture") == "test"
    assert header.get("no.such.key", 7) == 7


def test_nested_and_empty_arrays_survive_a_round_trip(tmp_path):
    fields = [
        make_field("n.nested", V.ARRAY, [[1, 2], [3]]),
        make_field("n.strings", V.ARRAY, [["a"], ["b", "c"]]),
        make_field("n.deep", V.ARRAY, [[[1.5]]]),
        make_field("n.empty", V.ARRAY, [], V.STRING),
        make_field("n.empty-default", V.ARRAY, []),
    ]
    header = read_header(write_file(tmp_path / "nested.gguf", fields, []))
    assert [header.get(f.key) for f in fields] == [[[1, 2], [3]], [["a"], ["b", "c"]], [[[1.5]]], [], []]
    assert list(header.fields.values()) == fields


def test_the_gguf_package_accepts_an_empty_array_beside_other_keys(tmp_path):
    fields = [make_field("a", V.ARRAY, [], V.STRING), make_field("b", V.UINT32, 9)]
    reader = GGUFReader(write_file(tmp_path / "empty.gguf", fields, []))
    found = reader.get_field("b")
    assert found is not None
    assert found.contents() == 9


def test_copied_fields_rebuild_the_same_bytes(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"x": gaussian(4, 32), "y.bias": gaussian(5)}, general__name="größe")
    header = read_header(path)
    copied = [Field(f.key, f.vtype, f.raw) for f in header.fields.values()]
    rebuilt, placed, size = build_header(copied, list(header.tensors.values()), header.alignment)
    assert rebuilt == path.read_bytes()[: header.data_offset]
    assert placed == list(header.tensors.values())
    assert size == path.stat().st_size


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_shapes_types_and_offsets_are_those_the_gguf_package_finds(tmp_path, alignment):
    fields = [make_field("general.alignment", V.UINT32, alignment)]
    tensors = [
        TensorInfo("scalars", (3,), QType.F32),
        TensorInfo("matrix", (5, 64), QType.Q8_0),
        TensorInfo("stack", (2, 3, 256), QType.Q3_K),
        TensorInfo("four", (2, 1, 3, 4), QType.F16),
        TensorInfo("größe", (7,), QType.BF16),
    ]
    path = write_file(tmp_path / "t.gguf", fields, tensors, alignment)
    header, reader = read_header(path), GGUFReader(path)
    assert header.alignment == alignment
    assert header.data_offset % alignment == 0
    for mine, theirs in zip(header.tensors.values(), reader.tensors, strict=True):
        assert mine.name == theirs.name
        assert mine.shape == tuple(reversed(theirs.shape.tolist()))
        assert mine.qtype == theirs.tensor_type
        assert mine.n_bytes == theirs.n_bytes
        assert mine.n_weights == theirs.n_elements
        assert mine.offset % alignment == 0
        assert header.data_offset + mine.offset == theirs.data_offset
    assert [t.n_rows for t in header.tensors.values()] == [1, 5, 6, 6, 1]
    assert [t.n_cols for t in header.tensors.values()] == [3, 64, 256, 4, 7]


def test_headers_by_the_gguf_writer_are_parsed_equal(tmp_path):
    writer = GGUFWriter(tmp_path / "w.gguf", "test")
    writer.add_custom_alignment(64)
    writer.add_tensor("a.weight", gaussian(2, 3, 32))
    writer.add_tensor("b.weight", np.zeros((4, 34), np.uint8), raw_dtype=QType.Q8_0)
    writer.add_tensor("c", np.arange(6, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "w.gguf")
    assert header.alignment == 64
    assert [(t.name, t.shape, t.qtype) for t in header.tensors.values()] == [
        ("a.weight", (2, 3, 32), QType.F32),
        ("b.weight", (4, 32), QType.Q8_0),
        ("c", (6,), QType.F16),
    ]
    assert [header.data_offset + t.offset for t in header.tensors.values()] == [
        t.data_offset for t in GGUFReader(tmp_path / "w.gguf").tensors
    ]


# A minimal file by hand, so that damage hits known places.


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def raw_file(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: int = 0,
    order: str = "<",
) -> bytes:
    head = magic + struct.pack(order + "IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


ARCH = string("general.architecture") + struct.pack("<I", V.STRING) + string("test")


def entry(name: str = "x", dims: tuple[int, ...] = (32,), qtype: int = QType.F32, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, qtype, offset)


def number(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", V.UINT32, value)


def test_the_hand_written_file_is_valid(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(raw_file(keys=(ARCH,), tensors=(entry(),), data=128))
    assert read_header(path).tensors["x"] == TensorInfo("x", (32,), QType.F32)


DAMAGE = {
    "wrong magic": (raw_file(magic=b"GGML", keys=(ARCH,)), "magic"),
    "version 1": (raw_file(version=1, keys=(ARCH,)), "version 1 "),
    "version 4": (raw_file(version=4, keys=(ARCH,)), "version 4 "),
    "big-endian": (raw_file(order=">"), "big-endian"),
    "key twice": (raw_file(keys=(ARCH, ARCH)), "general.architecture appears twice"),
    "tensor twice": (raw_file(tensors=(entry(), entry()), data=128), "x appears twice"),
    "unknown value type": (raw_file(keys=(string("k") + struct.pack("<I", 99) + bytes(8),)), "value type 99"),
    "unknown item type": (raw_file(keys=(string("k") + struct.pack("<IIQ", V.ARRAY, 77, 0),)), "value type 77"),
    "unknown tensor type": (raw_file(tensors=(entry(qtype=4),), data=128), "unknown type 4"),
    "five dimensions": (raw_file(tensors=(entry(dims=(1,) * 5),), data=128), "5 dimensions"),
    "broken blocks": (raw_file(tensors=(entry(dims=(33,), qtype=QType.Q8_0),), data=128), "33 .*Q8_0"),
    "alignment zero": (raw_file(keys=(number("general.alignment", 0),)), "alignment is 0"),
    "alignment odd": (raw_file(keys=(number("general.alignment", 24),)), "alignment is 24"),
    "alignment text": (
        raw_file(keys=(string("general.alignment") + struct.pack("<I", V.STRING) + string("32"),)),
        "alignment is 32",
    ),
    "data cut": (raw_file(tensors=(entry(),), data=127), "truncated: tensor x ends at byte"),
    "offset far away": (raw_file(tensors=(entry(offset=2**40),), data=128), "truncated: tensor x"),
    "huge dimension": (raw_file(tensors=(entry(dims=(2**63, 2**63)),), data=128), "truncated: tensor x"),
    "huge string": (raw_file(keys=(struct.pack("<Q", 2**64 - 1) + b"k",)), "too early"),
    "huge array": (raw_file(keys=(string("k") + struct.pack("<IIQ", V.ARRAY, V.UINT64, 2**64 - 1),)), "too early"),
    "huge string array": (
        raw_file(keys=(string("k") + struct.pack("<IIQ", V.ARRAY, V.STRING, 2**64 - 1),)),
        "too early",
    ),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1) + bytes(64), "twice|too early"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0) + bytes(64), "twice|too early"),
    "key not utf-8": (raw_file(keys=(struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", V.UINT32, 1),)), "utf-8"),
    "empty": (b"", "0 bytes"),
    "text": (b"not a model, just a text file\n", "magic"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_with_its_cause(tmp_path, kind):
    data, cause = DAMAGE[kind]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=cause) as refused:
        read_header(path)
    assert str(path) in refused.value.message


def test_arrays_nested_too_deep_are_refused(tmp_path):
    path = tmp_path / "deep.gguf"
    nest = struct.pack("<IQ", V.ARRAY, 1) * 5000 + struct.pack("<IQ", V.UINT8, 0)
    path.write_bytes(raw_file(keys=(string("k") + struct.pack("<I", V.ARRAY) + nest,)))
    with pytest.raises(SourceError, match=r"deep|nested"):
        read_header(path)


def test_a_text_value_that_is_not_utf8_is_refused_or_read_but_never_crashes(tmp_path):
    path = tmp_path / "latin1.gguf"
    path.write_bytes(raw_file(keys=(ARCH.replace(b"test", b"t\xe9st"),)))
    try:
        value = read_header(path).get("general.architecture")
    except SourceError:
        return
    assert isinstance(value, str)


@pytest.mark.parametrize("target", ["missing", "directory"])
def test_what_cannot_be_opened_is_a_source_error(tmp_path, target):
    path = tmp_path if target == "directory" else tmp_path / "missing.gguf"
    with pytest.raises(SourceError, match=r"cannot be read|bytes"):
        read_header(path)


def small_file() -> bytes:
    """A valid file with keys of several kinds, whose last tensor ends 24 bytes before the end of its padding."""
    nested = string("n") + struct.pack("<IIQ", V.ARRAY, V.ARRAY, 2) + struct.pack("<IQBIQ", V.UINT8, 1, 7, V.UINT8, 0)
    words = string("w") + struct.pack("<IIQ", V.ARRAY, V.STRING, 2) + string("a") + string("bc")
    tensors = (entry("x", (2, 3)), entry("y", (2,), offset=32))
    return raw_file(keys=(ARCH, words, nested, number("general.alignment", 32)), tensors=tensors, data=64)


LAST_WEIGHT = len(small_file()) - 24


def test_every_truncation_is_refused_unless_only_padding_is_lost(tmp_path):
    whole = small_file()
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length < LAST_WEIGHT:
            with pytest.raises(SourceError):
                read_header(path)
        else:
            assert list(read_header(path).tensors) == ["x", "y"]


@given(st.lists(st.tuples(st.integers(0, len(small_file()) - 1), st.integers(1, 255)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_raise_anything_but_a_source_error(tmp_path, flips):
    data = bytearray(small_file())
    for at, change in flips:
        data[at] ^= change
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except SourceError:
        return
    for info in header.tensors.values():
        assert header.data_offset + info.offset + info.n_bytes <= len(data)
    for field in header.fields.values():
        assert isinstance(field.value, int | float | str | list)
