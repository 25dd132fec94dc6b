"""The GGUF container: parse a header without touching tensor data, build one byte for byte.

Layout (ggml's docs/gguf.md, version 3, little-endian): magic, version, tensor count, key count;
key-value pairs; tensor infos; padding to `general.alignment`; tensor data, each tensor aligned.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGUFValueType

from .errors import SourceError
from .qtypes import QType, block_size, row_bytes

MAGIC = b"GGUF"

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Field:
    """One metadata pair; `raw` is the value as stored (type id left out), so it can be copied unchanged."""

    key: str
    vtype: GGUFValueType
    raw: bytes

    @cached_property
    def value(self) -> Any:
        """The value as int, float, bool, str or (nested) list of these."""
        return _Cursor(memoryview(self.raw), self.key).value(self.vtype)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry: `shape` in torch order (slowest first), `offset` relative to the data section."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    offset: int = 0

    @property
    def n_cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows of `n_cols` weights, all leading dimensions together."""
        return math.prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_rows * row_bytes(self.qtype, self.n_cols)


@dataclass(frozen=True)
class Header:
    """A parsed header. `data_offset` is the file position of the first tensor."""

    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_offset: int

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default` when the key is absent."""
        found = self.fields.get(key)
        return default if found is None else found.value


class FormatError(ValueError):
    """The bytes are not a well-formed GGUF header."""


class _Cursor:
    """Reads little-endian values in sequence, refusing to run past the end."""

    def __init__(self, data: memoryview, where: str) -> None:
        self.data = data
        self.at = 0
        self.where = where

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise FormatError(f"{self.where} ends {count - (len(self.data) - self.at)} bytes too early")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def scalar(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def vtype(self) -> GGUFValueType:
        number = self.scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise FormatError(f"unknown metadata value type {number}") from None

    def string(self) -> str:
        return bytes(self.take(self.scalar("<Q"))).decode("utf-8")

    def text(self) -> str:
        return bytes(self.take(self.scalar("<Q"))).decode("utf-8", "replace")

    def value(self, vtype: GGUFValueType) -> Any:
        if vtype == GGUFValueType.STRING:
            return self.text()
        if vtype == GGUFValueType.ARRAY:
            item, count = self.vtype(), self.scalar("<Q")
            if item in _SCALARS:
                fmt = _SCALARS[item]
                piece = self.take(count * struct.calcsize(fmt))
                return list(struct.unpack(f"<{count}{fmt[1]}", piece))
            return [self.value(item) for _ in range(count)]
        return self.scalar(_SCALARS[vtype])

    def _skip_strings(self, count: int) -> None:
        # Vocabularies are hundreds of thousands of them, the most of a header.
        data, at, end, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                at += 8
                break
            at += 8 + length(data, at)[0]
        self.take(at - self.at)

    def skip(self, vtype: GGUFValueType, depth: int = 0) -> None:
        if depth > 8:
            raise FormatError("arrays nested deeper than 8")
        if vtype == GGUFValueType.STRING:
            self.take(self.scalar("<Q"))
        elif vtype == GGUFValueType.ARRAY:
            item, count = self.vtype(), self.scalar("<Q")
            if item in _SCALARS:
                self.take(count * struct.calcsize(_SCALARS[item]))
            elif item == GGUFValueType.STRING:
                self._skip_strings(count)
            else:
                for _ in range(count):
                    self.skip(item, depth + 1)
        else:
            self.take(struct.calcsize(_SCALARS[vtype]))


def _begin(data: memoryview) -> tuple[_Cursor, int, int]:
    """A cursor at the first metadata pair of a file, and how many tensors and pairs the file has."""
    cur = _Cursor(data, "the header")
    if bytes(data[:4]) != MAGIC:
        raise FormatError("the file does not start with the GGUF magic")
    cur.take(4)
    version = cur.scalar("<I")
    if version & 0xFFFF == 0:
        raise FormatError("the file is big-endian, only little-endian GGUF is supported")
    if version not in (2, 3):
        raise FormatError(f"GGUF version {version} is not supported, only 2 and 3 are")
    return cur, cur.scalar("<Q"), cur.scalar("<Q")


def parse_header(data: memoryview) -> Header:
    """Parse the header at the start of `data`; FormatError says what is wrong with the bytes."""
    cur, n_tensors, n_fields = _begin(data)
    fields: dict[str, Field] = {}
    for _ in range(n_fields):
        key, vtype = cur.string(), cur.vtype()
        start = cur.at
        cur.skip(vtype)
        if key in fields:
            raise FormatError(f"metadata key {key} appears twice")
        fields[key] = Field(key, vtype, bytes(data[start : cur.at]))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name, n_dims = cur.string(), cur.scalar("<I")
        if not 0 <= n_dims <= 4:
            raise FormatError(f"tensor {name} has {n_dims} dimensions, at most 4 are allowed")
        dims = [cur.scalar("<Q") for _ in range(n_dims)]
        number, offset = cur.scalar("<I"), cur.scalar("<Q")
        try:
            qtype = QType(number)
        except ValueError:
            raise FormatError(f"tensor {name} has unknown type {number}") from None
        info = TensorInfo(name, tuple(reversed(dims)), qtype, offset)
        if info.n_cols % block_size(qtype):
            raise FormatError(f"tensor {name}: rows of {info.n_cols} do not divide into {qtype.name} blocks")
        if name in tensors:
            raise FormatError(f"tensor {name} appears twice")
        tensors[name] = info
    alignment = fields["general.alignment"].value if "general.alignment" in fields else GGUF_DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise FormatError(f"general.alignment is {alignment}, not a power of two")
    return Header(fields, tensors, alignment, align(cur.at, alignment))


def read_header(path: Path) -> Header:
    """Parse the header of the file at `path` and check that all tensor data lies inside the file.

    Raises SourceError for anything that is not a complete little-endian GGUF file.
    """
    try:
        size = path.stat().st_size
        if size < 24:
            raise FormatError(f"the file has {size} bytes, too few for a header")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                header = parse_header(view)
            finally:
                view.release()
    except (FormatError, UnicodeDecodeError, struct.error) as error:
        raise SourceError(f"{path}: not a readable GGUF file: {error}", "download or create it again") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    for info in header.tensors.values():
        end = header.data_offset + info.offset + info.n_bytes
        if end > size:
            raise SourceError(
                f"{path}: truncated: tensor {info.name} ends at byte {end}, the file has {size}",
                "download or create it again",
            )
    return header


def read_field(path: Path, key: str) -> Any:
    """A metadata value of the file at `path`, None where it has none, read no further than there.

    OSError where the file cannot be read, FormatError where it is no GGUF.
    """
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise FormatError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            cur, _, n_fields = _begin(view)
            for _ in range(n_fields):
                found, vtype = cur.string(), cur.vtype()
                if found == key:
                    return cur.value(vtype)
                cur.skip(vtype)
    return None


def align(offset: int, alignment: int) -> int:
    """The next multiple of `alignment` at or after `offset`."""
    return -(-offset // alignment) * alignment


def make_field(key: str, vtype: GGUFValueType, value: Any, item: GGUFValueType | None = None) -> Field:
    """Encode `value`; arrays take their items' type from `item`, or from the first item when omitted."""
    return Field(key, vtype, _encode(vtype, value, item))


def _encode(vtype: GGUFValueType, value: Any, item: GGUFValueType | None = None) -> bytes:
    if vtype == GGUFValueType.STRING:
        text = value.encode("utf-8") if isinstance(value, str) else bytes(value)
        return struct.pack("<Q", len(text)) + text
    if vtype == GGUFValueType.ARRAY:
        if item is None:
            item = GGUFValueType.get_type(value[0]) if len(value) else GGUFValueType.INT32
        head = struct.pack("<IQ", item, len(value))
        if item in _SCALARS:
            return head + struct.pack(f"<{len(value)}{_SCALARS[item][1]}", *value)
        return head + b"".join(_encode(item, entry) for entry in value)
    return struct.pack(_SCALARS[vtype], value)


def build_header(
    fields: Iterable[Field], tensors: Sequence[TensorInfo], alignment: int = GGUF_DEFAULT_ALIGNMENT
) -> tuple[bytes, list[TensorInfo], int]:
    """Lay out a file: its header bytes (padded to the data section), the tensors with offsets, its size in bytes.

    Sizes follow from shapes and types alone, so the header is final before any data exists.
    """
    fields = list(fields)
    placed: list[TensorInfo] = []
    offset = 0
    for info in tensors:
        placed.append(TensorInfo(info.name, info.shape, info.qtype, offset))
        offset = align(offset + info.n_bytes, alignment)
    parts = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(placed), len(fields))]
    for field in fields:
        parts += [_encode(GGUFValueType.STRING, field.key), struct.pack("<I", field.vtype), field.raw]
    for info in placed:
        parts += [
            _encode(GGUFValueType.STRING, info.name),
            struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape)),
            struct.pack("<IQ", info.qtype, info.offset),
        ]
    head = b"".join(parts)
    head += b"\0" * (align(len(head), alignment) - len(head))
    return head, placed, len(head) + offset
