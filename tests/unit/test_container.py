"""Containers: experts of any types are laid out as documented, and nothing that is damaged is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ROOT
from container_bytes import BLOCKS, NUMBERS, Table, by_expert, unpack
from gguf import GGML_QUANT_SIZES, GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from small_sources import stack_name, write_source

from alphaq_gguf.container import (
    PAYLOAD_TYPES,
    Container,
    container_types,
    lay_out,
    parse_container,
    stack_type,
)
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.gguf_file import TensorInfo
from alphaq_gguf.pipeline import convert
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import Recipe

NAME = "blk.0.ffn_up_exps.weight"


@st.composite
def stacks(draw: st.DrawFn) -> tuple[tuple[int, int, int], list[QType]]:
    """A shape and types that its rows can take, at least two of them different."""
    n_cols = draw(st.sampled_from([32, 96, 256, 352, 1408, 2048]))
    fitting = [QType[name] for name, (weights, _) in BLOCKS.items() if n_cols % weights == 0]
    # Matrices of fewer rows are smaller than what their table takes.
    shape = draw(st.integers(2, 24)), draw(st.integers(64, 200)), n_cols
    types = draw(st.lists(st.sampled_from(fitting), min_size=shape[0], max_size=shape[0]))
    first, other = draw(st.permutations(fitting))[:2]
    types[0], types[draw(st.integers(1, shape[0] - 1))] = first, other
    return shape, types


@given(stacks())
def test_experts_lie_as_documented_in_the_smallest_type_that_holds_them(stack) -> None:
    shape, types = stack
    qtype, container = stack_type(shape, types)
    assert container is not None
    table = unpack(container.header())
    assert (table.n_experts, table.n_rows, table.n_cols) == shape
    assert (table.magic, table.version, table.reserved) == (b"ALPHAQEX", 1, 0)
    assert [entry[:2] for entry in table.entries] == [[NUMBERS[q.name], 0] for q in types]
    places = sorted((entry[2], entry[2] + table.size_of(xid), xid) for xid, entry in enumerate(table.entries))
    assert places[0][0] >= 40 + 16 * shape[0]
    assert places[-1][1] == table.payload_end
    for (_, end, a), (start, _, b) in pairwise(places):
        same = types[a] == types[b]
        assert start == end if same else (start % 32, 0 <= start - end < 32) == (0, True)
        assert not same or a < b
    # Equal types are together, so that they change no more often than there are types.
    changes = sum(types[a] != types[b] for (_, _, a), (_, _, b) in pairwise(places))
    assert changes == len(set(types)) - 1
    sizes = {q: shape[0] * shape[1] * shape[2] // w * s for q, (w, s) in GGML_QUANT_SIZES.items() if shape[2] % w == 0}
    offered = container_types(shape[2])
    assert qtype == min((q for q in offered if sizes[q] >= table.payload_end), key=lambda q: sizes[q])
    assert parse_container(container.header(), TensorInfo(NAME, shape, qtype), "here") == container


@given(stacks())
def test_experts_of_one_type_need_no_container(stack) -> None:
    shape, types = stack
    assert stack_type(shape, types[:1] * shape[0]) == (types[0], None)


def test_experts_may_have_any_type_that_is_encoded_and_no_other() -> None:
    assert {q.name for q in PAYLOAD_TYPES} == BLOCKS.keys() == NUMBERS.keys()
    with pytest.raises(ValueError, match="2 types for 3 experts"):
        lay_out((3, 8, 256), [QType.Q4_K] * 2)
    with pytest.raises(ValueError, match="multiple of 256"):
        lay_out((2, 8, 32), [QType.Q4_K, QType.Q8_0])
    with pytest.raises(ValueError, match="no GGUF type holds"):
        stack_type((2, 1, 1), [QType.F32, QType.F16])


SHAPE = (5, 64, 256)
TYPES = [QType.Q4_K, QType.Q2_K, QType.Q4_K, QType.Q6_K, QType.Q2_K]
INFO = TensorInfo(NAME, SHAPE, QType.Q8_0)


def table() -> Table:
    """Q2_K of experts 1 and 4 from byte 128, Q4_K of 0 and 2 from 10880, Q6_K of 3 from 29312."""
    found = unpack(lay_out(SHAPE, TYPES).header())
    assert [entry[2] for entry in found.entries] == [10880, 128, 20096, 29312, 5504]
    return found


def parsed(data: bytes, info: TensorInfo = INFO) -> Container:
    return parse_container(data, info, "some.gguf")


@pytest.mark.parametrize("damage", [0x01, 0x80, 0xFF])
def test_a_byte_that_changed_is_noticed(damage: int) -> None:
    good = table().pack()
    assert parsed(good).types == tuple(TYPES)
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= damage
        with pytest.raises(AlphaQError, match=f"^some.gguf: {NAME}: "):
            parsed(bytes(data))


@pytest.mark.parametrize("length", [0, 1, 39, 40, 119])
def test_a_table_that_is_cut_off_is_noticed(length: int) -> None:
    with pytest.raises(AlphaQError, match="damaged container"):
        parsed(table().pack()[:length])


def moved(xid: int, offset: int) -> Callable[[Table], None]:
    def change(found: Table) -> None:
        found.entries[xid][2] = offset

    return change


def retyped(xid: int, number: int, reserved: int = 0) -> Callable[[Table], None]:
    def change(found: Table) -> None:
        found.entries[xid][:2] = [number, reserved]

    return change


def swapped(found: Table) -> None:
    found.entries[0][2], found.entries[2][2] = found.entries[2][2], found.entries[0][2]


def wide(found: Table) -> None:
    """A gap of the alignment between experts of one type, all behind it moved with them."""
    for xid in (2, 3):
        found.entries[xid][2] += 32
    found.payload_end += 32


def outside(found: Table) -> None:
    """The last expert behind the tensor's end, as the header says it is."""
    found.entries[3][2] = 2**40
    found.payload_end = 2**40 + found.size_of(3)


