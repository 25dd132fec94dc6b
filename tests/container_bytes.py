"""Containers read and written by their documented bytes alone, and recipes that give every expert a type of its own."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from alphaq_gguf.checkpoint import Source
from alphaq_gguf.gguf_file import Field, TensorInfo, build_header, make_field, read_header
from alphaq_gguf.qtypes import QType, row_bytes
from alphaq_gguf.recipe import Recipe, RecipeUnit

# Weights and bytes of a block, by ggml's block structs.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "IQ4_NL": (32, 18),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
# Their numbers in ggml.h.
NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "BF16": 30,
}


@dataclass
class Table:
    """All fields of a header. An entry is [type number, reserved, offset]."""

    n_experts: int
    n_rows: int
    n_cols: int
    entries: list[list[int]]
    payload_end: int
    magic: bytes = b"ALPHAQEX"
    version: int = 1
    reserved: int = 0

    def size_of(self, xid: int) -> int:
        """Bytes of an expert."""
        name = next(name for name, number in NUMBERS.items() if number == self.entries[xid][0])
        weights, size = BLOCKS[name]
        return self.n_rows * self.n_cols // weights * size

    def pack(self) -> bytes:
        """Header and table with the checksum that belongs to them."""
        shape = (self.version, self.n_experts, self.n_rows, self.n_cols)
        table = b"".join(struct.pack("<IIQ", *entry) for entry in self.entries)
        before = self.magic + struct.pack("<4IQ", *shape, self.payload_end)
        checksum = zlib.crc32(before + bytes(4) + struct.pack("<I", self.reserved) + table)
        return before + struct.pack("<2I", checksum, self.reserved) + table


def unpack(data: bytes) -> Table:
    """The header at the start of a tensor's bytes, which must be whole."""
    magic, version, n_experts, n_rows, n_cols, payload_end, _, reserved = struct.unpack_from("<8s4IQ2I", data)
    entries = [list(struct.unpack_from("<IIQ", data, 40 + 16 * xid)) for xid in range(n_experts)]
    table = Table(n_experts, n_rows, n_cols, entries, payload_end, magic, version, reserved)
    assert table.pack() == data[: 40 + 16 * n_experts]
    return table


def assert_holds(data: bytes, blocks: list[bytes]) -> None:
    """The tensor's bytes are a header, the experts' blocks where it says, and zeros."""
    table = unpack(data)
    covered = np.zeros(len(data), bool)
    covered[: 40 + 16 * len(blocks)] = True
    for xid, expected in enumerate(blocks):
        start = table.entries[xid][2]
        assert data[start : start + len(expected)] == expected, xid
        assert not covered[start : start + len(expected)].any()
        covered[start : start + len(expected)] = True
    assert not np.frombuffer(data, np.uint8)[~covered].any()


def by_expert(recipe: Recipe, source: Source, types: Mapping[str, Sequence[QType]]) -> Recipe:
    """`recipe`, of any granularity, with these types for the experts of stacks, all other stacks as they were."""
    units = [unit for unit in recipe.units if unit.tensor not in types]
    for stack in source.stacks:
        for xid, qtype in enumerate(types.get(stack.name, ())):
            n_bytes = stack.n_rows * row_bytes(qtype, stack.n_cols)
            n_weights = stack.n_rows * stack.n_cols
            units.append(RecipeUnit(stack.name, stack.bid, stack.proj, n_weights, qtype, n_bytes, xid))
    return replace(recipe, units=tuple(units), granularity="expert")


def write_twin(file: Path, twin: Path) -> None:
    """A file with containers as one that llama.cpp runs alone: weights in F32, decoded with gguf's own functions."""
    header = read_header(file)
    architecture = make_field("general.architecture", header.fields["general.name"].vtype, "qwen2moe")
    fields = [field for key, field in header.fields.items() if not key.startswith("alphaq.container.")]
    fields = [architecture if field.key == "general.architecture" else field for field in fields]
    names = {number: name for name, number in NUMBERS.items()}
    infos, data = [], []
    for tensor in GGUFReader(file).tensors:
        info, raw = header.tensors[tensor.name], tensor.data.tobytes()
        if tensor.name in header.get("alphaq.container.tensors"):
            table, parts = unpack(raw), []
            for xid, (number, _, offset) in enumerate(table.entries):
                weights, size = BLOCKS[names[number]]
                rows = np.frombuffer(raw, np.uint8, table.size_of(xid), offset)
                rows = rows.reshape(table.n_rows, table.n_cols // weights * size)
                parts.append(dequantize(rows, GGMLQuantizationType(number)))
            values = np.stack(parts)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
        infos.append(TensorInfo(info.name, info.shape, QType.F32))
        data.append(values.astype(np.float32).tobytes())
    write_file(twin, fields, infos, data)


def write_file(path: Path, fields: list[Field], infos: list[TensorInfo], data: list[bytes]) -> None:
    head, placed, size = build_header(fields, infos)
    with path.open("wb") as file:
        file.write(head)
        for info, raw in zip(placed, data, strict=True):
            file.seek(len(head) + info.offset)
            file.write(raw)
        file.truncate(size)