def set_to(**fields) -> Callable[[Table], None]:
    return lambda found: vars(found).update(fields)


FLAWS: dict[str, tuple[Callable[[Table], None], str]] = {
    "overlap of types": (moved(3, 10880), "experts end at byte 29312, the header says"),
    "overlap inside": (moved(3, 20096), "experts end at byte"),
    "the same place": (moved(4, 128), "experts 1 and 4 overlap"),
    "partial overlap": (moved(4, 5504 - 84), "experts 1 and 4 overlap"),
    "in the table": (moved(1, 96), "experts reach from byte 96"),
    "at zero": (moved(1, 0), "experts reach from byte 0"),
    "behind the tensor": (outside, "of 87040"),
    "offset near 2**64": (moved(3, 2**64 - 1), "of 87040"),
    "end that wraps around": (moved(3, 2**64 - 64 * 210), "of 87040"),
    "unaligned": (moved(1, 127), "unaligned"),
    "order of experts": (swapped, "do not follow each other"),
    "gap between experts": (wide, "do not follow each other"),
    "end too early": (set_to(payload_end=100), "the header says 100"),
    "end too late": (set_to(payload_end=2**64 - 1), "the header says"),
    "type of no use": (retyped(0, 16), "expert 0 has type 16, which experts cannot have"),
    "type that does not exist": (retyped(0, 2**32 - 1), "expert 0 has type 4294967295"),
    "type of another size": (retyped(0, 8), ""),
    "reserved part of an entry": (retyped(0, 12, reserved=1), "expert 0"),
    "reserved part of the header": (set_to(reserved=1), "a reserved field is not zero"),
    "magic": (set_to(magic=b"ALPHAQEY"), "does not start with a container's magic"),
    "more experts": (set_to(n_experts=6), r"made for shape \[6, 64, 256\]"),
    "very many experts": (set_to(n_experts=2**32 - 1), "made for shape"),
    "no experts": (set_to(n_experts=0), "made for shape"),
    "rows": (set_to(n_rows=32), "made for shape"),
    "columns": (set_to(n_cols=512), "made for shape"),
    "newer": (set_to(version=2), r"container of version 2, this version reads 1 \(update alphaq-gguf\)"),
    "version zero": (set_to(version=0), r"container of version 0, this version reads 1 \(convert"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_table_that_makes_no_sense_is_refused_whatever_its_checksum(flaw: str) -> None:
    change, cause = FLAWS[flaw]
    found = table()
    change(found)
    with pytest.raises(AlphaQError, match=f"^some.gguf: {NAME}: .*{cause}"):
        parsed(found.pack())


def test_a_container_belongs_to_its_tensor() -> None:
    data = table().pack()
    for info, cause in (
        (replace(INFO, qtype=QType.Q2_K), "of 26880"),
        (replace(INFO, shape=(5, 256, 64), qtype=QType.Q4_0), "made for shape"),
        (replace(INFO, shape=(320, 256)), r"found shape \[320, 256\]"),
        (replace(INFO, shape=(5, 0, 256)), "made for shape"),
    ):
        with pytest.raises(AlphaQError, match=cause):
            parsed(data, info)
    narrow = Table(2, 4, 96, [[12, 0, 96], [8, 0, 96]], 504)
    with pytest.raises(AlphaQError, match="rows of 96 do not divide into Q4_K blocks"):
        parsed(narrow.pack(), TensorInfo(NAME, (2, 4, 96), QType.F32))


def test_a_table_larger_than_its_tensor_is_refused() -> None:
    many = Table(1000, 1, 8, [[1, 0, 0]] * 1000, 0)
    with pytest.raises(AlphaQError, match="its table takes 16040 bytes, the tensor has 8000"):
        parsed(many.pack(), TensorInfo(NAME, (1000, 1, 8), QType.I8))


def listed_bytes(listing: str) -> bytes:
    """The bytes of `hexdump -C` without its column of text."""
    data = bytearray()
    for line in listing.strip().splitlines():
        if line == "*":
            continue
        at, *values = line.split()
        last = bytes(data[-16:])
        while len(data) < int(at, 16):
            data += last
        data += bytes.fromhex("".join(values))
    return bytes(data)


def test_the_example_in_the_documentation_is_what_is_written(tmp_path: Path) -> None:
    text = (ROOT / "docs/container.md").read_text(encoding="utf-8")
    listing = text[text.index("## Example") :].split("```")[1].removeprefix("text")
    name = stack_name("down")
    source = write_source(tmp_path / "in.gguf", {name: np.repeat([1, -2], 128).reshape(2, 4, 32).astype(np.float32)})
    base = Recipe("a tool", source.fingerprint, "testmoe", {}, {}, ())
    convert(source, by_expert(base, source, {name: [QType.Q8_0, QType.Q4_0]}), tmp_path / "out.gguf")
    (tensor,) = GGUFReader(tmp_path / "out.gguf").tensors
    assert tensor.tensor_type == QType.F16
    assert tensor.data.tobytes() == listed_bytes(listing)
